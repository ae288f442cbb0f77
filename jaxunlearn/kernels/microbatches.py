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

from jaxunlearn.kernels import _cpu, units
from jaxunlearn.kernels._meshes import local_params, placed_as_rows
from jaxunlearn.kernels._primitives import convolves
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.per_example import (
    BatchOfOne,
    evaluate_rows,
    hashable,
    padding_of,
)
from jaxunlearn.kernels.rowwise import check_operands, num_rows_of
from jaxunlearn.types import Batch, LossFn, Params

Consume = Callable[[PerExampleGradients], tuple[PyTree, PyTree]]
"""From the gradients of some rows to (what is added up, what is stacked: leaves (rows, ...))."""

_MOST_WRITTEN_OUT = 32
"""40 microbatches of a CNN took 38 s to compile written out, and 4 s in a loop."""


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
        padding rows, which contribute zero and are cut off again. Sums of microbatches are added in
        float32 or wider, and cast back to the dtype `consume` gave.
      microbatch_size: rows at a time, >= 1; it need not divide the batch.
      has_aux: as in `per_example`.

    Returns:
      A function with the arguments of what `per_example` returns -> (added, stacked) of the whole
      batch. It is jitted, and may be jitted again; make it once, not in every step. With
      `units_of_rows=`, `num_units=` and `max_rows_per_unit=`, those of
      `PerExampleGradients.by_unit`, `consume` sees the gradients of units, and figures are stacked
      to (num_units, ...). Rows of a unit may stand anywhere in the batch: a microbatch is
      microbatch_size // max_rows_per_unit whole units. In a trace a unit with more rows that are
      not padding than that is not finite.

    Cost: that of `consume` for all rows; with units, of num_units * max_rows_per_unit rows.
    Microbatches after the last row that is not padding are skipped. A loop of XLA's runs them,
    except on CPU where the model convolves: XLA is 20 to 50 times slower with a convolution inside
    a loop there, so up to 32 microbatches are written out one after the other, and compile time
    grows with their number. More of them run in a loop, with the convolutions laid out for it.

    Raises:
      ValueError: a microbatch that holds no row, or no whole unit; units as for `by_unit`.

    >>> import jax.numpy as jnp
    >>> both = lambda grads: (grads.clipped_sum(5.0), grads.norms())
    >>> step = microbatched(lambda w, x: jnp.mean(x * w), both, microbatch_size=2)
    >>> step(0.0, jnp.array([1.0, 2.0, 3.0]))
    (Array(6., dtype=float32), Array([1., 2., 3.], dtype=float32))
    """
    microbatch_size = check_size(microbatch_size)
    row_loss = BatchOfOne(hashable(loss_fn), has_aux)

    @functools.partial(jax.jit, static_argnums=0)
    def run(sizes, params, batch, keys, padding, units_of_rows):
        step = functools.partial(over_microbatches, row_loss, consume, microbatch_size, sizes)
        operands = params, batch, keys, None, padding, units_of_rows
        return placed_as_rows(step, *operands, batch=batch)

    def figures(
        params: Params,
        batch: Batch,
        *,
        keys=None,
        is_padding_example=None,
        ids=None,
        units_of_rows=None,
        num_units: int | None = None,
        max_rows_per_unit: int | None = None,
    ):
        check_operands(loss_fn, params, batch, keys)
        num_rows = num_rows_of(batch)
        padding = padding_of(is_padding_example, ids, num_rows)
        said = units_of_rows, num_units, max_rows_per_unit
        sizes = unit_sizes(*said, num_rows, microbatch_size)
        return run(sizes, params, batch, keys, padding, units_of_rows)

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


def unit_sizes(
    units_of_rows, num_units, max_rows, num_rows: int, microbatch_size: int | None
) -> tuple[int, int] | None:
    """(units, rows of one at most), or None where rows are their own units."""
    if (units_of_rows is None) != (num_units is None) or (units_of_rows is None and max_rows):
        raise ValueError("Expected units_of_rows= and num_units= together, or none of them.")
    if units_of_rows is None:
        return None
    most = units.check(units_of_rows, num_rows, num_units, max_rows, microbatch_size)
    if microbatch_size is not None and most > microbatch_size:
        raise ValueError(
            f"Expected microbatch_size={microbatch_size} >= {most}, the rows of one unit: a "
            "microbatch holds whole units. Say max_rows_per_unit= if units are traced."
        )
    return num_units, most


def over_microbatches(
    row_loss: Callable,
    consume: Consume,
    microbatch_size: int | None,
    sizes: tuple[int, int] | None,
    params: Params,
    rows: Batch,
    keys,
    shared,
    padding: Array | None,
    units_of_rows: Array | None,
    *,
    spmd_axis_name: Any = None,
) -> tuple[PyTree, PyTree]:
    """`consume` over all rows, in microbatches where there is more than one. Trace it.

    sizes: of `unit_sizes`.
    """
    num_rows = num_rows_of(rows)

    def gradients(rows, keys, padding):
        operands = row_loss, params, rows, keys, shared, padding
        return evaluate_rows(*operands, spmd_axis_name=spmd_axis_name)

    def of_rows(part):
        return consume(gradients(*part))

    def of_units(part):
        places, fits, padding = part
        rest = places == num_rows if padding is None else (places == num_rows) | padding[:, None]
        index, rest = (places * ~rest).ravel(), rest.ravel()
        own_rows, own_keys = jax.tree.map(lambda leaf: leaf[index], (rows, keys))
        return consume(units.side_by_side(gradients(own_rows, own_keys, rest), fits, padding))

    if microbatch_size is None or microbatch_size >= num_rows or (sizes and not sizes[0]):
        if sizes is None:
            return of_rows((rows, keys, padding))
        merged = units.merge(gradients(rows, keys, padding), jnp.asarray(units_of_rows), *sizes)
        return consume(merged)
    in_parts = functools.partial(
        _in_parts, convolving=_convolves_on_cpu(row_loss, params, rows, keys, shared)
    )
    if sizes is None:
        return in_parts(of_rows, (rows, keys), padding, num_rows, microbatch_size)
    table = units.table_of(jnp.asarray(units_of_rows), padding, *sizes)
    return in_parts(of_units, table, None, sizes[0], microbatch_size // sizes[1])


def _in_parts(step, operands, padding, count: int, size: int, *, convolving: bool):
    """`step` over parts (*operands, padding) of some size each; figures of `count`."""
    num_parts = -(-count // size)
    missing = num_parts * size - count
    if padding is None and missing:
        padding = jnp.zeros((count,), bool)
    parts = jax.tree.map(
        lambda leaf: leaf.reshape(num_parts, size, *leaf.shape[1:]),
        (*_filled_up(operands, missing, False), _filled_up(padding, missing, True)),
    )
    if convolving and num_parts <= _MOST_WRITTEN_OUT:
        added, stacked = _written_out(step, parts, num_parts)
    else:
        added, stacked = _looped(_cpu.in_loops(step) if convolving else step, parts, num_parts)
    joined = lambda leaf: leaf.reshape(num_parts * size, *leaf.shape[2:])[:count]
    return added, jax.tree.map(joined, stacked)


def _filled_up(tree: PyTree, missing: int, fill_with: bool) -> PyTree:
    """`missing` more rows: copies of the first, which are padding; True for the padding itself."""

    def fill(leaf):
        more = jnp.ones((missing,), bool) if fill_with else jnp.repeat(leaf[:1], missing, axis=0)
        return jnp.concatenate([leaf, more])

    return jax.tree.map(fill, tree) if missing else tree


def _convolves_on_cpu(row_loss, params, rows, keys, shared) -> bool:
    """Whether XLA would have to run convolutions inside a loop on CPU."""
    if jax.default_backend() != "cpu":
        return False
    row = jax.tree.map(lambda leaf: leaf[0], (rows, keys))
    return convolves(jax.make_jaxpr(row_loss)(params, *row, shared))


def _written_out(one, parts, num_parts: int) -> tuple[PyTree, PyTree]:
    """One microbatch after the other, and none before the one before it is done."""
    added, stacked = None, []
    for k in range(num_parts):
        part = jax.tree.map(functools.partial(_part_after, added, k), parts)
        new, figures = one(part)
        wide = jax.tree.map(lambda x: x.astype(_sum_dtype(x)), new)
        added = wide if added is None else jax.tree.map(jnp.add, added, wide)
        stacked.append(figures)
    return _cast_like(added, new), jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)


def _sum_dtype(x) -> Any:
    """The dtype to add microbatches up in: bfloat16 stops counting ones at 256."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.promote_types(x.dtype, jnp.float32) if is_float else x.dtype


def _cast_like(added: PyTree, like: PyTree) -> PyTree:
    """The sums in the dtypes of what was added."""
    return jax.tree.map(lambda total, x: total.astype(x.dtype), added, like)


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
    zeros = lambda s: jnp.zeros(s.shape, _sum_dtype(s))
    rows = lambda s: jnp.zeros((num_parts, *s.shape), s.dtype)
    varying = lambda tree: local_params(tree, parts)

    def step(k, carry):
        added, stacked = carry
        part = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, k, keepdims=False), parts)
        new, figures = one(part)
        put = lambda out, leaf: lax.dynamic_update_index_in_dim(out, leaf, k, 0)
        return varying((jax.tree.map(jnp.add, added, new), jax.tree.map(put, stacked, figures)))

    start = jax.tree.map(zeros, shapes[0]), jax.tree.map(rows, shapes[1])
    added, stacked = lax.fori_loop(0, last, step, varying(start))
    return _cast_like(added, shapes[0]), stacked
