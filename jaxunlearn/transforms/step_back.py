"""The published deletion of the Memory Pair: one step back along H g of the row, and noise."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxunlearn import kernels, tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.transforms.online_lbfgs import step_size
from jaxunlearn.types import LossFn, Params

UnitNoise = Callable[[Int[Array, ""], Params], Params]
"""(deletions before this one, parameters) -> standard normal noise like the parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperDeletion:
    """The published step back, w <- w + rate H g(row) + sigma N(0, I), and its two versions.

    rate: of the step back. 1.0 is the first version's; None is the last version's, the learning
      rate as it stood at the last insert.
    noise_stddev: sigma, fixed.
    noise_multiplier: added to sigma, times the norm of the step back; with
      `accounting.published_noise(...)(m)` it is the first version's noise. Scaled to the step of
      the row itself, it hides nothing of how long that step was.
    unit_noise: where the noise comes from, `deletion_noise(key)` say. Wanted where sigma is not 0.
    """

    rate: float | None = 1.0
    noise_stddev: float = 0.0
    noise_multiplier: float = 0.0
    unit_noise: UnitNoise | None = None

    def __post_init__(self):
        figures = (self.rate or 0.0, self.noise_stddev, self.noise_multiplier)
        if not all(math.isfinite(x) and x >= 0 for x in figures):
            raise ValueError(f"Expected finite figures >= 0, got {self}.")
        if (self.noise_stddev or self.noise_multiplier) and self.unit_noise is None:
            raise ValueError("Expected unit_noise=deletion_noise(key) where there is noise.")


def deletion_noise(key: Key[Array, ""]) -> UnitNoise:
    """Standard normal noise from a typed key, different for every deletion.

    >>> draw = deletion_noise(jax.random.key(0))
    >>> bool(jnp.all(draw(0, jnp.zeros(2)) == draw(1, jnp.zeros(2))))
    False
    """

    def draw(index, params):
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
        noise = [jax.random.normal(k, jnp.shape(p), p.dtype) for k, p in zip(keys, leaves)]
        return jax.tree.unflatten(structure, noise)

    return draw


def make_step_back(
    loss_fn: LossFn,
    paper: PaperDeletion,
    *,
    learning_rate: Any,
    l2: float | None = None,
    scale_range: tuple[float, float] | None = None,
    sensitivity: float = math.inf,
):
    """A function (params, state, rows, ids, num_before) that takes the step back for each row.

    One row after another, each from where the last one left, as the published code would for
    requests that come one by one. The pairs, the counter and the sum of squares are left alone:
    that is what the paper does.

    Args:
      learning_rate, l2, scale_range: those of the `online_lbfgs` that trained.
      sensitivity: the longest step back, without noise, that is accepted.

    Returns:
      (params, state, step_norm, noise_stddev, fits): the longest step's norm and largest sigma;
      fits is false where a step was longer than `sensitivity`, and then nothing is to be used.

    Cost: a gradient of one row and an L-BFGS product for each id.

    References: Stewart 2025 (arXiv 2508.10193), algorithm "Memory Pair Step", delete. Deviation:
      theirs refuses an empty memory, here H is then the identity.
    """
    gradient = kernels.weighted_grad(loss_fn)

    def one(carry, operand):
        params, state, step_norm, stddev, count = carry
        row, identity = operand
        live = identity >= 0
        memory = state.curvature
        single = jax.tree.map(lambda leaf: leaf[None], row)
        g = gradient(params, single, live.astype(jnp.float32)[None])
        if l2 is not None:
            g = jax.tree.map(lambda g, p: g + (l2 * p).astype(g.dtype), g, params)
        g = jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), g, memory.pairs)
        scale = None if scale_range is None else jnp.clip(lbfgs.initial_scale(memory), *scale_range)
        direction = lbfgs.inverse_product(memory, g, scale=scale)
        last = jnp.maximum(state.num_online_steps - 1, 0)
        rate = paper.rate
        if rate is None:
            rate = step_size(learning_rate, last, state.gradient_square_sum)
        step = jax.tree.map(lambda d: jnp.where(live, rate * d, 0), direction)
        norm = jnp.sqrt(tree.vdot(step, step))
        sigma = jnp.where(live, paper.noise_stddev + paper.noise_multiplier * norm, 0.0)
        moved = jax.tree.map(lambda p, d: p + d.astype(p.dtype), params, step)
        if paper.unit_noise is not None:
            add = lambda p, n: p + (sigma * n).astype(p.dtype)
            moved = jax.tree.map(add, moved, paper.unit_noise(count, params))
        cast = lambda new, old: new.astype(old.dtype)
        carry = (
            moved, state, jnp.maximum(step_norm, cast(norm, step_norm)),
            jnp.maximum(stddev, cast(sigma, stddev)), count + live.astype(jnp.int32),
        )  # fmt: skip
        return carry, None

    def step_back(params: Params, state, rows, ids: Int[Array, "b"], num_before: Int[Array, ""]):
        zero: Float[Array, ""] = jnp.zeros((), state.gradient_square_sum.dtype)
        begin = (params, state, zero, zero, num_before)
        (params, state, norm, stddev, _), _ = jax.lax.scan(one, begin, (rows, ids))
        return params, state, norm, stddev, norm <= sensitivity

    return step_back
