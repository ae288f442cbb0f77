"""Sums over rows that a deletion without the other rows works from: gradient, Hessian, bounds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from jaxunlearn.kernels.gradients import weighted_grad
from jaxunlearn.kernels.per_example import per_example
from jaxunlearn.kernels.products import hvp_many
from jaxunlearn.kernels.rowwise import finite_rows, largest_feature
from jaxunlearn.types import Batch, LossFn, Params


class LossSums(NamedTuple):
    """Sums over the rows of weight 1, of the loss alone, parameters as one vector in tree order.

    gradient: sum_i grad loss_i.  hessian: sum_i hess loss_i.
    gradient_norm_sum: sum_i ||grad loss_i||.  largest_gradient: max_i ||grad loss_i||.
    largest_feature: max_i ||x_i||, 0 without features.
    num_rows: rows of weight 1.  num_non_finite: those of them left out, since not finite.
    """

    gradient: Float[Array, "p"]
    hessian: Float[Array, "p p"]
    gradient_norm_sum: Float[Array, ""]
    largest_gradient: Float[Array, ""]
    largest_feature: Float[Array, ""]
    num_rows: Int[Array, ""]
    num_non_finite: Int[Array, ""]


def loss_sums(
    loss_fn: LossFn,
    *,
    features: Callable[[Batch], Float[Array, "b d"]] | None = None,
    microbatch_size: int | None = None,
):
    """Gradient and Hessian of a summed loss, dense: the statistics of Sekhari et al. 2021.

    Args:
      features: batch -> X of shape (B, d), whose largest row norm is wanted.
      microbatch_size: rows differentiated at a time in Hessian products.

    Returns:
      A function (params, rows, weights) -> `LossSums`. Weight 0 removes a row, whatever it holds.

    Cost: one gradient and p Hessian products over the rows. Memory: p squared.

    References: Sekhari et al. 2021, Algorithm 1, T(S); with the gradient beside the Hessian.

    >>> sums = loss_sums(lambda w, x: jnp.mean(0.5 * (x @ w) ** 2))
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    >>> sums(jnp.ones(2), x, jnp.array([1.0, 1.0, 0.0])).hessian
    Array([[1., 0.],
           [0., 4.]], dtype=float32)
    """
    gradient = weighted_grad(loss_fn)
    products = hvp_many(loss_fn, microbatch_size=microbatch_size)
    per_row = per_example(loss_fn)

    def sums(params: Params, rows: Batch, weights: Float[Array, "b"]) -> LossSums:
        counted = weights > 0
        flat, unravel = ravel_pytree(params)
        units = jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))
        columns = products(params, rows, units, weights=weights, num_rows=1)
        hessian = jax.vmap(lambda column: ravel_pytree(column)[0])(columns)
        norms = jnp.where(counted, per_row(params, rows).norms(), 0.0)
        finite = finite_rows(rows)
        return LossSums(
            gradient=ravel_pytree(gradient(params, rows, weights, num_rows=1))[0],
            hessian=0.5 * (hessian + hessian.T),
            gradient_norm_sum=jnp.sum(norms),
            largest_gradient=jnp.max(norms),
            largest_feature=largest_feature(features, rows, counted & finite),
            num_rows=jnp.sum(counted, dtype=jnp.int32),
            num_non_finite=jnp.sum(counted & ~finite, dtype=jnp.int32),
        )

    return sums
