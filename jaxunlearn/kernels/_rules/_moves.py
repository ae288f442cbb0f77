"""Rules for equations that move, scale or add what others computed."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxunlearn.kernels._jaxpr import Node, constant, derive
from jaxunlearn.kernels._rules._trail import (
    Form,
    Found,
    Trail,
    is_zero,
    merged,
    reshaping,
    rule,
    walk,
    without,
)
from jaxunlearn.kernels._stable import size_of
from jaxunlearn.kernels.factors import Placed, Shared


def moved(node: Node, trail: Trail, batch_axis: int, *steps) -> Found:
    """Go on with the first operand."""
    return walk(node.operands[0], trail.before(batch_axis, *steps))


def _reshaped(node: Node, trail: Trail, batch_axis: int) -> Found:
    """Go on with the first operand, whose elements the node only reshapes."""
    before = without(node.operands[0].shape, batch_axis)
    after = without(node.shape, trail.batch_axis)
    return moved(node, trail, batch_axis, *reshaping(before, after))


@rule("convert_element_type", "copy", "copy_p", "sharding_constraint", "mesh_cast", moves=True)
@rule("reduce_precision", "optimization_barrier", "pvary", "pcast", moves=True)
def _same(node: Node, trail: Trail):
    """The value passes through."""
    if node.call is not None and len(node.operands) != 1:  # a barrier of several values
        operands = dict(zip(node.call.outputs, node.operands))
        return walk(operands[node], trail)
    return moved(node, trail, trail.batch_axis)


@rule("transpose", moves=True)
def _transpose(node: Node, trail: Trail):
    permutation = node.params["permutation"]
    batch_axis = permutation[trail.batch_axis]
    rest = without(permutation, trail.batch_axis)
    rest = tuple(axis - (axis > batch_axis) for axis in rest)
    if rest == tuple(range(len(rest))):
        return moved(node, trail, batch_axis)
    return moved(node, trail, batch_axis, ("transpose", rest, ()))


@rule("reshape", moves=True)
def _reshape(node: Node, trail: Trail):
    if node.params.get("dimensions") is not None:
        return None
    before, after = node.operands[0].shape, node.shape
    leading = size_of(after[: trail.batch_axis])
    length = after[trail.batch_axis]
    for axis, size in enumerate(before):
        if size_of(before[:axis]) != leading or size % length:
            continue
        if size == length:
            return _reshaped(node, trail, axis)
        if node.operands[0].primitive == "conv_general_dilated":
            rest = (*before[:axis], size // length, *before[axis + 1 :])
            steps = reshaping(rest, without(after, trail.batch_axis))
            return walk(node.operands[0], trail.before(axis, *steps).holding(size // length))
    return None


@rule("squeeze", moves=True)
@rule("reduce_sum")
def _drop_unit_axes(node: Node, trail: Trail):
    """squeeze, and reduce_sum over axes of length one."""
    shape = node.operands[0].shape
    dropped = {
        axis % len(shape) for axis in node.params.get("dimensions", node.params.get("axes", ()))
    }
    if any(shape[axis] != 1 for axis in dropped):
        return None
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    return _reshaped(node, trail, kept[trail.batch_axis])


@rule("expand_dims", moves=True)
def _expand(node: Node, trail: Trail):
    dropped = {axis % len(node.shape) for axis in node.params["dimensions"]}
    kept = [axis for axis in range(len(node.shape)) if axis not in dropped]
    return _reshaped(node, trail, kept.index(trail.batch_axis))


@rule("broadcast_in_dim", moves=True)
def _broadcast(node: Node, trail: Trail):
    """broadcast_in_dim that adds axes of length one, or that makes one gradient of every row's."""
    axes = [int(axis) for axis in node.params["broadcast_dimensions"]]
    before, after = node.operands[0].shape, node.shape
    if trail.batch_axis not in axes:
        return _shared(node, trail)
    if size_of(before) != size_of(after):
        return None
    return _reshaped(node, trail, axes.index(trail.batch_axis))


def _shared(node: Node, trail: Trail) -> Form:
    """One gradient for every example: that of the first, which needs no other."""
    first = derive(lambda x: lax.index_in_dim(x, 0, trail.batch_axis, keepdims=False), node)
    return Form(Shared, (trail.finished(first),), (node.shape[trail.batch_axis],))


@rule("pad")
def _pad(node: Node, trail: Trail):
    """The gradient of a part of a parameter: zeros round it."""
    config = node.params["padding_config"]
    lows, highs, interiors = (tuple(int(item) for item in column) for column in zip(*config))
    here = (lows[trail.batch_axis], highs[trail.batch_axis])
    if not is_zero(node.operands[1]) or any(interiors) or min(lows + highs) < 0 or any(here):
        return None
    step = ("pad", without(lows, trail.batch_axis), without(highs, trail.batch_axis))
    found = moved(node, trail, trail.batch_axis, step)
    if not isinstance(found, str):
        return found
    part = derive(lambda x: jnp.moveaxis(x, trail.batch_axis, 0), node.operands[0])
    return Form(Placed, (trail.scaled(part),), ((step, *trail.steps),))


def _scalar(node: Node) -> Node | None:
    """The number that a node holds everywhere, or None."""
    while node.primitive == "broadcast_in_dim":
        node = node.operands[0]
    return node if not node.shape else None


@rule("neg", "mul", "div")
def _scaled(node: Node, trail: Trail):
    """neg, and mul or div by a number that is the same for all."""
    operands = node.operands
    if node.primitive == "neg":
        factor: Node | None = constant(-1.0)
    elif node.primitive == "mul" and _scalar(operands[0]) is not None:
        operands, factor = operands[::-1], _scalar(operands[0])
    else:
        factor = _scalar(operands[1])
    if factor is None:
        return None
    if node.primitive == "div":
        factor = derive(lambda x: 1 / x, factor)
    if trail.scale is not None:
        factor = derive(lambda x, y: x * y, trail.scale, factor)
    return walk(operands[0], dataclasses.replace(trail, scale=factor))


@rule("add", "add_any", "sub")
def _add(node: Node, trail: Trail):
    """Several uses of one parameter."""
    second = trail
    if node.primitive == "sub":
        minus = constant(-1.0)
        scale = minus if trail.scale is None else derive(lambda x: -x, trail.scale)
        second = dataclasses.replace(trail, scale=scale)
    pairs = [(op, t) for op, t in zip(node.operands, (trail, second)) if not is_zero(op)]
    if any(op.shape != node.shape for op, _ in pairs):
        return None
    forms: list[Form] = []
    for operand, way in pairs:
        found = walk(operand, way)
        if isinstance(found, str):
            return found
        forms.append(found)
    return merged(forms, final_shape(node, trail)) if forms else None


def final_shape(node: Node, trail: Trail) -> tuple[int, ...]:
    """The parameter's shape: that of a node, without its example axis, at the end of the trail."""
    shape = without(node.shape, trail.batch_axis)
    for kind, first, second in trail.steps:
        if kind == "reshape":
            shape = second
        elif kind == "transpose":
            shape = tuple(shape[axis] for axis in first)
        else:
            shape = tuple(lo + n + hi for lo, n, hi in zip(first, shape, second))
    return shape
