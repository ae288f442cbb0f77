"""L-BFGS actions and linear solves."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from _kernels import bars, ours, peers_jax
from _kernels.cells import Candidate, Cell, flat, measure, one
from _kernels.models import Model

NUM_PAIRS, DIMENSION = 20, 1_000_000
NUM_ACTIONS, ACTIONS_DIMENSION = 64, 131_072
NUM_SYSTEMS, SYSTEM_DAMPING = 16, 1e-2


# L-BFGS.


def lbfgs(dimension: int, count: int, *, peers: bool, **options) -> Cell:
    """H g for one g or many, from the same m pairs of a quadratic's curvature."""
    kernel = bars.ACTION if count == 1 else bars.ACTIONS
    k1, k2, k3 = jax.random.split(jax.random.key(4), 3)
    s = jax.random.normal(k1, (NUM_PAIRS, dimension))
    y = s * jnp.exp(jax.random.normal(k2, (dimension,)))
    g = jax.random.normal(k3, (count, dimension))
    state = peers_jax.filled_optax_state(s, y, g[0], jnp.zeros(dimension))
    optax_way = jax.jit(peers_jax.optax_two_loops)
    reference = [np.asarray(optax_way(state, g))]
    cell = Cell("lbfgs", f"d={dimension}, m={NUM_PAIRS}", count, bars.OPTAX_ACTION)

    def build():
        memory, actions = ours.actions(s, y)
        return peers_jax.bound(jax.jit(actions), memory, g)

    candidates = [
        Candidate(
            bars.OPTAX_ACTION, kernel, lambda: peers_jax.bound(optax_way, state, g), one
        ),
        Candidate("jaxunlearn", kernel, build, one, ours=True),
        Candidate(
            "Optax, update, donated", "push and " + kernel,
            lambda: peers_jax.donated_optax_update(s, y, g[0]), one,
        ),
        Candidate(
            "jaxopt", kernel, lambda: peers_jax.jaxopt_actions(s, y, state.weights_memory, g), one
        ),
        Candidate(bars.STREAM, "stream", lambda: stream(4 * NUM_PAIRS * dimension), one),
    ]  # fmt: skip
    wanted = {"jaxopt"} if not peers else set()
    wanted |= {"Optax, update, donated", bars.STREAM} if count > 1 else set()
    candidates = [c for c in candidates if c.name not in wanted]
    references = {kernel: reference, "push and " + kernel: reference, "stream": [np.zeros(())]}
    cell = measure(cell, candidates, references, **options)
    if bars.STREAM in cell.results:
        read = 4 * 4 * NUM_PAIRS * dimension / cell.results[bars.STREAM]["median_seconds"]
        cell.facts["stream_bytes_per_second"] = read
    return cell


def stream(num_floats: int):
    """Reading so many floats once, on all cores: a sum that XLA splits by rows."""
    rows = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 64
    values = jnp.zeros((rows, num_floats // rows))
    total = jax.jit(lambda x: jnp.sum(x, axis=1).sum())
    return peers_jax.bound(total, values)


# Solves.


def solves(model: Model, size: int, *, peers: bool, **options) -> Cell:
    """(H + damping I) x = b for 16 right-hand sides; checked by their residuals."""
    del peers
    params, batch = model.params(), model.batch(size)
    keys = iter(jax.random.split(jax.random.key(5), 2 * len(model.shapes)))
    rhs = jax.tree.map(lambda p: jax.random.normal(next(keys), (NUM_SYSTEMS, *p.shape)), params)

    def with_matvec(solve):
        def solved(params, batch, rhs):
            _, linear = jax.linearize(lambda p: jax.grad(model.loss_fn)(p, batch), params)
            damped = lambda v: jax.tree.map(lambda h, x: h + SYSTEM_DAMPING * x, linear(v), v)
            return solve(damped, rhs)

        return jax.jit(solved)

    residual_of = with_matvec(lambda matvec, x: jax.vmap(matvec)(x))
    products_of = lambda x: flat(residual_of(params, batch, x))

    def jitted(name, solve, arrays, ours=False):
        build = lambda: peers_jax.bound(with_matvec(solve), params, batch, rhs)
        return Candidate(name, bars.SOLVES, build, arrays, ours=ours)

    def ours_with_report(name, make):
        def arrays(solution):
            reported[name] = _report(solution, rhs)
            return products_of(solution.x)

        return jitted(name, lambda matvec, b: make()(jax.vmap(matvec), b), arrays, ours=True)

    sixteen = lambda: peers_jax.call_by_call(with_matvec(peers_jax.scipy_cg), params, batch, rhs)
    reported: dict = {}
    candidates = [
        Candidate(bars.SIXTEEN_CALLS, bars.SOLVES, sixteen, products_of),
        jitted("jax.scipy cg, vmap", peers_jax.vmapped_scipy_cg, products_of),
        *(ours_with_report(name, make) for name, make in ours.SOLVERS.items()),
    ]
    cell = Cell("solves", model.name, size, bars.SIXTEEN_CALLS)
    cell.facts = {
        "tol": peers_jax.SYSTEM_TOL,
        "damping": SYSTEM_DAMPING,
        "num_params": model.num_params,
        "reported": reported,
    }
    return measure(cell, candidates, {bars.SOLVES: flat(rhs)}, **options)


def _report(solution, rhs) -> dict:
    """What a solution says of itself, the worst of its systems."""
    squares = [jnp.sum(b**2, axis=range(1, b.ndim)) for b in jax.tree.leaves(rhs)]
    return {
        "largest_relative_residual": float(
            jnp.max(solution.residual_norm / jnp.sqrt(sum(squares)))
        ),
        "most_iterations": int(jnp.max(solution.num_iterations)),
    }
