"""Gradients of weighted sums of per-example losses: what training and deletion share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxunlearn.kernels._meshes import in_automatic_axes, local_params, specs_of
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.rowwise import (
    as_weights,
    check_operands,
    check_rows,
    fill_rows,
    finite_rows,
    row_losses,
)
from jaxunlearn.types import Batch, LossFn, Params


class GradientInfo(NamedTuple):
    """What `weighted_grad` found: the weighted loss, and rows that counted as zero.

    value: sum_i w_i loss_i / num_rows over the finite rows.
    num_non_finite: rows of non-zero weight whose inputs or loss were not finite.
    """

    value: Float[Array, ""]
    num_non_finite: Int[Array, ""]


def weighted_grad(loss_fn: LossFn, *, has_info: bool = False):
    """Gradient of the weighted loss, `sum_i w_i grad loss_i(params) / num_rows`, without L2.

    Use it as the training gradient and a later replay is bitwise the run it replays: optimization
    barriers keep XLA from fusing it differently into different programs.

    Args:
      loss_fn: mean of per-example losses, for any batch size.
      has_info: also return a `GradientInfo`.

    Returns:
      A function (params, batch, weights, *, num_rows=None, keys=None) -> gradient like params.
      weights: shape (B,), finite; zero removes a row, whatever it holds.
      num_rows: the divisor; None means `sum(weights)`; a divisor of 0 gives a zero gradient.
      keys: typed keys of shape (B,), `example_keys(step_key, ids)`, for a loss that takes a key.
      A row whose inputs or loss are not finite contributes zero and is counted in the info.
      Inside `shard_map` it is the gradient of the local rows; sum it with `jax.lax.psum`.

    Rows that a loss couples (BatchNorm in training mode, token counts over the batch) show in no
    trace, since a row is seen alone: run `check_loss` once, eagerly.

    Cost: one batch gradient; a second one in a step where some loss is not finite.

    Raises:
      ValueError: weights or keys that are not one for each row.
      LossSignatureError: `loss_fn` does not take these arguments, or does not return a scalar.
      TypeError: a parameter is not real floating point.

    >>> grad = weighted_grad(lambda w, batch: jnp.mean((batch - w) ** 2))
    >>> grad(0.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0]))
    Array(-2., dtype=float32, weak_type=True)
    """
    losses_of = row_losses(loss_fn)

    def value_and_grad(params, batch, weights, live, divisor, keys):
        rows = fill_rows(batch, live)

        def total(p):
            losses = widen(losses_of(p, rows, keys))
            terms = jnp.where(live & jnp.isfinite(losses), weights * losses, 0.0)
            return jnp.sum(terms) / divisor, losses

        return jax.value_and_grad(total, has_aux=True)(params)

    # Made once: JAX finds a compiled branch of an eager call again by the function that it is.
    def without_bad_rows(operands, _):
        (value, _), grads = value_and_grad(*operands)
        return value, grads

    def as_it_is(_, found):
        return found

    def gradient(
        params: Params,
        batch: Batch,
        weights: Float[Array, "b"],
        *,
        num_rows: Float[Array, ""] | int | None = None,
        keys: Key[Array, "b"] | None = None,
    ):
        check_rows(batch, weights, keys)
        check_operands(loss_fn, params, batch, keys)
        everywhere: Any = PartitionSpec()
        like_params = lambda: (specs_of(params), GradientInfo(everywhere, everywhere))
        operands = (params, batch, weights, num_rows, keys)
        grads, info = in_automatic_axes(gradient_and_info, *operands, specs=like_params)
        return (grads, info) if has_info else grads

    def gradient_and_info(params, batch, weights, num_rows, keys):
        params = local_params(params, (batch, weights, keys))
        params, batch, weights, num_rows, keys = jax.lax.optimization_barrier(
            (params, batch, as_weights(weights), num_rows, keys)
        )
        count = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        divisor = jnp.where(count == 0, 1.0, count)
        counts = (weights != 0) & (count != 0)
        live = counts & finite_rows(batch)
        (value, losses), grads = value_and_grad(params, batch, weights, live, divisor, keys)
        finite = live & jnp.isfinite(losses)

        operands = (params, batch, weights, finite, divisor, keys)
        bad_loss = jnp.any(live & ~finite)
        value, grads = jax.lax.cond(bad_loss, without_bad_rows, as_it_is, operands, (value, grads))
        grads = _zero_where(~jnp.any(finite), grads)
        info = GradientInfo(value, jnp.sum(counts & ~finite, dtype=jnp.int32))
        return jax.lax.optimization_barrier((grads, info))

    return gradient


def weighted_loss(loss_fn: LossFn):
    """The value that `weighted_grad` differentiates, for line searches: `value_fn` of a step.

    Returns a function (params, batch, weights, *, num_rows=None, keys=None) -> scalar.

    Cost: one forward pass.

    >>> value = weighted_loss(lambda w, batch: jnp.mean((batch - w) ** 2))
    >>> value(0.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0]))
    Array(1., dtype=float32)
    """
    losses_of = row_losses(loss_fn)

    def value(params, batch, weights, *, num_rows=None, keys=None):
        check_rows(batch, weights, keys)
        check_operands(loss_fn, params, batch, keys)
        weights = as_weights(weights)
        live = (weights != 0) & finite_rows(batch)
        losses = widen(losses_of(params, fill_rows(batch, live), keys))
        count = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        terms = jnp.where(live & jnp.isfinite(losses), weights * losses, 0.0)
        return jnp.where(count == 0, 0.0, jnp.sum(terms) / jnp.where(count == 0, 1.0, count))

    return value


def _zero_where(nothing_left, grads: Params) -> Params:
    """Zeros where no row is left: a batch of zeros may itself have no finite gradient."""
    return jax.tree.map(lambda g: jnp.where(nothing_left, jnp.zeros_like(g), g), grads)
