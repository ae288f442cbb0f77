"""Numbers that a caller gives, of any kind: refused at once where they can be seen."""

from typing import Any

import jax
import numpy as np


def check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None):
    """Refuse a number that is not > `above`, or not >= `least`; a traced one passes.

    Raises:
      ValueError: out of range or not a number; Python's, NumPy's and JAX's are all read.

    >>> check_number("damping", np.float32(0.5), least=0.0)
    """
    number = concrete(value)
    if number is None:
        return
    if above is not None and not number > above:
        raise ValueError(f"Expected {name}={value} > {above:g}.")
    if least is not None and not number >= least:
        raise ValueError(f"Expected {name}={value} >= {least:g}.")


def concrete(value: Any) -> np.ndarray | None:
    """The numbers of a value that is not traced."""
    return None if is_traced(value) else np.asarray(value)


def is_traced(value: Any) -> bool:
    """Whether a value stands for one that a trace does not know."""
    try:
        getattr(value, "is_fully_addressable", None)
    except jax.errors.ConcretizationTypeError:
        return True
    return False
