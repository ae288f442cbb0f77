"""Curvature pairs at released parameters, from Hessian products on retained rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.types import Params

_FLAT = 1e-7  # curvature along a direction, relative to ||d|| ||H d||, that counts as none
_SPENT = 1e-4  # part of ||d||^2 that must be left of a direction made conjugate to the others


class Curvature(NamedTuple):
    """The objective near the released parameters, on sampled retained rows.

    params: the released parameters.
    gradient: of the objective, over the sample.
    product: Hessian times a vector like the parameters.
    """

    params: Params
    gradient: Params
    product: Callable[[Params], Params]


class Pairs(NamedTuple):
    """Steps and the changes of the gradient along them, first to last; leaves have a leading axis.

    usable: false from the first direction without positive curvature on.
    """

    steps: PyTree
    changes: PyTree
    usable: Bool[Array, " k"]


def conjugate_pairs(curvature: Curvature, num_pairs: int, *, like: PyTree | None = None) -> Pairs:
    """(s_i, H s_i) for the first steps of conjugate gradients on the local quadratic model.

    The directions are conjugate, s_i' H s_j = 0, so that a BFGS matrix updated with all of them
    satisfies every secant equation, not the last alone. They start along the gradient.

    Args:
      like: the leaves to move, at the paths they have in the parameters (`optax.masked` leaves
        some out); the others stand still. None moves all.

    Cost: `num_pairs` Hessian products, and 4 `num_pairs` inner products each.
    """
    held = curvature.params if like is None else like
    inside, outside = _embedding(held, curvature.params)
    product = lambda v: _wide(inside(curvature.product(outside(v))))
    residual = jax.tree.map(jnp.negative, _wide(inside(curvature.gradient)))

    def step(i, carry):
        pairs, residual, direction, usable = carry
        before = tree.vdot(direction, direction)
        for _ in range(2):  # twice is enough
            direction = _conjugated(direction, pairs)
        length = tree.vdot(direction, direction)
        image = product(direction)
        curved, size = tree.vdot(direction, image), tree.vdot(residual, residual)
        floor = _FLAT * jnp.sqrt(length * tree.vdot(image, image))
        usable = usable & (curved > floor) & (length > _SPENT * before) & jnp.isfinite(floor)
        divisor = jnp.where(usable, curved, 1)
        scale, alpha = size / divisor, tree.vdot(direction, residual) / divisor
        put = lambda stack, v: stack.at[i].set(jnp.where(usable, scale * v, 0))
        pairs = Pairs(
            steps=jax.tree.map(put, pairs.steps, direction),
            changes=jax.tree.map(put, pairs.changes, image),
            usable=pairs.usable.at[i].set(usable),
        )
        new = jax.tree.map(lambda r, h: r - jnp.where(usable, alpha * h, 0), residual, image)
        beta = tree.vdot(new, new) / jnp.where(size > 0, size, 1)
        following = jax.tree.map(lambda r, d: r + beta * d, new, direction)
        return pairs, new, following, usable

    empty = jax.tree.map(lambda leaf: jnp.zeros((num_pairs, *leaf.shape), leaf.dtype), residual)
    pairs = Pairs(empty, empty, jnp.zeros((num_pairs,), bool))
    start = (pairs, residual, residual, jnp.array(True))
    return jax.lax.fori_loop(0, num_pairs, step, start)[0]


def _conjugated(direction: PyTree, pairs: Pairs) -> PyTree:
    """d - sum_i (y_i' d / s_i' y_i) s_i: rounding has made d lose its conjugacy to early pairs."""
    against = jax.vmap(tree.vdot, in_axes=(0, None))(pairs.changes, direction)
    curved = jax.vmap(tree.vdot)(pairs.steps, pairs.changes)
    share = jnp.where(curved > 0, against / jnp.where(curved > 0, curved, 1), 0)
    return jax.tree.map(lambda d, s: d - jnp.tensordot(share, s, 1), direction, pairs.steps)


def remake_optax_lbfgs(driven: Any, fresh: Any, context: Any) -> Any:
    """`optax.scale_by_lbfgs`: its memory filled, and one pair more that the next step completes.

    Optax forms a pair from its last parameters and gradient and those of the next step, so these
    stand one conjugate step before the released ones. Without positive curvature along the
    gradient the state is fresh.
    """
    num_slots = fresh.weights_memory.shape[0]
    count = driven.count
    pairs = conjugate_pairs(context.curvature, num_slots + 1, like=fresh.params)
    held, _ = _embedding(fresh.params, context.curvature.params)
    rank = jnp.arange(num_slots)
    slot = (count - 2 - rank) % num_slots  # the newest first, as optax will read them
    kept = pairs.usable[1:] & (rank < count - 1)
    older = lambda stack: jax.tree.map(lambda leaf: leaf[1:], stack)
    inner = jax.vmap(tree.vdot)(older(pairs.steps), older(pairs.changes))
    weights = jnp.where(kept, 1 / jnp.where(kept, inner, 1), 0)

    def place(stack, into):
        mask = lambda leaf: kept.reshape(-1, *(1,) * (leaf.ndim - 1))
        put = lambda leaf, old: old.at[slot].set(jnp.where(mask(leaf), leaf, 0).astype(old.dtype))
        return jax.tree.map(put, older(stack), into)

    before = lambda value, stack: jax.tree.map(
        lambda v, leaf: (v - leaf[0]).astype(v.dtype), held(value), stack
    )
    remade = fresh._replace(
        count=count,
        params=before(context.curvature.params, pairs.steps),
        updates=before(context.curvature.gradient, pairs.changes),
        diff_params_memory=place(pairs.steps, fresh.diff_params_memory),
        diff_updates_memory=place(pairs.changes, fresh.diff_updates_memory),
        weights_memory=fresh.weights_memory.at[slot].set(
            weights.astype(fresh.weights_memory.dtype)
        ),
    )
    begun = pairs.usable[0] & (count > 0)
    return jax.tree.map(lambda new, old: jnp.where(begun, new, old), remade, fresh)


def remake_memory(driven: Any, fresh: Any, context: Any) -> Any:
    """`kernels.lbfgs`: a memory of conjugate pairs that belong to nobody, the steepest newest.

    `push_clock` is where the driven one stands, and no more pairs are taken than it was offered.
    """
    num_slots = fresh.pair_owners.shape[0]
    like = jax.tree.map(lambda leaf: leaf[0, 0], fresh.pairs)
    pairs = conjugate_pairs(context.curvature, num_slots, like=like)
    memory = fresh
    for i in reversed(range(num_slots)):
        wanted = pairs.usable[i] & (i < driven.push_clock)
        offer = lambda stack, i=i, wanted=wanted: jax.tree.map(
            lambda leaf: jnp.where(wanted, leaf[i], 0), stack
        )
        memory, _ = lbfgs.push(memory, offer(pairs.steps), offer(pairs.changes))
    shift = driven.push_clock - memory.push_clock  # modulo 2**32, as clocks are
    clocks = jnp.where(lbfgs.is_occupied(memory), memory.pair_clocks + shift, 0)
    return memory._replace(
        pair_clocks=clocks.astype(fresh.pair_clocks.dtype), push_clock=driven.push_clock
    )


def _wide(vector: PyTree) -> PyTree:
    """Float32 or wider: conjugacy is lost in less."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), vector
    )


def _embedding(held: PyTree, params: Params):
    """(params-like -> held-like, held-like -> params-like with zeros elsewhere), by path."""
    key = jax.tree_util.keystr

    def inside(full):
        leaves = {key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(full)}
        return jax.tree_util.tree_map_with_path(lambda path, _: leaves[key(path)], held)

    def outside(part):
        leaves = {key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(part)}
        return jax.tree_util.tree_map_with_path(
            lambda path, p: leaves.get(key(path), jnp.zeros_like(p)).astype(p.dtype), params
        )

    return inside, outside
