"""Programs are compiled once a file."""

from tests.compiled_once import compiled_once

__all__ = ["compiled_once"]
