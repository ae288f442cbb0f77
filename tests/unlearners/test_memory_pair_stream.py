"""`memory_pair` as a stream: every event under one scan, deletions among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import accounting, transforms, tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.unlearners import Outcome
from tests.unlearners import _streams as streams
from tests.unlearners._streams import DELETE, EVENTS, INSERT, NOTHING, PREDICT, compiled, events_of

DATA = streams.make_data()


def run(script, mode="replay", data=DATA, params=None, **changes):
    params = streams.start() if params is None else params
    return compiled(mode, **changes)(params, events_of(script, data))


def learned(state):
    """What is released: parameters and the whole optimizer state."""
    return state.stream_params, state.stream_opt_state.inner


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1))
def test_after_replay_the_stream_is_bitwise_one_that_never_held_the_rows(seed):
    rng = np.random.default_rng(seed)
    script, alive, gone, t = [], [], [], 0
    while t < streams.INSERTS and len(script) < EVENTS:
        kind = rng.choice([INSERT, DELETE, PREDICT], p=[0.75, 0.15, 0.1])
        if kind == DELETE and alive:
            chosen = rng.choice(alive, size=min(len(alive), rng.integers(1, 3)), replace=False)
            gone += chosen.tolist()
            alive = [i for i in alive if i not in gone]
            script.append((DELETE, chosen.tolist()))
        elif kind == PREDICT:
            script.append((PREDICT, [3]))
        else:
            ids = [2 * t, 2 * t + 1]
            alive += ids
            script.append((INSERT, ids))
            t += 1
    state, output = run(script)
    never, _ = run(streams.without(script, set(gone)))
    assert not np.any(output.outcome)
    assert tree.same_bits(learned(state), learned(never))
    log = np.asarray(state.stream_opt_state.record.log.step_ids)
    assert not np.isin(log, gone).any()
    assert int(state.stream_opt_state.record.num_deletions) == len(gone)


@pytest.mark.parametrize("lag", [1, 2, 5, 12, 20, 24])
def test_replay_is_exact_at_every_lag_and_keeps_nothing_of_the_row(lag):
    victim = 2 * (streams.INSERTS - lag)
    script = [*streams.inserts(), (DELETE, [victim])]
    state, output = run(script)
    never, _ = run(streams.without(script, {victim}))
    before, _ = run(streams.inserts())
    assert tree.same_bits(learned(state), learned(never))
    assert not tree.same_bits(state.stream_params, before.stream_params)
    assert int(output.num_replayed[streams.INSERTS]) >= lag
    place = np.argwhere(np.asarray(before.stream_opt_state.record.log.step_ids) == victim)[0]
    assert np.all(np.asarray(state.stream_rows["x"])[tuple(place)] == 0)
    assert np.any(np.asarray(before.stream_rows["x"])[tuple(place)] != 0)
    assert victim not in np.asarray(state.stream_opt_state.inner.curvature.pair_owners)
    assert float(lbfgs.operator_distance(
        state.stream_opt_state.inner.curvature, never.stream_opt_state.inner.curvature
    )) == 0.0  # fmt: skip


def test_a_row_used_twice_leaves_both_times():
    script = [*streams.inserts(10), (INSERT, [4, 7]), *streams.inserts(14)[10:]]
    state, _ = run([*script, (DELETE, [4])])
    never, _ = run(streams.without([*script, (DELETE, [4])], {4}))
    assert tree.same_bits(learned(state), learned(never))


def test_what_cannot_be_done_is_said_and_changes_nothing():
    script = [
        *streams.inserts(3),
        (DELETE, [2]),
        (DELETE, [2]),  # already gone
        (DELETE, [40]),  # never came
        (DELETE, []),  # nobody
        (DELETE, [5, 2]),  # one of two is gone
        (INSERT, [2, 9]),  # an id does not come back
        (DELETE, [streams.NUM_EXAMPLES]),
        (INSERT, [-5, 9]),
        (PREDICT, [2]),
    ]
    state, output = run(script)
    refused = int(Outcome.REFUSED)
    assert output.outcome[:12].tolist() == [0, 0, 0, 0, *[refused] * 7, 0]
    plain, _ = run(script[:4])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_full_ledger_takes_no_insert():
    script = [*streams.inserts(), *[(INSERT, [t]) for t in range(4)]]
    state, output = run(script)
    assert output.outcome[: len(script)].tolist() == [0] * 26 + [int(Outcome.FULL)] * 2
    assert tree.same_bits(learned(state), learned(run(script[:26])[0]))


def test_losses_are_those_of_the_rows_before_the_event():
    script = [*streams.inserts(2), (PREDICT, [9]), (NOTHING, [])]
    _, output = run(script)
    state, _ = run(streams.inserts(2))
    w = np.asarray(state.stream_params["w"], np.float64)
    expected = np.log1p(np.exp(-DATA["y"][9] * (DATA["x"][9] @ w)))
    np.testing.assert_allclose(output.loss[0], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(output.loss[2], expected, rtol=1e-5)
    assert float(output.loss[3]) == 0.0


def test_forget_is_a_deletion_in_the_stream():
    made = streams.Made()
    steps = [[2 * t, 2 * t + 1] for t in range(20)]
    params, state = streams.train(made, DATA, steps, streams.start())
    result = made.unlearner.forget(params, state, [6, 31], data=DATA)
    streamed, _ = run([*streams.inserts(20), (DELETE, [31, 6])])
    expected = jax.tree.leaves(learned(streamed))
    for a, b in zip(jax.tree.leaves((result.params, result.opt_state.inner)), expected):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_the_state_of_a_stream_can_be_forgotten_from():
    made = streams.Made()
    streamed, _ = run(streams.inserts(20))
    params, _ = learned(streamed)
    result = made.unlearner.forget(params, streamed.stream_opt_state, [6], data=DATA)
    assert result.info.certificate.guarantee == "exact"
    never, _ = run(streams.without([*streams.inserts(20)], {6}))
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(never.stream_params)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_first_order_is_exact_where_the_loss_is_quadratic(x64):
    data = streams.make_data(np.float64)
    params = streams.start(jnp.float64)
    for victims in ([7], [40, 11]):
        script = [*streams.inserts(), (DELETE, victims)]
        changes = {"data": data, "params": params, "loss_fn": streams.squared}
        moved, output = run(script, "tangent", **changes)
        exact, _ = run(script, "replay", **changes)
        pairs = zip(jax.tree.leaves(learned(moved)), jax.tree.leaves(learned(exact)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
        assert float(output.influence[streams.INSERTS]) > 1e-4


@pytest.mark.slow
def test_first_order_is_close_where_it_is_not_and_says_when_it_cannot_be(x64):
    data, params = streams.make_data(np.float64), streams.start(jnp.float64)
    script = [*streams.inserts(), (DELETE, [40])]
    before, _ = run(streams.inserts(), "tangent", data=data, params=params)
    moved, _ = run(script, "tangent", data=data, params=params)
    exact, _ = run(script, "replay", data=data, params=params)
    gap = lambda a: tree.relative_distance(a.stream_params, exact.stream_params)
    assert gap(moved) < 0.1 * gap(before)

    first = [(INSERT, [0]), (INSERT, [1, 2]), (DELETE, [1, 2])]
    wild, output = run(first, "tangent", data=data, params=params)
    assert int(output.outcome[2]) == Outcome.UNTRUSTED
    assert tree.same_bits(
        learned(wild), learned(run(first[:2], "tangent", data=data, params=params)[0])
    )


@pytest.mark.slow
def test_drop_pair_takes_the_own_pairs_and_nothing_else():
    script = [*streams.inserts(), (DELETE, [47])]
    before, _ = run(streams.inserts(), "drop_pair")
    state, output = run(script, "drop_pair")
    assert int(output.outcome[streams.INSERTS]) == Outcome.DONE
    assert tree.same_bits(state.stream_params, before.stream_params)
    memory, old = (s.stream_opt_state.inner.curvature for s in (state, before))
    assert int(memory.num_pairs) == int(old.num_pairs) - 1
    assert 47 in np.asarray(old.pair_owners)
    assert 47 not in np.asarray(memory.pair_owners)


PAPER = transforms.PaperDeletion(
    rate=1.0, noise_stddev=0.5, unit_noise=transforms.deletion_noise(jax.random.key(3))
)
ODOMETER = accounting.DeletionOdometer(max_deletions=3, noise_stddev=0.01, sensitivity=1e3)


@pytest.mark.slow
def test_the_published_step_is_what_it_says():
    script = [*streams.inserts(), (DELETE, [44])]
    changes = {"paper": PAPER, "nothing_below": None}
    before, _ = run(streams.inserts(), "paper", **changes)
    state, output = run(script, "paper", **changes)
    memory = before.stream_opt_state.inner.curvature
    w = before.stream_params["w"]
    x, y = DATA["x"][44], DATA["y"][44]
    g = -y / (1 + jnp.exp(y * (x @ w))) * x + 0.1 * w
    noise = PAPER.unit_noise(jnp.zeros((), jnp.int32), before.stream_params)["w"]
    step = lbfgs.inverse_product(memory, {"w": g})["w"]
    np.testing.assert_allclose(
        state.stream_params["w"], w + step + 0.5 * noise, rtol=1e-4, atol=1e-5
    )
    assert tree.same_bits(state.stream_opt_state.inner, before.stream_opt_state.inner)
    np.testing.assert_allclose(output.step_norm[streams.INSERTS], jnp.linalg.norm(step), rtol=1e-4)
    assert float(output.noise_stddev[streams.INSERTS]) == 0.5


@pytest.mark.slow
def test_the_odometer_stops_the_stream_and_leaves_the_model_alone():
    changes = {"paper": PAPER, "nothing_below": None, "odometer": ODOMETER}
    script = [*streams.inserts(), *[(DELETE, [i]) for i in (47, 45, 43, 41)]]
    state, output = run(script, "paper", **changes)
    outcome = output.outcome[streams.INSERTS :].tolist()
    done = outcome[:4].count(int(Outcome.DONE))
    assert done == int(state.stream_opt_state.record.num_deletions) == 3
    assert outcome[3] == Outcome.EXHAUSTED
    shorter, _ = run(script[:-1], "paper", **changes)
    assert tree.same_bits(learned(state), learned(shorter))


@pytest.mark.slow
def test_an_id_named_twice_is_one_deletion():
    changes = {"paper": PAPER, "nothing_below": None, "odometer": ODOMETER}
    twice, _ = run([*streams.inserts(), (DELETE, [47, 47])], "paper", **changes)
    once, _ = run([*streams.inserts(), (DELETE, [47])], "paper", **changes)
    assert tree.same_bits(learned(twice), learned(once))
    assert int(twice.stream_opt_state.record.num_deletions) == 1


@pytest.mark.slow
def test_a_step_beyond_the_sensitivity_is_exhaustion_too():
    tight = accounting.DeletionOdometer(max_deletions=9, noise_stddev=0.01, sensitivity=1e-6)
    changes = {"paper": PAPER, "nothing_below": None, "odometer": tight}
    script = [*streams.inserts(), (DELETE, [47])]
    state, output = run(script, "paper", **changes)
    assert int(output.outcome[streams.INSERTS]) == Outcome.EXHAUSTED
    before, _ = run(streams.inserts(), "paper", **changes)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replay", "paper"])
def test_an_event_needs_no_second_copy_of_the_ledger(mode):
    made = streams.unlearner(mode, max_steps=50_000, num_examples=100_000)
    event = jax.tree.map(lambda leaf: leaf[0], events_of(streams.inserts(), DATA))
    state = made.stream.init(streams.start(), event)
    ledger = state.stream_rows, state.stream_opt_state.record.log.step_ids
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(ledger))
    compiled = jax.jit(made.stream.step, donate_argnums=0).lower(state, event).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes
    assert memory.temp_size_in_bytes < 0.2 * num_bytes


@pytest.mark.slow
def test_it_survives_donation_event_by_event():
    made = streams.unlearner()
    script = [*streams.inserts(6), (DELETE, [5])]
    events = events_of(script, DATA)
    step = jax.jit(made.stream.step, donate_argnums=0)
    state = made.stream.init(streams.start(), jax.tree.map(lambda leaf: leaf[0], events))
    for t in range(len(script)):
        state, output = step(state, jax.tree.map(lambda leaf, t=t: leaf[t], events))
        assert int(output.outcome) == Outcome.DONE
    assert step._cache_size() == 1
    scanned, _ = run(script)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
