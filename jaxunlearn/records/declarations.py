"""What a factory declares before any request, kept in the record so that it cannot be changed."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jaxunlearn import errors


def declare(**settings: Any) -> UInt8[Array, "32"]:
    """SHA-256 of numbers, words, dataclasses and tuples of them; of a function, that there is one.

    What is spent is counted in parts of one budget at one noise: a state that is taken to another
    factory would be charged by figures that were chosen after the request.

    >>> bool(jnp.all(declare(l2=1, names=("a", None)) == declare(names=("a", None), l2=1.0)))
    True
    >>> bool(jnp.all(declare(l2=1.0) == declare(l2=0.5)))
    False
    """
    text = json.dumps(_plain(settings), sort_keys=True)
    return jnp.array(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))


def check_declaration(found: UInt8[Array, "32"], expected: UInt8[Array, "32"], method: str) -> None:
    """Refuse a state whose budget, noise or constants were declared otherwise.

    Raises:
      WrongStateError: the digests differ.
    """
    if not np.array_equal(jax.device_get(found), jax.device_get(expected)):
        raise errors.WrongStateError(
            f"Expected a state that this unlearners.{method} made, got one whose budget, noise, "
            "regularisation or constants were declared otherwise. They are fixed by init: use the "
            "factory with the same arguments, or train again."
        )


def _plain(value):
    """The same as JSON, every number as the bits of a float64."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str):
        return value
    return "function" if callable(value) else float(value).hex()
