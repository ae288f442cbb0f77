"""The adapters load Flax when they are first used, and say so when it is not there."""

import builtins
import subprocess
import sys

import pytest

from jaxunlearn import adapters, errors


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_without_flax_the_message_names_the_extra(name, monkeypatch):
    imported = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == "flax":
            raise ModuleNotFoundError(module, name=module)
        return imported(module, *args, **kwargs)

    monkeypatch.delitem(sys.modules, f"jaxunlearn.adapters.{name}", raising=False)
    monkeypatch.delattr(adapters, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'jaxunlearn\[flax\]'"):
        getattr(adapters, name)


def test_there_are_no_other_adapters():
    with pytest.raises(AttributeError, match="keras"):
        _ = adapters.keras


def test_the_library_does_not_load_flax_by_itself():
    script = "import jaxunlearn.adapters, sys; print('flax' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
