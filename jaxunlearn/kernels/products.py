"""Hessian-vector products of a mean loss, one vector or many, whole batch or in microbatches."""

import jax
import jax.numpy as jnp

from jaxunlearn.kernels.rowwise import (
    as_weights,
    check_rows,
    fill_rows,
    finite_rows,
    local_params,
    num_rows_of,
    row_losses,
    widened,
)
from jaxunlearn.types import Batch, LossFn, Params


def hvp(loss_fn: LossFn, *, damping: float = 0.0, microbatch_size: int | None = None):
    """Hessian-vector product, `(H + damping I) v` with `H = sum_i w_i hess loss_i / num_rows`.

    Forward over reverse (Pearlmutter 1994).

    Args:
      loss_fn: mean of per-example losses.
      damping: >= 0, added to the diagonal.
      microbatch_size: rows differentiated at a time; None takes the batch whole. Bounds memory.

    Returns:
      A function (params, batch, vector, *, weights=None, num_rows=None, keys=None) -> product like
      `vector`. Without weights `H` is the Hessian of the mean; with them, `num_rows` None means
      `sum(weights)`, and 0 gives `damping * v`.

    Cost: about two gradients a call.

    >>> product = hvp(lambda w, batch: jnp.mean((batch * w) ** 2))
    >>> product(1.0, jnp.array([1.0, 3.0]), 1.0)
    Array(10., dtype=float32)
    """
    many = _products(loss_fn, damping, microbatch_size)

    def product(params: Params, batch: Batch, vector: Params, **options) -> Params:
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], vector)
        return jax.tree.map(lambda leaf: leaf[0], many(params, batch, stacked, **options))

    return product


def hvp_many(loss_fn: LossFn, *, damping: float = 0.0, microbatch_size: int | None = None):
    """`hvp` for a stack of vectors: every leaf of `vectors` has a leading axis, linearised once.

    Args and cost as `hvp`, the cost per vector; the linearisation is shared.

    >>> products = hvp_many(lambda w, batch: jnp.mean((batch * w) ** 2))
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([10., 20.], dtype=float32)
    """
    return _products(loss_fn, damping, microbatch_size)


def _products(loss_fn, damping, microbatch_size):
    """The shared body of `hvp` and `hvp_many`."""
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"Expected damping={damping} >= 0.")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"Expected microbatch_size={microbatch_size} >= 1.")
    losses_of = row_losses(loss_fn)

    def total(params, batch, weights, keys):
        live = (weights != 0) & finite_rows(batch)
        losses = widened(losses_of(params, fill_rows(batch, live), keys))
        return jnp.sum(jnp.where(live & jnp.isfinite(losses), weights * losses, 0.0))

    def chunk_products(params, batch, weights, keys, vectors):
        gradient = lambda p: jax.grad(total)(p, batch, weights, keys)
        _, linear = jax.linearize(gradient, params)
        return jax.vmap(linear)(vectors)

    def products(params, batch, vectors, *, weights=None, num_rows=None, keys=None):
        rows = num_rows_of(batch)
        weights = jnp.ones((rows,)) if weights is None else as_weights(weights)
        check_rows(batch, weights, keys)
        count = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        params = jax.tree.map(jnp.asarray, params)
        vectors = jax.tree.map(lambda v, p: jnp.asarray(v, p.dtype), vectors, params)
        params, vectors = local_params((params, vectors), (batch, weights, keys))
        if microbatch_size is None or microbatch_size >= rows:
            sums = chunk_products(params, batch, weights, keys, vectors)
        else:
            chunks = _chunked((batch, weights, keys), microbatch_size)

            def body(sums, chunk):
                rows, chunk_weights, chunk_keys = chunk
                more = chunk_products(params, rows, chunk_weights, chunk_keys, vectors)
                return jax.tree.map(jnp.add, sums, more), None

            sums, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, vectors), chunks)
        scale = jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))
        return jax.tree.map(lambda s, v: (scale * s + damping * v).astype(v.dtype), sums, vectors)

    return products


def _chunked(rows, size: int):
    """Leaves (B, ...) as (chunks, size, ...), padded with copies of row 0 at weight zero.

    `rows` is (batch, weights, keys); padding weights are zero, so padded rows do not count.
    """
    batch, weights, keys = rows
    pad = -len(weights) % size

    def split(leaf):
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:1], pad, axis=0)]) if pad else leaf
        return leaf.reshape(-1, size, *leaf.shape[1:])

    weights = jnp.concatenate([weights, jnp.zeros((pad,), weights.dtype)])
    batch, keys = jax.tree.map(lambda leaf: split(jnp.asarray(leaf)), (batch, keys))
    return batch, weights.reshape(-1, size), keys
