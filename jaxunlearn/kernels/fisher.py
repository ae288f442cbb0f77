"""Fisher-vector products: exact over the outputs' distribution, by sampled labels, empirical."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxunlearn import errors
from jaxunlearn.kernels._curvature import Options, driven, named, over_tangents, products, single
from jaxunlearn.kernels._operands import check_call
from jaxunlearn.kernels._splits import linear_outputs, sandwiched, usable_rows
from jaxunlearn.kernels.per_example import per_example
from jaxunlearn.types import LossFn


class Likelihood(NamedTuple):
    """The distribution of a label given one row's outputs z; its Fisher in z is F = E g g'.

    fisher: (z, u) -> F u, exactly.
    sample: (key, z) -> label.
    score: (z, label) -> g, the gradient of -log p(label | z) in z.
    """

    fisher: Callable[[Any, Any], Any]
    sample: Callable[[Key[Array, ""], Any], Any]
    score: Callable[[Any, Any], Any]


def categorical() -> Likelihood:
    """Labels in 0..C-1, logits (..., C), independent over the leading axes: F = diag(p) - p p'.

    Cost: 10 flops a logit in each product, an exponential counted as one.

    >>> categorical().fisher(jnp.zeros(2), jnp.array([1.0, 0.0]))
    Array([ 0.25, -0.25], dtype=float32)
    """

    def fisher(z, u):
        p = jax.nn.softmax(z)
        return p * (u - jnp.sum(p * u, axis=-1, keepdims=True))

    def score(z, label):
        return jax.nn.softmax(z) - jax.nn.one_hot(label, z.shape[-1], dtype=z.dtype)

    return Likelihood(fisher, jax.random.categorical, score)


def bernoulli() -> Likelihood:
    """Labels 0 or 1, independent logits: F = diag(p (1 - p)).

    Cost: 9 flops a logit in each product, an exponential counted as one.

    >>> bernoulli().fisher(jnp.zeros(1), jnp.array([4.0]))
    Array([1.], dtype=float32)
    """

    def fisher(z, u):
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * u

    def sample(key, z):
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    return Likelihood(fisher, sample, lambda z, label: jax.nn.sigmoid(z) - label)


def gaussian(variance: float = 1.0) -> Likelihood:
    """Targets normal round the outputs: F = I / variance; loss |z - y|^2 / (2 variance).

    Cost: one flop an output in each product.

    >>> gaussian(2.0).fisher(jnp.zeros(1), jnp.array([4.0]))
    Array([2.], dtype=float32)
    """
    if not variance > 0:
        raise ValueError(f"Expected variance={variance} > 0.")

    def sample(key, z):
        return z + variance**0.5 * jax.random.normal(key, z.shape, z.dtype)

    return Likelihood(lambda z, u: u / variance, sample, lambda z, label: (z - label) / variance)


def poisson() -> Likelihood:
    """Counts with log-rates z: F = diag(exp z).

    Cost: two flops an output in each product, an exponential counted as one.

    >>> poisson().fisher(jnp.zeros(1), jnp.array([4.0]))
    Array([4.], dtype=float32)
    """

    def sample(key, z):
        return jax.random.poisson(key, jnp.exp(z), z.shape).astype(z.dtype)

    return Likelihood(lambda z, u: jnp.exp(z) * u, sample, lambda z, label: jnp.exp(z) - label)


def discrete(negative_log: Callable[[Any, Any], Any], labels: Array) -> Likelihood:
    """Any distribution on finitely many labels, by enumeration: F = sum_y p_y g_y g_y'.

    Args:
      negative_log: (z, label) -> -log p(label | z), z one row's outputs, an array.
      labels: all of them, shape (L, ...).

    Cost: L scores a row in each product.

    >>> fair = discrete(lambda z, y: jnp.sum(jax.nn.softplus((1 - 2 * y) * z)), jnp.arange(2))
    >>> fair.fisher(jnp.zeros(1), jnp.array([4.0]))
    Array([1.], dtype=float32)
    """
    score = jax.grad(negative_log)

    def log_probabilities(z):
        return -jax.vmap(negative_log, in_axes=(None, 0))(z, labels)

    def fisher(z, u):
        scores = jax.vmap(score, in_axes=(None, 0))(z, labels)
        along = jnp.tensordot(scores, u, u.ndim, precision="highest")
        return jnp.tensordot(jnp.exp(log_probabilities(z)) * along, scores, 1, precision="highest")

    def sample(key, z):
        return labels[jax.random.categorical(key, log_probabilities(z))]

    return Likelihood(fisher, sample, score)


def fisher_vp(
    outputs_fn: Callable[..., Any],
    likelihood: Likelihood,
    *,
    num_samples: int | None = None,
    damping: float = 0.0,
    microbatch_size: int | None = None,
):
    """Fisher-vector product, `(F + damping I) v`, `F = sum_i w_i J_i' E[g g'] J_i / num_rows`.

    The expectation is over labels drawn from the model, not over those of the data: exactly, where
    it equals the Gauss-Newton matrix of -log p for a likelihood in its natural parameters, or over
    `num_samples` sampled labels a row, which is unbiased.

    Args:
      outputs_fn: (params, batch[, key]) -> outputs (an array), as in `ggn_vp`.
      likelihood: `categorical()`, `bernoulli()`, `gaussian()`, `poisson()`, `discrete(...)` or your
        own `Likelihood`, of one row's outputs without the batch axis. It is a sum over whatever
        axes remain: of tokens, say, where a loss may take the mean.
      num_samples: None is exact; >= 1 samples, from `sample_keys`.
      damping, microbatch_size: as in `hvp`.

    Returns:
      A function (params, batch, vector, *, sample_keys=None, weights=None, num_rows=None,
      keys=None, leave_out=None) -> product, the rest as in `hvp`. sample_keys: typed keys (B,),
      `example_keys(key, ids)`, so that leaving a row out moves no other's labels.

    Cost: at most 5/3 gradients' flops and one forward pass a call.

    References: Martens 2020, "New insights and perspectives on the natural gradient method",
      sections 5 and 9; Kunstner et al. 2019, "Limitations of the empirical Fisher approximation".

    >>> product = fisher_vp(lambda w, x: w * x, gaussian())
    >>> product(1.0, jnp.array([1.0, 3.0]), 1.0)
    Array(5., dtype=float32)
    """
    many = fisher_vp_many(
        outputs_fn,
        likelihood,
        num_samples=num_samples,
        damping=damping,
        microbatch_size=microbatch_size,
    )
    return single(many)


def fisher_vp_many(
    outputs_fn: Callable[..., Any],
    likelihood: Likelihood,
    *,
    num_samples: int | None = None,
    damping: float = 0.0,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """`fisher_vp` for a stack of vectors, linearised once; arguments as `hvp_many`.

    Cost: at most 4/3 gradients' flops a vector, and one forward pass to linearise. Samples are
    drawn once: all vectors see the same matrix.

    >>> products = fisher_vp_many(lambda w, x: w * x, gaussian())
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([ 5., 10.], dtype=float32)
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"Expected num_samples={num_samples} >= 1.")

    def maps(params, rows, weights, keys):
        batch, sample_keys = rows
        outputs, jacobian = linear_outputs(outputs_fn, params, batch, keys)
        _check_array(outputs)
        if num_samples is None:
            per_row = jax.vmap(lambda z, u: likelihood.fisher(z[0], u[0])[None])
            curvature = jax.linearize(lambda u: per_row(outputs, u), outputs)[1]
        else:
            curvature = _sampled(likelihood, num_samples, outputs, sample_keys)

        def weighted(u):
            scaled = curvature(u)
            return weights.reshape(-1, *[1] * (scaled.ndim - 1)).astype(scaled.dtype) * scaled

        return sandwiched(jacobian, weighted, params)

    options = Options(damping, microbatch_size, tangents_at_once)
    finite = usable_rows(lambda params, rows, *key: jnp.sum(outputs_fn(params, rows[0], *key)))
    check = functools.partial(check_call, "outputs_fn", outputs_fn)
    many = named(products(maps, finite, options, check), "fisher_vp_many")

    def checked(params, batch, vectors, *, sample_keys=None, **rest):
        if (sample_keys is None) != (num_samples is None):
            raise ValueError(
                f"Expected sample_keys with num_samples and only then, got num_samples="
                f"{num_samples} and sample_keys={sample_keys}."
            )
        return many(params, (batch, sample_keys), vectors, **rest)

    return checked


def _check_array(outputs) -> None:
    """Refuse outputs that are no array: a likelihood is of one."""
    if not isinstance(outputs, jax.Array):
        raise errors.LossSignatureError(
            "Expected outputs_fn to return one array (B, ...), got the structure "
            f"{jax.tree.structure(outputs)}. Return the array that the likelihood is of."
        )


def _sampled(likelihood: Likelihood, num_samples: int, outputs, sample_keys):
    """u -> the mean over sampled labels of g <g, u>, row by row."""

    def scores_of(z, key):
        labels = jax.vmap(likelihood.sample, in_axes=(0, None))(
            jax.random.split(key, num_samples), z
        )
        return jax.vmap(likelihood.score, in_axes=(None, 0))(z, labels)

    scores = jax.vmap(scores_of)(outputs[:, 0], sample_keys)
    scores = scores.reshape(*scores.shape[:2], -1)

    def curvature(u):
        along = jnp.einsum("bsz,bz->bs", scores, u.reshape(u.shape[0], -1))
        return jnp.einsum("bs,bsz->bz", along / num_samples, scores).reshape(u.shape)

    return curvature


def empirical_fisher_vp(
    loss_fn: LossFn, *, damping: float = 0.0, microbatch_size: int | None = None
):
    """Empirical-Fisher-vector product, `sum_i w_i g_i <g_i, v> / num_rows + damping v`.

    `g_i` is row i's own gradient at the data's label, kept as factors (`per_example`): no second
    pass, and the g_i are never formed. Not the Fisher matrix, nor near it away from a good fit.

    Args:
      loss_fn: mean of per-example losses.
      damping, microbatch_size: as in `hvp`.

    Returns:
      A function (params, batch, vector, *, weights=None, num_rows=None, keys=None, leave_out=None)
      -> product, as in `hvp`; a row whose inputs, loss or gradient are not finite contributes zero.

    Cost: at most four forward passes' flops a call, 4/3 of a deep network's gradient. Memory: the
    factors of a microbatch.

    References: Kunstner et al. 2019, "Limitations of the empirical Fisher approximation", eq. 3.

    >>> product = empirical_fisher_vp(lambda w, batch: jnp.mean(batch * w))
    >>> product(1.0, jnp.array([1.0, 3.0]), 1.0)
    Array(5., dtype=float32)
    """
    many = empirical_fisher_vp_many(loss_fn, damping=damping, microbatch_size=microbatch_size)
    return single(many)


def empirical_fisher_vp_many(
    loss_fn: LossFn,
    *,
    damping: float = 0.0,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """`empirical_fisher_vp` for a stack of vectors; arguments as `hvp_many`.

    Cost: at most two forward passes' flops a vector, 2/3 of a deep network's gradient, beside one
    forward and one backward pass for the factors.

    >>> products = empirical_fisher_vp_many(lambda w, batch: jnp.mean(batch * w))
    >>> products(1.0, jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([ 5., 10.], dtype=float32)
    """
    gradients = per_example(loss_fn)

    def summed(params, batch, weights, keys, vectors, at_once):
        grads = gradients(params, batch, keys=keys)
        return over_tangents(lambda v: grads.sum(weights * grads.dot(v)), vectors, at_once)

    check = functools.partial(check_call, "loss_fn", loss_fn)
    options = Options(damping, microbatch_size, tangents_at_once)
    return named(driven(summed, options, check), "empirical_fisher_vp_many")
