"""The README runs as it stands: every Python block, in order, in one namespace."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs_in_order(capsys):
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "DELETION CERTIFICATE" in printed
    assert "no check failed" in printed


def test_every_claim_names_a_script_that_exists_and_every_script_is_named():
    named = set(re.findall(r"`(\w+\.py)` \|", README))
    present = {path.name for path in (ROOT / "benchmarks" / "claims").glob("*.py")}
    assert named == present


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"(?:\(|`)((?:docs|notebooks|benchmarks)/[\w./]+)(?:\)|`)", README):
        assert (ROOT / name).exists(), name
