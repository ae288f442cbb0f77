"""Sums of outer products: weights that multiply."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._meshes import local_params
from jaxunlearn.kernels._stable import Limits, Parts, contract, size_of, unit_roundoff, widened
from jaxunlearn.kernels.factors._protocol import (
    CHUNK_FLOATS,
    LOOSE,
    Factor,
    Plan,
    Steps,
    built,
    gram_by_rows,
    pack,
    row_chunk,
    take_rows,
    tightened,
    unpack,
    weighted,
)

_MASKED_FLOATS = 1 << 13


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right", "size", "live", "limits"],
    meta_fields=["steps", "given"],
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """g_i[s] = sum_t left_i[s, t] right_i[s, t]^T, then moved along `steps`.

    left: (B, S, T, m).  right: (B, S, T, n).  S counts blocks that never meet (attention heads of a
    stacked weight; usually 1), T the tokens that are summed over (1 for a plain dense layer).
    given: "left" or "right" where that is an input of the caller's: it is not masked, which would
    copy it, and live, (B,), says in which rows it may be read. None: neither.
    """

    left: Float[Array, "b s t m"]
    right: Float[Array, "b s t n"]
    size: Float[Array, " b"]
    steps: Steps
    limits: Limits
    given: str | None = None
    live: Bool[Array, " b"] | None = None

    token_axis = 2

    @classmethod
    def of(cls, left: Array, right: Array, steps: Steps) -> "Outer":
        """Computes `size` = sqrt(sum_s (sum_t |left| |right|)^2): the norm, for one token."""
        return built([cls.plan(left, right, steps)])[0]

    @classmethod
    def plan(cls, left: Array, right: Array, steps: Steps, given: str | None = None) -> Plan:
        """`of`, as a plan."""
        left_parts, right_parts = yield [left, right]
        tokens, scale, _ = _token_norms(left_parts, right_parts)
        size = _stable.scale_by(jnp.sqrt(jnp.sum(tokens.sum(-1) ** 2, -1)), scale)
        live = None if given is None else jnp.isfinite(size) | True  # as local as `size`
        sides = [(left_parts, left), (right_parts, right)]
        (own, flushed), (other, _) = sides if _weighs_left(left, right, given) else sides[::-1]
        limits = Limits.of(own, other, flushed.shape[-1], size.dtype)
        return cls(left, right, size, steps, limits, given, live)

    @property
    def floor(self) -> float:
        num_blocks, m = self.left.shape[1], self.left.shape[-1]
        taken = _stable.underflow(num_blocks * m * self.right.shape[-1], self.size.dtype)
        return (2 * self.num_tokens + 1) * taken

    @property
    def num_tokens(self) -> int:
        """How many products are added up."""
        return self.left.shape[2]

    @property
    def floats(self) -> int:
        return size_of(self.left.shape[1:]) + size_of(self.right.shape[1:])

    def scaled(self, exponents: Array) -> "Outer":
        """Times 2^e: (B,) exponents."""
        left, right, top, _ = _balanced(self.left, self.right)
        right = _stable.scale_by(right, (top + exponents)[:, None, None, None])
        size = _stable.scale_by(self.size, exponents)
        return Outer(left, right, size, self.steps, self.limits)

    def part(self, start: Array, count: int) -> "Outer":
        return take_rows(self, start, count)

    def kept(self, mask: Array) -> "Outer":
        left, right, size = (
            _stable.rows_where(mask, x) for x in (self.left, self.right, self.size)
        )
        live = None if self.live is None else self.live & mask
        left = self.left if self.given == "left" else left
        right = self.right if self.given == "right" else right
        return dataclasses.replace(self, left=left, right=right, size=size, live=live)

    def norms(self) -> tuple[Array, Array]:
        _, num_blocks, num_tokens, m = self.left.shape
        roundoff = unit_roundoff(self.size.dtype)
        if num_tokens == 1:
            depth = m + self.right.shape[-1] + num_blocks + _stable.SLACK
            return self.size, self.size * (1 + depth * roundoff)
        if not gram_is_tight(num_tokens, m, self.right.shape[-1]):
            return _direct_norms(*_balanced(self.left, self.right))
        balanced = _balanced(self.left, self.right)
        return tightened(*_gram_norms(*balanced), lambda: _direct_norms(*balanced))

    def sum(self, weights: Array | None) -> Array:
        left, right = self.left, self.right
        if weights is not None:
            if _weighs_left(left, right, self.given):
                left = weighted(weights, left)
            else:
                right = weighted(weights, right)
        left, right = _matrix(left), _matrix(right)
        if self.live is None:
            total = _product(left, right)
        else:
            live = jnp.repeat(self.live, left.shape[0] // self.live.shape[0])
            given = functools.partial(_product_of_live, self.given == "left")
            plain = lambda live, left, right: _product(left, right)
            total = lax.cond(jnp.all(self.live), plain, given, live, left, right)
        return unpack(total[None], self.steps)[0]

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


def _weighs_left(left: Array, right: Array, given: str | None) -> bool:
    """Whether weights go to the left: to the smaller, not to what is given, which may be NaN."""
    return left.shape[-1] < right.shape[-1] if given is None else given == "right"


def _matrix(x: Array) -> Array:
    """(B T, m) for one block: XLA is slow with axes of length one, and gives them odd layouts."""
    return x.reshape(size_of(x.shape[:3]), x.shape[-1]) if x.shape[1] == 1 else x


def _product(left: Array, right: Array) -> Array:
    """sum_i left_i right_i^T, (S, m, n)."""
    if left.ndim == 2:
        return contract("km,kn->mn", left, right)[None]
    return contract("bstm,bstn->smn", left, right)


def _product_of_live(of_left: bool, live: Array, left: Array, right: Array) -> Array:
    """`_product` without the rows that are not live: zero in the one factor, NaN in the other.

    The other is masked a few columns at a time: it may be as large as the batch.
    """
    given, other = (left, right) if of_left else (right, left)
    length, num_blocks = given.shape[-1], 1 if left.ndim == 2 else left.shape[1]
    per_column = size_of(given.shape[:-1]) + num_blocks * other.shape[-1]
    columns = min(max(8, _MASKED_FLOATS // max(1, per_column)), length)

    def add(state):
        start, total = state  # a start beyond the last possible one is moved back, here and there
        some = lax.dynamic_slice_in_dim(given, start, columns, axis=-1)
        some = _stable.rows_where(live, some)
        product = _product(some, right) if of_left else _product(left, some)
        total = lax.dynamic_update_slice_in_dim(total, product, start, axis=1 if of_left else 2)
        return start + columns, total

    shape = (num_blocks, left.shape[-1], right.shape[-1])
    start = jnp.int32(0), jnp.zeros(shape, widened(left, right))
    start = local_params(start, (left, right, live))
    return lax.while_loop(lambda state: state[0] < length, add, start)[1]


def _gram_by_chunks(mine: Outer, others: Outer) -> Float[Array, "b c"]:
    """<g_i, h_j> from the products, a few of their rows at a time: never (B, m, n) at once."""
    m = mine.left.shape[-1]
    num_examples = mine.left.shape[0] + others.left.shape[0]
    per_row = num_examples * mine.left.shape[1] * mine.right.shape[-1]
    chunk = max(1, min(m, CHUNK_FLOATS // max(1, per_row)))
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


def _token_norms(left: Parts, right: Parts) -> tuple[Array, Array, Array]:
    """(p, e, e_left): |left_t| |right_t| = p 2^e with one e per example, and left's exponents."""
    (left_norm, left_e), (right_norm, right_e) = left, right
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
    tokens, top, left_e = _token_norms(*_stable.all_norm_parts([left, right]))
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

    chunk = row_chunk(num_examples, per_example)
    if chunk == num_examples:
        norms = jax.vmap(one)((left, right))
    else:
        norms = lax.map(one, (left, right), batch_size=chunk)
    relative = 1 + _stable.relative_bound(per_example, size.dtype)
    upper = norms * relative + 2 * (num_tokens + _stable.SLACK) * roundoff * size
    return _stable.scale_by(norms, top), _stable.scale_by(upper, top)
