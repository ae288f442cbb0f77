"""What a caller hands to a curvature product: refused by name before anything is traced."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxunlearn import errors
from jaxunlearn.kernels._checks import concrete
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.rowwise import check_params
from jaxunlearn.types import Params

_REAL = (np.bool_, np.integer, np.floating)


def as_params(params: Params) -> Params:
    """`params` as arrays.

    Raises:
      TypeError: a leaf has no gradient; it is named.
    """
    check_params(params)
    return jax.tree.map(jnp.asarray, params)


def check_like(params: PyTree, vector: PyTree, *, is_stack: bool = False) -> None:
    """Refuse a vector, or a stack of them, that is not one of the space of `params`.

    params: leaves with a shape and a dtype.

    Raises:
      ValueError: another structure or shape.  TypeError: leaves that are not real numbers.
    """
    name = "vectors" if is_stack else "vector"
    structures: list[Any] = [jax.tree.structure(x) for x in (params, vector)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"Expected {name} like params, of structure {structures[0]}, got {structures[1]}."
        )
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(vector)} if is_stack else {()}
    for (path, leaf), own in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(vector)
    ):
        place = f"{name}{jax.tree_util.keystr(path)}"
        shape, dtype = jnp.shape(own), jax.dtypes.result_type(own)
        if shape[is_stack:] != leaf.shape or len(shape) != len(leaf.shape) + is_stack:
            leading = "a leading axis and then shape" if is_stack else "shape"
            raise ValueError(
                f"Expected {name} like params, of {leading} {leaf.shape} at {place}, got {shape}."
            )
        if not any(jnp.issubdtype(dtype, kind) for kind in _REAL):
            raise TypeError(f"Expected {name} like params, real numbers at {place}, got {dtype}.")
    if len(lengths) > 1:
        raise ValueError(f"Expected {name} of one number, got leading axes {sorted(lengths)}.")


def check_call(name: str, function: Callable, keys: Any) -> None:
    """Refuse a loss that takes a key and gets none, or gets one that it does not take.

    Raises:
      LossSignatureError
    """
    operands = ("params", "batch") if keys is None else ("params", "batch", "key")
    try:
        inspect.signature(function).bind(*operands)
    except TypeError as error:
        hint = "Pass keys= for one that takes a key." if keys is None else "Leave keys= out."
        raise errors.LossSignatureError(
            f"Expected {name}({', '.join(operands)}), but calling it so fails: {error}. {hint}"
        ) from error
    except ValueError:  # a built-in without a signature: the call itself will tell
        pass


def mean_loss(name: str, value: Any) -> Float[Array, ""]:
    """A loss of the whole batch, in float32 or wider.

    Raises:
      LossSignatureError: it is not one real number.
    """
    got = jax.tree.map(jnp.shape, value)
    if got != ():
        raise errors.LossSignatureError(
            f"Expected {name} to return a scalar, the mean over the batch, got {got}. Take "
            "jnp.mean over the rows, and return nothing else."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise errors.LossSignatureError(
            f"Expected {name} to return a floating-point number, got {jnp.result_type(value)}."
        )
    return widen(value)


def check_left_out(leave_out: Any, num_rows: int, num_vectors: int) -> None:
    """Refuse rows that are none, where the numbers can be seen, and another shape."""
    if leave_out is None:
        return
    dtype, shape = jnp.result_type(leave_out), jnp.shape(leave_out)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"Expected leave_out of integers, got {dtype}.")
    if shape not in ((), (num_vectors,)):
        raise ValueError(
            f"Expected leave_out to be one row or of shape ({num_vectors},), got {shape}."
        )
    rows = concrete(leave_out)
    if rows is not None and not np.all((rows >= -1) & (rows < num_rows)):
        raise ValueError(f"Expected leave_out in -1..{num_rows - 1}, got {leave_out}.")


def left_out(leave_out: Any, num_rows: int) -> Int[Array, "..."]:
    """The rows left out as int32, and -1 for whatever is no row."""
    rows = jnp.asarray(leave_out)
    rows = rows if rows.dtype.itemsize >= 4 else rows.astype(jnp.int32)
    is_row = (rows >= 0) & (rows < num_rows)
    return jnp.where(is_row, jnp.where(is_row, rows, 0).astype(jnp.int32), -1)
