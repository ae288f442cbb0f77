"""Whether a function keeps the precision of its arguments, read off its jaxpr."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxunlearn import errors
from jaxunlearn.kernels._primitives import equations
from jaxunlearn.types import Batch, LossFn, Params


def narrowings(function, *args: Any) -> list[str]:
    """Equations of `function(*args)` that turn float64 into something narrower, as text.

    Trace it under `jax.enable_x64(True)` with float64 arguments: an empty list means that every
    operation on them runs in float64.

    >>> with jax.enable_x64(True):
    ...     narrowings(lambda x: jnp.sum(x.astype(jnp.float32)), jnp.zeros(2, jnp.float64))
    ['convert_element_type to float32']
    """
    found = []
    for eqn, inner in equations(jax.make_jaxpr(function)(*args)):
        wide = any(_bits(atom) == 64 for atom in eqn.invars)
        narrow = [out.aval.dtype.name for out in eqn.outvars if 0 < _bits(out) < 64]
        if wide and narrow and not inner:
            found.append(f"{eqn.primitive.name} to {narrow[0]}")
    return found


def check_float64(loss_fn: LossFn, params: Params, rows: Batch) -> None:
    """Refuse a loss whose gradient leaves float64, for figures that a certificate rests on.

    Raises:
      LossSignatureError: naming the operations that narrow.
    """
    few = jax.tree.map(lambda leaf: leaf[:2], rows)
    found = narrowings(jax.grad(loss_fn), params, few)
    if found:
        raise errors.LossSignatureError(
            "Expected a loss that computes in float64 on float64 parameters, since the certificate "
            f"rests on its gradient, got {', '.join(sorted(set(found)))}. Remove the casts (in "
            "Flax: dtype=None)."
        )


def _bits(atom: Any) -> int:
    """Width of a floating-point value; 0 for anything else."""
    dtype = getattr(atom.aval, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return jnp.finfo(dtype).bits if is_float else 0
