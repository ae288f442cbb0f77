"""`memory_pair` by single requests: what each way of deleting does, says and refuses."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Unlearner, accounting, errors, kernels, records, transforms, tree, unlearners
from jaxunlearn.kernels import lbfgs
from jaxunlearn.records import Event, Outcome
from tests.unlearners import _streams as streams
from tests.unlearners._streams import DELETE, INSERT, Made, events_of, train

DATA = streams.make_data()
STEPS = [[2 * t, 2 * t + 1] for t in range(20)]
ADMISSIONS = {
    "li-fukushima": transforms.prudente_souza(),
    "published": transforms.levenberg_damped(floor=0.0),
    "cautious": lbfgs.cautious(),
    "powell": lbfgs.powell(),
    "curvature": None,
}
PAPER = transforms.PaperDeletion(
    noise_stddev=0.1, unit_noise=transforms.gaussian_noise(jax.random.key(3))
)


def learned(result):
    return result[0], result[1].inner


# --- exact -------------------------------------------------------------------------------------


SLOW = {"published", "powell", "cautious"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ADMISSIONS],
)
def test_replay_is_bitwise_a_run_that_never_saw_the_rows_under_every_admission(name):
    made = Made(admission=ADMISSIONS[name], verify="bitwise")
    gone = {4, 5, 21}  # a whole step, and half of one
    params, state = train(made, DATA, STEPS, streams.start())
    result = made.unlearner.forget(params, state, gone, data=DATA)
    left = [[-1 if i in gone else i for i in ids] for ids in STEPS]
    never = train(made, DATA, [ids for ids in left if max(ids) >= 0], streams.start())
    assert tree.same_bits(learned(result), learned(never))
    assert not tree.same_bits(result.params, params)
    certificate = result.info.certificate
    assert (certificate.guarantee, certificate.scope) == ("exact", "full-state")
    assert json.loads(certificate.to_json())["epsilon"] is None


def test_a_second_deletion_starts_where_the_first_left_off():
    made = Made()
    start = train(made, DATA, STEPS, streams.start())
    first = made.unlearner.forget(*start, [7], data=DATA)
    second = made.unlearner.forget(first.params, first.opt_state, [37], data=DATA)
    assert second.info.measurements["first_step"] > 3
    both = made.unlearner.forget(*start, [7, 37], data=DATA)
    assert tree.same_bits(learned(second), learned(both))
    with pytest.raises(errors.AlreadyForgottenError):
        made.unlearner.forget(second.params, second.opt_state, [7], data=DATA)


@pytest.mark.slow
def test_rows_are_divided_by_those_left_or_by_those_scheduled():
    runs = {}
    for normalizer in ("kept", "batch"):
        made = Made(normalizer=normalizer, loss_fn=streams.squared)
        params, state = train(made, DATA, STEPS, streams.start())
        runs[normalizer] = made.unlearner.forget(params, state, [38], data=DATA).params["w"]
        before = made.unlearner.forget(params, state, [38, 39], data=DATA).params["w"]
    kept, batch = runs["kept"] - before, runs["batch"] - before
    # The last step, of two rows, keeps one: half the gradient of the loss where it is scheduled.
    assert np.linalg.norm(kept) > 1.3 * np.linalg.norm(batch)


def test_a_loss_with_a_key_replays_with_each_rows_own_key():
    def noisy(params, batch, key):
        mask = jax.random.bernoulli(key, 0.7, batch["x"].shape[-1:])
        x = jnp.where(mask, batch["x"], 0.0)
        return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * (x @ params["w"])))

    unlearner = unlearners.memory_pair(noisy, **streams.options(verify="bitwise"))
    gradient = kernels.weighted_grad(noisy)

    @jax.jit
    def step(params, state, rows, ids, key):
        keys = kernels.example_keys(key, ids)
        weights = (ids >= 0).astype(jnp.float32)
        grads = gradient(params, rows, weights, keys=keys)
        updates, state = unlearner.update(grads, state, params, batch=rows, ids=ids, key=key)
        return optax.apply_updates(params, updates), state

    def run(gone):
        params = streams.start()
        state = unlearner.init(params)
        for t, ids in enumerate(STEPS[:8]):
            ids = np.array([-1 if i in gone else i for i in ids], np.int32)
            rows = jax.tree.map(lambda leaf, i=ids: leaf[np.maximum(i, 0)], DATA)
            params, state = step(params, state, rows, ids, jax.random.fold_in(jax.random.key(1), t))
        return params, state

    result = unlearner.forget(*run(()), [3, 8], data=DATA)
    assert tree.same_bits(learned(result), learned(run((3, 8))))
    with pytest.raises(ValueError, match="without a key"):
        unlearner.stream.init(streams.start(), events_of([], DATA))


def test_gradients_that_are_not_of_the_loss_are_found_out():
    made = Made()
    params = streams.start()
    state = made.unlearner.init(params)
    update = jax.jit(made.unlearner.update)
    for ids in STEPS[:6]:
        ids = np.array(ids, np.int32)
        rows = jax.tree.map(lambda leaf, i=ids: leaf[i], DATA)
        grads = {"w": 0.01 * jnp.ones(streams.DIM)}
        updates, state = update(grads, state, params, batch=rows, ids=ids)
        params = optax.apply_updates(params, updates)
    with pytest.raises(errors.VerificationError, match="relative distance"):
        made.unlearner.forget(params, state, [3], data=DATA)


# --- nothing left ------------------------------------------------------------------------------


def _contracting(mode, **changes):
    return unlearners.memory_pair(
        streams.logistic, num_examples=1680, max_steps=424, batch_size=4, l2=0.1, learning_rate=0.1,
        mode=mode, num_checkpoints=8, segment_length=64, **changes,
    )  # fmt: skip


@pytest.mark.slow
def test_where_nothing_is_left_nothing_is_done_and_the_published_step_would_do_harm():
    """At lag 400 the run has contracted to one that never held the row."""
    data = streams.make_data(num_rows=1680, dim=5)
    ids = np.arange(1680, dtype=np.int32).reshape(420, 4)
    kinds = np.full(420, int(INSERT), np.int32)
    rows = jax.tree.map(lambda leaf: leaf[ids], data)
    events = Event(kinds, ids, rows)
    unlearner, exact = _contracting("paper"), _contracting("replay")
    blind = _contracting("paper", nothing_below=None)
    fresh = unlearner.stream.init(streams.start(dim=5), jax.tree.map(lambda leaf: leaf[0], events))
    state, _ = jax.jit(unlearner.stream.run)(fresh, events)
    params, opt_state = state.stream_params, state.stream_opt_state
    old, recent = int(ids[20, 0]), int(ids[400, 0])  # neither owns a pair any more

    target = exact.forget(params, opt_state, [old], data=data).params
    gap = lambda p: tree.relative_distance(p, target)
    given, published = gap(params), gap(blind.forget(params, opt_state, [old], data=data).params)
    assert published > 300 * given
    assert published > 0.01

    left_alone = unlearner.forget(params, opt_state, [old], data=data)
    assert tree.same_bits(learned(left_alone), (params, opt_state.inner))
    assert left_alone.info.measurements["nothing_left"]
    assert left_alone.info.certificate.guarantee == "heuristic"
    with pytest.raises(errors.AlreadyForgottenError):
        unlearner.forget(left_alone.params, left_alone.opt_state, [old], data=data)

    acted = unlearner.forget(params, opt_state, [recent], data=data)
    assert not acted.info.measurements["nothing_left"]
    assert not tree.same_bits(acted.params, params)

    one = Event(np.int32(DELETE), np.array([old, -1, -1, -1], np.int32),
                jax.tree.map(lambda leaf: np.zeros_like(leaf[0]), rows))  # fmt: skip
    after, output = jax.jit(unlearner.stream.step)(state, one)
    assert int(output.outcome) == Outcome.NOTHING_LEFT
    assert tree.same_bits(after.stream_params, params)


# --- odometer, quotes, certificates ------------------------------------------------------------


def test_an_exhausted_odometer_is_a_typed_error_and_an_unchanged_model():
    model = accounting.RegretModel(gradient_bound=2.0, strong_convexity=0.1, dimension=4)
    odometer = accounting.DeletionOdometer(
        max_deletions=2, noise_stddev=0.1, sensitivity=1e3, model=model
    )
    made = Made("paper", paper=PAPER, odometer=odometer, nothing_below=None)
    params, state = train(made, DATA, STEPS, streams.start())
    before = tree.digest((params, state))
    quotes = [made.unlearner.quote(params, state, [39]) for _ in range(2)]
    assert quotes[0] == quotes[1]
    assert quotes[0].feasible
    assert "2 deletions left of 2" in quotes[0].reason
    assert "regret" in quotes[0].reason
    assert quotes[0].epsilon is None
    refused = made.unlearner.quote(params, state, [1, 2, 3])
    assert not refused.feasible
    assert "retrain" in refused.reason
    with pytest.raises(errors.BudgetExhaustedError, match="at most 2 more"):
        made.unlearner.forget(params, state, [1, 2, 3], data=DATA)
    assert tree.digest((params, state)) == before
    done = made.unlearner.forget(params, state, [1, 2], data=DATA)
    assert int(done.opt_state.record.num_deletions) == 2
    assert done.info.certificate.guarantee == "heuristic"
    with pytest.raises(errors.BudgetExhaustedError, match="at most 0 more"):
        made.unlearner.forget(done.params, done.opt_state, [3], data=DATA)


def test_a_step_longer_than_the_noise_was_made_for_is_refused():
    odometer = accounting.DeletionOdometer(max_deletions=2, noise_stddev=0.1, sensitivity=1e-9)
    made = Made("paper", paper=PAPER, odometer=odometer, nothing_below=None)
    params, state = train(made, DATA, STEPS, streams.start())
    with pytest.raises(errors.BudgetExhaustedError, match="for which the noise was made"):
        made.unlearner.forget(params, state, [39], data=DATA)


@pytest.mark.parametrize(
    "mode", ["drop_pair", *(pytest.param(m, marks=pytest.mark.slow) for m in ("tangent", "paper"))]
)
def test_the_other_modes_promise_nothing(mode):
    made = Made(mode)
    params, state = train(made, DATA, STEPS, streams.start())
    result = made.unlearner.forget(params, state, [38], data=DATA)
    certificate = result.info.certificate
    assert certificate.guarantee == "heuristic"
    assert certificate.epsilon is None
    assert "heuristic" in certificate.why_no_epsilon
    assert made.unlearner.quote(params, state, [38]).guarantee == "heuristic"
    assert result.info.measurements["influence"] > 0


@pytest.mark.slow
def test_the_published_step_back_is_further_from_the_target_than_first_order_is():
    gaps = {}
    for mode in ("replay", "tangent", "paper"):
        made = Made(mode)
        params, state = train(made, DATA, STEPS, streams.start())
        gaps[mode] = made.unlearner.forget(params, state, [24], data=DATA).params
    distance = lambda mode: tree.relative_distance(gaps[mode], gaps["replay"])
    assert distance("tangent") < 0.2 * tree.relative_distance(params, gaps["replay"])
    assert distance("paper") > 3 * distance("tangent")


# --- the shape ---------------------------------------------------------------------------------


def test_the_stream_stays_with_the_unlearner():
    unlearner = streams.unlearner()
    assert isinstance(unlearner, Unlearner)
    assert isinstance(unlearner, optax.GradientTransformationExtraArgs)
    assert len(tuple(unlearner)) == 2
    for other in (
        copy.copy(unlearner),
        unlearner._replace(quote=print),
        type(unlearner)._make(unlearner._asdict().values()),
        unlearner.__reduce__()[0](*unlearner.__reduce__()[1]),
    ):
        assert isinstance(other, records.StreamUnlearner)
        assert other.stream is unlearner.stream
    with pytest.raises(TypeError, match="not a pytree"):
        type(unlearner)._make([print, print])


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "undo"},
        {"normalizer": "rows"},
        {"verify": "maybe"},
        {"batch_size": 0},
        {"odometer": accounting.DeletionOdometer(
            max_deletions=1, noise_stddev=1.0, sensitivity=1.0)},
        {"mode": "paper", "paper": "published"},
    ],
)  # fmt: skip
def test_a_bad_option_is_refused(changes):
    with pytest.raises((ValueError, TypeError), match="Expected"):
        unlearners.memory_pair(streams.logistic, **streams.options(**changes))


def test_noise_without_a_source_is_refused():
    with pytest.raises(ValueError, match="unit_noise"):
        transforms.PaperDeletion(noise_stddev=1.0)
    with pytest.raises(ValueError, match="finite"):
        transforms.PaperDeletion(rate=-1.0)


def test_an_insert_needs_its_rows():
    made = Made()
    params = streams.start()
    with pytest.raises(ValueError, match="Expected batch= with ids="):
        made.unlearner.update(params, made.unlearner.init(params), params, ids=np.array([1]))
