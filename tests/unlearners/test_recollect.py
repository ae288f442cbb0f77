"""recollect against retraining: where it is exact, how close it is, and when it says it is not."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import errors, kernels, records, tree, unlearners

NUM_ROWS, BATCH, FEATURES = 24, 6, 4


def ridge(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def logistic(params, batch):
    z = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jax.nn.softplus(z) - batch["y"] * z)


def make_data(num_rows=NUM_ROWS, features=FEATURES, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, features))
    truth = rng.normal(size=features)
    chance = 1 / (1 + np.exp(-x @ truth))
    return {"x": x, "y": (rng.uniform(size=num_rows) < chance).astype(float)}


def rows_of_norm_one(data):
    return data | {"x": data["x"] / np.linalg.norm(data["x"], axis=1, keepdims=True)}


def batches(num_rows=NUM_ROWS, batch=BATCH, epochs=4):
    order = [np.random.default_rng(e).permutation(num_rows) for e in range(epochs)]
    return np.concatenate(order).reshape(-1, batch).astype(np.int32)


def start(features=FEATURES):
    rng = np.random.default_rng(3)
    return {"w": jnp.asarray(rng.normal(size=features)), "b": jnp.asarray(0.5)}


def train(unlearner, loss_fn, data, steps, params):
    """Plain donated training with the library's gradient, as one scan."""
    gradient = kernels.weighted_grad(loss_fn)
    data = jax.tree.map(jnp.asarray, data)

    def step(carry, ids):
        params, state = carry
        rows = jax.tree.map(lambda leaf: leaf[ids], data)
        grads = gradient(params, rows, ids >= 0)
        updates, state = unlearner.update(grads, state, params, batch=rows, ids=ids)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.asarray(steps))[0])
    return run((params, unlearner.init(params)))


def make(tx, loss_fn, *, num_examples=NUM_ROWS, batch_size=BATCH, max_steps=64, **options):
    options = {"num_probes": 1} | options
    return unlearners.recollect(
        tx, loss_fn, num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        progress=False, **options,
    )  # fmt: skip


def errors_of(result, given, oracle):
    """Distance to the oracle in parameters and in state, relative to that of doing nothing."""
    gap = lambda a, b: math.sqrt(
        sum(
            float(np.sum((np.asarray(x) - np.asarray(y)) ** 2))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
            if x.dtype.kind == "f"
        )
    )
    (params, inner), (old_params, old_inner) = result, given
    in_params = gap(params, oracle[0]) / gap(old_params, oracle[0])
    nothing = gap(old_inner, oracle[1])
    return in_params, gap(inner, oracle[1]) / nothing if nothing else 0.0


def judged(unlearner, run, tx, loss_fn, forget, *, data, given_start, normalizer="batch", l2=None):
    """`forget`, and its errors relative to doing nothing."""
    params, state = run
    result = unlearner.forget(params, state, forget, data=data)
    oracle = records.oracle(
        tx, loss_fn, given_start, log=state.record.log, data=data, forget=forget,
        normalizer=normalizer, l2=l2, show=False,
    )  # fmt: skip
    found = errors_of((result.params, result.opt_state.inner), (params, state.inner), oracle)
    return result, found


DECAYED = functools.partial(optax.exponential_decay, transition_steps=1, decay_rate=0.995)
SGD = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize(
    ("optimizer", "normalizer"),
    [
        ("nesterov", "kept"),
        *(
            pytest.param(name, normalizer, marks=pytest.mark.slow)
            for name in SGD
            for normalizer in ("batch", "kept")
            if (name, normalizer) != ("nesterov", "kept")
        ),
    ],
)
def test_on_ridge_regression_any_single_row_is_forgotten_exactly_and_so_is_any_set_jointly(
    optimizer, normalizer, x64
):
    tx, data, first = SGD[optimizer], make_data(), start()
    options = {"normalizer": normalizer, "l2": 0.1}
    alone, together = make(tx, ridge, **options), make(tx, ridge, joint=True, **options)
    run = train(alone, ridge, data, batches(), first)
    for row in (0, 7, 23):
        result, found = judged(
            alone, run, tx, ridge, [row], data=data, given_start=first, **options
        )
        assert max(found) < 1e-10
        assert result.info.measurements["linearity_params"] < 1e-10
    run = train(together, ridge, data, batches(), first)
    _, found = judged(
        together, run, tx, ridge, [1, 7, 8, 20], data=data, given_start=first, **options
    )
    assert max(found) < 1e-10


@pytest.mark.parametrize(
    ("tx", "bar"),
    [
        pytest.param(optax.sgd(DECAYED(0.5)), 1e-3, marks=pytest.mark.slow),
        pytest.param(optax.sgd(DECAYED(0.05), momentum=0.9), 2e-2, marks=pytest.mark.slow),
        (optax.adam(DECAYED(0.05), eps=1e-3, eps_root=1e-8), 2e-2),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_on_logistic_regression_little_is_left_of_a_row_and_the_state_is_twenty_times_closer(
    tx, bar, x64
):
    num_rows, first = 1000, jax.tree.map(jnp.zeros_like, start(30))
    data = rows_of_norm_one(make_data(num_rows, 30))
    tracked = np.arange(0, num_rows, 50)
    unlearner = make(
        tx, logistic, num_examples=num_rows, batch_size=50, max_steps=300, l2=0.01, track=tracked
    )
    run = train(unlearner, logistic, data, batches(num_rows, 50, 15), first)
    found = [
        judged(unlearner, run, tx, logistic, [int(u)], data=data, given_start=first, l2=0.01)[1]
        for u in tracked[[0, 3, 7, 13, 18]]
    ]
    in_params, in_state = np.median(found, axis=0)
    assert in_params <= bar
    assert in_state <= 1 / 20


def test_users_are_forgotten_with_all_their_rows(x64):
    tx, data, first = SGD["momentum"], make_data(), start()
    users = np.arange(NUM_ROWS) // 4  # some have several rows in one batch
    unlearner = make(tx, ridge, units=users)
    params, state = train(unlearner, ridge, data, batches(), first)
    assert unlearner.quote(params, state, [5]).feasible
    with pytest.raises(errors.IdRangeError):
        unlearner.forget(params, state, [6])
    result = unlearner.forget(params, state, [2])
    oracle = records.oracle(
        tx, ridge, first, log=state.record.log, data=data, forget=range(8, 12), show=False
    )
    assert tree.relative_distance(result.params, oracle[0]) < 1e-10
    assert tree.relative_distance(result.opt_state.inner, oracle[1]) < 1e-10
    assert result.info.ids == (2,)
    assert set(records.forgotten_ids(result.opt_state.record.participation)) == {8, 9, 10, 11}
    with pytest.raises(errors.AlreadyForgottenError, match="got 2"):
        unlearner.forget(result.params, result.opt_state, [2])


@pytest.mark.slow
def test_the_joint_tangent_is_closer_than_the_sum_for_many_rows(x64):
    tx, first, data = optax.sgd(0.5), start(10), rows_of_norm_one(make_data(200, 10))
    forget = list(range(0, 200, 4))
    found = {}
    for joint in (False, True):
        unlearner = make(
            tx, logistic, num_examples=200, batch_size=20, max_steps=100, joint=joint, l2=0.01
        )
        run = train(unlearner, logistic, data, batches(200, 20, 8), first)
        _, (found[joint], _) = judged(
            unlearner, run, tx, logistic, forget, data=data, given_start=first, l2=0.01
        )
    assert found[True] < 0.2 * found[False] < 0.2


def test_only_tracked_units_can_be_forgotten_and_only_tracked_leaves_move():
    tx, data, first = SGD["momentum"], make_data(), start()
    unlearner = make(tx, logistic, track=[3, 9], track_leaves={"w": True, "b": False})
    params, state = train(unlearner, logistic, data, batches(), first)
    assert [leaf.shape for leaf in state.record.along.tangents] == [(2, FEATURES)] * 2
    with pytest.raises(errors.NotTrackedError, match="got 4"):
        unlearner.forget(params, state, [3, 4])
    assert not unlearner.quote(params, state, [4]).feasible
    result = unlearner.forget(params, state, [3, 9])
    assert not np.array_equal(result.params["w"], params["w"])
    assert np.array_equal(result.params["b"], params["b"])
    certificate = result.info.certificate
    assert certificate.scope == "params"
    assert any("track_leaves" in line for line in certificate.not_covered)


@functools.cache
def forgotten_once():
    data, first = make_data(), start()
    unlearner = make(SGD["momentum"], logistic)
    params, state = train(unlearner, logistic, data, batches(), first)
    return unlearner, data, first, (params, state), unlearner.forget(params, state, [5])


def test_the_certificate_is_heuristic_and_says_what_was_measured_and_what_remains():
    *_, result = forgotten_once()
    certificate = result.info.certificate
    assert (certificate.guarantee, certificate.scope) == ("heuristic", "full-state")
    assert certificate.target == "counterfactual"
    assert certificate.epsilon is None
    assert set(certificate.residuals) == {"linearity_params", "linearity_state"}
    assert all(0 < value < 0.1 for value in certificate.residuals.values())
    assert any("path with the forgotten rows" in line for line in certificate.not_covered)
    assert {a.name: a.status for a in certificate.assumptions}["linearity"] == "measured"


def test_after_a_deletion_shadows_are_gone_and_the_units_tangent_goes_with_the_next_step():
    unlearner, data, _, _, result = forgotten_once()
    along = result.opt_state.record.along
    for leaf in jax.tree.leaves(along.shadows.shadow_states):
        assert not np.asarray(leaf).any()
    assert (along.shadows.linearity > 0).all()
    ids = jnp.asarray([0, 1, 2, 3, 4, 6])
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[ids], data)
    grads = kernels.weighted_grad(logistic)(result.params, rows, jnp.ones(6))
    _, state = jax.jit(unlearner.update)(
        grads, result.opt_state, result.params, batch=rows, ids=ids
    )
    for before, after in zip(along.tangents, state.record.along.tangents):
        assert np.asarray(before)[5].any()
        assert not np.asarray(after)[5].any()
        assert np.asarray(after)[7].any()
    assert np.array_equal(state.record.along.shadows.linearity, along.shadows.linearity)


def test_refresh_remakes_the_tangents_along_the_path_without_the_rows():
    data, first, tx = make_data(), start(), SGD["momentum"]
    unlearner = make(tx, logistic, normalizer="kept")
    result = unlearner.forget(*train(unlearner, logistic, data, batches(), first), [5])
    _, state = unlearner.refresh(result.params, result.opt_state, data=data)
    never = np.where(batches() == 5, -1, batches())
    _, fresh = train(unlearner, logistic, data, never, first)
    pairs = zip(state.record.along.tangents, fresh.record.along.tangents)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert bool(state.record.along.slot_is_live.all())


def test_refresh_is_training_without_the_rows():
    unlearner, data, first, (_, given), result = forgotten_once()
    params, state = unlearner.refresh(result.params, result.opt_state, data=data)
    oracle = records.oracle(
        SGD["momentum"], logistic, first, log=given.record.log, data=data, forget=[5], show=False
    )
    assert tree.same_bits((params, state.inner), oracle)
    with pytest.raises(errors.AlreadyForgottenError):
        unlearner.forget(params, state, [5])


def test_probes_measure_the_error_of_the_row_that_they_leave_out(x64):
    data, first, tx = make_data(), start(), optax.adam(0.05, eps=1e-2, eps_root=1e-6)
    unlearner = make(tx, logistic, num_probes=1)
    params, state = train(unlearner, logistic, data, batches(), first)
    shadows = state.record.along.shadows
    unit = int(shadows.shadow_units[0])
    oracle = records.oracle(
        tx, logistic, first, log=state.record.log, data=data, forget=[unit], show=False
    )
    assert tree.relative_distance(shadows.shadow_states[0][0], oracle[0]) < 1e-12
    result = unlearner.forget(params, state, [unit])
    found = errors_of((result.params, result.opt_state.inner), (params, state.inner), oracle)
    np.testing.assert_allclose(shadows.linearity, found, rtol=1e-4)


# --- when the run is not smooth -----------------------------------------------------------------


def dead_pixel_data():
    """One feature that is zero in every row: its second moment stays zero."""
    data = make_data()
    return data | {"x": data["x"] * (np.arange(FEATURES) != 1)}


def test_adam_without_eps_root_is_called_out_before_training():
    with pytest.warns(UserWarning, match="eps_root"):
        make(optax.adam(0.1), logistic).init(start())
    with pytest.raises(errors.RoughRunError, match="eps_root"):
        make(optax.adam(0.1), logistic, if_rough="refuse").init(start())
    make(optax.adam(0.1, eps_root=1e-8), logistic, if_rough="refuse").init(start())
    make(optax.sgd(0.1, momentum=0.9), logistic, if_rough="refuse").init(start())


def test_tangents_that_are_not_finite_are_never_served():
    tx, data, first = optax.adam(0.1), dead_pixel_data(), start()
    unlearner = make(tx, logistic)
    with pytest.warns(UserWarning, match="eps_root"):
        params, state = train(unlearner, logistic, data, batches(), first)
    with (
        pytest.warns(UserWarning, match="eps_root"),
        pytest.raises(errors.NonFiniteError, match="eps_root"),
    ):
        unlearner.forget(params, state, [5])
    exact = make(tx, logistic, if_rough="replay")
    quote = exact.quote(params, state, [5])
    assert (quote.guarantee, quote.num_gradients) == ("exact", len(batches()))
    result = exact.forget(params, state, [5], data=data)
    oracle = records.oracle(
        tx, logistic, first, log=state.record.log, data=data, forget=[5], show=False
    )
    assert tree.same_bits((result.params, result.opt_state.inner), oracle)
    assert result.info.certificate.guarantee == "exact"
    with pytest.raises(errors.MissingDataError):
        exact.forget(params, state, [5])


@pytest.mark.parametrize("joint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_is_not_linear_is_recognised_and_the_policy_decides(joint):
    tx, data, first = optax.adam(0.3, eps_root=1e-12), make_data(), start()
    options = {"joint": joint, "num_probes": 2}
    run = train(make(tx, logistic, **options), logistic, data, batches(), first)
    with pytest.warns(UserWarning, match="not linear enough"):
        result = make(tx, logistic, **options).forget(*run, [5], data=data)
    assert max(result.info.certificate.residuals.values()) > 0.1
    with pytest.raises(errors.RoughRunError, match="rough_above"):
        make(tx, logistic, if_rough="refuse", **options).forget(*run, [5], data=data)
    exact = make(tx, logistic, if_rough="replay", **options).forget(*run, [5], data=data)
    oracle = records.oracle(
        tx, logistic, first, log=run[1].record.log, data=data, forget=[5], show=False
    )
    assert tree.same_bits((exact.params, exact.opt_state.inner), oracle)
    assert exact.info.measurements["route"] == "replay"


def test_without_probes_nothing_is_claimed_to_be_measured():
    unlearner = make(SGD["sgd"], logistic, num_probes=0)
    params, state = train(unlearner, logistic, make_data(), batches(), start())
    certificate = unlearner.forget(params, state, [5]).info.certificate
    assert not certificate.residuals
    assert {a.name: a.status for a in certificate.assumptions}["linearity"] == "assumed"


# --- memory, and the object itself --------------------------------------------------------------


def test_the_memory_is_stated_and_bounded_before_training():
    first = start()
    unlearner = make(SGD["momentum"], logistic)
    sizes = unlearner.describe(first)
    state = unlearner.init(first)
    assert sizes["total"] == tree.num_bytes(state.record)
    assert sizes["tangents"] == NUM_ROWS * 2 * tree.num_bytes(first)
    half = make(SGD["momentum"], logistic, storage_dtype=jnp.bfloat16).describe(first)
    assert half["tangents"] == sizes["tangents"] // 2
    shapes = jax.eval_shape(lambda: first)
    assert unlearner.describe(shapes) == sizes
    with pytest.raises(errors.RecordTooLargeError, match="max_bytes=1000"):
        make(SGD["momentum"], logistic, max_bytes=1000).init(first)


def test_copies_keep_every_function():
    unlearner = make(SGD["sgd"], logistic)
    for other in (
        copy.copy(unlearner),
        unlearner._replace(init=unlearner.init),
        unlearner._make(unlearner._asdict().values()),
        unlearner.__reduce__()[0](*unlearner.__reduce__()[1]),
    ):
        assert isinstance(other, optax.GradientTransformationExtraArgs)
        assert other.refresh is unlearner.refresh
        assert other.describe is unlearner.describe
        assert other.forget is unlearner.forget
    with pytest.raises(TypeError, match="7 functions"):
        unlearner._make(range(5))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"if_rough": "pray"}, "if_rough"),
        ({"num_probes": -1}, "num_probes"),
        ({"rough_above": 0.0}, "rough_above"),
        ({"recursion": "new"}, "recursion"),
        ({"normalizer": "mean"}, "normalizer"),
        ({"units": [0, 1]}, "units"),
        ({"units": np.full(NUM_ROWS, -1)}, "unit ids"),
        ({"track": []}, "track"),
        ({"track": [NUM_ROWS]}, "got 24"),
    ],
)
def test_options_are_checked_at_the_factory(options, match):
    with pytest.raises(ValueError, match=match):
        make(SGD["sgd"], logistic, **options)


def test_update_wants_the_rows_beside_the_ids():
    unlearner = make(SGD["sgd"], logistic)
    params = start()
    with pytest.raises(ValueError, match="batch="):
        unlearner.update(params, unlearner.init(params), params, ids=np.array([1], np.int32))
