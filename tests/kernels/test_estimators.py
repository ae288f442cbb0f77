"""Trace and diagonal estimates: unbiased, with an error that says how far off they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import kernels
from jaxunlearn.kernels.operators import LinearOperator


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """A given matrix on vectors {"a": (2, 3), "b": (P - 6,)}."""

    matrix: jax.Array

    @property
    def domain(self):
        shape = lambda *s: jax.ShapeDtypeStruct(s, self.matrix.dtype)
        return {"a": shape(2, 3), "b": shape(self.matrix.shape[0] - 6)}

    def products(self, vectors):
        flat = jnp.concatenate([vectors["a"].reshape(-1, 6), vectors["b"]], axis=1)
        out = jnp.matmul(flat, self.matrix, precision="highest")
        return {"a": out[:, :6].reshape(-1, 2, 3), "b": out[:, 6:]}


def matrix_of(seed, size=12, decay=1.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (basis * np.arange(1, size + 1) ** -decay) @ basis.T


def z_scores(estimates, truth):
    return np.asarray((estimates.mean - truth) / estimates.standard_error)


def test_trace_is_unbiased_and_its_error_is_its_spread():
    """400 runs of 16: z-scores of mean 0 and spread 1; a scale of 3/2 on the error is refused."""
    matrix = matrix_of(0)
    run = jax.jit(
        jax.vmap(
            lambda key: kernels.hutchinson_trace(
                Dense(jnp.asarray(matrix, jnp.float32)), key=key, num_probes=64
            )
        )
    )
    estimates = run(jax.random.split(jax.random.key(0), 400))
    scores = z_scores(estimates, np.trace(matrix))
    assert abs(scores.mean()) < 0.25
    assert 0.85 < scores.std() < 1.2
    off = matrix - np.diag(np.diag(matrix))
    exact = np.sqrt(2 * np.sum(off**2) / 64)
    assert 0.9 < np.sqrt(np.mean(np.asarray(estimates.standard_error) ** 2)) / exact < 1.1


def test_diagonal_is_unbiased_and_its_error_is_its_spread():
    matrix = matrix_of(1)
    run = jax.jit(
        jax.vmap(
            lambda key: kernels.hutchinson_diagonal(
                Dense(jnp.asarray(matrix, jnp.float32)), key=key, num_probes=64
            )
        )
    )
    estimates = run(jax.random.split(jax.random.key(1), 400))
    for name, truth in (("a", np.diag(matrix)[:6].reshape(2, 3)), ("b", np.diag(matrix)[6:])):
        mean, error = estimates.mean[name], estimates.standard_error[name]
        scores = np.asarray((mean - truth) / error)
        assert scores.shape[1:] == truth.shape
        assert np.all(np.abs(scores.mean(0)) < 0.25)
        assert np.all((scores.std(0) > 0.85) & (scores.std(0) < 1.2))


def test_a_diagonal_matrix_has_no_error():
    matrix = np.diag(np.arange(12.0))
    op = Dense(jnp.asarray(matrix, jnp.float32))
    trace = kernels.hutchinson_trace(op, key=jax.random.key(2), num_probes=2)
    assert (trace.mean, trace.standard_error) == (66.0, 0.0)
    diagonal = kernels.hutchinson_diagonal(op, key=jax.random.key(2), num_probes=2)
    assert np.array_equal(diagonal.mean["b"], np.arange(6.0, 12.0))


@pytest.mark.slow
def test_hutch_pp_is_exact_on_low_rank_and_ahead_where_the_spectrum_decays(x64):
    rng = np.random.default_rng(3)
    low = rng.normal(size=(20, 3))
    op = Dense(jnp.asarray(low @ low.T))
    got = kernels.hutch_pp_trace(op, key=jax.random.key(3), num_products=12)
    assert abs(got.mean - np.sum(low**2)) < 1e-10 * np.sum(low**2)
    decaying = Dense(jnp.asarray(matrix_of(4, size=40, decay=2.0)))
    keys = jax.random.split(jax.random.key(4), 100)
    truth = np.trace(matrix_of(4, size=40, decay=2.0))
    plus = jax.vmap(lambda k: kernels.hutch_pp_trace(decaying, key=k, num_products=24))(keys)
    plain = jax.vmap(lambda k: kernels.hutchinson_trace(decaying, key=k, num_probes=24))(keys)
    spread = lambda e: np.sqrt(np.mean((np.asarray(e.mean) - truth) ** 2))
    assert spread(plus) < 0.3 * spread(plain)
    assert abs(z_scores(plus, truth).mean()) < 0.5


class Counted:
    """An operator that notes how many vectors each product was given."""

    def __init__(self, operator):
        self.operator, self.given = operator, []

    @property
    def domain(self):
        return self.operator.domain

    def __matmul__(self, vectors):
        self.given.append(len(jax.tree.leaves(vectors)[0]))
        return self.operator @ vectors


def test_products_are_as_many_as_stated():
    key, dense = jax.random.key(5), Dense(jnp.asarray(matrix_of(5), jnp.float32))
    for estimator in (kernels.hutchinson_trace, kernels.hutchinson_diagonal):
        counted = Counted(dense)
        estimator(counted, key=key, num_probes=5)
        assert counted.given == [5]
    for num_products, spent in ((6, 6), (8, 6), (9, 9)):
        counted = Counted(dense)
        kernels.hutch_pp_trace(counted, key=key, num_products=num_products)
        assert sum(counted.given) == spent


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (kernels.hutchinson_trace, {"num_probes": 1}),
        (kernels.hutchinson_diagonal, {"num_probes": 0}),
        (kernels.hutch_pp_trace, {"num_products": 5}),
    ],
)
def test_too_few_products_are_refused(estimator, options):
    with pytest.raises(ValueError, match="Expected at least"):
        estimator(Dense(jnp.eye(8)), key=jax.random.key(0), **options)


def test_trace_of_a_hessian(x64):
    loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(20, 4)))
    op = kernels.hessian_operator(loss_fn)(jnp.zeros(4), x)
    got = kernels.hutchinson_trace(op, key=jax.random.key(5), num_probes=200)
    assert abs(got.mean - 2 * jnp.sum(x**2) / 20) < 5 * got.standard_error
