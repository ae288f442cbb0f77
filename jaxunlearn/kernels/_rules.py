"""From the equation that made a gradient to the factors it can be kept as."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxunlearn.kernels._jaxpr import Node
from jaxunlearn.kernels._stable import size_of, widened
from jaxunlearn.kernels.factors import (
    Dense,
    Factor,
    Outer,
    Shared,
    Steps,
    gram_is_cheaper,
)


@dataclasses.dataclass(frozen=True)
class Trail:
    """How a node becomes the gradient: its example axis, and the moves and scaling still due."""

    batch_axis: int = 0
    steps: Steps = ()
    scale: Array | None = None

    def before(self, batch_axis: int, *steps) -> "Trail":
        """The trail of the operand that `steps` turned into this node."""
        return Trail(batch_axis, (*steps, *self.steps), self.scale)


@dataclasses.dataclass(frozen=True)
class LeafPath:
    """Which path one parameter's gradients take, and why; a row of `explain()`."""

    leaf: str
    shape: tuple[int, ...]
    path: str
    floats: int
    reason: str


def find_factor(node: Node, name: str) -> tuple[Factor, LeafPath]:
    """The cheapest form of one gradient, (B, *shape), and a row that says which it is."""
    found = _trace(node, Trail())
    factor: Factor
    shape = tuple(node.value.shape[1:])
    if isinstance(found, str):
        path = "vector" if len(shape) <= 1 else "materialised"
        reason = "no smaller factor" if path == "vector" else f"no rule for {found}"
        factor = Dense.of(node.value)
    elif isinstance(found, Shared):
        factor, path, reason = found, "shared", "the same for every row"
    else:
        factor, path, reason = _outer(found)
    return factor, LeafPath(name, shape, path, factor.floats, reason)


def _outer(found: Outer) -> tuple[Factor, str, str]:
    """Keep an outer product as factors, or multiply it out where that is no larger."""
    _, _, num_tokens, m = found.left.shape
    n = found.right.shape[-1]
    if num_tokens == 1:
        return found, "factored", "one token: |left| |right|"
    if gram_is_cheaper(num_tokens, m, n):
        return found, "factored", f"{num_tokens} tokens: {num_tokens} x {num_tokens} Grams"
    return Dense.of(found.materialize()), "product", f"{num_tokens} tokens, only {m} x {n} weights"


def _trace(node: Node, trail: Trail) -> Outer | Shared | str:
    """Walk back from a gradient to its factors; the name of the primitive where that ends."""
    found = RULES[node.primitive](node, trail) if node.primitive in RULES else None
    return _behind_moves(node) if found is None else found


def _behind_moves(node: Node) -> str:
    """The primitive that computed a value, whatever has moved it since."""
    while node.primitive in MOVES:
        node = node.operands[0]
    return node.primitive


def _moved(node: Node, trail: Trail, batch_axis: int, *steps) -> Outer | Shared | str:
    """Go on with the first operand."""
    return _trace(node.operands[0], trail.before(batch_axis, *steps))


def _without(items, axis: int) -> tuple[int, ...]:
    """`items` without the entry at `axis`."""
    return tuple(int(item) for k, item in enumerate(items) if k != axis)


def _reshaped(node: Node, trail: Trail, batch_axis: int) -> Outer | Shared | str:
    """Go on with the first operand, whose elements the node only reshapes."""
    before = _without(node.operands[0].value.shape, batch_axis)
    after = _without(node.value.shape, trail.batch_axis)
    steps = () if before == after else (("reshape", before, after),)
    return _moved(node, trail, batch_axis, *steps)


def _same(node: Node, trail: Trail):
    """convert_element_type and the like: the value passes through."""
    return _moved(node, trail, trail.batch_axis)


def _transpose(node: Node, trail: Trail):
    permutation = node.eqn.params["permutation"]
    batch_axis = permutation[trail.batch_axis]
    rest = _without(permutation, trail.batch_axis)
    rest = tuple(axis - (axis > batch_axis) for axis in rest)
    return _moved(node, trail, batch_axis, ("transpose", rest, ()))


def _reshape(node: Node, trail: Trail):
    before, after = node.operands[0].value.shape, node.value.shape
    leading = size_of(after[: trail.batch_axis])
    for axis, length in enumerate(before):
        if length == after[trail.batch_axis] and size_of(before[:axis]) == leading:
            return _reshaped(node, trail, axis)
    return None


def _drop_unit_axes(node: Node, trail: Trail):
    """squeeze, and reduce_sum over axes of length one."""
    shape = node.operands[0].value.shape
    params = node.eqn.params
    dropped = {axis % len(shape) for axis in params.get("dimensions", params.get("axes", ()))}
    if any(shape[axis] != 1 for axis in dropped):
        return None
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    return _reshaped(node, trail, kept[trail.batch_axis])


def _broadcast(node: Node, trail: Trail):
    """broadcast_in_dim that adds axes of length one, or that makes one gradient of every row's."""
    axes = [int(axis) for axis in node.eqn.params["broadcast_dimensions"]]
    before, after = node.operands[0].value.shape, node.value.shape
    if trail.batch_axis not in axes:
        value = lax.index_in_dim(node.value, 0, trail.batch_axis, keepdims=False)
        return Shared.of(_finish(value, trail), after[trail.batch_axis])
    if size_of(before) != size_of(after):
        return None
    return _reshaped(node, trail, axes.index(trail.batch_axis))


def _finish(value: Array, trail: Trail) -> Array:
    """Carry a value without example axis along the trail."""
    for kind, first, second in trail.steps:
        value = value.reshape(second) if kind == "reshape" else value.transpose(first)
    return value if trail.scale is None else value * trail.scale


def _scalar(node: Node) -> Array | None:
    """The number that a node holds everywhere, or None."""
    if node.primitive == "broadcast_in_dim":
        return _scalar(node.operands[0])
    return node.value if jnp.ndim(node.value) == 0 else None


def _scaled(node: Node, trail: Trail):
    """neg, and mul or div by a number that is the same for all."""
    operands = node.operands
    factor: Any
    if node.primitive == "neg":
        factor = -1.0
    elif node.primitive == "mul" and _scalar(operands[0]) is not None:
        operands, factor = operands[::-1], _scalar(operands[0])
    else:
        factor = _scalar(operands[1])
        if factor is None:
            return None
        factor = 1 / factor if node.primitive == "div" else factor
    scale = factor if trail.scale is None else trail.scale * factor
    return _trace(operands[0], dataclasses.replace(trail, scale=scale))


def _add(node: Node, trail: Trail):
    """Several uses of one weight: their tokens stand side by side."""
    first, second = (_trace(operand, trail) for operand in node.operands)
    if not (isinstance(first, Outer) and isinstance(second, Outer)):
        return None
    shapes = [
        (f.left.shape[1], f.left.shape[3], f.right.shape[3], f.steps) for f in (first, second)
    ]
    if shapes[0] != shapes[1]:
        return None
    left = jnp.concatenate([first.left, second.left], axis=2)
    return Outer.of(left, jnp.concatenate([first.right, second.right], axis=2), first.steps)


def _dot_general(node: Node, trail: Trail):
    """A product with the example axis among its batch dimensions: its operands are the factors."""
    contracted, batched = node.eqn.params["dimension_numbers"]
    position = trail.batch_axis
    if position >= len(batched[0]):
        return None

    def canonical(operand, batch, contract):
        free = [a for a in range(operand.value.ndim) if a not in batch and a not in contract]
        others = _without(batch, position)
        value = operand.value.transpose(batch[position], *others, *contract, *free)
        shape = operand.value.shape
        lengths = [tuple(shape[a] for a in axes) for axes in (others, contract, free)]
        value = value.reshape(shape[batch[position]], *(size_of(length) for length in lengths))
        return value, lengths[0], lengths[2]

    left, blocks, left_free = canonical(node.operands[0], batched[0], contracted[0])
    right, _, right_free = canonical(node.operands[1], batched[1], contracted[1])
    if trail.scale is not None:
        right = right.astype(widened(right)) * trail.scale
    rest = trail.steps
    turned = (*range(len(left_free), len(left_free + right_free)), *range(len(left_free)))
    if not blocks and rest and rest[0] == ("transpose", turned, ()):  # or XLA transposes the sum
        left, right, left_free, right_free, rest = right, left, right_free, left_free, rest[1:]
    product = (left.shape[1], left.shape[3], right.shape[3])
    return Outer.of(left, right, (("reshape", product, (*blocks, *left_free, *right_free)), *rest))


Rule = Callable[[Node, Trail], Outer | Shared | str | None]

MOVES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _drop_unit_axes,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "sharding_constraint": _same,
}
RULES: dict[str, Rule] = {
    **MOVES,
    "dot_general": _dot_general,
    "reduce_sum": _drop_unit_axes,
    "neg": _scaled,
    "mul": _scaled,
    "div": _scaled,
    "add": _add,
    "add_any": _add,
}
"""One function per primitive: the factors behind a node, or None where it cannot say."""
