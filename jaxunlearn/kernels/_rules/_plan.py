"""Which form each parameter's gradients take, and their factors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxunlearn.kernels._jaxpr import Call, Node, argument, evaluate, trace
from jaxunlearn.kernels._rules import _convolution, _loops, _moves, _products, _tables
from jaxunlearn.kernels._rules._trail import VECTORS, Form, Trail, unmoved, walk
from jaxunlearn.kernels._stable import size_of
from jaxunlearn.kernels.factors import (
    Conv,
    Dense,
    Factor,
    Lookup,
    Outer,
    Placed,
    Plan,
    Shared,
    Sum,
    built,
    gram_is_cheaper,
    multiplied,
)

__all__ = ["Explanation", "LeafPath", "factored"]

_RULE_MODULES = (_convolution, _loops, _moves, _products, _tables)  # importing enters their rules


@dataclasses.dataclass(frozen=True)
class LeafPath:
    """Which path one parameter's gradients take, and why; a row of `explain()`."""

    leaf: str
    shape: tuple[int, ...]
    path: str
    floats: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which leaf took which path; `str()` is a table."""

    rows: tuple[LeafPath, ...]

    def __str__(self) -> str:
        cells = [("leaf", "shape", "path", "floats per example", "why")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            cells.append((row.leaf, shape, row.path, str(row.floats), row.reason))
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join(lines)


def factored(
    closed, args: Sequence[Any], varies: Sequence[bool], num_plain: int, names: Sequence[str]
) -> tuple[list[Any], list[tuple[Factor, LeafPath]], dict[int, Any]]:
    """Evaluate a jaxpr whose last outputs are gradients, (B, *shape), and those as factors.

    Args:
      args: what it is evaluated at.  varies: whether each differs from one example to the next.
      num_plain: how many outputs come before the gradients.  names: one for every gradient.

    Returns:
      The first outputs; for each gradient its factor, and the row that says which it is; and by
      the ids of the factors' arrays the matrices that they are reshaped from, for `cleaned`.
    """
    inputs = [argument(arg, varied) for arg, varied in zip(args, varies, strict=True)]
    effects: list[Call] = []
    outputs = trace(closed, inputs, effects)
    plain, gradients = outputs[:num_plain], outputs[num_plain:]
    plans = [_plan(node) for node in gradients]
    leaves = [node for form, _, _ in plans for node in form.leaves]
    origins = {node: unmoved(node) for node in leaves}
    values = evaluate([*plain, *origins.values()], dict(zip(inputs, args)), effects)
    shared = _as_shared(origins, values)
    factors = built([_factor_plan(form, path, values) for form, path, _ in plans], shared)
    found = []
    for name, node, plan, factor in zip(names, gradients, plans, factors, strict=True):
        _, path, reason = plan
        found.append((factor, LeafPath(name, tuple(node.shape[1:]), path, factor.floats, reason)))
    return [values[node] for node in plain], found, shared


def _as_shared(origins: dict[Node, Node], values: dict[Node, Any]) -> dict[int, Any]:
    """Add the nodes to the values of what they are moved from; matrices by the id of the arrays.

    Arrays of the same numbers are of the same matrix: a bias and its weight have a factor together.
    """
    matrices: dict[tuple, Any] = {}
    shared = {}
    for node, origin in origins.items():
        key = origin, node.shape[:1]
        if key not in matrices:
            shape = (*node.shape[:1], size_of(node.shape[1:]))
            matrices[key] = values[origin].reshape(shape) if node.shape else values[origin]
        values[node] = matrices[key].reshape(node.shape)
        shared[id(values[node])] = matrices[key]
    return shared


def _factor_plan(form: Form, path: str, values: dict[Node, Any]) -> Plan:
    """How the factor is made, multiplied out where that is its path."""
    plan = form.plan(values)
    return multiplied(plan) if path == "product" else plan


def _plan(node: Node) -> tuple[Form, str, str]:
    """The form of one gradient, the path it takes, and why."""
    shape = node.shape[1:]
    found = walk(node, Trail())
    if isinstance(found, str):
        dense = Form(Dense, (node,))
        if len(shape) <= 1:
            return dense, "vector", "no smaller factor"
        if found == VECTORS or found == "reduce_sum":
            return dense, "vector", VECTORS if found == VECTORS else "added to every token"
        return dense, "materialised", f"no rule for {found}"
    if found.kind is Shared:
        return found, "shared", "the same for every row"
    if found.kind is Placed:
        return found, "vector", "zero outside the part that is used"
    if found.kind is Sum and all(part.kind is Placed for part in found.parts):
        return found, "vector", f"{len(found.parts)} parts, no smaller factors"
    keeps, kind = _CHOICES[found.kind](found, size_of(shape))
    return found, "factored" if keeps else "product", kind


def _keep_outer(form: Form, num_weights: int) -> tuple[bool, str]:
    """An outer product is multiplied out where that is no larger."""
    (_, _, num_tokens, m), n = form.nodes[0].shape, form.nodes[1].shape[-1]
    if num_tokens == 1:
        return True, "one token: |left| |right|"
    if gram_is_cheaper(num_tokens, m, n):
        return True, f"{num_tokens} tokens: {num_tokens} x {num_tokens} Grams"
    return False, f"{num_tokens} tokens, only {m} x {n} weights"


def _keep_conv(form: Form, num_weights: int) -> tuple[bool, str]:
    """A convolution likewise; what it multiplies out serves the sum as well as the norms."""
    left, right = form.nodes
    taps = form.static[0].taps
    m, n = size_of(taps) * left.shape[-1], right.shape[-1]
    positions = size_of(right.shape[1:-2])
    kind = f"convolution: {' x '.join(map(str, taps))} taps, {positions} positions"
    if positions * (m + n) < m * n:
        return True, f"{kind}: {positions} x {positions} Grams"
    if num_weights > form.floats:
        return True, f"{kind}: products over the taps"
    return False, f"{kind}, only {num_weights} weights"


def _keep_lookup(form: Form, num_weights: int) -> tuple[bool, str]:
    """Rows of a table are kept where they are fewer than the table's."""
    num_tokens = form.nodes[1].shape[1]
    return form.floats < num_weights, f"lookup: {num_tokens} rows of {form.static[0]}"


def _keep_sum(form: Form, num_weights: int) -> tuple[bool, str]:
    """A sum of several uses is added up where that is no larger."""
    kinds = " + ".join(part.kind.__name__.lower() for part in form.parts)
    return form.floats < num_weights, f"{len(form.parts)} uses: {kinds}"


_CHOICES = {Outer: _keep_outer, Conv: _keep_conv, Lookup: _keep_lookup, Sum: _keep_sum}
