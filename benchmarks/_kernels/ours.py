"""How the benchmark calls the library; nothing else here does."""

import functools

import jax
import jax.numpy as jnp

from _kernels import peers_jax
from jaxunlearn import kernels
from jaxunlearn.kernels import lbfgs, solves


def clipped_sum(loss_fn, clip):
    """Factored: norms and the clipped sum in one pass."""
    gradients = kernels.per_example(loss_fn)
    return lambda params, batch: gradients(params, batch).clipped_sum(clip)


def norms(loss_fn):
    """Factored norms."""
    gradients = kernels.per_example(loss_fn)
    return lambda params, batch: gradients(params, batch).norms()


def products(loss_fn):
    """(params, batch, stack of vectors) -> stack of products."""
    return kernels.hvp_many(loss_fn)


def product(loss_fn):
    """The same for one vector, which comes as a stack of one."""
    single = kernels.hvp(loss_fn)
    take = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    stack = functools.partial(jax.tree.map, lambda leaf: leaf[None])
    return lambda params, batch, vectors: stack(single(params, batch, take(vectors)))


def actions(s, y):
    """(memory, function of memory and a stack of vectors) from pairs, oldest first."""
    memory = lbfgs.init(jnp.zeros(s.shape[1]), len(s))
    push = jax.jit(lambda memory, s, y: lbfgs.push(memory, s, y)[0], donate_argnums=0)
    for pair in zip(s, y, strict=True):
        memory = push(memory, *pair)

    def actions(memory, g):
        if len(g) == 1:
            return lbfgs.inverse_product(memory, g[0])[None]
        return lbfgs.inverse_product_many(memory, g)

    return memory, actions


SOLVER = {"tol": peers_jax.SYSTEM_TOL, "max_iterations": peers_jax.MAX_ITERATIONS}
SOLVERS = {
    "jaxunlearn cg": lambda: solves.cg(many=True, **SOLVER),
    "jaxunlearn block cg": lambda: solves.block_cg(**SOLVER),
}
