"""Gradients of weighted sums of per-example losses, against a loop over rows in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import errors, tree
from jaxunlearn.kernels import example_keys, weighted_grad, weighted_loss
from tests import oracles

ROWS, FEATURES, CLASSES = 6, 3, 4
seeds = st.integers(0, 2**32 - 1)


def linear_loss(params, batch):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return 0.5 * jnp.mean(error**2)


def logistic_loss(params, batch):
    z = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jax.nn.softplus(z) - batch["y"] * z)


def softmax_loss(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
    return -jnp.mean(picked)


LOSSES = {
    "linear": (linear_loss, oracles.linear_row),
    "logistic": (logistic_loss, oracles.logistic_row),
    "softmax": (softmax_loss, oracles.softmax_row),
}


@functools.cache
def gradient_of(loss_fn, **options):
    """`weighted_grad`, compiled as a whole."""
    return jax.jit(weighted_grad(loss_fn, **options))


@functools.cache
def value_of(loss_fn):
    return jax.jit(weighted_loss(loss_fn))


@functools.cache
def plain_gradient_of(loss_fn):
    return jax.jit(jax.grad(loss_fn))


GRADIENTS = {name: gradient_of(loss_fn, has_info=True) for name, (loss_fn, _) in LOSSES.items()}


def problem(name, seed, dtype=np.float32):
    """Parameters and a batch of one of the three models."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, FEATURES)).astype(dtype)
    shape = (FEATURES, CLASSES) if name == "softmax" else (FEATURES,)
    params = {
        "w": rng.normal(size=shape).astype(dtype),
        "b": rng.normal(size=shape[1:]).astype(dtype),
    }
    y = {
        "linear": rng.normal(size=ROWS).astype(dtype),
        "logistic": rng.integers(0, 2, ROWS).astype(dtype),
        "softmax": rng.integers(0, CLASSES, ROWS).astype(np.int32),
    }[name]
    return params, {"x": x, "y": y}


def some_weights(seed, dtype=np.float32):
    """Weights of which some are zero and at least one is not."""
    rng = np.random.default_rng(seed + 1)
    weights = rng.uniform(0.2, 2.0, ROWS) * rng.integers(0, 2, ROWS)
    weights[rng.integers(ROWS)] = 1.0
    return weights.astype(dtype)


@given(seed=seeds)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_over_rows(name, seed):
    row = LOSSES[name][1]
    params, batch = problem(name, seed)
    weights = some_weights(seed)
    for num_rows in (None, 2.5):
        divisor = float(np.sum(weights)) if num_rows is None else num_rows
        got, _ = GRADIENTS[name](params, batch, weights, num_rows=num_rows)
        want = oracles.weighted_gradient(row, params, batch["x"], batch["y"], weights, divisor)
        assert oracles.relative_gap(got, want) < 3e-6


@given(seed=seeds)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_over_rows_to_1e_12_in_double_precision(name, seed, x64):
    row = LOSSES[name][1]
    params, batch = problem(name, seed, np.float64)
    weights = some_weights(seed, np.float64)
    got, info = GRADIENTS[name](params, batch, weights, num_rows=ROWS)
    want = oracles.weighted_gradient(row, params, batch["x"], batch["y"], weights, ROWS)
    value = oracles.weighted_value(row, params, batch["x"], batch["y"], weights, ROWS)
    assert got["w"].dtype == jnp.float64
    assert oracles.relative_gap(got, want) < 1e-12
    assert abs(float(info.value) - value) < 1e-12 * max(1.0, abs(value))


def test_with_unit_weights_it_is_the_gradient_of_the_mean():
    params, batch = problem("softmax", 0)
    got = gradient_of(softmax_loss)(params, batch, jnp.ones(ROWS))
    assert oracles.relative_gap(got, plain_gradient_of(softmax_loss)(params, batch)) < 1e-6


def test_kept_divides_by_the_rows_left_and_batch_by_the_rows_scheduled():
    params, batch = problem("logistic", 1)
    weights = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    kept = gradient_of(logistic_loss)(params, batch, weights)
    scheduled = gradient_of(logistic_loss)(params, batch, weights, num_rows=ROWS)
    left = jax.tree.map(lambda leaf: leaf[np.array([0, 2, 3, 5])], batch)
    assert oracles.relative_gap(kept, plain_gradient_of(logistic_loss)(params, left)) < 1e-6
    assert oracles.relative_gap(scheduled, jax.tree.map(lambda g: g * 4 / 6, kept)) < 1e-6


def test_a_divisor_of_zero_gives_a_zero_gradient():
    params, batch = problem("logistic", 2)
    grads, info = gradient_of(logistic_loss, has_info=True)(
        params, batch, jnp.ones(ROWS), num_rows=0
    )
    assert not np.any(oracles.flat(grads))
    assert float(info.value) == 0.0
    assert int(info.num_non_finite) == 0


@pytest.mark.parametrize("num_rows", [None, ROWS, 0])
@pytest.mark.parametrize("content", [1.0, np.nan, np.inf])
def test_everything_masked_gives_zeros_whatever_the_rows_hold(num_rows, content):
    params, batch = problem("logistic", 3)
    batch = {"x": np.full_like(batch["x"], content), "y": batch["y"]}
    grads, info = GRADIENTS["logistic"](params, batch, jnp.zeros(ROWS), num_rows=num_rows)
    assert not np.any(oracles.flat(grads))
    assert float(info.value) == 0.0
    assert int(info.num_non_finite) == 0


@given(seed=seeds, row=st.integers(0, ROWS - 1), content=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_row_of_weight_zero_may_hold_anything(seed, row, content):
    params, batch = problem("softmax", seed)
    weights = np.ones(ROWS, np.float32)
    weights[row] = 0.0
    spoilt = {"x": batch["x"].copy(), "y": batch["y"]}
    spoilt["x"][row] = content
    (want, clean), (got, info) = (
        GRADIENTS["softmax"](params, rows, weights) for rows in (batch, spoilt)
    )
    assert tree.same_bits((want, clean), (got, info))
    assert int(info.num_non_finite) == 0


@given(seed=seeds, row=st.integers(0, ROWS - 1), feature=st.integers(0, FEATURES - 1))
def test_nan_in_one_row_changes_no_other_rows_contribution_by_a_bit(seed, row, feature):
    params, batch = problem("softmax", seed)
    without = np.ones(ROWS, np.float32)
    without[row] = 0.0
    spoilt = {"x": batch["x"].copy(), "y": batch["y"]}
    spoilt["x"][row, feature] = np.nan
    gradient = GRADIENTS["softmax"]
    want, clean = gradient(params, batch, without, num_rows=ROWS)
    got, info = gradient(params, spoilt, np.ones(ROWS, np.float32), num_rows=ROWS)
    assert tree.same_bits((want, clean.value), (got, info.value))
    assert int(info.num_non_finite) == 1


def log_loss(params, batch):
    return jnp.mean(jnp.log(batch * params["w"]) ** 2)


LOG_GRADIENT = gradient_of(log_loss, has_info=True)


@given(seed=seeds, row=st.integers(0, ROWS - 1))
def test_a_loss_that_is_not_finite_on_finite_input_counts_as_zero_and_is_counted(seed, row):
    batch = np.random.default_rng(seed).uniform(0.5, 2.0, ROWS).astype(np.float32)
    spoilt = batch.copy()
    spoilt[row] = 0.0  # log 0: an infinite loss of a finite row
    without = np.ones(ROWS, np.float32)
    without[row] = 0.0
    params = {"w": jnp.float32(1.3)}
    want, _ = LOG_GRADIENT(params, batch, without, num_rows=ROWS)
    got, info = LOG_GRADIENT(params, spoilt, np.ones(ROWS, np.float32), num_rows=ROWS)
    assert np.isfinite(got["w"])
    assert abs(float(got["w"]) - float(want["w"])) <= 1e-6 * abs(float(want["w"])) + 1e-7
    assert int(info.num_non_finite) == 1


def test_nothing_but_rows_that_are_not_finite_gives_zeros_and_counts_them_all():
    grads, info = gradient_of(log_loss, has_info=True)(
        {"w": jnp.float32(1.0)}, jnp.array([0.0, jnp.nan, jnp.inf]), jnp.ones(3)
    )
    assert float(grads["w"]) == 0.0
    assert int(info.num_non_finite) == 3


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_row_that_is_not_finite_does_not_count_even_where_its_loss_is(content):
    forgiving = lambda params, batch: jnp.mean((jnp.nan_to_num(batch, posinf=5.0) - params) ** 2)
    batch = jnp.array([1.0, content, 3.0])
    grads, info = weighted_grad(forgiving, has_info=True)(0.0, batch, jnp.ones(3), num_rows=3)
    assert np.isclose(grads, -8 / 3)
    assert np.isclose(info.value, 10 / 3)
    assert int(info.num_non_finite) == 1


def direction_loss(params, batch):
    unit = batch["x"] / jnp.linalg.norm(batch["x"], axis=1, keepdims=True)
    return jnp.mean((unit @ params["w"] + params["b"] - batch["y"]) ** 2)


def test_padding_of_zeros_is_harmless_to_a_loss_that_normalises_its_input():
    params, batch = problem("linear", 4)
    padded = {"x": np.concatenate([batch["x"], np.zeros((2, FEATURES), np.float32)])}
    padded["y"] = np.concatenate([batch["y"], np.zeros(2, np.float32)])
    weights = np.concatenate([np.ones(ROWS), np.zeros(2)]).astype(np.float32)
    got, info = gradient_of(direction_loss, has_info=True)(params, padded, weights)
    assert oracles.relative_gap(got, plain_gradient_of(direction_loss)(params, batch)) < 1e-6
    assert int(info.num_non_finite) == 0


def dropout_loss(params, batch, key):
    mask = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return linear_loss(params, {"x": batch["x"] * mask, "y": batch["y"]})


DROPOUT_GRADIENT = gradient_of(dropout_loss)
ONE_DROPOUT_GRADIENT = plain_gradient_of(dropout_loss)


@given(seed=seeds, row=st.integers(0, ROWS - 1))
def test_dropping_a_row_does_not_shift_the_dropout_of_another(seed, row):
    params, batch = problem("linear", seed)
    ids = np.random.default_rng(seed).permutation(100)[:ROWS]
    keys = example_keys(jax.random.key(seed), jnp.asarray(ids))
    weights = np.ones(ROWS, np.float32)
    weights[row] = 0.0
    masked = DROPOUT_GRADIENT(params, batch, weights, num_rows=ROWS, keys=keys)
    alone = [
        ONE_DROPOUT_GRADIENT(
            params,
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch),
            jax.random.fold_in(jax.random.key(seed), ids[i]),
        )
        for i in range(ROWS)
        if i != row
    ]
    want = jax.tree.map(lambda *g: sum(g) / ROWS, *alone)
    assert oracles.relative_gap(masked, want) < 3e-6


def test_the_order_of_rows_does_not_matter_to_a_keyed_loss():
    params, batch = problem("linear", 6)
    ids = jnp.array([4, 8, 15, 16, 23, 42])
    order = np.array([3, 1, 5, 0, 2, 4])
    gradient = lambda rows, some_ids: DROPOUT_GRADIENT(
        params, rows, jnp.ones(ROWS), keys=example_keys(jax.random.key(1), some_ids)
    )
    shuffled = gradient(jax.tree.map(lambda leaf: leaf[order], batch), ids[order])
    assert oracles.relative_gap(shuffled, gradient(batch, ids)) < 1e-6


def test_half_precision_parameters_get_half_precision_gradients_of_losses_summed_in_float32():
    params, batch = problem("logistic", 7)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, batch))
    grads, info = gradient_of(logistic_loss, has_info=True)(*half, jnp.ones(ROWS))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert info.value.dtype == jnp.float32
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), half)
    want = oracles.weighted_gradient(
        oracles.logistic_row, exact[0], exact[1]["x"], exact[1]["y"], np.ones(ROWS), ROWS
    )
    assert oracles.relative_gap(grads, want) < 2e-2


def test_a_mask_of_booleans_weighs_like_a_mask_of_floats():
    params, batch = problem("logistic", 8)
    mask = np.array([True, False, True, True, True, False])
    for function in (GRADIENTS["logistic"], value_of(logistic_loss)):
        want = function(params, batch, mask.astype(np.float32), num_rows=2.5)
        for dtype in (bool, np.int32):
            got = function(params, batch, mask.astype(dtype), num_rows=2.5)
            assert tree.same_bits(got, want)


def test_one_row_is_a_batch():
    params, batch = problem("softmax", 9)
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    got = gradient_of(softmax_loss)(params, one, jnp.array([0.5]))
    assert oracles.relative_gap(got, plain_gradient_of(softmax_loss)(params, one)) < 1e-6


def test_no_row_at_all_gives_zeros():
    params, batch = problem("softmax", 10)
    none = jax.tree.map(lambda leaf: leaf[:0], batch)
    grads, info = gradient_of(softmax_loss, has_info=True)(params, none, jnp.zeros(0))
    assert not np.any(oracles.flat(grads))
    assert int(info.num_non_finite) == 0


def test_scalar_parameters_and_features_of_width_zero_work():
    loss_fn = lambda p, b: jnp.mean((b["y"] - p["c"]) ** 2) + 0 * jnp.sum(b["x"])
    batch = {"x": jnp.zeros((2, 0)), "y": jnp.array([1.0, 3.0])}
    assert float(gradient_of(loss_fn)({"c": 0.0}, batch, jnp.ones(2))["c"]) == -4.0


@pytest.mark.parametrize("shape", [(), (ROWS, 1), (ROWS - 1,), (1,)])
@pytest.mark.parametrize("make", [weighted_grad, weighted_loss])
def test_weights_that_would_broadcast_are_refused(make, shape):
    params, batch = problem("logistic", 11)
    with pytest.raises(ValueError, match=r"Expected weights of shape \(6,\)"):
        make(logistic_loss)(params, batch, jnp.ones(shape))


@pytest.mark.parametrize("make", [weighted_grad, weighted_loss])
def test_one_key_for_all_rows_is_refused(make):
    params, batch = problem("linear", 12)
    with pytest.raises(ValueError, match="example_keys"):
        make(dropout_loss)(params, batch, jnp.ones(ROWS), keys=jax.random.key(0))


def test_leaves_of_unequal_length_are_refused():
    params, batch = problem("linear", 13)
    with pytest.raises(ValueError, match="one leading axis"):
        gradient_of(linear_loss)(params, batch | {"y": batch["y"][:-1]}, jnp.ones(ROWS))


def test_a_loss_that_is_not_a_scalar_is_refused():
    with pytest.raises(errors.LossSignatureError, match="scalar"):
        gradient_of(lambda p, b: b * p)(1.0, jnp.ones(3), jnp.ones(3))


def test_without_info_it_returns_the_same_gradient_alone():
    params, batch = problem("softmax", 14)
    alone = gradient_of(softmax_loss)(params, batch, jnp.ones(ROWS))
    both, info = gradient_of(softmax_loss, has_info=True)(params, batch, jnp.ones(ROWS))
    assert tree.same_bits(alone, both)
    assert info.num_non_finite.dtype == jnp.int32


SOFTMAX_SLOPE = jax.jit(jax.value_and_grad(weighted_loss(softmax_loss)))


@given(seed=seeds)
def test_weighted_loss_is_what_weighted_grad_differentiates(seed):
    params, batch = problem("softmax", seed)
    weights = some_weights(seed)
    for num_rows in (None, ROWS):
        value, slope = SOFTMAX_SLOPE(params, batch, weights, num_rows=num_rows)
        got, info = GRADIENTS["softmax"](params, batch, weights, num_rows=num_rows)
        assert oracles.relative_gap(got, slope) < 3e-6
        assert abs(float(value - info.value)) < 1e-6 * max(1.0, float(value))


def test_weighted_loss_counts_a_bad_row_as_zero_and_a_divisor_of_zero_as_zero():
    value = value_of(log_loss)
    params = {"w": jnp.float32(2.0)}
    bad = value(params, jnp.array([0.0, jnp.nan, 1.0]), jnp.ones(3), num_rows=3)
    assert np.isclose(bad, np.log(2.0) ** 2 / 3)
    assert float(value(params, jnp.ones(3), jnp.ones(3), num_rows=0)) == 0.0


def network_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1))


def test_it_is_bitwise_the_same_inside_two_different_programs():
    rng = np.random.default_rng(15)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"w1": normal(20, 33), "b1": normal(33), "w2": normal(33, 10), "b2": normal(10)}
    batch = {"x": normal(48, 20), "y": rng.integers(0, 10, 48).astype(np.int32)}
    weights = jnp.asarray((rng.uniform(size=48) > 0.2).astype(np.float32))
    gradient = weighted_grad(network_loss)

    @jax.jit
    def alone(params, batch, weights):
        return gradient(params, batch, weights, num_rows=48)

    @jax.jit
    def in_a_step(params, velocity, batch, weights):
        scaled = jax.tree.map(lambda leaf: leaf * 2.0 / 2.0, params)
        grads = gradient(scaled, batch, weights, num_rows=jnp.sum(weights >= 0, dtype=jnp.int32))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        stepped = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        return stepped, velocity, grads, sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    zeros = jax.tree.map(jnp.zeros_like, params)
    _, _, inside, _ = in_a_step(params, zeros, batch, weights)
    assert tree.same_bits(alone(params, batch, weights), inside)


def test_it_vmaps_over_weights():
    params, batch = problem("softmax", 16)
    deletions = 1.0 - jnp.eye(ROWS)
    gradient = lambda w: GRADIENTS["softmax"](params, batch, w, num_rows=ROWS)[0]
    together = jax.vmap(gradient)(deletions)
    for i in range(ROWS):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert oracles.relative_gap(one, gradient(deletions[i])) < 1e-6


def test_an_eager_call_compiles_once(caplog):
    grad = weighted_grad(softmax_loss)
    grad(*softmax_operands(0))
    operands = softmax_operands(1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        grad(*operands)
    assert not [r for r in caplog.records if r.getMessage().startswith("Compiling")]


def softmax_operands(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": normal(FEATURES, CLASSES), "b": normal(CLASSES)}
    batch = {"x": normal(ROWS, FEATURES), "y": jnp.asarray(rng.integers(0, CLASSES, ROWS))}
    return params, batch, jnp.ones(ROWS)


@pytest.mark.parametrize("make", [weighted_grad, weighted_loss])
def test_operands_that_have_no_gradient_are_named(make):
    params, batch, weights = softmax_operands(0)
    with pytest.raises(TypeError, match=r"int32 at params\['n'\]"):
        make(softmax_loss)(params | {"n": jnp.int32(3)}, batch, weights)
    with pytest.raises(
        TypeError, match=r"Expected arrays as parameters, got .* at params\['act'\]"
    ):
        make(softmax_loss)(params | {"act": jax.nn.relu}, batch, weights)
    with pytest.raises(errors.LossSignatureError, match="Pass keys="):
        make(lambda p, b, key: softmax_loss(p, b))(params, batch, weights)
    with pytest.raises(errors.LossSignatureError, match="Expected loss_fn to return a scalar"):
        make(lambda p, b: (softmax_loss(p, b), 0.0))(params, batch, weights)
