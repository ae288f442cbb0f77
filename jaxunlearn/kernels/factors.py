"""Per-example gradients of one parameter, kept as the factors they are made of.

Every class here is a registered pytree with the same nine members; a new kind of leaf is a new
class with these and a rule in `_rules.py` that builds it.

    size           (B,)  an upper bound on each norm, finite exactly where the row is usable
    kept(mask)           the same, with zeros in the rows where `mask` is false
    norms()        (B,), (B,)  each norm, and an upper bound on what it is in exact arithmetic
    sum(weights)         sum_i w_i g_i, shaped like the parameter
    dot(vector)    (B,)  <g_i, vector>
    row(i)               g_i, shaped like the parameter
    gram(other)    (B, C)  <g_i, h_j> with another batch's gradients of the same parameter; or own
    materialize()  (B, *shape)
    floats               numbers kept per example
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._stable import contract, size_of, unit_roundoff, widened

LOOSE = 2.0**17
"""A Gram-trick norm whose bound exceeds this many roundings (0.8 percent in float32) is loose."""

_CHUNK_FLOATS = 1 << 22

Steps = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
"""Moves from the product of two factors to the parameter's shape, example axis left out:
("reshape", from, to) or ("transpose", permutation, ())."""


class Factor(Protocol):
    """What `PerExampleGradients` needs to know of one parameter's gradients."""

    @property
    def size(self) -> Array: ...
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


def unpack(x: Array, steps: Steps) -> Array:
    """Carry `x` of shape (K, ...) along `steps`."""
    for kind, first, second in steps:
        if kind == "reshape":
            x = x.reshape(x.shape[0], *second)
        else:
            x = x.transpose(0, *(axis + 1 for axis in first))
    return x


def pack(x: Array, steps: Steps) -> Array:
    """The inverse of `unpack`, for one array without the leading axis."""
    for kind, first, _ in reversed(steps):
        if kind == "reshape":
            x = x.reshape(first)
        else:
            x = x.transpose(tuple(first.index(axis) for axis in range(len(first))))
    return x


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right", "size"], meta_fields=["steps"]
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """g_i[s] = sum_t left_i[s, t] right_i[s, t]^T, then moved along `steps`.

    left: (B, S, T, m).  right: (B, S, T, n).  S counts blocks that never meet (attention heads of a
    stacked weight; usually 1), T the tokens that are summed over (1 for a plain dense layer).
    """

    left: Float[Array, "b s t m"]
    right: Float[Array, "b s t n"]
    size: Float[Array, " b"]
    steps: Steps

    @classmethod
    def of(cls, left: Array, right: Array, steps: Steps) -> "Outer":
        """Computes `size` = sqrt(sum_s (sum_t |left| |right|)^2): the norm, for one token."""
        tokens, scale, _ = _token_norms(left, right)
        size = _stable.scale_by(jnp.sqrt(jnp.sum(tokens.sum(-1) ** 2, -1)), scale)
        return cls(left, right, size, steps)

    @property
    def floats(self) -> int:
        return size_of(self.left.shape[1:]) + size_of(self.right.shape[1:])

    def kept(self, mask: Array) -> "Outer":
        left, right, size = (
            _stable.rows_where(mask, x) for x in (self.left, self.right, self.size)
        )
        return Outer(left, right, size, self.steps)

    def norms(self) -> tuple[Array, Array]:
        _, num_blocks, num_tokens, m = self.left.shape
        roundoff = unit_roundoff(self.size.dtype)
        if num_tokens == 1:
            depth = m + self.right.shape[-1] + num_blocks + _stable.SLACK
            return self.size, self.size * (1 + depth * roundoff)
        if not gram_is_tight(num_tokens, m, self.right.shape[-1]):
            return _direct_norms(*_balanced(self.left, self.right))
        balanced = _balanced(self.left, self.right)
        norms, upper = _gram_norms(*balanced)
        return lax.cond(
            jnp.any(upper - norms > LOOSE * roundoff * upper),
            lambda: _direct_norms(*balanced),
            lambda: (norms, upper),
        )

    def sum(self, weights: Array | None) -> Array:
        left, right = self.left, self.right
        if weights is not None:
            if left.shape[-1] < right.shape[-1]:
                left = _weighted(weights, left)
            else:
                right = _weighted(weights, right)
        if left.shape[1] == 1:  # one plain matmul: XLA is slow with a batch axis of length one
            left, right = (x.reshape(size_of(x.shape[:3]), x.shape[-1]) for x in (left, right))
            return unpack(contract("km,kn->mn", left, right)[None], self.steps)[0]
        return unpack(contract("bstm,bstn->smn", left, right)[None], self.steps)[0]

    def dot(self, vector: Array) -> Array:
        moved = contract("bstm,smn->bstn", self.left, pack(vector, self.steps))
        return contract("bstn,bstn->b", moved, self.right)

    def row(self, i: Array) -> Array:
        return unpack(contract("stm,stn->smn", self.left[i], self.right[i])[None], self.steps)[0]

    def gram(self, other: Factor | None = None) -> Array:
        other = self if other is None else other
        if not isinstance(other, Outer) or other.steps != self.steps:
            return gram_by_rows(self, other)
        if self.left.shape[2] == other.left.shape[2] == 1:
            lefts = contract("bsm,csm->sbc", self.left[:, :, 0], other.left[:, :, 0])
            rights = contract("bsn,csn->sbc", self.right[:, :, 0], other.right[:, :, 0])
            return jnp.sum(lefts * rights, axis=0)
        return _gram_by_chunks(self, other)

    def materialize(self) -> Array:
        return unpack(contract("bstm,bstn->bsmn", self.left, self.right), self.steps)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "size"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense:
    """The gradients themselves, (B, *shape): biases and scales, and whatever has no rule."""

    value: Float[Array, "b *shape"]
    size: Float[Array, " b"]

    @classmethod
    def of(cls, value: Array) -> "Dense":
        """Computes `size` = the norm of each row."""
        return cls(value, _stable.norm(value.reshape(value.shape[0], size_of(value.shape[1:]))))

    @property
    def floats(self) -> int:
        return size_of(self.value.shape[1:])

    @property
    def rows(self) -> Float[Array, "b n"]:
        """The gradients flattened."""
        return self.value.reshape(self.value.shape[0], self.floats)

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
            rows, weights = _weighted(weights, rows), jnp.ones_like(weights)
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
        norm = _stable.norm(value.ravel())
        return cls(value, jnp.ones((num_examples,), norm.dtype), jnp.full((num_examples,), norm))

    @property
    def floats(self) -> int:
        return 1

    def kept(self, mask: Array) -> "Shared":
        usable = jnp.where(jnp.any(mask), self.value, jnp.zeros((), self.value.dtype))
        return Shared(usable, *(_stable.rows_where(mask, x) for x in (self.rows, self.size)))

    def norms(self) -> tuple[Array, Array]:
        relative = _stable.relative_bound(self.value.size, self.size.dtype)
        return self.size, self.size * (1 + relative)

    def sum(self, weights: Array | None) -> Array:
        total = jnp.sum(self.rows if weights is None else weights * self.rows)
        return total * self.value.astype(self.size.dtype)

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


def _gram_by_chunks(mine: Outer, others: Outer) -> Float[Array, "b c"]:
    """<g_i, h_j> from the products, a few of their rows at a time: never (B, m, n) at once."""
    m = mine.left.shape[-1]
    num_examples = mine.left.shape[0] + others.left.shape[0]
    per_row = num_examples * mine.left.shape[1] * mine.right.shape[-1]
    chunk = max(1, min(m, _CHUNK_FLOATS // max(1, per_row)))
    num_chunks = -(-m // chunk)

    def chunked(left):
        left = jnp.pad(left, [(0, 0)] * 3 + [(0, num_chunks * chunk - m)])
        return jnp.moveaxis(left.reshape(*left.shape[:3], num_chunks, chunk), 3, 0)

    def add(total, lefts):
        rows, other_rows = (
            contract("bstm,bstn->bsmn", left, factor.right).reshape(left.shape[0], -1)
            for left, factor in zip(lefts, (mine, others))
        )
        return total + contract("bk,ck->bc", rows, other_rows), None

    dtype = widened(mine.size, others.size)
    start = jnp.zeros((mine.left.shape[0], others.left.shape[0]), dtype)
    return lax.scan(add, start, (chunked(mine.left), chunked(others.left)))[0]


def _weighted(weights: Array, x: Array) -> Array:
    """w_i x_i, as a matrix: a bias and its weight then share the product."""
    matrix = x.reshape(x.shape[0], size_of(x.shape[1:]))
    return (weights.astype(widened(weights, x))[:, None] * matrix).reshape(x.shape)


def gram_is_cheaper(num_tokens: int, m: int, n: int) -> bool:
    """Whether T x T Grams beat the (m, n) product: half its flops, and half its memory.

    At equal flops they lose: the product also serves the sum that follows.
    """
    return 2 * num_tokens * (m + n) < m * n


def gram_is_tight(num_tokens: int, m: int, n: int) -> bool:
    """Whether the Gram trick's rounding bound is small for tokens that neither help nor cancel."""
    return _gram_roundings(1, num_tokens, m, n) * num_tokens <= LOOSE


def _gram_roundings(num_blocks: int, num_tokens: int, m: int, n: int) -> int:
    """Roundings in the square, as a multiple of sum_s (sum_t |left| |right|)^2."""
    return m + n + 2 * num_tokens + num_blocks + _stable.SLACK


def _token_norms(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """(p, e, e_left): |left_t| |right_t| = p 2^e with one e per example, and left's exponents."""
    left_norm, left_e = _stable.norm_parts(left)
    right_norm, right_e = _stable.norm_parts(right)
    both = left_e + right_e
    top = jnp.max(both, axis=(1, 2), initial=jnp.iinfo(jnp.int32).min // 2)
    dtype = widened(left_norm, right_norm)
    tokens = left_norm.astype(dtype) * right_norm.astype(dtype)
    return _stable.scale_by(tokens, both - top[:, None, None]), top, left_e


def _balanced(left: Array, right: Array) -> tuple[Array, Array, Array, Array]:
    """Both factors scaled by powers of two, token by token, so that no square leaves the range.

    Returns (left, right, exponent, size): the product is 2^exponent times that of the new factors,
    none of whose tokens exceeds one in magnitude, and `size` is theirs.
    """
    tokens, top, left_e = _token_norms(left, right)
    dtype = tokens.dtype
    left = _stable.scale_by(left.astype(dtype), -left_e[..., None])
    right = _stable.scale_by(right.astype(dtype), (left_e - top[:, None, None])[..., None])
    return left, right, top, jnp.sqrt(jnp.sum(tokens.sum(-1) ** 2, -1))


def _gram_norms(left: Array, right: Array, top: Array, size: Array) -> tuple[Array, Array]:
    """||sum_t l_t r_t^T||^2 = sum_tu (l_t . l_u)(r_t . r_u), and an upper bound on the norm.

    Each (l_t . l_u) is off by at most m u |l_t| |l_u|, so the square is off by a number of
    roundings times (sum_t |l_t| |r_t|)^2, however much its terms cancel.
    """
    _, num_blocks, num_tokens, m = left.shape
    roundoff = unit_roundoff(size.dtype)
    lefts = contract("bstm,bsum->bstu", left, left)
    rights = contract("bstn,bsun->bstu", right, right)
    # Without the barrier XLA joins the sums over t and u into one of T^2 terms.
    partial = lax.optimization_barrier(jnp.sum(lefts * rights, axis=-1))
    square = jnp.maximum(jnp.sum(partial, axis=(1, 2)), 0)
    roundings = _gram_roundings(num_blocks, num_tokens, m, right.shape[-1])
    upper = jnp.sqrt(square + roundings * roundoff * 1.01 * size**2)
    upper = upper + (num_tokens + _stable.SLACK) * roundoff * size  # the contribution's own sum
    return _stable.scale_by(jnp.sqrt(square), top), _stable.scale_by(upper, top)


def _direct_norms(left: Array, right: Array, top: Array, size: Array) -> tuple[Array, Array]:
    """||sum_t l_t r_t^T|| from the product itself, a few examples at a time."""
    num_examples, num_blocks, num_tokens, m = left.shape
    roundoff = unit_roundoff(size.dtype)
    per_example = num_blocks * m * right.shape[-1]

    def one(pair):
        product = contract("stm,stn->smn", *pair).reshape(per_example)
        return jnp.sqrt(_stable.sum_squares(product))

    chunk = max(1, min(num_examples, _CHUNK_FLOATS // max(1, per_example)))
    if chunk == num_examples:
        norms = jax.vmap(one)((left, right))
    else:
        norms = lax.map(one, (left, right), batch_size=chunk)
    relative = 1 + _stable.relative_bound(per_example, size.dtype)
    upper = norms * relative + 2 * (num_tokens + _stable.SLACK) * roundoff * size
    return _stable.scale_by(norms, top), _stable.scale_by(upper, top)
