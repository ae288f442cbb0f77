"""Several uses of one parameter, of different kinds: tied weights."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._stable import Limits, contract, unit_roundoff
from jaxunlearn.kernels.factors._dense import Dense, Product, Shared
from jaxunlearn.kernels.factors._lookup import Lookup
from jaxunlearn.kernels.factors._outer import Outer
from jaxunlearn.kernels.factors._protocol import (
    Factor,
    Plan,
    Steps,
    answered,
    row_chunk,
    tightened,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "size"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class Sum:
    """g_i = sum_p part_p of example i: a table that embeds and also projects, a stack of layers.

    shape: the parameter's.
    """

    parts: tuple[Any, ...]
    size: Float[Array, " b"]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parts: tuple[Any, ...], shape: tuple[int, ...]) -> "Sum":
        """Computes `size` = the sum of the parts' sizes."""
        return cls(tuple(parts), functools.reduce(jnp.add, (p.size for p in parts)), shape)

    @classmethod
    def plan(cls, plans: Sequence[Plan], shape: tuple[int, ...]) -> Plan:
        """`of` the factors that some plans make, as a plan."""
        asked = [next(plan) for plan in plans]
        answers = iter((yield [x for arrays in asked for x in arrays]))
        parts = [answered(plan, [next(answers) for _ in own]) for plan, own in zip(plans, asked)]
        return cls.of(tuple(parts), shape)

    @property
    def floats(self) -> int:
        return sum(part.floats for part in self.parts)

    @property
    def floor(self) -> float:
        added = _stable.underflow(_stable.size_of(self.shape), self.size.dtype)
        return sum(part.floor + added for part in self.parts)

    @property
    def limits(self) -> Limits:
        return functools.reduce(Limits.also, (part.limits for part in self.parts))

    def scaled(self, exponents: Array) -> "Sum":
        """Times 2^e: (B,) exponents."""
        parts = tuple(part.scaled(exponents) for part in self.parts)
        return Sum(parts, _stable.scale_by(self.size, exponents), self.shape)

    def part(self, start: Array, count: int) -> "Sum":
        parts = tuple(part.part(start, count) for part in self.parts)
        size = lax.dynamic_slice_in_dim(self.size, start, count)
        return Sum(parts, size, self.shape)

    def kept(self, mask: Array) -> "Sum":
        parts = tuple(part.kept(mask) for part in self.parts)
        return Sum(parts, _stable.rows_where(mask, self.size), self.shape)

    def norms(self) -> tuple[Array, Array]:
        if all(self._apart(*pair) for pair in itertools.combinations(self.parts, 2)):
            return self._joint_norms()
        exponent = _stable.exponent(self.size)
        unit = self.scaled(-exponent)
        if not unit.has_cross_terms:
            norms, upper = unit._direct_norms()
        else:
            norms, upper = tightened(*unit._gram_norms(), unit._direct_norms)
        return _stable.scale_by(norms, exponent), _stable.scale_by(upper, exponent)

    def _apart(self, first, second) -> bool:
        """Whether two parts never meet."""
        return disjoint(first, second, self.shape)

    @property
    def has_cross_terms(self) -> bool:
        """Whether every two parts have an inner product that needs no product of either."""
        pairs = itertools.combinations(self.parts, 2)
        return all(self._apart(*pair) or _crosses(*pair) for pair in pairs)

    def _joint_norms(self) -> tuple[Array, Array]:
        """Norms of parts that never meet."""
        norms, uppers = zip(*(part.norms() for part in self.parts))
        norm, upper = (_stable.joint_norm(list(x), self.size.shape[0]) for x in (norms, uppers))
        margin = (len(norms) + 2 * _stable.SLACK) * unit_roundoff(upper.dtype)
        return norm, upper * (1 + margin)

    def _gram_norms(self) -> tuple[Array, Array]:
        """||sum_p g_p||^2 = sum_p ||g_p||^2 + 2 sum_(p<q) <g_p, g_q>, each with its bound."""
        roundoff = unit_roundoff(self.size.dtype)
        norms, uppers = zip(*(part.norms() for part in self.parts))
        square = functools.reduce(jnp.add, (norm**2 for norm in norms))
        hidden = functools.reduce(jnp.add, (u**2 - n**2 for n, u in zip(norms, uppers)))
        depth = len(self.parts) ** 2 + _stable.SLACK
        for first, second in itertools.combinations(self.parts, 2):
            if not self._apart(first, second):
                product, roundings = _cross_terms(first, second)
                square = square + 2 * product
                hidden = hidden + 2 * roundings * roundoff * first.size * second.size
        square = jnp.maximum(square, 0)
        upper = jnp.sqrt(square + hidden + 2.02 * depth * roundoff * self.size**2)
        return jnp.sqrt(square), upper + self._contribution_slack

    @property
    def _contribution_slack(self) -> Array:
        """What the rounding of a contribution, part after part, can add to its norm."""
        return product_slack(self)

    def _direct_norms(self) -> tuple[Array, Array]:
        """Norms of the sums themselves, a few examples at a time."""
        num_examples, per_example = self.size.shape[0], _stable.size_of(self.shape)
        one = lambda i: jnp.sqrt(_stable.sum_squares(self.row(i).ravel()))
        chunk = row_chunk(num_examples, per_example)
        rows = jnp.arange(num_examples)
        if chunk == num_examples:
            norms = jax.vmap(one)(rows)
        else:
            norms = lax.map(one, rows, batch_size=chunk)
        relative = 1 + _stable.relative_bound(per_example, self.size.dtype)
        return norms, norms * relative + 2 * self._contribution_slack

    def sum(self, weights: Array | None) -> Array:
        return functools.reduce(jnp.add, (part.sum(weights) for part in self.parts))

    def dot(self, vector: Array) -> Array:
        return functools.reduce(jnp.add, (part.dot(vector) for part in self.parts))

    def row(self, i: Array) -> Array:
        return functools.reduce(jnp.add, (part.row(i) for part in self.parts))

    def gram(self, other: Factor | None = None) -> Array:
        if other is None:
            others = self.parts
        else:
            others = other.parts if isinstance(other, Sum) else (other,)
        pairs = itertools.product(self.parts, others)
        grams = [
            mine.gram(None if mine is its else its)
            for mine, its in pairs
            if mine is its or not self._apart(mine, its)
        ]
        empty = jnp.zeros((self.size.shape[0], others[0].size.shape[0]), self.size.dtype)
        return functools.reduce(jnp.add, grams, empty)

    def materialize(self) -> Array:
        return functools.reduce(jnp.add, (part.materialize() for part in self.parts))


def multiplied(plan: Plan) -> Plan:
    """The product of the factor that a plan makes, as a plan."""
    asked = next(plan)
    # No branch: where nobody asks what is hidden, XLA leaves all of this out.
    factor = answered(plan, [_stable.unguarded_norm_parts(x) for x in asked])
    dense = yield from Dense.plan(factor.materialize())
    return Product(dense.value, dense.size, product_slack(factor))


def product_slack(factor) -> Array:
    """What the rounding of a product, part after part, can add to its norm or hide of it."""
    parts = factor.parts if isinstance(factor, Sum) else (factor,)
    depth = max(map(_num_tokens, parts)) + len(parts) + _stable.SLACK
    return 2 * depth * unit_roundoff(factor.size.dtype) * factor.size


def disjoint(first, second, shape: tuple[int, ...]) -> bool:
    """Whether two parts stand in different places of a parameter, as far as their pads tell."""
    last: list[Steps] = [getattr(part, "steps", ())[-1:] for part in (first, second)]
    if not all(steps and steps[0][0] == "pad" for steps in last):
        return False
    (_, befores, afters), (_, starts, ends) = last[0][0], last[1][0]
    sizes = zip(shape, befores, afters, starts, ends)
    return any(after + start >= n or before + end >= n for n, before, after, start, end in sizes)


def _alike(first, second) -> bool:
    """Whether a table's rows and an outer product (num_rows, d) go the same way from there."""
    if not (isinstance(first, Lookup) and isinstance(second, Outer)):
        return False
    product = (1, first.num_rows, first.rows.shape[-1])
    if second.steps[:1] != (("reshape", product, first.steps[0][2]),):
        return False
    return first.steps[1:] == second.steps[1:]


def _crosses(first, second) -> bool:
    """Whether `_cross_terms` knows the two."""
    pair = (first, second)
    return any(isinstance(p, Shared) for p in pair) or _alike(*pair) or _alike(*pair[::-1])


def _cross_terms(first, second) -> tuple[Array, int]:
    """<first_i, second_i>, and its roundings as a multiple of the product of the sizes."""
    if isinstance(first, Shared):
        first, second = second, first
    if isinstance(second, Shared):
        depth = first.floats + second.value.size + _stable.SLACK
        return second.rows * first.dot(second.value), depth
    if isinstance(first, Outer):
        first, second = second, first
    products = contract("btd,bud->btu", first.rows, second.right[:, 0])
    met = jnp.take_along_axis(second.left[:, 0], first.index[:, None, :], axis=2, mode="clip")
    depth = first.rows.shape[-1] + _num_tokens(first) + _num_tokens(second) + _stable.SLACK
    # Without the barrier XLA joins the sums over t and u into one of as many terms as both have.
    partial = lax.optimization_barrier(jnp.sum(products * met.swapaxes(1, 2), axis=2))
    return jnp.sum(partial, axis=1), depth


def _num_tokens(part) -> int:
    """How many terms a part adds up."""
    return getattr(part, "num_tokens", 1)
