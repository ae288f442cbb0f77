"""Norms that neither overflow nor underflow, and what they may be wrong by.

`unit_roundoff(dtype)` is u: every rounding is off by at most a factor 1 +- u. A sum of n terms in
any order is off by at most n u times the sum of their magnitudes (Higham 2002, eq. 4.4). Bounds
here count roundings, times u, with a margin that covers the second-order terms.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

SLACK = 16
"""Roundings granted to square roots, products and scalings, whose number never depends on sizes."""

Parts = tuple[Array, Array]
"""A norm r 2^e as (r, e)."""

_BLOCK = 1024
_BITS = {"float32": (jnp.int32, 23, 127), "float64": (jnp.int64, 52, 1023)}


def widened(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or wider where an operand is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """Leaves in float32 or wider: sums of a bfloat16 model do not round to bfloat16."""
    return jax.tree.map(lambda x: jnp.asarray(x, widened(x)), tree)


def unit_roundoff(dtype) -> float:
    """u: 2^-24 in float32, 2^-53 in float64."""
    return float(jnp.finfo(dtype).eps) / 2


def exponent(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The least e with |x| < 2^e; of a number too small to be normal, that of the smallest one."""
    integer, shift, bias = _BITS[x.dtype.name]
    bits = lax.bitcast_convert_type(jnp.abs(x), integer)
    return jnp.right_shift(bits, shift).astype(jnp.int32) - (bias - 1)


def scale_by(x: Float[Array, "..."], e: Int[Array, "..."]) -> Float[Array, "..."]:
    """x * 2^e, exact as long as the result is a normal number."""
    bias = _BITS[x.dtype.name][2]
    e = lax.clamp(-2 * (bias - 1), e, 2 * bias)
    half = lax.shift_right_arithmetic(e, jnp.ones_like(e))
    return x * _power_of_two(half, x.dtype) * _power_of_two(e - half, x.dtype)


def _power_of_two(e: Int[Array, "..."], dtype) -> Float[Array, "..."]:
    """2^e, where that is a normal number."""
    integer, shift, bias = _BITS[jnp.dtype(dtype).name]
    return lax.bitcast_convert_type(jnp.left_shift((e + bias).astype(integer), shift), dtype)


def additions(n: int) -> int:
    """How many additions a term of `sum_squares` over n terms can pass through."""
    return n if n <= 4 * _BLOCK else _BLOCK + n // _BLOCK + 1


def sum_squares(x: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    """Sum of squares over the last axis."""
    n = x.shape[-1]
    if n <= 4 * _BLOCK:
        return jnp.sum(x * x, axis=-1)
    full = n // _BLOCK * _BLOCK
    blocks = jnp.square(x[..., :full]).reshape(*x.shape[:-1], n // _BLOCK, _BLOCK)
    # Without the barrier XLA joins the two sums into one long one.
    partial = lax.optimization_barrier(jnp.sum(blocks, axis=-1))
    return jnp.sum(partial, axis=-1) + jnp.sum(x[..., full:] ** 2, axis=-1)


def relative_bound(n: int, dtype) -> float:
    """Bound on the relative error of `norm` over n terms."""
    return (additions(n) + SLACK) * unit_roundoff(dtype)


def norm_parts(x: Float[Array, "*b n"]) -> Parts:
    """(r, e) with ||x||_2 = r 2^e over the last axis; r is zero or in [1/2, 1)."""
    return all_norm_parts([x])[0]


def all_norm_parts(arrays: Sequence[Array]) -> list[Parts]:
    """`norm_parts` of each array. One guard is for all: every branch is compiled for its own."""
    # As matrices, so that XLA sees that a bias and its weight share a factor.
    matrices = [x.astype(widened(x)).reshape(size_of(x.shape[:-1]), x.shape[-1]) for x in arrays]
    squares = [sum_squares(x) for x in matrices]
    safe = [_are_safe(own) for own in squares]

    def plain():
        zero = lambda own: jnp.isnan(own).astype(jnp.int32) * 0  # as local as `own`
        return [(jnp.sqrt(own), zero(own)) for own in squares]

    def guarded():
        rows = zip(safe, squares, map(_scaled_squares, matrices))
        return [
            (jnp.sqrt(jnp.where(ok, own, new)), jnp.where(ok, 0, e)) for ok, own, (new, e) in rows
        ]

    every = functools.reduce(jnp.logical_and, map(jnp.all, safe), jnp.bool_(True))
    found = []
    for x, (r, e) in zip(arrays, lax.cond(every, plain, guarded)):
        own = exponent(r)
        found.append((scale_by(r, -own).reshape(x.shape[:-1]), (e + own).reshape(x.shape[:-1])))
    return found


def unguarded_norm_parts(x: Float[Array, "*b n"]) -> Parts:
    """`norm_parts` by scaling each row, needed or not; r may exceed one."""
    squares, e = _scaled_squares(x.astype(widened(x)))
    return jnp.sqrt(squares), e


def _are_safe(squares: Array) -> Array:
    """Which sums of squares have not left the range; NaN stays NaN however it is scaled.

    What squares below `tiny` can hide is far below one rounding of a sum this large.
    """
    low, high = (float(getattr(jnp.finfo(squares.dtype), name)) for name in ("tiny", "max"))
    return ((squares > low * 2.0**40) & (squares < high * 2.0**-20)) | jnp.isnan(squares)


def _guarded(safe: Array, squares: Array, x: Array) -> Parts:
    """(r, e) row by row: a large row must not change how another is rounded."""
    scaled, e = _scaled_squares(x)
    return jnp.sqrt(jnp.where(safe, squares, scaled)), jnp.where(safe, 0, e)


def _scaled_squares(x: Float[Array, "*b n"]) -> Parts:
    """(s, e) with ||x||_2^2 = s 4^e, whatever the magnitudes."""
    e = exponent(jnp.max(jnp.abs(x), axis=-1, initial=0))
    return sum_squares(scale_by(x, -e[..., None])), e


def norm(x: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    """||x||_2 over the last axis, neither overflowing nor underflowing on the way."""
    return scale_by(*norm_parts(x))


def joint_norm(norms: list[Float[Array, " b"]], num_examples: int) -> Float[Array, " b"]:
    """sqrt(sum of squares) of several norms, rounded by at most `len(norms) + SLACK` roundings."""
    if not norms:
        return jnp.zeros((num_examples,), jnp.float32)
    dtype = widened(*norms)
    # Few numbers: no branch is worth its compilation.
    squares, e = _scaled_squares(jnp.stack([n.astype(dtype) for n in norms], axis=-1))
    return scale_by(jnp.sqrt(squares), e)


def underflow(count: int, dtype) -> float:
    """Bound on the norm of what `count` numbers lose that are flushed to zero, twice over."""
    return 2 * float(jnp.finfo(dtype).tiny) * count**0.5


class Limits(NamedTuple):
    """What weights do to numbers that are not of plain magnitude, for each row.

    reach: a bound on the norm of what w_i g_i loses that is flushed to zero, for a w_i that is not
    one. largest: the w_i up to which nothing overflows.
    """

    reach: Float[Array, " b"] | float
    largest: Float[Array, " b"] | float

    @classmethod
    def plain(cls, size: Float[Array, " b"], reach: float) -> "Limits":
        """Of numbers that a weight multiplies where they are, whose magnitudes add up to `size`."""
        room = scale_by(jnp.ones_like(size), jnp.finfo(size.dtype).maxexp - 1 - exponent(size))
        return cls(jnp.full_like(size, reach), jnp.maximum(room, 1))

    @classmethod
    def of(cls, weighted: Parts, other: Parts, count: int, dtype) -> "Limits":
        """Of vectors of `count` numbers that a weight multiplies first, and what they meet then.

        The reach cannot overflow: `tiny` times the largest number is below 4.
        """
        limits = jnp.finfo(dtype)
        (r, e), (_, own) = ((x.reshape(x.shape[0], -1) for x in pair) for pair in (other, weighted))
        top, highest = (jnp.max(x, axis=1, initial=limits.minexp) for x in (e, own))
        total = jnp.sum(scale_by(r.astype(dtype), e - top[:, None]), axis=1)
        largest = scale_by(jnp.ones_like(total), limits.maxexp - 2 - highest)
        return cls(scale_by(2 * count**0.5 * total, top + limits.minexp), largest)

    def also(self, other: "Limits") -> "Limits":
        """Of both."""
        return Limits(self.reach + other.reach, jnp.minimum(self.largest, other.largest))


def contract(subscripts: str, *arrays: Array) -> Array:
    """`einsum` in float32 or wider, at the highest precision the device has."""
    dtype = widened(*arrays)
    same = all(array.dtype == arrays[0].dtype for array in arrays)
    arrays = arrays if same else tuple(array.astype(dtype) for array in arrays)
    return jnp.einsum(
        subscripts, *arrays, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )


def rows_where(mask: Array, x: Array) -> Array:
    """`x` with zeros in the rows where `mask` is false; NaN times zero would be NaN."""
    return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def size_of(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return int(np.prod(shape, dtype=np.int64))
