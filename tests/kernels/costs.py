"""What a program costs by XLA's count of its operations."""

import contextlib

import jax


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
