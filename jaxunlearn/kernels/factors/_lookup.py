"""Rows added into a table: embeddings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._stable import Limits, contract, unit_roundoff
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "rows", "size"],
    meta_fields=["num_rows", "steps"],
)
@dataclasses.dataclass(frozen=True)
class Lookup:
    """g_i[v] = sum of rows_i[t] over the tokens with index_i[t] = v, moved along `steps`.

    index: (B, T), in 0..num_rows-1.  rows: (B, T, d).  The product is (num_rows, d).
    """

    index: Int[Array, "b t"]
    rows: Float[Array, "b t d"]
    size: Float[Array, " b"]
    num_rows: int
    steps: Steps

    token_axis = 1

    @classmethod
    def of(cls, index: Array, rows: Array, num_rows: int, steps: Steps) -> "Lookup":
        """Computes `size` = sum_t |rows_i[t]|, which the norm cannot exceed."""
        return built([cls.plan(index, rows, num_rows, steps)])[0]

    @classmethod
    def plan(cls, index: Array, rows: Array, num_rows: int, steps: Steps) -> Plan:
        """`of`, as a plan."""
        [(norms, exponents)] = yield [rows]
        top = jnp.max(exponents, axis=1, initial=jnp.iinfo(jnp.int32).min // 2)
        total = jnp.sum(_stable.scale_by(norms, exponents - top[:, None]), axis=1)
        return cls(index, rows, _stable.scale_by(total, top), num_rows, steps)

    @property
    def num_tokens(self) -> int:
        """How many rows are added up."""
        return self.rows.shape[1]

    @property
    def floats(self) -> int:
        return self.rows.shape[1] * (self.rows.shape[2] + 1)

    @property
    def floor(self) -> float:
        return 2 * self.num_tokens * _stable.underflow(self.rows.shape[2], self.size.dtype)

    @property
    def limits(self) -> Limits:
        return Limits.plain(self.size, self.floor)

    def scaled(self, exponents: Array) -> "Lookup":
        """Times 2^e: (B,) exponents."""
        rows = _stable.scale_by(self.rows.astype(self.size.dtype), exponents[:, None, None])
        size = _stable.scale_by(self.size, exponents)
        return dataclasses.replace(self, rows=rows, size=size)

    def part(self, start: Array, count: int) -> "Lookup":
        return take_rows(self, start, count)

    def kept(self, mask: Array) -> "Lookup":
        rows, size = (_stable.rows_where(mask, x) for x in (self.rows, self.size))
        return dataclasses.replace(self, rows=rows, size=size)

    def norms(self) -> tuple[Array, Array]:
        """Each token's rows are added up where it first stands: nothing is squared before."""
        _, num_tokens, d = self.rows.shape
        roundoff = unit_roundoff(self.size.dtype)
        if num_tokens == 1:
            depth = 2 * (d + _stable.SLACK)
            return self.size, self.size * (1 + depth * roundoff)
        same = self.index[:, :, None] == self.index[:, None, :]
        earlier = jnp.tril(same, -1).any(axis=2)
        first = (same & ~earlier[:, :, None]).astype(self.size.dtype)
        added = contract("btu,bud->btd", first, self.rows)
        norms = _stable.norm(added.reshape(added.shape[0], -1))
        relative = 1 + _stable.relative_bound(num_tokens * d, self.size.dtype)
        slack = 2 * (num_tokens + _stable.SLACK) * roundoff * self.size
        return norms, norms * relative + slack

    def sum(self, weights: Array | None) -> Array:
        rows = self.rows.astype(self.size.dtype)
        if weights is not None:
            rows = weighted(weights, rows)
        table = jnp.zeros((self.num_rows, rows.shape[-1]), rows.dtype)
        table = table.at[self.index.ravel()].add(rows.reshape(-1, rows.shape[-1]))
        return unpack(table[None], self.steps)[0]

    def dot(self, vector: Array) -> Array:
        taken = jnp.take(pack(vector, self.steps), self.index, axis=0, mode="clip")
        return contract("btd,btd->b", taken, self.rows)

    def row(self, i: Array) -> Array:
        table = jnp.zeros((self.num_rows, self.rows.shape[-1]), self.size.dtype)
        return unpack(table.at[self.index[i]].add(self.rows[i])[None], self.steps)[0]

    def gram(self, other: Factor | None = None) -> Array:
        return gram_by_rows(self, self if other is None else other)

    def materialize(self) -> Array:
        num_examples, _, d = self.rows.shape
        table = jnp.zeros((num_examples, self.num_rows, d), self.size.dtype)
        table = table.at[jnp.arange(num_examples)[:, None], self.index].add(self.rows)
        return unpack(table, self.steps)
