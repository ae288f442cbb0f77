"""Norms that neither overflow nor underflow, and what they may be wrong by.

`unit_roundoff(dtype)` is u: every rounding is off by at most a factor 1 +- u. A sum of n terms in
any order is off by at most n u times the sum of their magnitudes (Higham 2002, eq. 4.4). Bounds
here count roundings, times u, with a margin that covers the second-order terms.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxunlearn.kernels._meshes import local_params

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
    e = jnp.minimum(jnp.maximum(e, -2 * (bias - 1)), 2 * bias)
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


def all_norm_parts(
    arrays: Sequence[Array], same: Mapping[int, Any] = MappingProxyType({})
) -> list[Parts]:
    """`norm_parts` of each array, in one loop: XLA compiles what is in it once for all.

    Args:
      same: by the id of an array, what it is reshaped from: a bias and its weight share a factor,
        which has one norm.
    """
    # As matrices, so that XLA sees that a bias and its weight share a factor.
    keys = [(id(same.get(id(x), x)), size_of(x.shape[:-1]), x.shape[-1]) for x in arrays]
    places = [sorted(set(keys), key=keys.index).index(key) for key in keys]
    distinct = [arrays[places.index(k)] for k in range(max(places, default=-1) + 1)]
    matrices = [x.astype(widened(x)).reshape(size_of(x.shape[:-1]), x.shape[-1]) for x in distinct]
    found = []
    for squares, e in _safe_squares(matrices):
        r = jnp.sqrt(squares)
        own = exponent(r)
        found.append((r * _power_of_two(-own, r.dtype), e + own))
    return [
        (found[k][0].reshape(x.shape[:-1]), found[k][1].reshape(x.shape[:-1]))
        for k, x in zip(places, arrays)
    ]


def _safe_squares(matrices: list[Array]) -> list[Parts]:
    """(s, e) with ||x||_2^2 = s 4^e for the rows of each matrix.

    A row whose sum of squares leaves the range is added up once more, scaled: a large row must not
    change how another is rounded.
    """
    if not matrices:
        return []

    def squared(state):
        _, exponents, _ = state
        after, found = [], []
        again: dict[tuple[int, ...], Any] = {}  # by shape: a reduction each
        for x, e in zip(matrices, exponents):
            squares = sum_squares(x * _power_of_two(-e, x.dtype)[:, None])
            low, high, step = _range(x.dtype)
            more = jnp.where(squares < high, jnp.where(squares > low, 0, -step), step)
            more = jnp.where((e == 0) & ~jnp.isnan(squares), more, 0)
            found.append(squares)
            after.append(e + more)
            again[e.shape] = again.get(e.shape, False) | (more != 0)
        return functools.reduce(jnp.logical_or, map(jnp.any, again.values())), after, found

    exponents = [jnp.zeros(x.shape[:1], jnp.int32) for x in matrices]
    squares = [jnp.zeros(x.shape[:1], x.dtype) for x in matrices]
    start = local_params((jnp.bool_(True), exponents, squares), matrices)
    _, exponents, squares = lax.while_loop(lambda state: state[0], squared, start)
    return list(zip(squares, exponents))


def _range(dtype) -> tuple[float, float, int]:
    """What sums of squares lie strictly between, and by which power of two others are scaled.

    What squares below `tiny` can hide is far below one rounding of a sum this large.
    """
    low, high = (float(getattr(jnp.finfo(dtype), name)) for name in ("tiny", "max"))
    return low * 2.0**40, high * 2.0**-20, {"float32": 90, "float64": 720}[jnp.dtype(dtype).name]


def unguarded_norm_parts(x: Float[Array, "*b n"]) -> Parts:
    """`norm_parts` by scaling each row, needed or not; r may exceed one."""
    squares, e = _scaled_squares(x.astype(widened(x)))
    return jnp.sqrt(squares), e


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
    norms = [n.astype(dtype) for n in norms]
    e = exponent(functools.reduce(jnp.maximum, map(jnp.abs, norms)))
    squares = functools.reduce(jnp.add, (scale_by(n, -e) ** 2 for n in norms))
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
