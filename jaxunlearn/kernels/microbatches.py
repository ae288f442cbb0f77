"""Per-example gradients of a large batch, a few rows at a time."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxunlearn.kernels._meshes import placed_as_rows
from jaxunlearn.kernels._primitives import convolves
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.per_example import (
    BatchOfOne,
    evaluate_rows,
    hashable,
    padding_of,
)
from jaxunlearn.kernels.rowwise import check_operands, local_params, num_rows_of
from jaxunlearn.types import Batch, LossFn, Params

Consume = Callable[[PerExampleGradients], tuple[PyTree, PyTree]]
"""From the gradients of some rows to (what is added up, what is stacked: leaves (rows, ...))."""


def microbatched(
    loss_fn: LossFn,
    consume: Consume,
    *,
    microbatch_size: int,
    has_aux: bool = False,
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Any figures of per-example gradients, in the memory of `microbatch_size` rows.

    Args:
      loss_fn: mean of per-example losses for any batch size.
      consume: called on the `PerExampleGradients` of each microbatch; returns (added, stacked):
        pytrees of sums over rows, and of figures per row. The last microbatch is filled up with
        padding rows, which contribute zero and are cut off again.
      microbatch_size: rows at a time, >= 1; it need not divide the batch.
      has_aux: as in `per_example`.

    Returns:
      A function with the arguments of what `per_example` returns -> (added, stacked) of the whole
      batch. It is jitted, and may be jitted again; make it once, not in every step.

    Cost: that of `consume` for all rows. Microbatches after the last row that is not padding are
    skipped. A loop of XLA's runs them, except on CPU where the model convolves: XLA is 20 to 50
    times slower with a convolution inside a loop there, so the microbatches are written out one
    after the other, and compile time grows with their number.

    >>> import jax.numpy as jnp
    >>> both = lambda grads: (grads.clipped_sum(5.0), grads.norms())
    >>> step = microbatched(lambda w, x: jnp.mean(x * w), both, microbatch_size=2)
    >>> step(0.0, jnp.array([1.0, 2.0, 3.0]))
    (Array(6., dtype=float32), Array([1., 2., 3.], dtype=float32))
    """
    microbatch_size = check_size(microbatch_size)
    row_loss = BatchOfOne(hashable(loss_fn), has_aux)

    @jax.jit
    def run(params, batch, keys, padding):
        step = functools.partial(over_microbatches, row_loss, consume, microbatch_size)
        return placed_as_rows(step, params, batch, keys, None, padding, batch=batch)

    def figures(params: Params, batch: Batch, *, keys=None, is_padding_example=None, ids=None):
        check_operands(loss_fn, params, batch, keys)
        padding = padding_of(is_padding_example, ids, num_rows_of(batch))
        return run(params, batch, keys, padding)

    return figures


def check_size(microbatch_size) -> int:
    """The size as Python's own, of any kind of integer; refuses a microbatch that is none."""
    try:
        size = operator.index(microbatch_size)
    except TypeError:
        size = None
    if size is None or isinstance(microbatch_size, bool | np.bool_):
        raise ValueError(f"Expected an integer microbatch_size, got {microbatch_size!r}.")
    if size < 1:
        raise ValueError(f"Expected microbatch_size={size} >= 1.")
    return size


def over_microbatches(
    row_loss: Callable,
    consume: Consume,
    microbatch_size: int | None,
    params: Params,
    rows: Batch,
    keys,
    shared,
    padding: Array | None,
    *,
    spmd_axis_name: Any = None,
) -> tuple[PyTree, PyTree]:
    """`consume` over all rows, in microbatches where there is more than one. Trace it."""
    num_rows = num_rows_of(rows)

    def one(part):
        rows, keys, padding = part
        gradients = evaluate_rows(
            row_loss, params, rows, keys, shared, padding, spmd_axis_name=spmd_axis_name
        )
        return consume(gradients)

    if microbatch_size is None or microbatch_size >= num_rows:
        return one((rows, keys, padding))
    num_parts = -(-num_rows // microbatch_size)
    missing = num_parts * microbatch_size - num_rows
    if padding is None and missing:
        padding = jnp.zeros((num_rows,), bool)
    operands = _filled_up((rows, keys), missing, False), _filled_up(padding, missing, True)
    (rows, keys), padding = operands
    parts = jax.tree.map(
        lambda leaf: leaf.reshape(num_parts, microbatch_size, *leaf.shape[1:]),
        (rows, keys, padding),
    )
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    loop = _written_out if _convolves_on_cpu(row_loss, params, first, shared) else _looped
    added, stacked = loop(one, parts, num_parts)
    joined = lambda leaf: leaf.reshape(num_parts * microbatch_size, *leaf.shape[2:])[:num_rows]
    return added, jax.tree.map(joined, stacked)


def _filled_up(tree: PyTree, missing: int, fill_with: bool) -> PyTree:
    """`missing` more rows: copies of the first, which are padding; True for the padding itself."""

    def fill(leaf):
        more = jnp.ones((missing,), bool) if fill_with else jnp.repeat(leaf[:1], missing, axis=0)
        return jnp.concatenate([leaf, more])

    return jax.tree.map(fill, tree) if missing else tree


def _convolves_on_cpu(row_loss, params, part, shared) -> bool:
    """Whether XLA would have to run convolutions inside a loop on CPU."""
    if jax.default_backend() != "cpu":
        return False
    row = jax.tree.map(lambda leaf: leaf[0], part[:2])
    return convolves(jax.make_jaxpr(row_loss)(params, *row, shared))


def _written_out(one, parts, num_parts: int) -> tuple[PyTree, PyTree]:
    """One microbatch after the other, and none before the one before it is done."""
    added, stacked = None, []
    for k in range(num_parts):
        part = jax.tree.map(functools.partial(_part_after, added, k), parts)
        new, figures = one(part)
        added = new if added is None else jax.tree.map(jnp.add, added, new)
        stacked.append(figures)
    return added, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)


def _part_after(done: PyTree, k: int, leaf: Array) -> Array:
    """Row k of `leaf`, read when `done` is there.

    XLA on CPU takes barriers out before it orders the work, and would hold all microbatches at
    once. An index that can only be k, but that it cannot know to be, is a dependency that stays.
    """
    firsts = [x.ravel()[0] for x in jax.tree.leaves(done) if x.size]
    if not firsts:
        return leaf[k]
    never = functools.reduce(jnp.logical_or, ((x != x) & (x == 0) for x in firsts))
    return lax.dynamic_index_in_dim(leaf, k + never.astype(jnp.int32), keepdims=False)


def _looped(one, parts, num_parts: int) -> tuple[PyTree, PyTree]:
    """A loop over the microbatches that hold a row that is not padding, and those between."""
    padding = parts[2]
    last: Any = num_parts
    if padding is not None:
        live = ~jnp.all(padding, axis=1)
        last = jnp.max(jnp.where(live, jnp.arange(1, num_parts + 1), 0))
    shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = lambda lead, tree: jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), tree)
    varying = lambda tree: local_params(tree, parts)

    def step(k, carry):
        added, stacked = carry
        part = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, k, keepdims=False), parts)
        new, figures = one(part)
        put = lambda out, leaf: lax.dynamic_update_index_in_dim(out, leaf, k, 0)
        return varying((jax.tree.map(jnp.add, added, new), jax.tree.map(put, stacked, figures)))

    start = zeros((), shapes[0]), zeros((num_parts,), shapes[1])
    return lax.fori_loop(0, last, step, varying(start))
