"""Rules for products: the operands of `dot_general`, and of a broadcast `mul`, are the factors."""

import jax.numpy as jnp

from jaxunlearn.kernels._jaxpr import Node, derive
from jaxunlearn.kernels._rules._moves import _scaled
from jaxunlearn.kernels._rules._trail import Form, Trail, rule, walk, without
from jaxunlearn.kernels._stable import contract, size_of
from jaxunlearn.kernels.factors import Outer, Steps


@rule("dot_general")
def _dot_general(node: Node, trail: Trail):
    """A product with the example axis among its batch dimensions: its operands are the factors."""
    contracted, batched = node.params["dimension_numbers"]
    position = trail.batch_axis
    if position >= len(batched[0]):
        found = _through_constant(node, trail)
        return _with_constant(node, trail) if found is None else found

    def canonical(operand: Node, batch, contract_axes):
        ndim = len(operand.shape)
        free = [a for a in range(ndim) if a not in batch and a not in contract_axes]
        others = without(batch, position)
        lengths = [tuple(operand.shape[a] for a in axes) for axes in (others, contract_axes, free)]
        order = (batch[position], *others, *contract_axes, *free)
        shape = (operand.shape[batch[position]], *(size_of(length) for length in lengths))
        moved = derive(lambda x: _ordered(x, order).reshape(shape), operand)
        return moved, lengths[0], lengths[2]

    left, blocks, left_free = canonical(node.operands[0], batched[0], contracted[0])
    right, _, right_free = canonical(node.operands[1], batched[1], contracted[1])
    return outer(left, right, (blocks, left_free, right_free), trail)


def _ordered(x, order: tuple[int, ...]):
    """`x` with its axes in `order`, not transposed where only axes of length one change places.

    XLA on CPU gives such a transpose a layout of its own, and copies what it has already.
    """
    long = [axis for axis in order if x.shape[axis] > 1]
    moves = long != sorted(long)
    return x.transpose(order) if moves else x.reshape([x.shape[axis] for axis in order])


def outer(left: Node, right: Node, shapes: tuple[tuple[int, ...], ...], trail: Trail) -> Form:
    """The form of sum_t left right^T of shape (*blocks, *left_free, *right_free)."""
    blocks, left_free, right_free = shapes
    right, steps = trail.scaled(right), trail.steps
    turned = (*range(len(left_free), len(left_free + right_free)), *range(len(left_free)))
    if not blocks and steps and steps[0] == ("transpose", turned, ()):
        # Or XLA transposes the sum.
        left, right, left_free, right_free = right, left, right_free, left_free
        steps = steps[1:]
    product = (left.shape[1], left.shape[3], right.shape[3])
    steps = (("reshape", product, (*blocks, *left_free, *right_free)), *steps)
    return Form(Outer, (left, right), (steps,))


def _through_constant(node: Node, trail: Trail):
    """A product of a gradient and something that all examples share: of its factor on that side.

    So do the gradients of A and B in x (W + A B) stay factored.
    """
    contracted, batched = node.params["dimension_numbers"]
    side = 0 if node.operands[0].varies else 1
    inner, constant = node.operands[side], node.operands[1 - side]
    if constant.varies or batched[0] or len(contracted[side]) != 1 or len(constant.shape) != 2:
        return None
    free = [a for a in range(len(inner.shape)) if a != contracted[side][0]]
    outputs = [*free, None] if side == 0 else [None, *free]  # None: the constant's free axis
    batch_axis = outputs[trail.batch_axis]
    if batch_axis is None or len(free) != 2:
        return None
    found = walk(inner, Trail(batch_axis))
    if isinstance(found, str) or found.kind is not Outer:
        return found if isinstance(found, str) else None
    axes = _matrix_axes(found.static[0], (found.nodes[0].shape[-1], found.nodes[1].shape[-1]))
    if axes is None or found.nodes[0].shape[1] != 1:
        return None
    position = contracted[side][0] - (contracted[side][0] > batch_axis)
    hit = axes[position]  # 0 where the contracted axis is left's, 1 where it is right's
    contracts = contracted[1 - side][0]

    def through(x, matrix):
        matrix = matrix if contracts == 0 else matrix.T
        return contract("bstm,mk->bstk", x, matrix)

    nodes = list(found.nodes)
    nodes[hit] = derive(through, nodes[hit], constant)
    # The output has the constant's axis last (side 0) or first; the other factor's is the other.
    first, second = (nodes[1 - hit], nodes[hit]) if side == 0 else (nodes[hit], nodes[1 - hit])
    return outer(first, second, ((), first.shape[-1:], second.shape[-1:]), trail)


def _with_constant(node: Node, trail: Trail):
    """An outer product with something that all examples share: the first state of a recurrence."""
    contracted, batched = node.params["dimension_numbers"]
    lengths = [node.operands[0].shape[axis] for axis in contracted[0]]
    shapes = [operand.shape for operand in node.operands]
    side = 0 if node.operands[0].varies else 1
    if node.operands[1 - side].varies or batched[0] or size_of(tuple(lengths)) != 1:
        return None
    free = [[a for a in range(len(s)) if a not in c] for s, c in zip(shapes, contracted)]
    places = [(k, axis) for k in (0, 1) for axis in free[k]]
    which, axis = places[trail.batch_axis]
    if which != side:
        return None
    num_examples = node.shape[trail.batch_axis]
    frees = [tuple(shapes[k][a] for a in free[k] if (k, a) != (which, axis)) for k in (0, 1)]
    row = lambda x: jnp.moveaxis(x, axis, 0).reshape(num_examples, 1, 1, -1)
    every = lambda x: jnp.broadcast_to(x.reshape(1, 1, 1, -1), (num_examples, 1, 1, x.size))
    nodes = [derive(row if k == side else every, node.operands[k]) for k in (0, 1)]
    return outer(nodes[0], nodes[1], ((), *frees), trail)


def _matrix_axes(steps: Steps, lengths: tuple[int, int]) -> tuple[int, int] | None:
    """Which factor each axis of a matrix (m, n) or (n, m) belongs to, or None: no such matrix."""
    shape, axes = (1, *lengths), (0, 1)
    for kind, first, second in steps:
        if kind == "reshape" and first in (shape, lengths) and second == lengths:
            continue
        if kind == "transpose" and first == (1, 0) and len(axes) == 2:
            axes, lengths = axes[::-1], lengths[::-1]
            continue
        return None
    return axes


@rule("mul")
def _mul(node: Node, trail: Trail):
    """A product of two broadcasts that share only the example axis is an outer product."""
    found = _scaled(node, trail)
    if found is not None:
        return found
    left, right = (_unbroadcast(operand, trail.batch_axis) for operand in node.operands)
    axes = tuple(a for a in range(len(node.shape)) if a != trail.batch_axis and node.shape[a] > 1)
    ordered = tuple(sorted((*left[1], *right[1])))
    if not all(node.operands[k].varies for k in (0, 1)) or not left[1] or not right[1]:
        return None
    if left[1] > right[1]:
        left, right = right, left
    if ordered != axes or (*left[1], *right[1]) != axes:
        return None
    free = without(node.shape, trail.batch_axis)
    split = max(left[1]) + 1 - (max(left[1]) + 1 > trail.batch_axis)
    vector = lambda x: x.reshape(x.shape[0], 1, 1, -1)
    nodes = [derive(vector, side[0]) for side in (left, right)]
    return outer(nodes[0], nodes[1], ((), free[:split], free[split:]), trail)


def _unbroadcast(node: Node, batch_axis: int) -> tuple[Node, tuple[int, ...]]:
    """What a node repeats, example axis first, and the axes along which it does not."""
    shape = node.shape
    axes = [a for a in range(len(shape)) if a != batch_axis and shape[a] > 1]
    origin = node
    if node.primitive == "broadcast_in_dim":
        places = [int(axis) for axis in node.params["broadcast_dimensions"]]
        before = node.operands[0].shape
        own = {axis for axis, size in zip(places, before) if size > 1}
        axes = [axis for axis in axes if axis in own]
    indices = tuple(slice(None) if a in axes or a == batch_axis else 0 for a in range(len(shape)))
    kept = [a for a in range(len(shape)) if a in axes or a == batch_axis]
    position = kept.index(batch_axis)
    value = derive(lambda x: jnp.moveaxis(x[indices], position, 0), origin)
    return value, tuple(axes)
