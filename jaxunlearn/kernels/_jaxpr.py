"""Evaluating a jaxpr while remembering which equation made each value."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.extend import core as jex_core

# Evaluated in place: their body. What a checkpoint would compute again is kept; it is a factor.
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value of the evaluation, with the equation and the operands that made it."""

    value: Any
    eqn: Any = None
    operands: tuple["Node", ...] = ()

    @property
    def primitive(self) -> str:
        """Name of the primitive that made the value; "input" for arguments and constants."""
        return "input" if self.eqn is None else self.eqn.primitive.name


def evaluate(closed: "jex_core.ClosedJaxpr", args: list[Any]) -> list[Node]:
    """The outputs of `closed` at `args`, as nodes. Values nobody uses are left to XLA to drop."""
    return _run(closed.jaxpr, [Node(c) for c in closed.consts], [Node(a) for a in args])


def _run(jaxpr, consts: list[Node], inputs: list[Node]) -> list[Node]:
    """Evaluate `jaxpr` equation by equation."""
    nodes = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom):  # a literal has its value with it
        return Node(atom.val) if hasattr(atom, "val") else nodes[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(read(atom) for atom in eqn.invars)
        nodes.update(zip(eqn.outvars, _step(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn, operands: tuple[Node, ...]) -> list[Node]:
    """The outputs of one equation."""
    if eqn.primitive.name in _INLINED:
        body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        consts = [Node(c) for c in getattr(body, "consts", ())]
        return _run(getattr(body, "jaxpr", body), consts, list(operands))
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*(node.value for node in operands), **params)
    values = out if eqn.primitive.multiple_results else [out]
    return [Node(value, eqn, operands) for value in values]
