"""What the rules hand to one another: the way back from a gradient, and what is found there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxunlearn.kernels._jaxpr import Derived, Node, derive
from jaxunlearn.kernels._stable import size_of, widened
from jaxunlearn.kernels.factors import Conv, Lookup, Outer, Plan, Steps, Sum


@dataclasses.dataclass(frozen=True)
class Trail:
    """How a node becomes the gradient: its example axis, and the moves and scaling still due.

    held: where not None, the example axis holds as many entries of each example, one after the
    other, as vmap makes of the features of a convolution; the steps then start with that axis.
    """

    batch_axis: int = 0
    steps: Steps = ()
    scale: Node | None = None
    held: int | None = None

    def before(self, batch_axis: int, *steps) -> "Trail":
        """The trail of the operand that `steps` turned into this node."""
        steps, rest = tuple(steps), self.steps
        if steps and rest and steps[-1][0] == rest[0][0] == "transpose":
            turn = tuple(steps[-1][1][axis] for axis in rest[0][1])
            again = () if turn == tuple(range(len(turn))) else (("transpose", turn, ()),)
            steps, rest = (*steps[:-1], *again), rest[1:]
        return Trail(batch_axis, (*steps, *rest), self.scale)

    def holding(self, held: int) -> "Trail":
        """The trail with several entries of each example on the example axis."""
        return dataclasses.replace(self, held=held)

    def finished(self, node: Node) -> Node:
        """Carry a node without example axis along the trail."""

        def finish(value, *scale):
            for kind, first, second in self.steps:
                if kind == "reshape":
                    value = value.reshape(second)
                elif kind == "transpose":
                    value = value.transpose(first)
                else:
                    config = [(lo, hi, 0) for lo, hi in zip(first, second)]
                    value = lax.pad(value, np.zeros((), value.dtype), config)
            return value * scale[0] if scale else value

        return derive(finish, node, *(() if self.scale is None else (self.scale,)))

    def scaled(self, node: Node) -> Node:
        """`node` times the scaling that is due, in float32 or wider."""
        if self.scale is None:
            return node
        return derive(lambda x, scale: x.astype(widened(x)) * scale, node, self.scale)


@dataclasses.dataclass(frozen=True)
class Form:
    """A factor that is planned: its kind, the nodes of its arrays, and what else it is made of.

    The nodes have the example axis first. A sum has parts in place of nodes.
    """

    kind: Any
    nodes: tuple[Node, ...] = ()
    static: tuple[Any, ...] = ()
    parts: tuple["Form", ...] = ()

    def plan(self, values: dict[Node, Any]) -> Plan:
        """How the factor is made, once its arrays are computed."""
        if self.parts:
            return Sum.plan([part.plan(values) for part in self.parts], *self.static)
        if self.kind is Outer:
            given = [is_given(node) for node in self.nodes]
            side = "left" if given[0] else "right" if given[1] else None
            (left, right), (steps,) = (values[node] for node in self.nodes), self.static
            return Outer.plan(left, right, steps, side)
        return self.kind.plan(*(values[node] for node in self.nodes), *self.static)

    @property
    def leaves(self) -> tuple[Node, ...]:
        """The nodes of all parts."""
        return self.nodes + tuple(node for part in self.parts for node in part.leaves)

    @property
    def floats(self) -> int:
        """Numbers kept per example."""
        return sum(size_of(node.shape[1:]) for node in self.leaves)


Found = Form | str
"""A form, or the name of the primitive where the way back ended."""

VECTORS = "a vector for every iteration"
"""Found in a loop: nothing smaller is to be had."""

Rule = Callable[[Node, Trail], Found | None]
RULES: dict[str, Rule] = {}
"""One function per primitive: the factors behind a node, or None where it cannot say."""

MOVES: set[str] = set()
"""Primitives that only move what is in their first operand."""


def rule(*primitives: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Enter a function as the rule for some primitives."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        if moves:
            MOVES.update(primitives)
        return function

    return enter


def walk(node: Node, trail: Trail) -> Found:
    """Walk back from a gradient to its factors; the name of the primitive where that ends."""
    found = RULES[node.primitive](node, trail) if node.primitive in RULES else None
    return source(node).primitive if found is None else found


def source(node: Node) -> Node:
    """What computed a value, whatever has moved it since."""
    while node.primitive in MOVES:
        node = node.operands[0]
    return node


def unmoved(node: Node) -> Node:
    """The earliest node with the same numbers in the same order, whatever its shape."""
    while len(node.operands) == 1 and _keeps_order(node):
        node = node.operands[0]
    return node


def _keeps_order(node: Node) -> bool:
    """Whether a node of one operand reshapes it, and does nothing else."""
    (before,) = node.operands
    if size_of(before.shape) != size_of(node.shape) or before.dtype != node.dtype:
        return False
    if node.primitive == "transpose":
        long = [axis for axis in node.params["permutation"] if before.shape[axis] > 1]
        return long == sorted(long)
    if isinstance(node.call, Derived):
        operand = jax.ShapeDtypeStruct(before.shape, before.dtype)
        traced = jax.make_jaxpr(node.call.function)(operand)
        return all(eqn.primitive.name in _RESHAPES for eqn in traced.jaxpr.eqns)
    return node.primitive in (*_RESHAPES, "reduce_sum")  # which here adds up nothing


_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy"})


def is_given(node: Node) -> bool:
    """Whether a node is an argument that was at most moved: an array that is the caller's."""
    while node.varies and node.primitive in (*MOVES, "derived") and len(node.operands) == 1:
        node = node.operands[0]
    return node.varies and node.call is None


def without(items, axis: int) -> tuple[int, ...]:
    """`items` without the entry at `axis`."""
    return tuple(int(item) for k, item in enumerate(items) if k != axis)


def reshaping(before: tuple[int, ...], after: tuple[int, ...]) -> Steps:
    """The step from one shape to another; none where they are the same."""
    return () if before == after else (("reshape", before, after),)


def is_zero(node: Node) -> bool:
    """Whether a node is known to be zero everywhere."""
    while node.primitive in ("broadcast_in_dim", "convert_element_type", "pvary", "pcast"):
        node = node.operands[0]
    return node.value is not None and not np.any(np.asarray(node.value))


def mergeable(first: Form, second: Form) -> bool:
    """Whether the tokens of two forms can stand side by side in one factor."""
    if first.kind is not second.kind or first.static != second.static:
        return False
    if first.kind not in (Outer, Conv, Lookup):
        return False
    axis = first.kind.token_axis
    shapes = [[without(node.shape, axis) for node in form.nodes] for form in (first, second)]
    return shapes[0] == shapes[1]


def merged(parts: list[Form], shape: tuple[int, ...]) -> Form:
    """The sum of several forms for a parameter of this shape."""
    groups: list[list[Form]] = []
    for part in parts:
        for piece in part.parts or (part,):
            group = next((g for g in groups if mergeable(g[0], piece)), None)
            groups.append([piece]) if group is None else group.append(piece)
    forms = [_side_by_side(group) for group in groups]
    return forms[0] if len(forms) == 1 else Form(Sum, (), (shape,), tuple(forms))


def _side_by_side(group: list[Form]) -> Form:
    """One form with the tokens of all."""
    if len(group) == 1:
        return group[0]
    axis = group[0].kind.token_axis
    join = lambda *arrays: _joined(arrays, axis)
    nodes = tuple(derive(join, *column) for column in zip(*(form.nodes for form in group)))
    return dataclasses.replace(group[0], nodes=nodes)


def _joined(arrays, axis: int):
    """Arrays of possibly unlike dtypes along an axis."""
    dtype = arrays[0].dtype
    for array in arrays[1:]:
        dtype = jnp.promote_types(dtype, array.dtype) if dtype != array.dtype else dtype
    return lax.concatenate([array.astype(dtype) for array in arrays], axis)
