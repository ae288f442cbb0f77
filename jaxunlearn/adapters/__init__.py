"""Flax adapters, loaded when first used: `adapters.nnx`, `adapters.linen`."""

import importlib
from types import ModuleType

from jaxunlearn import errors

__all__ = ["linen", "nnx"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "flax":
            raise
        raise errors.MissingExtraError(
            f"adapters.{name} needs Flax: pip install 'jaxunlearn[flax]'"
        ) from error
