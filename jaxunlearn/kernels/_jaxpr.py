"""A jaxpr as a graph: planned first, evaluated afterwards, and of it only what is asked for.

`trace` makes a node of every value without computing it, `derive` adds nodes, and `evaluate`
computes the nodes that are wanted, from the equations that they need and from no others.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxunlearn.kernels._primitives import CALLS

if TYPE_CHECKING:
    from jax.extend import core as jex_core

# Traced in place: their body. What a checkpoint would compute again is kept; it is a factor.
_INLINED = CALLS | {
    *("checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_serial = itertools.count()


@dataclasses.dataclass(eq=False)
class Node:
    """A value that is known (`value`), handed in, or made by a call.

    varies: whether it may differ from one example to the next.
    """

    shape: tuple[int, ...]
    dtype: Any
    varies: bool
    call: "Call | None" = None
    value: Any = None

    @property
    def primitive(self) -> str:
        """Name of the primitive that makes the value; "input" for arguments and constants."""
        return "input" if self.call is None else self.call.primitive

    @property
    def operands(self) -> tuple["Node", ...]:
        """What the call that makes the value reads."""
        return () if self.call is None else self.call.operands

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the equation that makes the value."""
        return {} if self.call is None else self.call.params


class Call:
    """What makes nodes out of nodes: an equation of the jaxpr."""

    params: dict[str, Any]

    def __init__(self, eqn, operands: tuple[Node, ...]):
        self.eqn, self.operands, self.serial = eqn, operands, next(_serial)
        self.primitive, self.params = eqn.primitive.name, eqn.params
        varies = any(operand.varies for operand in operands)
        self.outputs = [_node(var.aval, varies, self) for var in eqn.outvars]

    def needs(self, wanted: set[Node]) -> Sequence[Node]:
        """The operands that `run` reads to compute `wanted`, some of the outputs."""
        return self.operands

    def run(self, values: dict[Node, Any], wanted: set[Node]) -> None:
        """Add the outputs to `values`."""
        params = self.eqn.primitive.get_bind_params(self.eqn.params)
        with self.eqn.ctx.manager:
            out = self.eqn.primitive.bind(*(values[node] for node in self.operands), **params)
        values.update(zip(self.outputs, out if self.eqn.primitive.multiple_results else [out]))


class Derived(Call):
    """A Python function of nodes."""

    def __init__(self, function: Callable, operands: tuple[Node, ...]):
        self.function, self.operands, self.serial = function, operands, next(_serial)
        self.primitive, self.params = "derived", {}
        avals = [jax.ShapeDtypeStruct(node.shape, node.dtype) for node in operands]
        varies = any(operand.varies for operand in operands)
        self.outputs = [_node(jax.eval_shape(function, *avals), varies, self)]

    def run(self, values: dict[Node, Any], wanted: set[Node]) -> None:
        values[self.outputs[0]] = self.function(*(values[node] for node in self.operands))


class Scan(Call):
    """A `scan`, whose body can be asked for more outputs, and is then left without the unused."""

    def __init__(self, eqn, operands: tuple[Node, ...]):
        super().__init__(eqn, operands)
        body, (self.num_consts, num_carry) = eqn.params["jaxpr"], _scan_layout(eqn.params)
        varies = any(operand.varies for operand in operands)
        firsts = range(self.num_consts, self.num_consts + num_carry)
        self.inputs = [
            _node(aval, varies if k in firsts else operand.varies)
            for k, (aval, operand) in enumerate(zip(body.in_avals, operands))
        ]
        self.carries = dict(enumerate(self.inputs[slice(firsts.start, firsts.stop)]))
        self.effects: list[Call] = []
        self.results = trace(body, self.inputs, self.effects)
        self.extras: dict[Node, Node] = {}

    def emit(self, node: Node) -> Node:
        """What `node` of the body is in every iteration, stacked: an output that was not there."""
        if node not in self.extras:
            shape = (self.params["length"], *node.shape)
            self.extras[node] = Node(shape, node.dtype, node.varies, self)
        return self.extras[node]

    def needs(self, wanted: set[Node]) -> Sequence[Node]:
        if not wanted & set(self.extras.values()):
            return self.operands
        carries, read = self._read(wanted)
        kept = {self.carries[k] for k in carries}
        return [op for op, node in zip(self.operands, self.inputs) if node in read | kept]

    def _stacked(self, wanted: set[Node]) -> dict[Node, Node]:
        """What of `wanted` the body gives for every iteration: {output: node of the body}."""
        stacks = zip(self.outputs[len(self.carries) :], self.results[len(self.carries) :])
        outputs = dict(stacks) | {out: node for node, out in self.extras.items()}
        return {out: node for out, node in outputs.items() if out in wanted}

    def _read(self, wanted: set[Node]) -> tuple[list[int], set[Node]]:
        """Which carries have to be carried, and which inputs of the body are read."""
        carries = {k for k in self.carries if self.outputs[k] in wanted}
        while True:
            targets = [*self._stacked(wanted).values(), *(self.results[k] for k in carries)]
            read = _reached(targets, self.effects)[1]
            more = {k for k, node in self.carries.items() if node in read}
            if more <= carries:
                return sorted(carries), read
            carries |= more

    def run(self, values: dict[Node, Any], wanted: set[Node]) -> None:
        if not wanted & set(self.extras.values()):
            return super().run(values, wanted)
        carries, read = self._read(wanted)
        stacked, num_consts = self._stacked(wanted), self.num_consts
        given = {node: values[op] for op, node in zip(self.operands, self.inputs) if node in read}
        xs = {n: given[n] for n in self.inputs[num_consts + len(self.carries) :] if n in given}
        consts = {n: given[n] for n in self.inputs[:num_consts] if n in given}

        def body(carry, rows):
            known = {**consts, **dict(zip(xs, rows)), **dict(zip(firsts, carry))}
            lasts = [self.results[k] for k in carries]
            found = evaluate([*lasts, *stacked.values()], known, self.effects)
            return [found[n] for n in lasts], [found[n] for n in stacked.values()]

        firsts = [self.carries[k] for k in carries]
        start = [values[self.operands[num_consts + k]] for k in carries]
        options = {key: self.params[key] for key in ("length", "reverse", "unroll")}
        with self.eqn.ctx.manager:
            last, rows = lax.scan(body, start, list(xs.values()), **options)
        values.update(zip([self.outputs[k] for k in carries], last))
        values.update(zip(stacked, rows))
        return None


def _scan_layout(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries a scan has; newer JAX says so by a tree."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _node(aval, varies: bool, call: Call | None = None) -> Node:
    """A node of the shape and dtype of `aval`."""
    return Node(tuple(aval.shape), aval.dtype, varies, call)


def argument(value: Any, varies: bool) -> Node:
    """A node for what is handed in."""
    return Node(jnp.shape(value), jnp.result_type(value), varies)


def constant(value: Any) -> Node:
    """A node whose value is known."""
    return Node(jnp.shape(value), jax.dtypes.result_type(value), False, None, value)


def derive(function: Callable, *operands: Node) -> Node:
    """The node `function(*operands)`."""
    return Derived(function, operands).outputs[0]


def trace(
    closed: "jex_core.ClosedJaxpr", inputs: Sequence[Node], effects: list[Call]
) -> list[Node]:
    """The outputs of `closed` as nodes; calls with effects are added to `effects`."""
    return _trace(closed.jaxpr, [constant(c) for c in closed.consts], inputs, effects)


def _trace(jaxpr, consts: Sequence[Node], inputs: Sequence[Node], effects) -> list[Node]:
    """Make the nodes of `jaxpr`, equation by equation."""
    nodes = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom):  # a literal has its value with it
        return constant(atom.val) if hasattr(atom, "val") else nodes[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(read(atom) for atom in eqn.invars)
        nodes.update(zip(eqn.outvars, _step(eqn, operands, effects), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn, operands: tuple[Node, ...], effects: list[Call]) -> list[Node]:
    """The outputs of one equation."""
    if eqn.primitive.name in _INLINED:
        body = next(eqn.params[key] for key in _BODIES if key in eqn.params)
        consts = [constant(c) for c in getattr(body, "consts", ())]
        return _trace(getattr(body, "jaxpr", body), consts, operands, effects)
    call = (Scan if eqn.primitive.name == "scan" else Call)(eqn, operands)
    if eqn.effects:
        effects.append(call)
    return call.outputs


def _reached(wanted: Sequence[Node], effects: Sequence[Call]) -> tuple[list, set[Node]]:
    """The calls that `wanted` needs, with the outputs each must give; and the inputs read."""
    asked: dict[Call, set[Node]] = {call: set() for call in effects}
    inputs: set[Node] = set()

    def ask(node):
        if node.call is None:
            inputs.add(node)
        elif node.call in asked:
            asked[node.call].add(node)
        else:
            asked[node.call] = {node}
            heapq.heappush(queue, (-node.call.serial, node.call))

    queue = [(-call.serial, call) for call in effects]
    heapq.heapify(queue)
    for node in wanted:
        ask(node)
    plan = []
    while queue:  # the latest first: whoever reads its outputs has been heard
        call = heapq.heappop(queue)[1]
        plan.append((call, asked[call]))
        for node in call.needs(asked[call]):
            ask(node)
    return plan[::-1], inputs


def evaluate(
    wanted: Sequence[Node], known: dict[Node, Any], effects: Sequence[Call] = ()
) -> dict[Node, Any]:
    """The values of `wanted`, given those of the inputs."""
    plan, inputs = _reached(wanted, effects)
    values = dict(known)
    values.update({node: node.value for node in inputs if node.value is not None})
    for call, outputs in plan:
        call.run(values, outputs)
    return values
