"""Hessian-vector products, against dense Hessians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from jaxunlearn.kernels import _primitives, example_keys, ggn_vp, ggn_vp_many, hvp, hvp_many
from tests import oracles
from tests.kernels.costs import flops, without_branches

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


@pytest.mark.parametrize("size", [pytest.param(None, marks=pytest.mark.slow), 3])
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


# --- many vectors, in whatever way they are dispatched -------------------------------------------


def network_outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"] + params["b"]


def quartic(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 4)


def grid_outputs(params, batch):
    """A convolution in channels-first order with strides, a sequence model's products, a loop."""
    dims = ("NCHW", "OIHW", "NCHW")
    h = jax.lax.conv_general_dilated(
        batch["x"], params["kernel"], (2, 1), "SAME", dimension_numbers=dims
    )
    tokens = jnp.tanh(h).reshape(h.shape[0], h.shape[1], -1).swapaxes(1, 2)
    mixed, _ = jax.lax.scan(lambda t, w: (jnp.tanh(t @ w), None), tokens, params["stack"])
    return jnp.einsum("btd,de->be", mixed, params["head"])


def grid_loss(params, batch):
    return jnp.mean((grid_outputs(params, batch) - batch["y"]) ** 2)


def grid_problem(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 2, 3, 3), "stack": (2, 3, 3), "head": (3, 2)}
    params = {name: rng.normal(size=shape).astype(dtype) / 2 for name, shape in shapes.items()}
    batch = {"x": rng.normal(size=(5, 2, 4, 3)), "y": rng.normal(size=(5, 2))}
    vectors = {name: rng.normal(size=(4, *shape)) for name, shape in shapes.items()}
    return params, jax.tree.map(lambda leaf: leaf.astype(dtype), batch), vectors


def by_rows(matrix_of, params, batch):
    """The matrix of each row alone, (B, P, P), by JAX's own dense derivatives."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, params))
    single = lambda row: jax.tree.map(lambda leaf: leaf[None], row)
    return np.asarray(jax.jit(jax.vmap(lambda row: matrix_of(flat, unravel, single(row))))(batch))


def dense_hessians(loss_fn, params, batch):
    return by_rows(
        lambda flat, unravel, row: jax.hessian(lambda p: loss_fn(unravel(p), row))(flat),
        params,
        batch,
    )


def dense_gauss_newtons(outputs_fn, outputs_loss, params, batch):
    def matrix(flat, unravel, row):
        outputs = lambda p: outputs_fn(unravel(p), row).ravel()
        shape = outputs_fn(unravel(flat), row).shape
        jacobian = jax.jacobian(outputs)(flat)
        curvature = jax.hessian(lambda z: outputs_loss(z.reshape(shape), row))(outputs(flat))
        return jacobian.T @ curvature @ jacobian

    return by_rows(matrix, params, batch)


def rows_of(tree):
    """A stack of vectors as a matrix in the order of `ravel_pytree`."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@pytest.mark.parametrize("at_once", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_convolutions_scans_and_tokens_give_the_dense_hessian_however_dispatched(at_once, x64):
    params, batch, vectors = grid_problem(0)
    size = 2 if at_once == 1 else None
    many = jax.jit(hvp_many(grid_loss, tangents_at_once=at_once, microbatch_size=size))
    want = rows_of(vectors) @ dense_hessians(grid_loss, params, batch).mean(0)
    assert oracles.relative_gap(rows_of(many(params, batch, vectors)), want) < 1e-12


def test_a_loop_on_the_cpu_holds_no_convolution_in_a_slow_layout():
    params, batch, vectors = grid_problem(0, np.float32)
    checkpointed = lambda p, b: jnp.mean((jax.checkpoint(grid_outputs)(p, b) - b["y"]) ** 2)
    for size, loss_fn in ((None, grid_loss), (2, grid_loss), (None, checkpointed)):
        many = hvp_many(loss_fn, microbatch_size=size)
        jaxpr = jax.make_jaxpr(many)(params, batch, vectors).jaxpr
        layouts = set(convolution_layouts(jaxpr))
        assert layouts == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


def convolution_layouts(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield tuple(eqn.params["dimension_numbers"])
        for value in eqn.params.values():
            for inner in _primitives.jaxprs_in(value):
                yield from convolution_layouts(inner)


@pytest.mark.parametrize("at_once", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_gauss_newton_equals_the_dense_sandwich(at_once, x64):
    params, batch = network_problem(3)
    vectors = jax.tree.map(lambda leaf: np.stack([leaf, leaf**2, np.cos(leaf)]), params)
    weights = np.random.default_rng(4).uniform(0.5, 2.0, ROWS)
    matrices = dense_gauss_newtons(network_outputs, quartic, params, batch)
    total = np.tensordot(weights, matrices, 1)
    for size, num_rows in ((None, None), (3, 5)):
        product = jax.jit(
            ggn_vp_many(network_outputs, quartic, tangents_at_once=at_once, microbatch_size=size)
        )
        got = rows_of(product(params, batch, vectors, weights=weights, num_rows=num_rows))
        divisor = weights.sum() if num_rows is None else num_rows
        assert oracles.relative_gap(got, rows_of(vectors) @ total / divisor) < 1e-12


def test_gauss_newton_is_not_the_hessian_but_has_its_damping(x64):
    params, batch = network_problem(5)
    matrix = dense_gauss_newtons(network_outputs, quartic, params, batch).mean(0)
    got = jax.jit(ggn_vp(network_outputs, quartic, damping=0.5))(params, batch, params)
    flat = oracles.flat(params)
    assert oracles.relative_gap(oracles.flat(got), matrix @ flat + 0.5 * flat) < 1e-12
    hessian = dense_hessians(lambda p, b: quartic(network_outputs(p, b), b), params, batch).mean(0)
    assert oracles.relative_gap(matrix, hessian) > 0.1


# --- rows left out -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_each_vector_leaves_out_its_own_row(at_once, x64):
    params, batch = network_problem(6)
    rows = np.array([2, -1, 6, 2], np.int32)
    vectors = jax.tree.map(
        lambda leaf: np.random.default_rng(7).normal(size=(4, *np.shape(leaf))), params
    )
    weights = np.random.default_rng(8).uniform(0.5, 2.0, ROWS)
    matrices = dense_hessians(network_loss, params, batch)
    many = jax.jit(hvp_many(network_loss, damping=0.1, tangents_at_once=at_once, microbatch_size=4))
    for num_rows in (None, 5):
        got = rows_of(
            many(params, batch, vectors, weights=weights, num_rows=num_rows, leave_out=rows)
        )
        for k, (row, vector) in enumerate(zip(rows, rows_of(vectors))):
            kept = np.where((np.arange(ROWS) == row) & (row >= 0), 0, weights)
            divisor = kept.sum() if num_rows is None else num_rows
            want = np.tensordot(kept, matrices, 1) @ vector / divisor + 0.1 * vector
            assert oracles.relative_gap(got[k], want) < 1e-11


def test_one_row_left_out_is_a_weight_of_zero(x64):
    params, batch, vector, weights = logistic_problem(10)
    product = jax.jit(hvp(logistic_loss))
    for row in (-1, 0, ROWS - 1):
        got = product(params, batch, vector, weights=weights, leave_out=row)
        without = np.where(np.arange(ROWS) == row, 0.0, weights)
        want = product(params, batch, vector, weights=without)
        assert np.array_equal(oracles.flat(got), oracles.flat(want))


@pytest.mark.parametrize("leave_out", [ROWS, -2, np.array([0, 1, 2]), 0.5])
def test_a_row_that_is_not_there_is_refused(leave_out):
    params, batch, vector, _ = logistic_problem(11, np.float32)
    vectors = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), vector)
    with pytest.raises((ValueError, TypeError), match="Expected leave_out"):
        hvp_many(logistic_loss)(params, batch, vectors, leave_out=leave_out)


# --- rows that are not finite --------------------------------------------------------------------


def root_loss(params, batch):
    """Zero inputs have no gradient; a first input of 2 has no loss; both rows are finite."""
    z = batch["x"] @ params["w"]
    return jnp.mean(jnp.sqrt(z**2 + 0.0 * params["b"]) ** 3 + jnp.log(2.0 - batch["x"][:, 0]) * z)


def root_problem():
    rng = np.random.default_rng(12)
    params = {"w": rng.uniform(0.5, 1.0, FEATURES), "b": np.float64(0.3)}
    batch = {"x": rng.uniform(0.5, 1.5, size=(ROWS, FEATURES))}
    batch["x"][1], batch["x"][4, 0], batch["x"][5] = np.inf, 2.0, np.nan
    vectors = jax.tree.map(lambda leaf: rng.normal(size=(3, *np.shape(leaf))), params)
    good = np.ones(ROWS)
    good[[1, 4, 5]] = 0
    return params, batch, vectors, good


@pytest.mark.parametrize(("size", "at_once"), [(None, 1), (2, 3)])
def test_a_row_without_finite_inputs_or_loss_contributes_zero(size, at_once, x64):
    params, batch, vectors, good = root_problem()
    options = {"microbatch_size": size, "tangents_at_once": at_once}
    many = jax.jit(hvp_many(root_loss, **options))
    clean = jax.tree.map(lambda leaf: leaf[good == 1], batch)
    want = rows_of(vectors) @ dense_hessians(root_loss, params, clean).sum(0) / ROWS
    assert oracles.relative_gap(rows_of(many(params, batch, vectors)), want) < 1e-12
    alone = many(params, batch, vectors, weights=1 - good, num_rows=1)
    assert not np.any(rows_of(alone))
    whole = rows_of(many(params, batch, vectors, num_rows=ROWS))
    left = rows_of(many(params, batch, vectors, num_rows=ROWS, leave_out=np.array([1, 4, 5])))
    assert np.array_equal(left, whole)


def test_a_row_with_a_loss_and_no_gradient_is_not_left_out_unseen(x64):
    params, batch, vectors, _ = root_problem()
    batch["x"][1] = 0.0
    assert np.isfinite(root_loss(params, {"x": batch["x"][1:2]}))
    got = jax.jit(hvp_many(root_loss))(params, batch, vectors)
    assert np.any(np.isnan(rows_of(got)))


def test_a_row_without_a_loss_is_left_out_also_where_its_curvature_is_finite(x64):
    params, batch, vectors, _ = root_problem()
    batch["x"][[1, 5]] = 1.0
    loss = lambda p, b: jnp.mean((b["x"] @ p["w"]) ** 2 + jnp.log(2.0 - b["x"][:, 0]))
    many = jax.jit(hvp_many(loss))
    clean = jax.tree.map(lambda leaf: np.delete(leaf, 4, axis=0), batch)
    want = rows_of(many(params, clean, vectors, num_rows=ROWS))
    assert oracles.relative_gap(rows_of(many(params, batch, vectors)), want) < 1e-13
    weighted = many(params, batch, vectors, weights=np.ones(ROWS))
    assert oracles.relative_gap(rows_of(weighted), want) < 1e-13


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_whole_batch_is_a_batch_of_ones_whatever_the_divisor(damping, x64):
    params, batch, vectors, _ = root_problem()
    batch["x"][[1, 4, 5]] = 1.0
    many = jax.jit(hvp_many(root_loss, damping=damping))
    for options in ({}, {"num_rows": 3}, {"num_rows": 0}):
        got = rows_of(many(params, batch, vectors, **options))
        want = rows_of(many(params, batch, vectors, weights=np.ones(ROWS), **options))
        assert np.max(abs(got - want)) <= 1e-13 * np.max(abs(want))


def test_gauss_newton_leaves_out_a_row_without_finite_outputs(x64):
    params, batch, vectors, good = root_problem()
    outputs = lambda p, b: jnp.sqrt(b["x"] @ p["w"]) + jnp.log(2.0 - b["x"][:, 0]) + p["b"]
    square = lambda z, b: jnp.mean(z**2)
    clean = jax.tree.map(lambda leaf: leaf[good == 1], batch)
    want = dense_gauss_newtons(outputs, square, params, clean).sum(0) / ROWS
    got = jax.jit(ggn_vp_many(outputs, square))(params, batch, vectors)
    assert oracles.relative_gap(rows_of(got), rows_of(vectors) @ want) < 1e-12


def test_a_vector_that_is_not_finite_is_not_hidden():
    params, batch, vector, _ = logistic_problem(13, np.float32)
    vector["b"] = np.float32(np.nan)
    got = jax.jit(hvp(logistic_loss))(params, batch, vector)
    assert np.all(np.isnan(oracles.flat(got)))


def test_under_vmap_the_branch_for_bad_rows_stays_a_branch():
    params, batch, vector, _ = logistic_problem(14, np.float32)
    vectors = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), vector)
    mapped = jax.vmap(lambda v: hvp(logistic_loss)(params, batch, v))
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(mapped)(vectors).jaxpr.eqns]
    assert "cond" in names


# --- precision, cost, compilation ----------------------------------------------------------------


def test_half_precision_parameters_do_not_add_microbatches_up_in_half_precision():
    rows = 512
    loss_fn = lambda w, batch: jnp.mean(0.5 * batch * w**2)
    batch = jnp.full((rows,), 1.0, jnp.bfloat16)
    product = jax.jit(hvp(loss_fn, microbatch_size=1))
    assert product(jnp.bfloat16(1), batch, jnp.bfloat16(1)) == 1.0


def test_products_cost_what_their_docstrings_say():
    rng = np.random.default_rng(15)
    sizes = (64, 96, 96, 8)
    params = [rng.normal(size=s).astype(np.float32) for s in itertools.pairwise(sizes)]
    batch = rng.normal(size=(64, 64)).astype(np.float32), np.zeros((64, 8), np.float32)

    def outputs(p, b):
        return jnp.tanh(jnp.tanh(b[0] @ p[0]) @ p[1]) @ p[2]

    square = lambda z, b: jnp.mean(jnp.sum((z - b[1]) ** 2, -1))
    loss = lambda p, b: square(outputs(p, b), b)
    usual = lambda function: lambda *args: without_branches(function, *args)
    gradient = flops(jax.grad(loss), params, batch)
    assert flops(usual(hvp(loss)), params, batch, params) < 3.05 * gradient
    assert flops(usual(ggn_vp(outputs, square)), params, batch, params) < 2.4 * gradient
    vectors = [jax.tree.map(lambda leaf, k=k: np.stack([leaf] * k), params) for k in (2, 4)]
    for make, bound in (
        (lambda **o: hvp_many(loss, **o), 2.1),
        (lambda **o: ggn_vp_many(outputs, square, **o), 1.75),
    ):
        two, four = (flops(usual(make(tangents_at_once=8)), params, batch, v) for v in vectors)
        assert (four - two) / 2 < bound * gradient


def test_a_second_call_compiles_nothing():
    params, batch, vectors = grid_problem(1, np.float32)
    many = jax.jit(hvp_many(grid_loss))
    many(params, batch, vectors, leave_out=np.zeros(4, np.int32))
    other = jax.tree.map(lambda leaf: leaf + 1, (params, batch, vectors))
    many(*other, leave_out=np.ones(4, np.int32))
    assert many._cache_size() == 1
