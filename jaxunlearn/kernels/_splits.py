"""A model as outputs and a loss on them: the linear maps that curvature products are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxunlearn import errors
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.rowwise import finite_rows, row_losses
from jaxunlearn.types import Batch, LossFn, Params


def weighted_total(losses: Float[Array, " b"], weights: Float[Array, " b"]) -> Float[Array, ""]:
    """sum_i w_i loss_i; a loss that is not finite gets no cotangent."""
    losses = widen(losses)
    return jnp.sum(jnp.where(jnp.isfinite(losses), weights * losses, 0.0))


def usable_rows(loss_fn: LossFn):
    """A function (params, batch, keys) -> which rows have finite inputs and loss.

    The rule of `weighted_grad`: a row with a finite loss and no finite gradient is not left out
    unseen; it shows in the product.
    """
    losses_of = row_losses(loss_fn)

    def usable(params, batch, keys):
        return finite_rows(batch) & jnp.isfinite(losses_of(params, batch, keys))

    return usable


def split_loss(outputs_fn: Callable[..., Any], outputs_loss: Callable[[Any, Batch], Any]) -> LossFn:
    """The loss that a split adds up to, with a key if it is given one."""

    def loss_fn(params, batch, *key):
        return outputs_loss(outputs_fn(params, batch, *key), batch)

    return loss_fn


def linear_outputs(outputs_fn, params: Params, batch: Batch, keys: Key[Array, " b"] | None):
    """Every row's outputs as of a batch of one, (B, 1, ...), and the linear map to their tangents.

    Raises:
      LossSignatureError: a row's outputs have no leading axis of length one.
    """

    def one(params, row, key):
        single = jax.tree.map(lambda leaf: leaf[None], row)
        out = outputs_fn(params, single) if key is None else outputs_fn(params, single, key)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(out)]
        if any(shape[:1] != (1,) for shape in shapes):
            raise errors.LossSignatureError(
                "Expected outputs_fn to return leaves with the leading axis of the batch, got "
                f"shapes {shapes} for a batch of one row."
            )
        return out

    axes = (None, 0, None if keys is None else 0)
    return jax.linearize(lambda p: jax.vmap(one, in_axes=axes)(p, batch, keys), params)


def outputs_losses(outputs_loss, outputs, batch: Batch) -> Float[Array, " b"]:
    """Each row's loss from its outputs (B, 1, ...)."""

    def one(output, row):
        value = outputs_loss(output, jax.tree.map(lambda leaf: leaf[None], row))
        if jnp.shape(value) != ():
            raise errors.LossSignatureError(
                f"Expected outputs_loss to return a scalar, the mean over the batch, got shape "
                f"{jnp.shape(value)}. Take jnp.mean over the rows."
            )
        return value

    return jax.vmap(one)(outputs, batch)


def sandwiched(jacobian, curvature, params: Params):
    """v -> J' C J v for linear maps J and C."""
    transposed = jax.linear_transpose(jacobian, params)
    return lambda vector: transposed(curvature(jacobian(vector)))[0]
