"""The gradient of the rows that stay: evaluated, or foretold from a cached one by L-BFGS."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.gradients import GradientInfo, weighted_grad
from jaxunlearn.types import Batch, LossFn, Params

SMOOTHNESS_SLACK = 1.5
ROUNDINGS = 16  # a difference is news where it exceeds so many roundings of what it is taken from


class WeightedRows(NamedTuple):
    """Rows of a batch, the weight of each (0 or 1), and their keys where the loss takes one."""

    batch: Batch
    row_weights: Float[Array, "b"]
    row_keys: Key[Array, "b"] | None = None


class CachedStep(NamedTuple):
    """A step of a recorded run that is to be taken without some of its rows.

    cached_params, cached_gradient: the run's parameters before the step, and its gradient over
      the rows that stay and those that go: their sum, divided by `num_rows`, or by how many there
      are where `num_rows` is None.
    kept, gone: the rows that stay, and those that go; `kept` is not looked at by `foretell`.
    num_kept: how many stay.
    """

    cached_params: Params
    cached_gradient: PyTree
    kept: WeightedRows | None
    gone: WeightedRows
    num_kept: Float[Array, ""]
    num_rows: Float[Array, ""] | None


class Foretold(NamedTuple):
    """How a gradient foretold by the pairs stands, or would have stood.

    trusted: the newest offered pair had positive curvature, and ||B v|| is within the smoothness
      that the pairs measured.
    error_norm: ||B v - y||, y the change of the gradient that was found; 0 where none was.
    change_norm: ||y||.  gradient_norm: the norm of the gradient of the rows that stay, in the same
      unit, a mean over the rows that there were.
    """

    trusted: Bool[Array, ""]
    error_norm: Float[Array, ""]
    change_norm: Float[Array, ""]
    gradient_norm: Float[Array, ""]


Evaluate = Callable[..., tuple[PyTree, GradientInfo, lbfgs.LBFGSMemory, Foretold]]
Foretell = Callable[..., tuple[PyTree, Foretold]]


def retained_gradients(
    loss_fn: LossFn, *, learns: bool = True, guarded: bool = True
) -> tuple[Evaluate, Foretell]:
    """Two ways to the gradient of the rows that stay, at parameters w near the cached w_t.

    With v = w - w_t, g the cached gradient, n rows of which k go, and B of the L-BFGS pairs,
    started from (s'y / s's) I of the newest:

        evaluate:  g_R = grad F_R(w);   the pair (v, y), y = grad F(w) - g over all n rows
        foretell:  g_R = (n (g + B v) - sum_gone grad loss_i(w)) / (n - k)

    Args:
      learns: whether `evaluate` offers the pair; else it does not look at the rows that go.
      guarded: whether `foretell` judges itself; else it is always trusted once there is a pair.

    Returns:
      evaluate(params, pairs, step) -> (gradient, info, pairs, foretold), bitwise the gradient of
        `weighted_grad`; `foretold` tells what `foretell` would have been worth there.
      foretell(params, pairs, step) -> (gradient, foretold).
      Both without L2, which a caller adds at w, where it is exact.

    Cost: evaluate: a gradient over the rows that stay, one over those that go, and the inner
      products of a push. foretell: a gradient over the rows that go, none where there are none, and
      4 m parameter counts read.

    References: Wu, Dobriban and Davidson 2020, "DeltaGrad", algorithm 1. Deviations: y is the
      change of the mean over the rows, without L2; a pair without positive curvature, or at the
      level of rounding, is not admitted; v = 0 needs no pair.

    >>> half_square = lambda w, batch: jnp.mean(0.5 * (w - batch) ** 2)
    >>> rows = lambda *values: WeightedRows(jnp.array(values), jnp.ones(len(values)))
    >>> at_zero = CachedStep(jnp.array(0.0), jnp.array(-2.0), rows(1.0), rows(3.0), 1.0, None)
    >>> evaluate, foretell = retained_gradients(half_square)
    >>> _, _, pairs, _ = evaluate(jnp.array(0.5), lbfgs.init(jnp.array(0.0), 2), at_zero)
    >>> gradient, told = foretell(jnp.array(0.25), pairs, at_zero._replace(kept=None))
    >>> float(gradient), bool(told.trusted)
    (-0.75, True)
    """
    gradient = weighted_grad(loss_fn, has_info=True)
    total = weighted_grad(loss_fn)

    def gone_sum(params, gone: WeightedRows):
        evaluate = lambda _: total(
            params, gone.batch, gone.row_weights, num_rows=1, keys=gone.row_keys
        )
        nothing = lambda _: jax.tree.map(jnp.zeros_like, params)
        return jax.lax.cond(jnp.any(gone.row_weights > 0), evaluate, nothing, None)

    def evaluate(params, pairs, step: CachedStep):
        kept: Any = step.kept
        found, info = gradient(
            params, kept.batch, kept.row_weights, num_rows=step.num_rows, keys=kept.row_keys
        )
        if not learns:
            return found, info, pairs, _foretold(pairs, False)
        num_all, divisor, kept_divisor = _divisors(step)
        shift = displacement(params, step.cached_params)
        change = jax.tree.map(
            lambda f, gone, g: (
                (kept_divisor * widen(f) + widen(gone) - divisor * widen(g)) / num_all
            ),
            found,
            gone_sum(params, step.gone),
            step.cached_gradient,
        )
        image = _image(pairs, shift)
        error = jax.tree.map(lambda a, b: a - b, image, change)
        usable = (pairs.num_pairs > 0) & (_norm(shift) > 0)
        foretold = _foretold(
            pairs,
            usable,
            jnp.where(usable, _norm(error), 0),
            _norm(change),
            kept_divisor / num_all * _norm(found),
        )
        # A pair of rounding errors is no news about the curvature: then the clock stands still.
        is_news = (_norm(shift) > _rounding(params)) & (
            _norm(change) > _rounding(step.cached_gradient)
        )
        pairs = jax.lax.cond(
            is_news,
            lambda memory: lbfgs.push(memory, shift, change)[0],
            lambda memory: memory,
            pairs,
        )
        return found, info, pairs, foretold

    def foretell(params, pairs, step: CachedStep):
        num_all, divisor, kept_divisor = _divisors(step)
        shift = displacement(params, step.cached_params)
        image = _image(pairs, shift)
        empty = step.num_kept == 0

        def leaf(g, b, gone, p):
            rest = divisor * widen(g) + num_all * b - widen(gone)
            return jnp.where(empty, 0, rest / kept_divisor).astype(jnp.result_type(p))

        gone = gone_sum(params, step.gone)
        found = jax.tree.map(leaf, step.cached_gradient, image, gone, params)
        trusted = _is_trusted(pairs, shift, image, guarded)
        return found, _foretold(pairs, trusted)

    return evaluate, foretell


def displacement(params: Params, cached: Params) -> Params:
    """params - cached in float32 or wider."""
    return jax.tree.map(lambda p, c: widen(p) - widen(c), params, cached)


def _divisors(step: CachedStep):
    """How many rows there were, and what the cached and the new gradient are divided by."""
    num_all = step.num_kept + jnp.sum(step.gone.row_weights)
    some = lambda count: jnp.where(count == 0, 1, count)
    if step.num_rows is None:
        return some(num_all), some(num_all), some(step.num_kept)
    return some(num_all), some(step.num_rows), some(step.num_rows)


def _image(pairs, shift):
    """B v, with B started from s'y / s's of the newest pair."""
    slot = pairs.next_slot - 1
    s_s, s_y = pairs.pair_gram[slot, 0, slot, 0], pairs.pair_gram[slot, 0, slot, 1]
    scale = jnp.where(pairs.num_pairs > 0, s_s / jnp.where(pairs.num_pairs > 0, s_y, 1), 1)
    return lbfgs.product(pairs, shift, scale=scale)


def _is_trusted(pairs, shift, image, guarded: bool) -> Bool[Array, ""]:
    """Whether B v may stand in for the change of a gradient."""
    still = _norm(shift) == 0
    if not guarded:
        return still | (pairs.num_pairs > 0)
    live = lbfgs.is_occupied(pairs)
    gram = pairs.pair_gram
    s_y = jnp.diagonal(gram[:, 0, :, 1])
    smoothness = jnp.max(
        jnp.where(live, jnp.diagonal(gram[:, 1, :, 1]) / jnp.where(live, s_y, 1), 0)
    )
    curved = lbfgs.ages(pairs)[pairs.next_slot - 1] == 0
    smooth = _norm(image) <= SMOOTHNESS_SLACK * smoothness * _norm(shift)
    return still | ((pairs.num_pairs > 0) & curved & smooth)


def _foretold(pairs, trusted, error=0.0, change=0.0, gradient=0.0) -> Foretold:
    """The figures in the dtype of the pairs."""
    norms = (jnp.asarray(norm, pairs.pair_gram.dtype) for norm in (error, change, gradient))
    return Foretold(jnp.asarray(trusted, bool), *norms)


def _rounding(vector: PyTree) -> Float[Array, ""]:
    """What may be rounding in a difference of two such vectors."""
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(vector))
    return ROUNDINGS * eps * _norm(vector)


def _norm(vector: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(tree.vdot(vector, vector))
