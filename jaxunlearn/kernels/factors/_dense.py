"""Gradients that are kept as they are: vectors, what has no rule, and what all examples share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._stable import Limits, contract, size_of
from jaxunlearn.kernels.factors._protocol import (
    Factor,
    Plan,
    Steps,
    built,
    gram_by_rows,
    pack,
    take_rows,
    unpack,
    weighted,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "size"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense:
    """The gradients themselves, (B, *shape): biases and scales, and whatever has no rule."""

    value: Float[Array, "b *shape"]
    size: Float[Array, " b"]

    @classmethod
    def of(cls, value: Array) -> "Dense":
        """Computes `size` = the norm of each row."""
        return built([cls.plan(value)])[0]

    @classmethod
    def plan(cls, value: Array) -> Plan:
        """`of`, as a plan."""
        is_matrix = value.ndim == 2  # then the same array: it may be a factor of a weight
        flat = value if is_matrix else value.reshape(value.shape[0], size_of(value.shape[1:]))
        [parts] = yield [flat]
        return cls(value, _stable.scale_by(*parts))

    @property
    def floats(self) -> int:
        return size_of(self.value.shape[1:])

    @property
    def floor(self) -> float:
        return _stable.underflow(self.floats, self.size.dtype)

    @property
    def limits(self) -> Limits:
        return Limits.plain(self.size, self.floor)

    @property
    def rows(self) -> Float[Array, "b n"]:
        """The gradients flattened."""
        return self.value.reshape(self.value.shape[0], self.floats)

    def scaled(self, exponents: Array) -> "Dense":
        """Times 2^e: (B,) exponents."""
        value = _stable.scale_by(self.rows.astype(self.size.dtype), exponents[:, None])
        return Dense(value.reshape(self.value.shape), _stable.scale_by(self.size, exponents))

    def part(self, start: Array, count: int) -> "Dense":
        return take_rows(self, start, count)

    def kept(self, mask: Array) -> "Dense":
        return Dense(_stable.rows_where(mask, self.value), _stable.rows_where(mask, self.size))

    def norms(self) -> tuple[Array, Array]:
        relative = _stable.relative_bound(self.floats, self.size.dtype)
        return self.size, self.size * (1 + relative)

    def sum(self, weights: Array | None) -> Array:
        rows, shape = self.rows, self.value.shape[1:]
        if weights is None:
            weights = jnp.ones(self.size.shape, self.size.dtype)
        elif len(shape) <= 1:  # small, and the weighted rows are often a factor of another leaf
            return jnp.sum(weighted(weights, rows), axis=0).reshape(shape)
        return contract("b,bk->k", weights, rows).reshape(shape)

    def dot(self, vector: Array) -> Array:
        return contract("bk,k->b", self.rows, vector.ravel())

    def row(self, i: Array) -> Array:
        return self.value[i]

    def gram(self, other: Factor | None = None) -> Array:
        other = self if other is None else other
        if not isinstance(other, Dense):
            return gram_by_rows(self, other)
        return contract("bk,ck->bc", self.rows, other.rows)

    def materialize(self) -> Array:
        return self.value


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "size", "hidden"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Product(Dense):
    """Gradients that were multiplied out.

    hidden: (B,), what the rounding of the product can have hidden of the norm that its factors have
    in exact arithmetic. `norms` leaves it out: sums add up the rounded product itself.
    """

    hidden: Float[Array, " b"]

    def kept(self, mask: Array) -> "Product":
        dense = super().kept(mask)
        return Product(dense.value, dense.size, self.hidden)

    def scaled(self, exponents: Array) -> "Product":
        """Times 2^e: (B,) exponents."""
        dense = super().scaled(exponents)
        return Product(dense.value, dense.size, _stable.scale_by(self.hidden, exponents))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "rows", "size"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Shared:
    """One gradient that every example has: a parameter the row does not touch (often zero).

    value: (*shape).  rows: (B,), one for the rows that count and zero for the others.
    """

    value: Float[Array, "*shape"]
    rows: Float[Array, " b"]
    size: Float[Array, " b"]

    @classmethod
    def of(cls, value: Array, num_examples: int) -> "Shared":
        """Computes `size` = the norm of the one gradient, for each row."""
        return built([cls.plan(value, num_examples)])[0]

    @classmethod
    def plan(cls, value: Array, num_examples: int) -> Plan:
        """`of`, as a plan."""
        [parts] = yield [value.ravel()]
        norm = _stable.scale_by(*parts)
        return cls(value, jnp.ones((num_examples,), norm.dtype), jnp.full((num_examples,), norm))

    @property
    def floats(self) -> int:
        return 1

    @property
    def floor(self) -> float:
        return _stable.underflow(self.value.size, self.size.dtype)

    @property
    def limits(self) -> Limits:
        return Limits.plain(self.size, self.floor)

    def scaled(self, exponents: Array) -> "Shared":
        """Times 2^e: (B,) exponents."""
        value = self.value.astype(self.size.dtype)
        top = _stable.exponent(jnp.max(jnp.abs(value), initial=0))
        rows = _stable.scale_by(self.rows, top + exponents)
        size = _stable.scale_by(self.size, exponents)
        return Shared(_stable.scale_by(value, -top), rows, size)

    def part(self, start: Array, count: int) -> "Shared":
        rows, size = (lax.dynamic_slice_in_dim(x, start, count) for x in (self.rows, self.size))
        return Shared(self.value, rows, size)

    def kept(self, mask: Array) -> "Shared":
        usable = jnp.where(jnp.any(mask), self.value, jnp.zeros((), self.value.dtype))
        return Shared(usable, *(_stable.rows_where(mask, x) for x in (self.rows, self.size)))

    def norms(self) -> tuple[Array, Array]:
        relative = _stable.relative_bound(self.value.size, self.size.dtype)
        return self.size, self.size * (1 + relative)

    def sum(self, weights: Array | None) -> Array:
        value = self.value.astype(self.size.dtype)
        # The weights of small gradients are large: their sum must not leave the range.
        top = _stable.exponent(jnp.max(jnp.abs(value), initial=0))
        rows = self.rows if weights is None else weights * self.rows
        return jnp.sum(_stable.scale_by(rows, top)) * _stable.scale_by(value, -top)

    def dot(self, vector: Array) -> Array:
        return self.rows * contract("k,k->", self.value.ravel(), vector.ravel())

    def row(self, i: Array) -> Array:
        return self.rows[i] * self.value.astype(self.size.dtype)

    def gram(self, other: Factor | None = None) -> Array:
        other = self if other is None else other
        return self.rows[:, None] * other.dot(self.value)[None, :]

    def materialize(self) -> Array:
        rows = self.rows.reshape(-1, *[1] * self.value.ndim)
        return rows * self.value.astype(self.size.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=["steps"])
@dataclasses.dataclass(frozen=True)
class Placed:
    """Gradients of a part of the parameter: zero in the rest (the first rows of a position table).

    inner: (B, *part).  steps: from the part to the parameter.
    """

    inner: Dense
    steps: Steps

    @classmethod
    def of(cls, value: Array, steps: Steps) -> "Placed":
        """Computes `size` = the norm of each row."""
        return built([cls.plan(value, steps)])[0]

    @classmethod
    def plan(cls, value: Array, steps: Steps) -> Plan:
        """`of`, as a plan."""
        inner = yield from Dense.plan(value)
        return cls(inner, steps)

    @property
    def size(self) -> Array:
        return self.inner.size

    @property
    def floats(self) -> int:
        return self.inner.floats

    @property
    def floor(self) -> float:
        return self.inner.floor

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    def scaled(self, exponents: Array) -> "Placed":
        """Times 2^e: (B,) exponents."""
        return Placed(self.inner.scaled(exponents), self.steps)

    def part(self, start: Array, count: int) -> "Placed":
        return Placed(self.inner.part(start, count), self.steps)

    def kept(self, mask: Array) -> "Placed":
        return Placed(self.inner.kept(mask), self.steps)

    def norms(self) -> tuple[Array, Array]:
        return self.inner.norms()

    def sum(self, weights: Array | None) -> Array:
        return unpack(self.inner.sum(weights)[None], self.steps)[0]

    def dot(self, vector: Array) -> Array:
        return self.inner.dot(pack(vector, self.steps))

    def row(self, i: Array) -> Array:
        return unpack(self.inner.row(i)[None], self.steps)[0]

    def gram(self, other: Factor | None = None) -> Array:
        if other is None:
            return self.inner.gram()
        if isinstance(other, Placed) and other.steps == self.steps:
            return self.inner.gram(other.inner)
        return gram_by_rows(self, other)

    def materialize(self) -> Array:
        return unpack(self.inner.materialize(), self.steps)
