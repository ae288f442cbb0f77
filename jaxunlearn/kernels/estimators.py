"""Trace and diagonal of a matrix known by its products, from random probes, with their errors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from jaxunlearn.kernels._stable import widen, widened
from jaxunlearn.kernels.operators import LinearOperator


class Estimate(NamedTuple):
    """A mean over probes and its standard error, both shaped alike.

    The error is that of the mean: the sample standard deviation over sqrt(probes).
    """

    mean: PyTree
    standard_error: PyTree


def hutchinson_trace(operator: LinearOperator, *, key: Key[Array, ""], num_probes: int) -> Estimate:
    """Trace by random signs, the mean of z' A z (Hutchinson 1990).

    Unbiased, of variance 2 sum_{i != j} A_ij^2 / num_probes for a symmetric A: exact, with error
    zero, where A is diagonal.

    Args:
      operator: A, anything with `domain` and `op @ stack`.
      key: a typed key.
      num_probes: >= 2.

    Returns:
      `Estimate` of scalars.

    Cost: num_probes products, twice as many vectors in memory.

    References: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".

    >>> from jaxunlearn.kernels import hessian_operator
    >>> matrix = hessian_operator(lambda w, x: jnp.mean(x @ w**2))(jnp.ones(2), jnp.ones((1, 2)))
    >>> hutchinson_trace(matrix, key=jax.random.key(0), num_probes=4)
    Estimate(mean=Array(4., dtype=float32), standard_error=Array(0., dtype=float32))
    """
    _check(num_probes, 2)
    return _summary(_quadratic_forms(operator, key, num_probes))


def hutchinson_diagonal(
    operator: LinearOperator, *, key: Key[Array, ""], num_probes: int
) -> Estimate:
    """Diagonal by random signs, the mean of z * A z (Bekas, Kokiopoulou and Saad 2007).

    Unbiased; entry i has variance sum_{j != i} A_ij^2 / num_probes.

    Args and cost as `hutchinson_trace`.

    Returns:
      `Estimate` of two pytrees like a vector.

    References: Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix",
      eq. 5; with signs the denominator is num_probes.

    >>> from jaxunlearn.kernels import hessian_operator
    >>> matrix = hessian_operator(lambda w, x: jnp.mean(x @ w**2))(jnp.ones(2), jnp.ones((1, 2)))
    >>> hutchinson_diagonal(matrix, key=jax.random.key(0), num_probes=4).mean
    Array([2., 2.], dtype=float32)
    """
    _check(num_probes, 2)
    probes = _signs(operator.domain, key, num_probes)
    samples = jax.tree.map(jnp.multiply, probes, operator @ probes)
    summaries = jax.tree.map(_summary, samples)
    is_estimate = lambda node: isinstance(node, Estimate)
    pick = lambda name: jax.tree.map(lambda e: getattr(e, name), summaries, is_leaf=is_estimate)
    return Estimate(pick("mean"), pick("standard_error"))


def hutch_pp_trace(operator: LinearOperator, *, key: Key[Array, ""], num_products: int) -> Estimate:
    """Trace with the range of a sketch taken exactly, and random signs for the rest (Hutch++).

        tr(Q' A Q) + mean z' (I - Q Q') A (I - Q Q') z,    Q = orth(A S)

    For a positive semi-definite A the relative error falls like 1 / num_products, where plain
    Hutchinson's falls like its square root: the choice for a spectrum that decays.

    Args:
      operator: symmetric.
      num_products: >= 6, a third of it for S, for Q and for z.

    Returns:
      `Estimate` of scalars; the standard error is of the second term, given Q.

    Cost: num_products products at most, a QR of P by num_products / 3, as many vectors in memory.

    References: Meyer, Musco, Musco and Woodruff 2021, "Hutch++: optimal stochastic trace
      estimation", algorithm 1.

    >>> from jaxunlearn.kernels import hessian_operator
    >>> matrix = hessian_operator(lambda w, x: jnp.mean((x @ w) ** 2))
    >>> at = matrix(jnp.ones(8), jnp.ones((1, 8)))
    >>> bool(abs(hutch_pp_trace(at, key=jax.random.key(0), num_products=6).mean - 16.0) < 1e-3)
    True
    """
    _check(num_products, 6)
    if not jax.tree.leaves(operator.domain):
        return _summary(jnp.zeros((2,)))
    third = num_products // 3
    key_sketch, key_probe = jax.random.split(key)
    sketch = _flat(operator @ _signs(operator.domain, key_sketch, third))
    basis = jnp.linalg.qr(sketch.T)[0].T
    inside = jnp.sum(basis * _times(operator, basis))
    probes = _flat(_signs(operator.domain, key_probe, third))
    along = jnp.matmul(probes, basis.T, precision="highest")
    rest = probes - jnp.matmul(along, basis, precision="highest")
    forms = _summary(jnp.sum(rest * _times(operator, rest), axis=1))
    return Estimate(inside + forms.mean, forms.standard_error)


def _quadratic_forms(operator, key, num_probes: int) -> Float[Array, " k"]:
    """z' A z for each probe."""
    probes = _signs(operator.domain, key, num_probes)
    forms = [
        jnp.sum((z * az).reshape(num_probes, -1).astype(widened(az)), axis=1)
        for z, az in zip(jax.tree.leaves(probes), jax.tree.leaves(operator @ probes))
    ]
    return functools.reduce(jnp.add, forms, jnp.zeros((num_probes,)))


def _signs(domain, key, num_probes: int) -> PyTree:
    """Random signs, a stack of vectors."""
    leaves, treedef = jax.tree.flatten(domain)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, (num_probes, *leaf.shape), leaf.dtype)
        for k, leaf in zip(keys, leaves)
    ]
    return jax.tree.unflatten(treedef, signs)


def _summary(samples: Float[Array, "k ..."]) -> Estimate:
    """Mean over the leading axis, and its standard error."""
    samples = widen(samples)
    return Estimate(
        jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / len(samples) ** 0.5
    )


def _flat(vectors: PyTree) -> Float[Array, "k p"]:
    """A stack of vectors as the rows of a matrix."""
    return jax.vmap(lambda vector: ravel_pytree(vector)[0])(vectors)


def _times(operator, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
    """The products with the rows of a matrix."""
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), operator.domain)
    return _flat(operator @ jax.vmap(ravel_pytree(zero)[1])(rows))


def _check(number: int, least: int) -> None:
    """Refuse too few products for an error bar."""
    if number < least:
        raise ValueError(f"Expected at least {least} products, got {number}.")
