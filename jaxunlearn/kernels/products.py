"""Hessian- and Gauss-Newton-vector products of a mean loss, one vector or many."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxunlearn.kernels._curvature import Options, named, products, single
from jaxunlearn.kernels._operands import check_call, mean_loss
from jaxunlearn.kernels._splits import (
    linear_outputs,
    outputs_losses,
    sandwiched,
    split_loss,
    usable_rows,
    weighted_total,
)
from jaxunlearn.kernels.rowwise import row_losses
from jaxunlearn.types import Batch, LossFn


def hvp(loss_fn: LossFn, *, damping: float = 0.0, microbatch_size: int | None = None):
    """Hessian-vector product, `(H + damping I) v` with `H = sum_i w_i hess loss_i / num_rows`.

    Forward over reverse (Pearlmutter 1994).

    Args:
      loss_fn: mean of per-example losses. Run `check_loss` on it once: of a sum, or of a loss in
        which rows meet, the product with weights is not the one without, and no trace shows it.
      damping: >= 0, added to the diagonal.
      microbatch_size: rows differentiated at a time; None takes the batch whole. Bounds memory.

    Returns:
      A function (params, batch, vector, *, weights=None, num_rows=None, keys=None, leave_out=None)
      -> product like `vector`, in its parameters' dtypes.
      weights: shape (B,); zero removes a row, whatever it holds. Without them `H` is the Hessian
        of the mean; with them, `num_rows` None means `sum(weights)`, and 0 gives `damping * v`.
      keys: typed keys of shape (B,), `example_keys(step_key, ids)`, for a loss that takes a key.
      leave_out: a row whose weight is taken as zero, its share of the divisor included; -1, and
        where it is traced whatever else is no row: none.
      A row whose inputs or loss are not finite contributes zero, as in `weighted_grad`. Where only
      its derivatives are not, or the vector where H meets it, neither is the product: nothing is
      left out unseen.
      Inside `shard_map` it is the product over the local rows.

    Cost: at most three gradients' flops a call, about 1.5 gradients' time; a microbatch where a
      row is not finite and spoils the sum is done twice. Memory: about that of two gradients of a
      microbatch. On CPU convolutions cost the same inside a loop as outside. Outside `jit` a call
      is traced anew, and compiled the first time.

    Raises:
      TypeError: a parameter is not floating-point, or leave_out no integer.
      LossSignatureError: the loss is no scalar, or takes a key and gets none.
      ValueError: `vector` is not like params, or leave_out is known and no row.

    References: Pearlmutter 1994, "Fast exact multiplication by the Hessian", section 3.

    >>> import jax.numpy as jnp
    >>> product = hvp(lambda w, batch: jnp.mean((batch * w) ** 2))
    >>> product(1.0, jnp.array([1.0, 3.0]), 1.0)
    Array(10., dtype=float32)
    >>> product(1.0, jnp.array([1.0, 3.0]), 1.0, leave_out=0)
    Array(18., dtype=float32)
    """
    return single(hvp_many(loss_fn, damping=damping, microbatch_size=microbatch_size))


def hvp_many(
    loss_fn: LossFn,
    *,
    damping: float = 0.0,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """`hvp` for a stack of vectors: every leaf of `vectors` has a leading axis, linearised once.

    Args as `hvp`, and
      tangents_at_once: how many vectors go side by side, the rest in a loop. None decides by size:
        small parameters take all of them at once, large ones and convolutions one at a time on
        CPU; elsewhere as many as a bound on memory allows.

    Returns:
      A function like that of `hvp`. leave_out may be of shape (k,): vector k then leaves out row
      leave_out[k], as (H_total - w_i H_i) v, and where `num_rows` is None its own divisor is used.

    Cost: at most two gradients' flops a vector, and one gradient to linearise; with leave_out of
      shape (k,) a product of a batch of one row more. Memory: tangents_at_once tangents.

    >>> import jax.numpy as jnp
    >>> products = hvp_many(lambda w, batch: jnp.mean((batch * w) ** 2))
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([10., 20.], dtype=float32)
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]), leave_out=jnp.array([0, 1]))
    Array([18.,  4.], dtype=float32)
    """
    losses_of = row_losses(loss_fn)

    def maps(params, batch, weights, keys):
        def total(p):
            return weighted_total(losses_of(p, batch, keys), weights)

        return jax.linearize(jax.grad(total), params)[1]

    def whole(params, batch):
        def mean(p):
            value = mean_loss("loss_fn", loss_fn(p, batch))
            return value, value

        _, product, value = jax.linearize(jax.grad(mean, has_aux=True), params, has_aux=True)
        return value, product

    options = Options(damping, microbatch_size, tangents_at_once)
    check = functools.partial(check_call, "loss_fn", loss_fn)
    return named(products(maps, usable_rows(loss_fn), options, check, whole), "hvp_many")


def ggn_vp(
    outputs_fn: Callable[..., Any],
    outputs_loss: Callable[[Any, Batch], Any],
    *,
    damping: float = 0.0,
    microbatch_size: int | None = None,
):
    """Gauss-Newton-vector product, `(G + damping I) v`, `G = sum_i w_i J_i' H_i J_i / num_rows`.

    `J_i` is the Jacobian of row i's outputs, `H_i` the Hessian of its loss in the outputs. Any
    split of `loss_fn(params, batch) = outputs_loss(outputs_fn(params, batch), batch)` will do.

    Args:
      outputs_fn: (params, batch[, key]) -> outputs, a pytree whose leaves have the batch's leading
        axis; rows must not meet in it, since with weights a row is seen as a batch of one. Run
        `check_loss` on the loss once.
      outputs_loss: (outputs, batch) -> scalar, mean of per-example losses, no sum; convex in the
        outputs if `G` is to be positive semi-definite. The batch is where labels come from.
      damping, microbatch_size: as in `hvp`.

    Returns:
      A function (params, batch, vector, *, weights=None, num_rows=None, keys=None, leave_out=None)
      -> product, all as in `hvp`.

    Cost: at most two gradients' flops and one forward pass a call.

    References: Schraudolph 2002, "Fast curvature matrix-vector products", section 3.

    >>> import jax.numpy as jnp
    >>> product = ggn_vp(lambda w, x: w * x, lambda z, x: jnp.mean(z**3))
    >>> product(1.0, jnp.array([1.0, 2.0]), 1.0)
    Array(27., dtype=float32)
    """
    many = ggn_vp_many(outputs_fn, outputs_loss, damping=damping, microbatch_size=microbatch_size)
    return single(many)


def ggn_vp_many(
    outputs_fn: Callable[..., Any],
    outputs_loss: Callable[[Any, Batch], Any],
    *,
    damping: float = 0.0,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """`ggn_vp` for a stack of vectors, linearised once; arguments as `hvp_many`.

    Cost: at most 5/3 gradients' flops a vector, and one gradient to linearise.

    >>> import jax.numpy as jnp
    >>> products = ggn_vp_many(lambda w, x: w * x, lambda z, x: jnp.mean(z**2))
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([10., 20.], dtype=float32)
    """

    def maps(params, batch, weights, keys):
        outputs, jacobian = linear_outputs(outputs_fn, params, batch, keys)

        def total(z):
            return weighted_total(outputs_losses(outputs_loss, z, batch), weights)

        curvature = jax.linearize(jax.grad(total), outputs)[1]
        return sandwiched(jacobian, curvature, params)

    def whole(params, batch):
        outputs, jacobian = jax.linearize(lambda p: outputs_fn(p, batch), params)

        def mean(z):
            value = mean_loss("outputs_loss", outputs_loss(z, batch))
            return value, value

        _, curvature, value = jax.linearize(jax.grad(mean, has_aux=True), outputs, has_aux=True)
        return value, sandwiched(jacobian, curvature, params)

    options = Options(damping, microbatch_size, tangents_at_once)
    check = functools.partial(check_call, "outputs_fn", outputs_fn)
    usable = usable_rows(split_loss(outputs_fn, outputs_loss))
    return named(products(maps, usable, options, check, whole), "ggn_vp_many")
