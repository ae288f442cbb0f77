"""The rule for `scan`: the factors of every iteration, in place of their product."""

import dataclasses

import jax.numpy as jnp

from jaxunlearn.kernels._jaxpr import Node, Scan, derive
from jaxunlearn.kernels._rules._moves import final_shape
from jaxunlearn.kernels._rules._trail import (
    VECTORS,
    Form,
    Found,
    Trail,
    is_zero,
    merged,
    rule,
    walk,
)
from jaxunlearn.kernels.factors import Conv, Lookup, Outer, Steps


@rule("scan")
def _scan(node: Node, trail: Trail):
    """A stack of gradients, one of each iteration, or a carry to which each adds one."""
    call = node.call
    if not isinstance(call, Scan) or node not in call.outputs or not call.params["length"]:
        return None
    place = call.outputs.index(node)
    if place < len(call.carries):
        return _accumulated(call, place, trail)
    if trail.batch_axis == 0:
        return None
    result = call.results[place]
    found = walk(result, Trail(trail.batch_axis - 1))
    if isinstance(found, str):
        return VECTORS if len(result.shape) <= 2 else found
    return _stacked(found, call, trail)


def _stacked(found: Form, call: Scan, trail: Trail) -> Form | None:
    """The factors of the iterations as blocks that never meet."""
    length = call.params["length"]
    lift = _BLOCKS.get(found.kind)
    if lift is None:
        return None
    nodes = [derive(lambda x: jnp.moveaxis(x, 0, 1), call.emit(node)) for node in found.nodes]
    nodes, static, own = lift(nodes, found.static, length)
    steps = (*own, *_lifted(found.static[-1], length), *trail.steps)
    form = Form(found.kind, tuple(nodes), (*static, steps))
    return dataclasses.replace(form, nodes=(*form.nodes[:-1], trail.scaled(form.nodes[-1])))


def _lifted(steps: Steps, length: int) -> Steps:
    """Steps that leave a new first axis alone."""
    lifted: list = []
    for kind, first, second in steps:
        if kind == "transpose":
            lifted.append((kind, (0, *(axis + 1 for axis in first)), ()))
        else:
            new = length if kind == "reshape" else 0
            lifted.append((kind, (new, *first), (new, *second)))
    return tuple(lifted)


def _outer_blocks(nodes, static, length: int):
    """(B, K, S, T, m) as (B, K S, T, m)."""
    merge = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    (_, _, num_blocks, _, m), n = nodes[0].shape, nodes[1].shape[-1]
    own = (("reshape", (length * num_blocks, m, n), (length, num_blocks, m, n)),)
    return [derive(merge, node) for node in nodes], static[:-1], own


def _conv_blocks(nodes, static, length: int):
    """(B, K, N, .., G, m) as (B, N, .., K G, m): groups of channels never meet either."""

    def merge(x):
        x = jnp.moveaxis(x, 1, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    (num_groups, m), n = nodes[0].shape[-2:], nodes[1].shape[-1]
    taps = static[0].taps
    split = (*taps, length, num_groups, m, n)
    turn = (len(taps), *range(len(taps)), *range(len(taps) + 1, len(split)))
    own = (("reshape", (*taps, length * num_groups, m, n), split), ("transpose", turn, ()))
    return [derive(merge, node) for node in nodes], static[:-1], own


def _lookup_blocks(nodes, static, length: int):
    """K tables as one, of K times as many rows."""
    num_rows, width = static[0], nodes[1].shape[-1]

    def shifted(index):
        offsets = num_rows * jnp.arange(length, dtype=index.dtype)
        return (index + offsets[:, None]).reshape(index.shape[0], -1)

    rows = derive(lambda x: x.reshape(x.shape[0], -1, width), nodes[1])
    own = (("reshape", (length * num_rows, width), (length, num_rows, width)),)
    return [derive(shifted, nodes[0]), rows], (length * num_rows,), own


_BLOCKS = {Outer: _outer_blocks, Conv: _conv_blocks, Lookup: _lookup_blocks}


def _accumulated(call: Scan, place: int, trail: Trail) -> Found | None:
    """The start, and the terms that the iterations add: as tokens of one factor."""
    carry, result = call.carries[place], call.results[place]
    terms = _terms(result, carry)
    if terms is None or any(_reads(other, carry) for other in _others(call, place, terms)):
        return None
    found: list[Form] = []
    for term in terms:
        each = walk(term, Trail(trail.batch_axis))
        if isinstance(each, str):
            return each
        found += each.parts or (each,)
    if not all(hasattr(form.kind, "token_axis") for form in found):
        return None
    start = call.operands[call.num_consts + place]
    forms = [_as_tokens(form, call, trail) for form in found]
    if not is_zero(start):
        first = walk(start, trail)
        if isinstance(first, str):
            return first
        forms.append(first)
    return merged(forms, final_shape(result, trail))


def _as_tokens(form: Form, call: Scan, trail: Trail) -> Form:
    """The tokens of all iterations side by side."""
    axis = form.kind.token_axis

    def merge(x):
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    *others, last = (derive(merge, call.emit(node)) for node in form.nodes)
    static = (*form.static[:-1], (*form.static[-1], *trail.steps))
    return Form(form.kind, (*others, trail.scaled(last)), static)


def _terms(node: Node, carry: Node) -> list[Node] | None:
    """What is added to the carry to give the node; None where it is more than added to."""
    if node is carry:
        return []
    if node.primitive not in ("add", "add_any") or node.shape != carry.shape:
        return None
    for k, operand in enumerate(node.operands):
        rest = _terms(operand, carry)
        if rest is not None:
            return [*rest, node.operands[1 - k]]
    return None


def _others(call: Scan, place: int, terms: list[Node]) -> list[Node]:
    """The results of a body that must not read a carry for it to be a sum."""
    return [*(r for k, r in enumerate(call.results) if k != place), *terms]


def _reads(node: Node, carry: Node) -> bool:
    """Whether a node is computed from a carry."""
    seen, queue = set(), [node]
    while queue:
        node = queue.pop()
        if node is carry:
            return True
        if node.call is not None and node.call.serial not in seen:
            seen.add(node.call.serial)
            queue.extend(node.operands)
    return False
