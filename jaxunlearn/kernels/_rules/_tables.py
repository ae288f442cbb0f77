"""The rule for tables: reading rows is `gather`, and its gradient a `scatter-add` into zeros."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxunlearn.kernels._jaxpr import Node, derive
from jaxunlearn.kernels._rules._trail import Form, Trail, is_zero, rule, without
from jaxunlearn.kernels._stable import size_of
from jaxunlearn.kernels.factors import Lookup


@rule("scatter-add", "scatter_add")
def _scatter_add(node: Node, trail: Trail):
    """Whole rows added to a table of zeros: which rows, and what."""
    table, index, updates = node.operands
    numbers = node.params["dimension_numbers"]
    looked_up = tuple(int(axis) for axis in numbers.scatter_dims_to_operand_dims)
    inserted = tuple(int(axis) for axis in numbers.inserted_window_dims)
    batching = tuple(int(axis) for axis in numbers.operand_batching_dims)
    if not is_zero(table) or sorted(looked_up) != sorted(inserted) or not looked_up:
        return None
    windows = [a for a in range(len(table.shape)) if a not in inserted and a not in batching]
    window_axes = [int(axis) for axis in numbers.update_window_dims]
    if [updates.shape[axis] for axis in window_axes] != [table.shape[axis] for axis in windows]:
        return None
    token_axes = [axis for axis in range(len(updates.shape)) if axis not in window_axes]
    num_examples = table.shape[trail.batch_axis]
    if batching == (trail.batch_axis,):
        place = int(numbers.scatter_indices_batching_dims[0])
        index_order = (place, *without(range(len(index.shape)), place))
        order = (token_axes[place], *without(token_axes, place), *window_axes)
    elif not batching and trail.batch_axis in windows and not index.varies:
        place = windows.index(trail.batch_axis)
        index_order = None
        order = (window_axes[place], *token_axes, *without(window_axes, place))
        windows = [axis for axis in windows if axis != trail.batch_axis]
    else:
        return None
    lengths = tuple(table.shape[axis] for axis in looked_up)
    num_rows, width = size_of(lengths), size_of(tuple(table.shape[axis] for axis in windows))
    clips = node.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def ids_of(index):
        if index_order is None:
            index = jnp.broadcast_to(index, (num_examples, *index.shape))
        else:
            index = index.transpose(index_order)
        return index.reshape(num_examples, -1, len(lengths))

    def flat(index):
        total = jnp.zeros((), jnp.int32)
        for k, length in enumerate(lengths):
            total = total * length + jnp.clip(ids_of(index)[..., k], 0, length - 1)
        return total.astype(jnp.int32)

    def rows(updates, index):
        values = updates.transpose(order).reshape(num_examples, -1, width)
        if clips:
            return values
        ids = ids_of(index)
        inside = jnp.all((ids >= 0) & (ids < jnp.asarray(lengths)), axis=-1)
        return lax.select(jnp.broadcast_to(inside[..., None], values.shape), values, 0 * values)

    # (num_rows, width), to looked-up axes and windows, to the table's own order.
    shape = (*lengths, *(table.shape[axis] for axis in windows))
    axes = [axis - (axis > trail.batch_axis) for axis in (*looked_up, *windows)]
    turn = tuple(axes.index(axis) for axis in range(len(axes)))
    steps: tuple = (("reshape", (num_rows, width), shape),)
    steps += () if turn == tuple(range(len(turn))) else (("transpose", turn, ()),)
    nodes = (derive(flat, index), trail.scaled(derive(rows, updates, index)))
    return Form(Lookup, nodes, (num_rows, (*steps, *trail.steps)))
