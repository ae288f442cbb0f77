"""What all curvature products share: masks, tangents, microbatches, rows left out, the divisor.

A product is sum_i w_i M_i v / num_rows + damping v. A kind of curvature gives `maps`: a function
(params, batch, weights, keys) -> (v -> sum_i w_i M_i v) that looks at no row of weight zero, and
`usable`, a function (params, batch, keys) -> which rows are finite, asked only when a sum is not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxunlearn.kernels import _cpu
from jaxunlearn.kernels._checks import check_number
from jaxunlearn.kernels._meshes import in_automatic_axes, local_params, specs_of
from jaxunlearn.kernels._operands import as_params, check_left_out, check_like, left_out
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.rowwise import (
    as_weights,
    check_rows,
    fill_rows,
    finite_rows,
    num_rows_of,
)
from jaxunlearn.tree import is_inexact, num_parameters
from jaxunlearn.types import Batch, Params

SMALL_PARAMETERS = 1 << 16
"""On CPU, parameters up to this many take all tangents in one `vmap`, larger ones one at a time.

Measured on 2 cores, batch 128, 64 tangents, gradients per tangent, vmap / one at a time: logistic
784x10 (7850 parameters) 0.2 / 0.6; MLP 784-256-256-10 (270 thousand) 1.36 / 1.10; transformer
(200 thousand) 1.11 / 0.85; CNN (500 thousand) 2.2 / 1.2.
"""

ACCELERATOR_FLOATS = 1 << 26
"""Elsewhere as many tangents at once as hold this many floats. Bounds memory; not tuned."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a product is computed; none of it changes what it is, but for `damping`."""

    damping: Any = 0.0
    microbatch_size: int | None = None
    tangents_at_once: int | None = None

    def __post_init__(self):
        check_damping(self.damping)
        for name in ("microbatch_size", "tangents_at_once"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"Expected {name}={size} >= 1.")


def check_damping(damping: Any) -> None:
    """Refuse damping that is negative, where the number can be seen, or not one number."""
    if jnp.shape(damping) != ():
        raise ValueError(f"Expected damping to be one number, got shape {jnp.shape(damping)}.")
    check_number("damping", damping, least=0.0)


def single(many: Callable[..., Params]) -> Callable[..., Params]:
    """The product with one vector, from that with a stack."""

    def product(params: Params, batch: Batch, vector: Params, **options) -> Params:
        params = as_params(params)
        check_like(params, vector)
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], vector)
        return jax.tree.map(lambda leaf: leaf[0], many(params, batch, stacked, **options))

    return product


def named(many: Callable[..., Params], name: str) -> Callable[..., Params]:
    """`many`, under the name of its factory in Python's own errors."""
    many.__qualname__ = f"{name}(...)"
    return many


def products(
    maps: Callable,
    usable: Callable,
    options: Options,
    check: Callable[[Any], None],
    whole: Callable | None = None,
) -> Callable[..., Params]:
    """The function (params, batch, vectors, *, weights, num_rows, keys, leave_out) -> products.

    check: keys -> None, refusing keys that the model does not take.
    whole: (params, batch) -> (mean loss, v -> mean_i M_i v), the rows seen together. Where every
      row weighs one it is tried first: rows as batches of one cost a tenth more, their masks
      another. A mean loss that is finite says that every row's is.
    """

    def summed(params, batch, weights, keys, vectors, at_once):
        def sums(weights, rows, live):
            linear = _cpu.linear(maps(params, rows, jnp.where(live, weights, 0), keys))
            return over_tangents(lambda v: _with_badness(linear(v)), vectors, at_once)

        def without_bad_rows(_):
            kept = live & usable(params, batch, keys)
            again, _ = sums(weights, fill_rows(batch, kept), kept)
            any_left = jnp.any(kept)
            return jax.tree.map(lambda leaf: jnp.where(any_left, leaf, 0).astype(leaf.dtype), again)

        # A dead row that spoils the sum is only then replaced: copying the batch costs a tenth.
        live = (weights != 0) & finite_rows(batch)
        usual, bad = sums(weights, batch, live)
        return lax.cond(jnp.any(bad), without_bad_rows, lambda kept: kept, usual)

    def together(params, batch, vectors, at_once, finish, whole=whole):
        def row_by_row(_):
            weights = jnp.ones((num_rows_of(batch),))
            sums = summed(params, batch, weights, None, vectors, at_once)
            means = jax.tree.map(lambda leaf: leaf / max(1, len(weights)), widen(sums))
            return jax.tree.map(finish, means, vectors)

        mean, linear = whole(params, batch)
        linear = _cpu.linear(linear)
        finished = lambda v: jax.tree.map(finish, widen(linear(v)), v)
        usual = over_tangents(finished, vectors, at_once)
        seen = [mean, *filter(is_inexact, jax.tree.leaves(batch))]
        bad = not_finite(lax.stop_gradient(seen))
        return lax.cond(bad, row_by_row, lambda kept: kept, usual)

    return driven(summed, options, check, together if whole else None)


def _with_badness(product):
    """A product, and whether it is spoilt: looked at while it is in the cache."""
    return product, not_finite(jax.tree.leaves(lax.stop_gradient(product)))


def driven(
    summed: Callable,
    options: Options,
    check: Callable[[Any], None],
    together: Callable | None = None,
) -> Callable[..., Params]:
    """The same from `summed`, (params, batch, weights, keys, vectors, at_once) -> sum_i w_i M_i v.

    Microbatches, one row left out for each vector, the divisor and the damping are added to it.
    together: (params, batch, vectors, at_once, finish) -> finish(mean_i M_i v, v), for a whole
      batch without weights.
    """

    def summed_at(at_once):
        return _cpu.in_loops(lambda *operands: summed(*operands, at_once))

    def total(params, batch, weights, keys, vectors, at_once):
        size = options.microbatch_size
        if size is None or size >= len(weights):
            return widen(summed_at(at_once)(params, batch, weights, keys, vectors))

        def body(sums, chunk):
            more = summed_at(at_once)(params, *chunk, vectors)
            return jax.tree.map(jnp.add, sums, widen(more)), None

        start = jax.tree.map(jnp.zeros_like, widen(vectors))
        return lax.scan(body, start, _chunked((batch, weights, keys), size))[0]

    def own_share(params, batch, weights, keys, vectors, rows, at_once):
        """w_i M_i v for the one row i that each v leaves out."""

        def one(pair):
            row, vector = pair
            take = lambda leaf: lax.dynamic_slice_in_dim(jnp.asarray(leaf), row, 1)
            weight = jnp.where(row >= 0, take(weights), 0)
            operands = jax.tree.map(take, batch), weight, jax.tree.map(take, keys)
            stacked = jax.tree.map(lambda leaf: leaf[None], vector)
            return jax.tree.map(lambda leaf: leaf[0], summed_at(1)(params, *operands, stacked))

        return widen(over_tangents(one, (rows, vectors), at_once))

    def many(params, batch, vectors, *, weights=None, num_rows=None, keys=None, leave_out=None):
        num_all = num_rows_of(batch)
        size = options.microbatch_size
        is_whole = size is None or size >= num_all
        plain = together and is_whole and weights is None and keys is None and leave_out is None
        weights = jnp.ones((num_all,)) if weights is None else as_weights(weights)
        check(keys)
        check_rows(batch, weights, keys)
        params = as_params(params)
        check_like(params, vectors, is_stack=True)
        if not jax.tree.leaves(params):
            return vectors
        check_left_out(leave_out, num_all, num_rows_of(vectors))
        vectors = jax.tree.map(lambda v, p: jnp.asarray(v, p.dtype), vectors, params)
        operands = params, batch, vectors, weights, num_rows, keys, leave_out
        return compiled_once(placed_together if plain else placed, *operands)

    see_together: Any = together

    def placed_together(*operands):
        return in_automatic_axes(all_together, *operands, specs=lambda: specs_of(operands[2]))

    def placed(*operands):
        return in_automatic_axes(weighted, *operands, specs=lambda: specs_of(operands[2]))

    def all_together(params, batch, vectors, weights, num_rows, keys, leave_out):
        params, vectors = local_params((params, vectors), (batch, weights, keys))
        share = None if num_rows is None else _inverse(jnp.asarray(num_rows)) * len(weights)
        finish = functools.partial(_finish, share, options.damping)
        with jax.default_matmul_precision("highest"):
            at_once = _tangents_at_once(options, summed, (params, batch, weights, keys), vectors)
            product = _cpu.in_loops(lambda *operands: see_together(*operands, at_once, finish))
            return product(params, batch, vectors)

    def weighted(params, batch, vectors, weights, num_rows, keys, leave_out):
        params, vectors = local_params((params, vectors), (batch, weights, keys))
        weights, rows = _without(weights, leave_out)
        count = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        operands = params, batch, weights, keys
        with jax.default_matmul_precision("highest"):
            at_once = _tangents_at_once(options, summed, operands, vectors)
            sums = total(*operands, vectors, at_once)
            if rows is not None:
                own = own_share(*operands, vectors, rows, at_once)
                sums = jax.tree.map(jnp.subtract, sums, own)
                if num_rows is None:
                    count = count - jnp.where(rows >= 0, weights[rows], 0)
        finish = functools.partial(_finish, _inverse(count), options.damping)
        return jax.tree.map(finish, sums, vectors)

    return many


def _inverse(count):
    """1 / count, and 0 of 0: nothing divided by no rows leaves the damping."""
    return jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))


def _finish(scale, damping, product, vector):
    """scale * product + damping * vector in the parameters' dtype; `scale` None is one.

    `scale` may be one for each vector.
    """
    if scale is not None:
        product = scale.reshape(scale.shape + (1,) * (product.ndim - 1) * scale.ndim) * product
    if not (isinstance(damping, int | float) and damping == 0):
        product = product + damping * vector
    return product.astype(vector.dtype)


def over_tangents(function: Callable[[Any], Any], vectors: Any, at_once: int) -> Any:
    """`function` of each vector of a stack, `at_once` of them side by side."""
    num_tangents = num_rows_of(vectors)
    if num_tangents == 1:  # XLA is slow with an axis of length one in a product
        only = function(jax.tree.map(lambda leaf: leaf[0], vectors))
        return jax.tree.map(lambda leaf: leaf[None], only)
    if at_once >= num_tangents:
        return jax.vmap(function)(vectors)
    return lax.map(function, vectors, batch_size=None if at_once == 1 else at_once)


def _tangents_at_once(options: Options, summed, operands, vectors) -> int:
    """How many tangents go side by side: what was asked for, or what was measured."""
    size = max(1, num_parameters(operands[0]))
    if num_rows_of(vectors) == 1:
        return 1
    if options.tangents_at_once is not None:
        return options.tangents_at_once
    if not _cpu.on_cpu():
        return max(1, ACCELERATOR_FLOATS // size)
    if size > SMALL_PARAMETERS:
        return 1
    first = jax.tree.map(lambda leaf: leaf[:1], vectors)
    convolves = _cpu.has_convolution(lambda *rest: summed(*rest, first, 1), *operands)
    return 1 if convolves else ACCELERATOR_FLOATS // size


@jax.custom_batching.custom_vmap
def not_finite(leaves: list[Array]) -> Bool[Array, ""]:
    """Whether some entry is not finite; under `vmap`, in any of the batch.

    One answer for a whole batch, since a branch on an answer for each would take both sides.
    """
    # Zero times an entry is zero unless it is not finite; XLA on CPU is slow to look at each.
    totals = [jnp.sum(widen(leaf) * 0) for leaf in leaves]
    return ~jnp.isfinite(sum(totals, start=jnp.zeros(())))


@not_finite.def_vmap
def _not_finite_in_any(axis_size, in_batched, leaves):
    del axis_size, in_batched
    return not_finite(leaves), False


def _without(weights, leave_out):
    """Weights with one row at zero, or the row ids (k,) that the tangents leave out."""
    if leave_out is None:
        return weights, None
    rows = left_out(leave_out, len(weights))
    if rows.ndim == 0:
        return jnp.where(jnp.arange(len(weights)) != rows, weights, 0), None
    return weights, rows


def _chunked(rows, size: int):
    """Leaves (B, ...) as (chunks, size, ...), padded with copies of row 0 at weight zero.

    `rows` is (batch, weights, keys); padding weights are zero, so padded rows do not count.
    """
    batch, weights, keys = rows
    pad = -len(weights) % size

    def split(leaf):
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:1], pad, axis=0)]) if pad else leaf
        return leaf.reshape(-1, size, *leaf.shape[1:])

    weights = jnp.concatenate([weights, jnp.zeros((pad,), weights.dtype)])
    batch, keys = jax.tree.map(lambda leaf: split(jnp.asarray(leaf)), (batch, keys))
    return batch, weights.reshape(-1, size), keys
