"""Online L-BFGS as a plain Optax optimizer: every pair is formed on one minibatch, at both ends."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxunlearn import kernels, tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.types import LossFn, Params

Schedule = Callable[[Array], Array]


class AdaptiveRate(NamedTuple):
    """Step size D / sqrt(sum_{s <= t} ||g_s||^2), at most `max_rate`.

    diameter: D > 0 of the set in which the parameters stay.
    max_rate: > 0.
    """

    diameter: float
    max_rate: float = math.inf


class OnlineLBFGSState(NamedTuple):
    """State of `online_lbfgs`.

    num_online_steps: calls of `update` so far, t.
    gradient_square_sum: sum of ||g||^2 over them, S_t, in float32 or wider.
    curvature: the pairs, each with the ids of the rows that it was made from.
    """

    num_online_steps: Int[Array, ""]
    gradient_square_sum: Float[Array, ""]
    curvature: lbfgs.LBFGSMemory


def inverse_time(strong_convexity: float, *, max_rate: float = math.inf) -> Schedule:
    """The schedule min(max_rate, 1 / (lambda t)), t = 1 for the first step.

    >>> schedule = inverse_time(0.5)
    >>> float(schedule(jnp.zeros((), jnp.int32))), float(schedule(jnp.array(3)))
    (2.0, 0.5)
    """
    if not strong_convexity > 0 or not max_rate > 0:
        raise ValueError(
            f"Expected strong_convexity={strong_convexity} > 0 and max_rate={max_rate} > 0."
        )
    return lambda count: jnp.minimum(max_rate, 1 / (strong_convexity * (count + 1)))


def online_lbfgs(
    loss_fn: LossFn | None = None,
    *,
    learning_rate: float | Array | Schedule | AdaptiveRate = 0.5,
    memory_size: int = 10,
    owners_per_pair: int = 1,
    admission: lbfgs.Admission | None = None,
    l2: float | None = None,
    incoming: str = "any",
    scale_range: tuple[float, float] | None = None,
    max_norm: float | None = None,
    move: str = "realised",
) -> optax.GradientTransformationExtraArgs:
    """Steps of -rate H g, H the L-BFGS inverse of pairs made on the minibatch of each step.

    With g the incoming updates and B the minibatch,

        w' = w - rate H g,    s = w' - w,    y = grad F_B(w') - grad F_B(w),

    and the pair (s, y) is offered to the memory: both gradients on the same rows, since their
    difference over two minibatches is mostly noise. s is the move that was made, rounding and
    projection included, so this transform stands last in a chain:
    `optax.chain(optax.clip_by_global_norm(1.0), online_lbfgs(loss_fn))`.

    `update(updates, state, params, *, batch, ids, weights, num_rows, key)`: the incoming updates
    move the parameters, `batch` makes the pair. weights: (b,), default 1, or 0 where ids is -1.
    num_rows: the divisor, default the sum of the weights. ids: whose the pair is, up to
    `owners_per_pair`. key: for a loss that takes one. Without `batch`, Optax's `value_fn` (and
    `grad`, if given) stand for F_B: that is how it works inside `unlearners.replay`.

    Args:
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2. None
        where `value_fn` is always passed.
      learning_rate: a number, a schedule (`inverse_time(lambda)` is 1/(lambda t)), or an
        `AdaptiveRate` (D / sqrt(sum ||g||^2)).
      memory_size: pairs held, m.
      owners_per_pair: rows a minibatch can have, if the pairs are to know all their ids.
      admission: a rule of `kernels.lbfgs` or `transforms`; `levenberg_damped()` is the published
        one, and `prudente_souza()` keeps every pair positive. None is `kernels.lbfgs.curvature()`.
      l2: adds `l2 * params` to the updates and to both gradients.
      incoming: "gradient" promises that the incoming updates are the gradient of the same loss on
        the same rows, and saves one gradient a step; "any" promises nothing.
      scale_range: bounds of gamma, H = gamma I before the pairs; None leaves s'y / y'y alone.
      max_norm: the norm that parameters are scaled back to; None lets them go.
      move: "realised" as above; "step" makes s and y of the step before it is scaled back to
        `max_norm`, as the published code did, though nobody ever made that step.

    Returns:
      A transform with state `OnlineLBFGSState`. Under `scan` and donation it keeps every aval.

    Cost: two gradients of the minibatch (one with incoming="gradient" or `grad`), 4 m + 2 passes
      over the parameters; memory 2 m parameter counts in float32 or wider.

    Raises:
      ValueError: a bad option; no params; neither `batch` nor `value_fn`.

    References: Mokhtari and Ribeiro 2015, "Global convergence of online limited memory BFGS",
      JMLR 16; Schraudolph, Yu and Guenter 2007, "A stochastic quasi-Newton method for online convex
      optimization"; step sizes after Stewart 2025 (arXiv 2508.10193).

    >>> tx = online_lbfgs(lambda w, batch: jnp.mean((w - batch) ** 2), learning_rate=0.5)
    >>> w, batch = jnp.array(3.0), jnp.array([1.0])
    >>> updates, state = tx.update(jnp.array(4.0), tx.init(w), w, batch=batch)
    >>> float(w + updates), int(state.curvature.num_pairs)
    (1.0, 1)
    """
    _check_options(l2, incoming, scale_range, max_norm, move, learning_rate)
    gradient = None if loss_fn is None else kernels.weighted_grad(loss_fn)
    keyed = loss_fn is not None and kernels.takes_key(loss_fn)

    def init(params):
        memory = lbfgs.init(params, memory_size, owners_per_pair=owners_per_pair)
        return OnlineLBFGSState(
            num_online_steps=jnp.zeros((), jnp.int32),
            gradient_square_sum=jnp.zeros((), memory.pair_gram.dtype),
            curvature=memory,
        )

    def penalised(updates, params):
        if l2 is None:
            return updates
        return jax.tree.map(lambda g, p: g + (l2 * p).astype(g.dtype), updates, params)

    def objective_gradient(batch, ids, weights, num_rows, key, value_fn):
        """F_B's gradient as a function of the parameters."""
        if batch is None:
            if value_fn is None:
                raise ValueError("Expected batch= in update, to form the pair on, or value_fn=.")
            return lambda p: penalised(jax.grad(value_fn)(p), p)
        if gradient is None:
            raise ValueError("Expected online_lbfgs(loss_fn) for an update with batch=.")
        weights = _weights_of(batch, ids, weights)
        keys = _example_keys(key, ids) if keyed else None
        return lambda p: penalised(gradient(p, batch, weights, num_rows=num_rows, keys=keys), p)

    def update(
        updates, state, params=None, *, batch=None, ids=None, weights=None, num_rows=None,
        key=None, value_fn=None, grad=None, **extra,
    ):  # fmt: skip
        del extra
        if params is None:
            raise ValueError("Expected params: call update(updates, state, params, batch=batch).")
        memory = state.curvature
        incoming_gradient = penalised(updates, params)
        wide = lambda p: jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), p, memory.pairs)
        g = wide(incoming_gradient)
        square_sum = state.gradient_square_sum + _square(g).astype(state.gradient_square_sum.dtype)
        rate = step_size(learning_rate, state.num_online_steps, square_sum)
        scale = None if scale_range is None else jnp.clip(lbfgs.initial_scale(memory), *scale_range)
        direction = lbfgs.inverse_product(memory, g, scale=scale)
        step = jax.tree.map(lambda d, p: (-rate * d).astype(p.dtype), direction, params)
        reached = optax.apply_updates(params, step)
        updates = step if max_norm is None else _scaled_back(params, reached, max_norm)
        if move == "realised":
            reached = optax.apply_updates(params, updates)
        gradient_at = objective_gradient(batch, ids, weights, num_rows, key, value_fn)
        if batch is None and grad is not None:
            first = wide(penalised(grad, params))
        else:
            first = g if incoming == "gradient" else wide(gradient_at(params))
        y = jax.tree.map(jnp.subtract, wide(gradient_at(reached)), first)
        s = jax.tree.map(jnp.subtract, wide(reached), wide(params))
        memory, _ = lbfgs.push(
            memory, s, y,
            owner=_owners(ids, weights, owners_per_pair),
            gradient_norm=jnp.sqrt(_square(first)),
            admission=admission,
        )  # fmt: skip
        return updates, OnlineLBFGSState(state.num_online_steps + 1, square_sum, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def step_size(learning_rate, count: Int[Array, ""], square_sum: Float[Array, ""]):
    """The rate of a step: `count` steps were before it, `square_sum` is S_t, its own included."""
    if isinstance(learning_rate, AdaptiveRate):
        root = jnp.sqrt(jnp.where(square_sum > 0, square_sum, 1))
        rate = jnp.where(square_sum > 0, learning_rate.diameter / root, learning_rate.max_rate)
        # A sum of zero is a gradient of zero: any finite rate will do.
        return jnp.minimum(rate, min(learning_rate.max_rate, float(jnp.finfo(rate.dtype).max)))
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _scaled_back(params: Params, reached: Params, max_norm: float) -> Params:
    """The move from `params` to `reached`, or to the point of norm `max_norm` below it."""
    norm = jnp.sqrt(_square(reached))
    factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
    shrink = lambda r, p: jnp.where(norm > max_norm, (factor * r).astype(r.dtype), r) - p
    return jax.tree.map(shrink, reached, params)


def _square(vector: Params) -> Float[Array, ""]:
    """||v||^2 over all leaves."""
    return tree.vdot(vector, vector)


def _weights_of(batch: Any, ids, weights) -> Array:
    """As given; else one a row, zero for padding."""
    if weights is not None:
        return weights
    if ids is not None:
        return (jnp.asarray(ids) >= 0).astype(jnp.float32)
    return jnp.ones((jax.tree.leaves(batch)[0].shape[0],), jnp.float32)


def _example_keys(key, ids):
    """A key for each row, its own."""
    if key is None or ids is None:
        raise ValueError("Expected key= and ids= in update: the loss takes a key.")
    return kernels.example_keys(key, jnp.asarray(ids))


def _owners(ids, weights, owners_per_pair: int) -> Array:
    """Ids that the pair belongs to, without those of weight zero; -1 where they are unknown."""
    if ids is None:
        return jnp.full((1,), -1, jnp.int32)
    ids = jnp.asarray(ids)
    owners = ids.astype(jnp.int32)
    owners = owners if weights is None else jnp.where(jnp.asarray(weights) != 0, owners, -1)
    if owners.shape[0] > owners_per_pair:
        raise ValueError(
            f"Expected at most owners_per_pair={owners_per_pair} ids in update, got "
            f"{owners.shape[0]}. Say owners_per_pair=batch_size."
        )
    return owners


def _check_options(l2, incoming, scale_range, max_norm, move, learning_rate) -> None:
    """Refuse a bad configuration at the factory."""
    if isinstance(l2, int | float) and not l2 >= 0:
        raise ValueError(f"Expected l2={l2} >= 0.")
    if incoming not in ("any", "gradient"):
        raise ValueError(f'Expected incoming={incoming!r} to be "any" or "gradient".')
    if move not in ("realised", "step"):
        raise ValueError(f'Expected move={move!r} to be "realised" or "step".')
    if scale_range is not None and not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"Expected scale_range={scale_range} with 0 < low <= high.")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"Expected max_norm={max_norm} > 0.")
    if isinstance(learning_rate, AdaptiveRate) and not (
        learning_rate.diameter > 0 and learning_rate.max_rate > 0
    ):
        raise ValueError(f"Expected positive fields in {learning_rate}.")
    if isinstance(learning_rate, int | float) and not learning_rate > 0:
        raise ValueError(f"Expected learning_rate={learning_rate} > 0.")
