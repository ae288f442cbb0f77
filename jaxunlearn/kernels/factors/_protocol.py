"""What every factor has, and the moves from a product to the shape of its parameter."""

from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn.kernels._stable import (
    Limits,
    Parts,
    all_norm_parts,
    size_of,
    unit_roundoff,
    widened,
)

LOOSE = 2.0**17
"""A Gram-trick norm whose bound exceeds this many roundings (0.8 percent in float32) is loose."""

CHUNK_FLOATS = 1 << 22

Steps = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
"""Moves from the product of two factors to the parameter's shape, example axis left out:
("reshape", from, to), ("transpose", permutation, ()), or ("pad", before, after) with zeros."""


Plan = Generator[list[Array], list[Parts], Any]
"""How a factor is made: it asks once for the norms of some arrays, over their last axes."""


def built(plans: Sequence[Plan], same: Mapping[int, Any] = MappingProxyType({})) -> list[Any]:
    """The factors that the plans make, with one guard against overflow for all their norms.

    same: by the id of an array, what it is reshaped from.
    """
    asked = [next(plan) for plan in plans]
    answers = iter(all_norm_parts([x for arrays in asked for x in arrays], same))
    return [answered(plan, [next(answers) for _ in own]) for plan, own in zip(plans, asked)]


def answered(plan: Plan, norms: list[Parts]) -> Any:
    """What the plan makes of the norms that it asked for."""
    try:
        plan.send(norms)
    except StopIteration as done:
        return done.value
    raise AssertionError("A plan asks once.")


class Factor(Protocol):
    """What `PerExampleGradients` needs to know of one parameter's gradients."""

    @property
    def size(self) -> Array: ...
    @property
    def floor(self) -> float: ...
    @property
    def limits(self) -> Limits: ...
    def part(self, start: Array, count: int) -> "Factor": ...
    def kept(self, mask: Array) -> "Factor": ...
    def norms(self) -> tuple[Array, Array]: ...
    def sum(self, weights: Array | None) -> Array: ...
    def dot(self, vector: Array) -> Array: ...
    def row(self, i: Array) -> Array: ...
    def gram(self, other: "Factor | None" = None) -> Array: ...
    def materialize(self) -> Array: ...
    @property
    def floats(self) -> int: ...


def gram_by_rows(mine: Factor, others: Factor) -> Float[Array, "b c"]:
    """<g_i, h_j> for factors of unlike kinds: one g_i multiplied out at a time."""
    num_rows = mine.size.shape[0]
    return lax.map(lambda i: others.dot(mine.row(i)), jnp.arange(num_rows))


def tightened(
    norms: Array, upper: Array, direct: Callable[[], tuple[Array, Array]]
) -> tuple[Array, Array]:
    """`norms` and `upper`, or those of `direct` in the rows where the bound is loose.

    Row by row: a row that cancels must not change how any other is clipped, or the sensitivity of a
    sum would grow with the batch.
    """
    loose = upper - norms > LOOSE * unit_roundoff(upper.dtype) * upper

    def replaced():
        return tuple(jnp.where(loose, d, x) for d, x in zip(direct(), (norms, upper), strict=True))

    return lax.cond(jnp.any(loose), replaced, lambda: (norms, upper))


def take_rows(factor: Any, start: Array, count: int) -> Any:
    """`count` rows of a factor all of whose arrays have the example axis first."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), factor)


def unpack(x: Array, steps: Steps) -> Array:
    """Carry `x` of shape (K, ...) along `steps`."""
    for kind, first, second in steps:
        if kind == "reshape":
            x = x.reshape(x.shape[0], *second)
        elif kind == "transpose":
            x = x.transpose(0, *(axis + 1 for axis in first))
        else:
            x = jnp.pad(x, [(0, 0), *zip(first, second)])
    return x


def pack(x: Array, steps: Steps) -> Array:
    """The inverse of `unpack`, for one array without the leading axis."""
    for kind, first, second in reversed(steps):
        if kind == "reshape":
            x = x.reshape(first)
        elif kind == "transpose":
            x = x.transpose(tuple(first.index(axis) for axis in range(len(first))))
        else:
            x = x[tuple(slice(lo, n - hi) for lo, hi, n in zip(first, second, x.shape))]
    return x


def weighted(weights: Array, x: Array) -> Array:
    """w_i x_i, as a matrix: a bias and its weight then share the product."""
    matrix = x.reshape(x.shape[0], size_of(x.shape[1:]))
    return (weights.astype(widened(weights, x))[:, None] * matrix).reshape(x.shape)


def row_chunk(num_examples: int, per_example: int) -> int:
    """How many examples of `per_example` numbers to have in memory at a time."""
    return max(1, min(num_examples, CHUNK_FLOATS // max(1, per_example)))
