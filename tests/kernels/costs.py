"""What a program costs by XLA's count of its operations."""

import contextlib
import math

import jax

from jaxunlearn.kernels._primitives import jaxprs_in


def flops(function, *args):
    """Floating-point operations of the compiled program; each branch of a `cond` counts."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def without_branches(function, *args):
    """`function` with every `cond` replaced by its branch for finite sums, for counting."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    values = {}
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    values.update(zip(closed.jaxpr.constvars, closed.consts))
    values.update(zip(closed.jaxpr.invars, jax.tree.leaves(args)))
    for eqn in closed.jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "cond":
            branch = eqn.params["branches"][0]
            out = jax.core.eval_jaxpr(branch.jaxpr, branch.consts, *operands[1:])
        else:
            out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out))
    outputs = [read(atom) for atom in closed.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


@contextlib.contextmanager
def compilations():
    """A list that gets one entry for each program that XLA compiles in the meantime."""
    found = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def dots(function, *args) -> float:
    """Floating-point operations of the matrix products and convolutions of a jaxpr.

    A loop's count as often as it says it runs, of a `cond` the dearest branch does, and nothing is
    compiled.
    """
    return _dots(jax.make_jaxpr(function)(*args))


def _dots(jaxpr) -> float:
    return sum(map(_dots_of_equation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _dots_of_equation(eqn) -> float:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = [eqn.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod((*terms, *eqn.outvars[0].aval.shape))
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel) // outputs
    inner = [_dots(jaxpr) for value in eqn.params.values() for jaxpr in jaxprs_in(value)]
    if eqn.primitive.name == "cond":
        return max(inner)
    return sum(inner) * eqn.params.get("length", 1)


def reads(function, memory, *args) -> bool:
    """Whether a function's jaxpr reads a leaf of an L-BFGS memory's pairs."""
    closed = jax.make_jaxpr(function)(memory, *args)
    pairs = closed.jaxpr.invars[: len(jax.tree.leaves(memory.pairs))]
    return any(var in pairs for eqn in closed.jaxpr.eqns for var in eqn.invars)
