"""Hessian-vector products, against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from jaxunlearn.kernels import example_keys, hvp, hvp_many
from tests import oracles

ROWS, FEATURES = 7, 4
seeds = st.integers(0, 2**32 - 1)


def logistic_loss(params, batch):
    z = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jax.nn.softplus(z) - batch["y"] * z)


def network_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] + params["b"] - batch["y"]) ** 2)


def dropout_loss(params, batch, key):
    mask = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return logistic_loss(params, {"x": batch["x"] * mask, "y": batch["y"]})


LOGISTIC = jax.jit(hvp(logistic_loss, damping=0.3))
NETWORK = jax.jit(hvp(network_loss))


@jax.jit
def dense_hessian(flat_params, batch):
    """The Hessian of `network_loss` in the order of `ravel_pytree`."""
    _, unravel = ravel_pytree(
        {"b": jnp.zeros(()), "v": jnp.zeros(3), "w": jnp.zeros((FEATURES, 3))}
    )
    return jax.hessian(lambda p: network_loss(unravel(p), batch))(flat_params)


def logistic_problem(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=FEATURES).astype(dtype), "b": dtype(rng.normal())}
    vector = {"w": rng.normal(size=FEATURES).astype(dtype), "b": dtype(rng.normal())}
    batch = {
        "x": rng.normal(size=(ROWS, FEATURES)).astype(dtype),
        "y": rng.integers(0, 2, ROWS).astype(dtype),
    }
    return params, batch, vector, rng.uniform(0.1, 2.0, ROWS).astype(dtype)


def network_problem(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (FEATURES, 3), "v": (3,), "b": ()}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    batch = {"x": rng.normal(size=(ROWS, FEATURES)), "y": rng.normal(size=ROWS)}
    return params, batch


@given(seed=seeds)
def test_equals_the_closed_form_of_logistic_regression(seed, x64):
    params, batch, vector, weights = logistic_problem(seed)
    for num_rows in (None, ROWS):
        divisor = weights.sum() if num_rows is None else num_rows
        hessian = oracles.logistic_hessian(params, batch["x"], weights, divisor)
        got = LOGISTIC(params, batch, vector, weights=weights, num_rows=num_rows)
        want = hessian @ oracles.flat(vector) + 0.3 * oracles.flat(vector)
        assert oracles.relative_gap(oracles.flat(got), want) < 1e-12


@given(seed=seeds)
def test_equals_the_dense_hessian_of_a_network(seed, x64):
    params, batch = network_problem(seed)
    flat_params, unravel = ravel_pytree(jax.tree.map(jnp.asarray, params))
    hessian = dense_hessian(flat_params, batch)
    vector = jax.random.normal(jax.random.key(seed), flat_params.shape)
    got, _ = ravel_pytree(NETWORK(params, batch, unravel(vector)))
    assert oracles.relative_gap(got, hessian @ vector) < 1e-11


@given(seed=seeds)
def test_is_right_to_single_precision_in_single_precision(seed):
    params, batch, vector, weights = logistic_problem(seed, np.float32)
    got = LOGISTIC(params, batch, vector, weights=weights)
    hessian = oracles.logistic_hessian(params, batch["x"], weights, weights.sum(dtype=np.float64))
    hessian = hessian + 0.3 * np.eye(FEATURES + 1)
    gap = np.linalg.norm(oracles.flat(got) - hessian @ oracles.flat(vector))
    assert gap < 3e-6 * np.linalg.norm(hessian) * np.linalg.norm(oracles.flat(vector))


@given(seed=seeds)
def test_is_symmetric(seed, x64):
    params, batch = network_problem(seed)
    rng = np.random.default_rng(seed + 1)
    u, v = (jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), params) for _ in range(2))
    left = oracles.flat(u) @ oracles.flat(NETWORK(params, batch, v))
    right = oracles.flat(v) @ oracles.flat(NETWORK(params, batch, u))
    assert abs(left - right) <= 1e-11 * (1 + abs(left))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_microbatches_give_the_whole_batch_also_where_they_do_not_divide_it(size, x64):
    params, batch, vector, weights = logistic_problem(0)
    for options in ({}, {"weights": weights, "num_rows": ROWS}):
        whole = jax.jit(hvp(logistic_loss, damping=0.1))(params, batch, vector, **options)
        parts = jax.jit(hvp(logistic_loss, damping=0.1, microbatch_size=size))(
            params, batch, vector, **options
        )
        assert oracles.relative_gap(parts, whole) < 1e-13


@pytest.mark.parametrize("size", [None, 3])
def test_each_row_keeps_its_key_in_microbatches(size, x64):
    params, batch, vector, weights = logistic_problem(1)
    ids = jnp.array([3, 1, 4, 15, 9, 2, 6])
    keys = example_keys(jax.random.key(5), ids)
    got = jax.jit(hvp(dropout_loss, microbatch_size=size))(
        params, batch, vector, weights=weights, keys=keys
    )
    one = jax.jit(lambda row, key: hvp(lambda p, b: dropout_loss(p, b, key))(params, row, vector))
    terms = [
        one(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch), keys[i]) for i in range(ROWS)
    ]
    want = sum(w * oracles.flat(term) for w, term in zip(weights, terms)) / weights.sum()
    assert oracles.relative_gap(oracles.flat(got), want) < 1e-12


@pytest.mark.parametrize("size", [None, 3])
def test_many_products_are_the_products_stacked(size, x64):
    params, batch = network_problem(2)
    vectors = jax.tree.map(
        lambda leaf: np.random.default_rng(3).normal(size=(5, *np.shape(leaf))), params
    )
    many = jax.jit(hvp_many(network_loss, damping=0.2, microbatch_size=size))(
        params, batch, vectors
    )
    for i in range(5):
        pick = lambda leaf, i=i: leaf[i]
        one = jax.jit(hvp(network_loss, damping=0.2))(params, batch, jax.tree.map(pick, vectors))
        assert oracles.relative_gap(jax.tree.map(pick, many), one) < 1e-12


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_row_of_weight_zero_may_hold_anything(content, x64):
    params, batch, vector, weights = logistic_problem(4)
    weights[2] = 0.0
    want = jax.jit(hvp(logistic_loss))(params, batch, vector, weights=weights)
    batch["x"][2] = content
    for size in (None, 2):
        product = jax.jit(hvp(logistic_loss, microbatch_size=size))
        got = product(params, batch, vector, weights=weights)
        assert oracles.relative_gap(got, want) < 1e-13


def test_a_divisor_of_zero_leaves_the_damping():
    params, batch, vector, _ = logistic_problem(5, np.float32)
    product = jax.jit(hvp(logistic_loss, damping=0.5))
    for options in ({"weights": jnp.zeros(ROWS)}, {"num_rows": 0}):
        got = product(params, batch, vector, **options)
        assert np.array_equal(oracles.flat(got), 0.5 * oracles.flat(vector))


def test_a_mask_of_booleans_weighs_like_a_mask_of_floats():
    params, batch, vector, _ = logistic_problem(6, np.float32)
    mask = np.arange(ROWS) % 2 == 0
    got = jax.jit(hvp(logistic_loss))(params, batch, vector, weights=mask, num_rows=ROWS)
    want = jax.jit(hvp(logistic_loss))(params, batch, vector, weights=mask * 1.0, num_rows=ROWS)
    assert np.array_equal(oracles.flat(got), oracles.flat(want))


def test_products_have_the_dtype_of_the_parameters():
    params, batch, vector, _ = logistic_problem(7, np.float32)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    got = jax.jit(hvp(logistic_loss, damping=0.1))(half, batch, vector)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.jit(hvp(logistic_loss, damping=0.1))(params, batch, vector)
    assert oracles.relative_gap(got, exact) < 3e-2


def test_it_jits():
    params, batch, vector, weights = logistic_problem(8, np.float32)
    product = jax.jit(hvp(logistic_loss, microbatch_size=2))
    got = jax.jit(product)(params, batch, vector, weights=weights, num_rows=jnp.int32(5))
    want = product(params, batch, vector, weights=weights, num_rows=5)
    assert oracles.relative_gap(got, want) < 1e-6


@pytest.mark.parametrize("make", [hvp, hvp_many])
@pytest.mark.parametrize("options", [{"damping": -1.0}, {"microbatch_size": 0}])
def test_a_bad_configuration_is_refused_at_once(make, options):
    with pytest.raises(ValueError, match="Expected"):
        make(logistic_loss, **options)


@pytest.mark.parametrize("shape", [(), (ROWS, 1), (ROWS - 1,)])
@pytest.mark.parametrize("size", [None, 2])
def test_weights_that_would_broadcast_are_refused(shape, size):
    params, batch, vector, _ = logistic_problem(9, np.float32)
    with pytest.raises(ValueError, match="Expected weights of shape"):
        jax.jit(hvp(logistic_loss, microbatch_size=size))(
            params, batch, vector, weights=jnp.ones(shape)
        )
