"""Refusals of a bad configuration, at the factory."""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np


def check_integers(least: int = 1, /, **values: Any) -> None:
    """Refuse what is no integer, or below `least`.

    >>> check_integers(0, burn_in=-1)
    Traceback (most recent call last):
    ValueError: Expected an integer burn_in=-1 >= 0.
    """
    for name, value in values.items():
        try:
            number = None if isinstance(value, bool | np.bool_) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < least:
            raise ValueError(f"Expected an integer {name}={value!r} >= {least}.")


def check_choices(**values: tuple[Any, tuple[str, ...]]) -> None:
    """Refuse a value that is not among those allowed: name=(value, allowed)."""
    for name, (value, allowed) in values.items():
        if value not in allowed:
            raise ValueError(f"Expected {name} to be one of {allowed}, got {value!r}.")


def check_storage(storage_dtype: Any) -> None:
    """Refuse a dtype that holds no fractions; None is that of what is stored."""
    if storage_dtype is not None and not jnp.issubdtype(storage_dtype, jnp.floating):
        raise ValueError(f"Expected a floating storage_dtype, got {storage_dtype!r}.")
