"""What JAX users write or install today, each at its best setting."""

import functools

import jax
import jax.numpy as jnp
import optax
from _harness import seconds
from optax import contrib

MICROBATCHES = (1, 4, 16, 64)


def per_row_gradients(loss_fn):
    """The usual way: vmap(grad), every leaf (B, *shape)."""

    def one(params, row):
        return jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: leaf[None], row))

    return jax.vmap(one, in_axes=(None, 0))


def materialised_norms(grads):
    """Norms of materialised per-example gradients."""
    squares = [
        jnp.sum(jnp.square(g).reshape(g.shape[0], -1), axis=1) for g in jax.tree.leaves(grads)
    ]
    return jnp.sqrt(sum(squares))


def vmap_norms(loss_fn):
    """vmap(grad), norms."""
    return lambda params, batch: materialised_norms(per_row_gradients(loss_fn)(params, batch))


def vmap_clip_sum(loss_fn, clip):
    """vmap(grad), norms, and the weighted sum as the contraction that XLA does best."""

    def clipped(params, batch):
        grads = per_row_gradients(loss_fn)(params, batch)
        scale = jnp.minimum(1, clip / materialised_norms(grads))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), grads)

    return clipped


def optax_clip_sum(loss_fn, clip):
    """vmap(grad), then Optax's clipped mean of them, without its noise; as a sum."""
    transform = contrib.differentially_private_aggregate(clip, noise_multiplier=0.0, key=0)

    def clipped(params, batch):
        grads = per_row_gradients(loss_fn)(params, batch)
        mean = transform.update(grads, transform.init(params))[0]
        return jax.tree.map(lambda g: g * len(batch[1]), mean)

    return clipped


def best_jax_privacy(loss_fn, clip, params, batch):
    """`jax_privacy.clipped_grad`, jitted, at the microbatch size that is fastest on this batch.

    Searched upwards, until twice as slow as the best.
    """
    from jax_privacy import clipped_grad

    rows = len(batch[1])
    functions, times = {}, {}
    for size in (*(size for size in MICROBATCHES if size < rows), None):
        functions[size] = jax.jit(clipped_grad(loss_fn, l2_clip_norm=clip, microbatch_size=size))
        jax.block_until_ready(functions[size](params, batch))
        times[size] = seconds(functools.partial(functions[size], params, batch))
        if times[size] > 2 * min(times.values()):
            break
    best = min(times, key=times.__getitem__)
    return bound(functions[best], params, batch, setting=f"microbatch {best or rows}")


def bound(function, *operands, setting=None):
    """`function` at these operands, with a note of how it was set."""

    def call():
        return function(*operands)

    call.setting = setting
    return call


# Products: (params, batch, stack of vectors) -> stack of products.


def vmapped_products(loss_fn):
    """Forward over reverse, all vectors at once."""

    def products(params, batch, vectors):
        gradient = lambda p: jax.grad(loss_fn)(p, batch)
        return jax.vmap(lambda v: jax.jvp(gradient, (params,), (v,))[1])(vectors)

    return products


def mapped_products(loss_fn):
    """Forward over reverse, one vector after another."""

    def products(params, batch, vectors):
        gradient = lambda p: jax.grad(loss_fn)(p, batch)
        return jax.lax.map(lambda v: jax.jvp(gradient, (params,), (v,))[1], vectors)

    return products


def reverse_products(loss_fn):
    """Reverse over reverse: the gradient of <gradient, v>, as one finds it in most code."""

    def products(params, batch, vectors):
        def directional(p, v):
            grads = jax.tree.leaves(jax.grad(loss_fn)(p, batch))
            return sum(jnp.vdot(g, x) for g, x in zip(grads, jax.tree.leaves(v), strict=True))

        return jax.vmap(lambda v: jax.grad(directional)(params, v))(vectors)

    return products


# L-BFGS: s, y of shape (m, d), oldest first.


def optax_two_loops(state, g):
    """H g as `optax.scale_by_lbfgs` computes it, without the push that its `update` begins with.

    Optax has no public function for this: here are its two scans, and `donated_optax_update` is
    checked to give the same numbers. g: (r, d), vmapped unless r is 1.
    """
    s_all, y_all, rho = state.diff_params_memory, state.diff_updates_memory, state.weights_memory
    size = len(rho)
    order = (state.count + jnp.arange(size)) % size
    last = (state.count - 1) % size
    scale = jnp.vdot(y_all[last], s_all[last]) / jnp.vdot(y_all[last], y_all[last])

    def right(vector, i):
        alpha = rho[i] * jnp.vdot(s_all[i], vector)
        return vector - alpha * y_all[i], alpha

    def left(vector, at):
        i, alpha = at
        beta = rho[i] * jnp.vdot(y_all[i], vector)
        return vector + (alpha - beta) * s_all[i], None

    def product(vector):
        vector, alphas = jax.lax.scan(right, vector, order, reverse=True)
        return jax.lax.scan(left, scale * vector, (order, alphas))[0]

    return product(g[0])[None] if len(g) == 1 else jax.vmap(product)(g)


def filled_optax_state(s, y, g, params):
    """Optax's state after pairs (s, y): an `update(g, ., params)` pushes the last of them again."""
    size, dimension = s.shape
    state = optax.scale_by_lbfgs(memory_size=size).init(jnp.zeros(dimension))
    return state._replace(
        count=jnp.asarray(size, jnp.int32),
        params=params - s[-1],
        updates=g - y[-1],
        diff_params_memory=s,
        diff_updates_memory=y,
        weights_memory=1 / jnp.sum(s * y, axis=1),
    )


def donated_optax_update(s, y, g):
    """`optax.scale_by_lbfgs(m).update` itself, in place: pushes (s_m, y_m) anew, then H g."""
    update = jax.jit(optax.scale_by_lbfgs(memory_size=len(s)).update, donate_argnums=1)
    params = jnp.zeros(s.shape[1])
    fresh = filled_optax_state(jnp.copy(s), jnp.copy(y), g, params)
    before = (jnp.copy(fresh.params), jnp.copy(fresh.updates))
    held = [fresh]

    def call():
        # Donated buffers move on; the difference that is pushed stays (s_m, y_m).
        state = held[0]._replace(
            count=jnp.asarray(len(s), jnp.int32), params=jnp.copy(before[0]),
            updates=jnp.copy(before[1]),
        )  # fmt: skip
        updates, held[0] = update(g, state, params)
        return updates[None]

    return call


def jaxopt_actions(s, y, rho, g):
    """The step of `jaxopt.LBFGS.update` at step size 1; what it pushes is unused and left out."""
    import jaxopt

    size, dimension = s.shape
    solver = jaxopt.LBFGS(lambda p: 0.5 * jnp.vdot(p, p), history_size=size, stepsize=1.0, jit=True)
    origin = jnp.zeros(dimension)
    state = solver.init_state(origin)._replace(
        iter_num=jnp.asarray(0), s_history=s, y_history=y, rho_history=rho,
        gamma=jnp.vdot(y[-1], s[-1]) / jnp.vdot(y[-1], y[-1]),
    )  # fmt: skip

    def actions(state, g):
        one = lambda vector: -solver.update(origin, state._replace(grad=vector)).params
        return one(g[0])[None] if len(g) == 1 else jax.vmap(one)(g)

    return bound(jax.jit(actions), state, g)


# Solves.

SYSTEM_TOL, MAX_ITERATIONS = 1e-6, 1000


def scipy_cg(matvec, rhs):
    """`jax.scipy.sparse.linalg.cg`; it returns no residual."""
    return jax.scipy.sparse.linalg.cg(matvec, rhs, tol=SYSTEM_TOL, maxiter=MAX_ITERATIONS)[0]


def vmapped_scipy_cg(matvec, rhs):
    """The same for a stack: all systems go on until the last is solved."""
    return jax.vmap(lambda b: scipy_cg(matvec, b))(rhs)


def call_by_call(solve, params, batch, rhs):
    """A compiled solve for one right-hand side, called for each."""
    count = len(jax.tree.leaves(rhs)[0])
    each = [jax.tree.map(lambda leaf, k=k: leaf[k], rhs) for k in range(count)]

    def call():
        rows = [solve(params, batch, one) for one in each]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    return call
