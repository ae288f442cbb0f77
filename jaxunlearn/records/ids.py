"""Example ids, checked on the host before array work: JAX would clamp, wrap or drop bad ones."""

import operator
from typing import Any

import numpy as np

from jaxunlearn import errors

_SHOWN = 5


def validate_ids(ids: Any, num_examples: int) -> tuple[np.ndarray, int]:
    """A deletion request as sorted unique int32 ids, and how many duplicates it held.

    Args:
      ids: one integer, or any one-dimensional collection of integers (list, set, range, array).
      num_examples: ids are dense in 0..num_examples-1.

    Raises:
      IdTypeError: a bool, a float (3.0 too), NaN, text, None, or more than one axis.
      IdRangeError: negative, or not below num_examples; 2**32 + 5 never becomes 5.

    >>> validate_ids([3, 1, 3], num_examples=4)
    (array([1, 3], dtype=int32), 1)
    """
    values = _as_integers(ids)
    if values.size == 0:
        return np.zeros((0,), np.int32), 0
    negative = values[values < 0]
    if negative.size:
        raise errors.IdRangeError(
            f"Expected ids in 0..{num_examples - 1}, got negative {_show(negative)}. "
            "-1 is padding, never an example."
        )
    beyond = values[values >= num_examples]
    if beyond.size:
        raise errors.IdRangeError(
            f"Expected ids in 0..{num_examples - 1}, got {_show(beyond)}. "
            f"num_examples={num_examples} was given to the unlearner."
        )
    unique = np.unique(values.astype(np.int32))
    return unique, int(values.size - unique.size)


def bucket(ids: np.ndarray) -> np.ndarray:
    """Ids padded with -1 to the next power of two, so that one trace serves a bucket.

    >>> bucket(np.array([4, 7, 9], np.int32))
    array([ 4,  7,  9, -1], dtype=int32)
    """
    size = 1 << max(0, len(ids) - 1).bit_length()
    return np.concatenate([ids, np.full(size - len(ids), -1)]).astype(np.int32)


def show_ids(ids) -> str:
    """The first few ids of a long list, for a message."""
    return _show(np.asarray(ids))


def _show(values: np.ndarray) -> str:
    shown = ", ".join(str(v) for v in values[:_SHOWN])
    return shown if len(values) <= _SHOWN else f"{shown}, ... ({len(values)} ids)"


def _as_integers(ids: Any) -> np.ndarray:
    """A one-dimensional array of integers, wide enough to hold what was passed."""
    if isinstance(ids, bool | float | str | bytes | bytearray | memoryview) or ids is None:
        raise _not_integers(ids)
    if isinstance(ids, set | frozenset | range | dict) or hasattr(ids, "__next__"):
        ids = list(ids)
    if isinstance(ids, list | tuple):
        return np.array([_as_integer(value) for value in ids], dtype=object)
    try:
        values = np.atleast_1d(np.asarray(ids))
    except TypeError:
        raise _not_integers(ids) from None
    if values.dtype == object and values.ndim == 1:
        return np.array([_as_integer(value) for value in values], dtype=object)
    if values.size and values.dtype.kind not in "iu":
        raise _not_integers(values.ravel()[0])
    if values.ndim != 1:
        raise errors.IdTypeError(
            f"Expected ids along one axis, got an array of shape {values.shape}."
        )
    return values


def _as_integer(value: Any) -> int:
    """One member of a collection."""
    if isinstance(value, bool | np.bool_):
        raise _not_integers(value)
    try:
        return operator.index(value)
    except TypeError:
        raise _not_integers(value) from None


def _not_integers(value: Any) -> errors.IdTypeError:
    kind = type(value).__name__
    nan = (
        " NaN is nobody's id." if isinstance(value, float | np.floating) and value != value else ""
    )
    return errors.IdTypeError(
        f"Expected integer example ids, got {value!r} of type {kind}.{nan} "
        "Map your own keys to 0..num_examples-1 on the host, and pass ints."
    )
