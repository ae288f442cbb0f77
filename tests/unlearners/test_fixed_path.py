"""`unlearners.fixed_path`: rows taken out of the state along the recorded parameters, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import errors, kernels, records, tree
from jaxunlearn.unlearners import fixed_path
from tests.compiled_once import compiled_once
from tests.conformance import cases
from tests.conformance.cases import differing, ids_of_step
from tests.unlearners import _convex as convex

__all__ = ["compiled_once"]  # a fixture: programs are compiled once a file
pytestmark = pytest.mark.usefixtures("x64")
RATE, B1, B2, EPS, STEPS, FORGET = 0.05, 0.9, 0.99, 1e-3, 9, [3, 5]
DATA = cases.make_data()
WIDE = jax.tree.map(lambda leaf: leaf.astype(np.float64), DATA)


def unlearner(tx, **options):
    sizes = {"num_examples": 40, "batch_size": 4, "max_steps": 12, "num_checkpoints": 3}
    return fixed_path(tx, cases.squared_error, **(sizes | options))


def train(method, start=None, *, steps=range(STEPS), skip=()):
    """(params, state) after the steps, and the flat parameters before each of them, in float64."""
    gradient = kernels.weighted_grad(cases.squared_error)
    params = cases.make_params(jnp.float64)
    params, state = (params, method.init(params)) if start is None else start
    path = []

    @jax.jit
    def step(params, state, rows, ids):
        grads = gradient(params, rows, (ids >= 0).astype(jnp.float64))
        updates, state = method.update(grads, state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    for t in steps:
        ids = np.where(np.isin(ids_of_step(t), skip), -1, ids_of_step(t))
        path.append(tree.flatten(params))
        rows = jax.tree.map(lambda leaf, ids=ids: leaf[np.maximum(ids, 0)], WIDE)
        params, state = step(params, state, rows, ids)
    return (params, state), path


def gradient(flat, t, gone=(), normalizer="batch"):
    """Step t's gradient of least squares without the rows in `gone`, in NumPy."""
    scheduled = ids_of_step(t)[ids_of_step(t) >= 0]
    kept = scheduled[~np.isin(scheduled, gone)]
    z, y = convex.design(DATA, kept), np.asarray(DATA["y"], np.float64)[kept]
    return z.T @ (z @ flat - y) / max(1, len(scheduled if normalizer == "batch" else kept))


def changes(path, gone, normalizer="batch"):
    """g_t and d_t, the change of it, along the path."""
    g = np.array([gradient(w, t) for t, w in enumerate(path)])
    without = np.array([gradient(w, t, gone, normalizer) for t, w in enumerate(path)])
    return g, without - g


def assert_flat(found, expected):
    np.testing.assert_allclose(tree.flatten(found), expected, rtol=1e-10, atol=1e-12)


# --- the closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", [pytest.param("batch", marks=pytest.mark.slow), "kept"])
def test_momentum_loses_what_the_rows_put_in_and_the_parameters_what_they_moved(normalizer):
    method = unlearner(optax.sgd(RATE, momentum=B1), normalizer=normalizer)
    (params, state), path = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    _, d = changes(path, FORGET, normalizer)
    decay = B1 ** np.arange(STEPS)[::-1]
    trace = tree.flatten(state.inner[0].trace) + decay @ d
    assert_flat(result.opt_state.inner[0].trace, trace)
    # A change d_t sits in the trace of step t and of every later one.
    moved = sum(d[t] * (1 - B1 ** (STEPS - t)) / (1 - B1) for t in range(STEPS))
    assert_flat(result.params, tree.flatten(params) - RATE * moved)


def test_adam_moments_are_the_closed_form_and_the_parameters_its_direct_updates():
    tx = optax.chain(optax.scale_by_adam(B1, B2, eps=EPS), optax.scale(-RATE))
    method = unlearner(tx)
    (params, state), path = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    g, d = changes(path, FORGET)
    age = np.arange(STEPS)[::-1]
    before, after = state.inner[0], result.opt_state.inner[0]
    assert_flat(after.mu, tree.flatten(before.mu) + (1 - B1) * (B1**age @ d))
    square = (1 - B2) * (B2**age @ (2 * g * d + d**2))
    assert_flat(after.nu, tree.flatten(before.nu) + square)
    assert int(after.count) == int(before.count) == STEPS
    mean, square, moved = np.zeros(6), np.zeros(6), tree.flatten(cases.make_params(jnp.float64))
    for t in range(STEPS):
        mean = B1 * mean + (1 - B1) * (g + d)[t]
        square = B2 * square + (1 - B2) * (g + d)[t] ** 2
        corrected = np.sqrt(square / (1 - B2 ** (t + 1))) + EPS
        moved = moved - RATE * mean / (1 - B1 ** (t + 1)) / corrected
    assert_flat(result.params, moved)


@pytest.mark.slow
def test_an_average_of_gradients_is_the_closed_form():
    method = unlearner(optax.chain(optax.ema(B1, debias=False), optax.scale(-RATE)))
    (params, state), path = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    _, d = changes(path, FORGET)
    part = (1 - B1) * (B1 ** np.arange(STEPS)[::-1] @ d)
    assert_flat(result.opt_state.inner[0].ema, tree.flatten(state.inner[0].ema) + part)


@pytest.mark.slow
def test_any_transform_is_folded_over_the_retained_gradients_at_the_recorded_parameters():
    tx = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 9))
    )
    method = unlearner(tx, l2=0.1)
    (params, state), path = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    like = cases.make_params(jnp.float64)
    moved, inner = like, tx.init(like)
    for t, w in enumerate(path):
        grads = tree.unflatten(gradient(w, t, FORGET) + 0.1 * w, like)
        updates, inner = tx.update(grads, inner, tree.unflatten(w, like))
        moved = optax.apply_updates(moved, updates)
    assert_flat(result.params, tree.flatten(moved))
    assert tree.relative_distance(result.opt_state.inner, inner) < 1e-10


# --- what is kept, and what later deletions find ------------------------------------------------


@pytest.mark.slow
def test_keep_returns_the_parameters_as_they_are_and_mends_the_state_alone():
    kept, moved = (
        unlearner(optax.sgd(RATE, momentum=B1), parameters=choice) for choice in ("keep", "path")
    )
    (params, state), _ = train(kept)
    result = kept.forget(params, state, FORGET, data=WIDE)
    assert differing(result.params, params) == []
    same = moved.forget(params, state, FORGET, data=WIDE)
    assert differing(result.opt_state.inner, same.opt_state.inner) == []
    assert any("parameters" in line for line in result.info.certificate.not_covered)
    assert differing(same.params, params)
    again = kept.forget(result.params, result.opt_state, [7], data=WIDE)
    assert again.info.measurements["verified"] == "bitwise"
    assert differing(again.params, params) == []


@pytest.mark.slow
def test_two_deletions_in_a_row_equal_one_of_both():
    method = unlearner(optax.adamw(0.05))
    (params, state), _ = train(method)
    first = method.forget(params, state, [3], data=WIDE)
    second = method.forget(first.params, first.opt_state, [5], data=WIDE)
    both = method.forget(params, state, [5, 3], data=WIDE)
    assert differing(second[:2], both[:2]) == []
    assert differing(both.opt_state.record.path_params, state.record.path_params) == []


@pytest.mark.slow
def test_training_between_two_deletions_goes_on_where_the_first_landed():
    method = unlearner(optax.sgd(RATE, momentum=B1))
    (params, state), path = train(method, steps=range(5))
    first = method.forget(params, state, [3], data=WIDE)
    start = (first.params, first.opt_state)
    (params, state), later = train(method, start, steps=range(5, STEPS), skip=[3])
    result = method.forget(params, state, [5], data=WIDE)
    trace, moved = np.zeros(6), tree.flatten(cases.make_params(jnp.float64))
    for t, w in enumerate(path + later):
        trace = B1 * trace + gradient(w, t, [3, 5]) * (1 if t < 5 else _scheduled_share(t, [3]))
        moved = moved - RATE * trace
    assert_flat(result.opt_state.inner[0].trace, trace)
    assert_flat(result.params, moved)


def _scheduled_share(t, skipped):
    """A row that was left out of the schedule does not count among the step's rows."""
    scheduled = ids_of_step(t)[ids_of_step(t) >= 0]
    return len(scheduled) / np.sum(~np.isin(scheduled, skipped))


@pytest.mark.slow
def test_a_loss_with_a_key_gets_the_recorded_ones():
    def noisy(params, batch, key):
        return cases.squared_error(params, batch) + jax.random.uniform(key) * params["bias"]

    method = fixed_path(
        optax.sgd(RATE, momentum=B1), noisy, num_examples=40, batch_size=4, max_steps=12
    )
    gradient = kernels.weighted_grad(noisy)

    @functools.partial(jax.jit)
    def step(params, state, rows, ids, key):
        keys = kernels.example_keys(key, ids)
        grads = gradient(params, rows, (ids >= 0).astype(jnp.float32), keys=keys)
        updates, state = method.update(grads, state, params, ids=ids, key=key)
        return optax.apply_updates(params, updates), state

    params = cases.make_params()
    state = method.init(params)
    for t, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        rows = jax.tree.map(lambda leaf, t=t: leaf[np.maximum(ids_of_step(t), 0)], DATA)
        params, state = step(params, state, rows, ids_of_step(t), key)
    result = method.forget(params, state, [int(ids_of_step(1)[0])], data=WIDE)
    assert result.info.measurements["verified"] == "bitwise"


# --- what is said -------------------------------------------------------------------------------


def test_the_certificate_claims_nothing_and_the_reset_stands_beside_it():
    method = unlearner(optax.adam(0.05))
    (params, state), _ = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    certificate = result.info.certificate
    assert (certificate.target, certificate.guarantee) == ("fixed_path", "heuristic")
    assert certificate.epsilon is None
    assert "path" in certificate.why_no_epsilon
    figures = result.info.measurements
    assert 0 < figures["change_of_state"] < figures["change_by_reset"]
    reset = optax.adam(0.05).init(result.params)
    assert figures["change_by_reset"] == tree.relative_distance(reset, state.inner)


@pytest.mark.slow
def test_a_run_that_was_changed_outside_is_refused():
    method = unlearner(optax.adam(0.05), verify="bitwise")
    (params, state), _ = train(method)
    other = jax.tree.map(lambda leaf: leaf + 0.01, params)
    with pytest.raises(errors.VerificationError, match="bit for bit"):
        method.forget(other, state, FORGET, data=WIDE)
    unchecked = unlearner(optax.adam(0.05), verify="off")
    assert unchecked.forget(other, state, FORGET, data=WIDE).info.measurements["verified"] == "no"


def test_a_quote_counts_the_copy_of_the_path_and_says_what_could_still_stop_it():
    params, quotes = cases.make_params(), {}
    method = unlearner(optax.sgd(RATE))
    state = jax.jit(method.init)(params)
    _, state = jax.jit(method.update)(params, state, params, ids=ids_of_step(0))
    for verify in ("off", "report", "bitwise"):
        method = unlearner(optax.sgd(RATE), verify=verify)
        quotes[verify] = method.quote(params, state, ids_of_step(0)[:1])
        assert quotes[verify].memory_bytes > tree.num_bytes(state.record.path_params)
        assert method.quote(params, state, []).reason == ""
    assert quotes["off"].reason == ""
    assert "given state" in quotes["report"].reason
    assert "any bit" in quotes["bitwise"].reason


def test_a_key_whose_words_do_not_say_how_to_use_it_is_refused():
    keyed = lambda params, batch, key: cases.squared_error(params, batch)
    method = fixed_path(optax.sgd(RATE), keyed, num_examples=40, batch_size=4, max_steps=12)
    params = cases.make_params()
    state = method.init(params)
    with pytest.raises(ValueError, match="default implementation"):
        method.update(params, state, params, ids=ids_of_step(0), key=jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parameters": "drop"}, "parameters"),
        ({"normalizer": "sum"}, "normalizer"),
        ({"verify": "maybe"}, "verify"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_checkpoints": True}, "num_checkpoints=True"),
        ({"l2": -1.0}, "l2=-1.0"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_at_the_factory(options, match):
    with pytest.raises(ValueError, match=match):
        unlearner(optax.sgd(0.1), **options)


@pytest.mark.slow
def test_of_momentum_it_leaves_a_tenth_of_what_doing_nothing_does():
    """Where the path is short, and gradients change little along it. A reset, beside it."""
    tx = optax.sgd(0.003, momentum=0.9)
    method = unlearner(tx)
    (params, state), _ = train(method)
    result = method.forget(params, state, FORGET, data=WIDE)
    oracle = records.oracle(
        tx, cases.squared_error, cases.make_params(jnp.float64), log=state.record.log, data=WIDE,
        forget=FORGET,
    )  # fmt: skip
    error = lambda params, inner: (
        tree.relative_distance(params, oracle[0]),
        tree.relative_distance(inner, oracle[1]),
    )
    nothing, reset = error(params, state.inner), error(params, tx.init(params))
    ours = error(result.params, result.opt_state.inner)
    assert ours[0] < 0.1 * nothing[0]
    assert ours[1] < 0.1 * min(nothing[1], reset[1])
