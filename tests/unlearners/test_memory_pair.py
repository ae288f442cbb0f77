"""`memory_pair` by single requests: what each way of deleting does, says and refuses."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import (
    Status,
    Unlearner,
    accounting,
    errors,
    kernels,
    records,
    transforms,
    tree,
    unlearners,
)
from jaxunlearn.kernels import lbfgs
from jaxunlearn.unlearners import Event, Outcome
from jaxunlearn.unlearners.memory_pair import _online, _promises, _stream
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
    noise_stddev=0.1, unit_noise=transforms.deletion_noise(jax.random.key(3))
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
    harmed = blind.forget(params, opt_state, [old], data=data)
    untouched, published = gap(params), gap(harmed.params)
    assert published > 300 * untouched
    assert published > 0.01

    left_alone = unlearner.forget(params, opt_state, [old], data=data)
    given, kept = opt_state.inner, left_alone.opt_state.inner
    assert tree.same_bits(left_alone.params, params)
    assert tree.same_bits(kept.curvature, given.curvature)
    square_sum = exact.forget(params, opt_state, [old], data=data).opt_state.inner[1]
    # First order: 0.057 of what was there is left of the row in S_t.
    assert abs(float(kept[1] - square_sum)) < 0.1 * abs(float(given[1] - square_sum))
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


def test_sums_that_never_decay_are_taken_out_or_the_row_is_not_gone():
    memory = lbfgs.init(jnp.zeros(2), 2)
    for _ in range(5):
        memory, _ = lbfgs.push(memory, jnp.ones(2), jnp.ones(2), owner=jnp.array([3]))
    state = lambda steps, total, memory: transforms.OnlineLBFGSState(
        jnp.int32(steps), jnp.float32(total), memory
    )
    shorter = memory._replace(
        push_clock=memory.push_clock - 1, pair_clocks=memory.pair_clocks - jnp.uint32(1)
    )
    given, other = state(5, 4971.0, memory), state(4, 299.0, shorter)
    twins = _online.Twins(jnp.ones(2), given, jnp.ones(2), other, jnp.int32(9))
    nobody, owner = jnp.array([0, -1]), jnp.array([3, -1])
    assert bool(_stream.is_gone(given, twins, nobody))
    assert tree.same_bits(_stream.without_sums(given, twins), other)
    assert not bool(_stream.is_gone(given, twins, owner))
    assert not bool(_stream.is_gone(given, twins._replace(quiet_steps=jnp.int32(2)), nobody))
    older = other._replace(curvature=shorter._replace(pair_clocks=jnp.zeros(2, jnp.uint32)))
    wilder = other._replace(gradient_square_sum=jnp.float32(jnp.nan))
    fewer = other._replace(curvature=shorter._replace(num_pairs=jnp.int32(1)))
    for unlike, quiet in ((older, 3), (wilder, 9), (fewer, 9)):
        changed = twins._replace(other_inner=unlike, quiet_steps=jnp.int32(quiet))
        assert not bool(_stream.is_gone(given, changed, nobody))


@pytest.mark.slow
def test_an_adaptive_rate_whose_sum_holds_the_row_is_never_said_to_have_nothing_left():
    """A row of large gradient, far in the past: 4971 of S_t where a run without it has 299."""
    x = np.float32(np.random.default_rng(0).uniform(0.5, 1.5, size=(60, 1)))
    x[0] = 3.0
    data = {"x": x, "y": 2.0 * x[:, 0]}
    options = {
        "num_examples": 60, "max_steps": 60, "batch_size": 1, "l2": None, "memory_size": 2,
        "admission": None, "learning_rate": transforms.AdaptiveRate(20.0, 1.0),
    }  # fmt: skip
    sums, told = {}, {}
    for mode in ("replay", "drop_pair"):
        made = Made(mode, streams.squared, **options)
        params, state = train(made, data, [[t] for t in range(60)], streams.start(dim=1))
        result = made.unlearner.forget(params, state, [0], data=data)
        sums[mode], told[mode] = result.opt_state.inner.gradient_square_sum, result.info
    carried = float(state.inner.gradient_square_sum)
    assert carried > 10 * float(sums["replay"])
    if told["drop_pair"].measurements["nothing_left"]:
        np.testing.assert_allclose(sums["drop_pair"], sums["replay"], rtol=1e-3)
    else:
        assert any("S_t: unchanged" in line for line in told["drop_pair"].certificate.not_covered)


# --- at the present state, traced -----------------------------------------------------------------


def test_forget_step_spends_draws_new_noise_and_takes_no_id_twice():
    odometer = accounting.DeletionOdometer(max_deletions=2, noise_stddev=1.0, sensitivity=1e3)
    still = transforms.PaperDeletion(
        rate=0.0, unit_noise=transforms.deletion_noise(jax.random.key(3))
    )
    made = Made("paper", paper=still, odometer=odometer, nothing_below=None)
    params, state = train(made, DATA, STEPS, streams.start())
    step = jax.jit(made.unlearner.forget_step)

    def delete(at, *ids):
        ids = np.array([*ids, *[-1] * (2 - len(ids))], np.int32)
        rows = jax.tree.map(lambda leaf: leaf[np.clip(ids, 0, 47)], DATA)
        return step(*at, rows, ids, np.ones(2, np.float32))

    *first, one = delete((params, state), 4, 4)  # a repeat is one deletion
    *second, two = delete(first, 5)
    assert (int(one["status"]), int(two["status"])) == (0, 0)
    noises = [first[0]["w"] - params["w"], second[0]["w"] - first[0]["w"]]
    for index, noise in enumerate(noises):
        expected = still.unit_noise(index, params)["w"]
        np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-6)
    record = second[1].record
    assert int(record.num_deletions) == 2
    assert not np.isin(record.log.step_ids, [4, 5]).any()
    for at, ids, wrong in (
        (second, [6], Status.BUDGET_EXHAUSTED),
        (first, [6, 7], Status.BUDGET_EXHAUSTED),
        (first, [4], Status.NOT_IN_THE_MODEL),
        (first, [44], Status.NOT_IN_THE_MODEL),  # never came
        (first, [streams.NUM_EXAMPLES], Status.ID_OUT_OF_RANGE),
    ):
        bad, poisoned, arrays = delete(at, *ids)
        assert Status(int(arrays["status"])) == wrong
        assert Status(int(poisoned.record.participation.status)) == wrong
        assert np.isnan(bad["w"]).all()
        assert np.isnan(poisoned.inner.gradient_square_sum)
        with pytest.raises(errors.TrainingRecordError, match="cannot be deleted from"):
            made.unlearner.forget(params, poisoned, [8], data=DATA)
    *nobody, none = delete(first)
    assert int(none["status"]) == 0
    assert tree.same_bits(tuple(nobody), tuple(first))
    with pytest.raises(errors.AlreadyForgottenError):
        made.unlearner.forget(*second, [4], data=DATA)


@pytest.mark.slow
def test_forget_step_beyond_the_sensitivity_is_poisoned():
    tight = accounting.DeletionOdometer(max_deletions=2, noise_stddev=0.1, sensitivity=1e-9)
    made = Made("paper", paper=PAPER, odometer=tight, nothing_below=None)
    params, state = train(made, DATA, STEPS, streams.start())
    ids = np.array([39, -1], np.int32)
    rows = jax.tree.map(lambda leaf: leaf[np.maximum(ids, 0)], DATA)
    bad, after, arrays = made.unlearner.forget_step(params, state, rows, ids, np.ones(2))
    assert Status(int(arrays["status"])) == Status.BUDGET_EXHAUSTED
    assert np.isnan(bad["w"]).all()
    assert int(after.record.num_deletions) == 0


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


SAID = {
    "drop_pair": ["parameters: they are bitwise those given", "carry the rows", "S_t: unchanged"],
    "paper": ["The curvature pairs: unchanged", "S_t, and with it", "The counters: unchanged"],
    "tangent": ["first order"],
}


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
    assert certificate.scope == ("params" if mode == "paper" else "full-state")
    page = " ".join(certificate.summary().split())
    assert all(words in page for words in SAID[mode])
    if mode == "drop_pair":
        assert tree.same_bits(result.params, params)


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


@pytest.mark.parametrize("incoming", ["any", "gradient"])
def test_a_quote_counts_the_gradients_that_the_program_has(incoming):
    """In products with the table of rows; a Hessian product with its gradient counts as three."""
    tx = transforms.online_lbfgs(streams.squared, owners_per_pair=8, incoming=incoming)
    params = {"w": jnp.zeros(3)}
    row = records.Segment(
        rows={"x": jnp.zeros((8, 3)), "y": jnp.zeros(8)}, ids=jnp.arange(8), weights=jnp.ones(8),
        num_rows=jnp.int32(8), keys=jnp.zeros((), jnp.uint32), settings={},
    )  # fmt: skip
    inner = tx.init(params)
    step = _online.make_online_step(tx, streams.squared, normalizer="kept")
    twin = _online.make_twin_step(tx, streams.squared, normalizer="kept")
    gradient = kernels.weighted_grad(streams.squared)
    one = _readings(gradient, params, row.rows, row.weights)
    counted = {
        "replay": _readings(step, params, inner, row) // one,
        "tangent": _readings(twin, _online.twins_of(params, inner), row, row.weights) // one,
    }
    for mode, per_step in counted.items():
        unlearner = unlearners.memory_pair(
            streams.squared, num_examples=8, max_steps=2, batch_size=8, mode=mode, verify="off",
            optimizer_options={"incoming": incoming},
        )  # fmt: skip
        state, ids = unlearner.init(params), np.arange(8, dtype=np.int32)
        _, state = unlearner.update(params, state, params, batch=row.rows, ids=ids)
        assert unlearner.quote(params, state, [1]).num_gradients == per_step
    assert counted == ({"replay": 3, "tangent": 9} if incoming == "any" else
                       {"replay": 2, "tangent": 8})  # fmt: skip


def test_what_was_not_verified_is_not_told_as_a_check_that_failed():
    told = {}
    for verified in ("no", "bitwise"):
        fields = _promises.promise("replay", {"verified": verified}, "kept", 1e-4)
        told[verified] = fields["assumptions"][0]
    assert "this was not verified" in told["no"].text
    assert "tolerance" not in told["no"].text
    assert told["bitwise"].text.endswith("given state: bitwise, tolerance 0.0001.")
    assert [told[how].status for how in told] == ["assumed", "measured"]


def _readings(function, *operands) -> int:
    """Products with the (8, 3) table of rows in a program, branches included."""

    def inside(jaxpr):
        found = 0
        for eqn in jaxpr.eqns:
            sizes = [getattr(v.aval, "size", 0) for v in eqn.invars]
            found += eqn.primitive.name == "dot_general" and 8 * 3 in sizes
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")
            ):
                found += inside(value.jaxpr) if hasattr(value, "jaxpr") else 0
        return found

    return inside(jax.make_jaxpr(function)(*operands).jaxpr)


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
        assert isinstance(other, unlearners.StreamUnlearner)
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


def test_a_key_whose_words_the_ledger_cannot_hold_is_refused():
    noisy = lambda params, batch, key: jnp.mean(params["w"]) * jax.random.normal(key)
    unlearner = unlearners.memory_pair(noisy, **streams.options())
    params = streams.start()
    state = unlearner.init(params)
    rows, ids = jax.tree.map(lambda leaf: leaf[:1], DATA), np.array([0], np.int32)
    with pytest.raises(ValueError, match="default implementation"):
        unlearner.update(
            params, state, params, batch=rows, ids=ids, key=jax.random.key(0, impl="rbg")
        )


def test_an_insert_needs_its_rows():
    made = Made()
    params = streams.start()
    with pytest.raises(ValueError, match="Expected batch= with ids="):
        made.unlearner.update(params, made.unlearner.init(params), params, ids=np.array([1]))
