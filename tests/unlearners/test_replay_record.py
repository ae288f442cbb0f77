"""What `unlearners.replay` leaves behind: nothing of a forgotten row, and a record that goes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import errors, records
from tests import oracles
from tests.conformance import cases
from tests.conformance.cases import INSIDE, PLAIN, differing, make_problem, trained

REPLAY_CASE = next(case for case in cases.CASES if case.name == "replay")
KEPT_CASE = next(case for case in cases.CASES if case.name == "replay-kept")
both_normalizers = pytest.mark.parametrize("case", [REPLAY_CASE, KEPT_CASE], ids=lambda c: c.name)


def problem_of(inside=PLAIN, case=REPLAY_CASE, **options):
    return make_problem(case, inside, **options)


@functools.cache
def run():
    return trained("replay")


def everything(result):
    """Parameters, inner state and record of a `Forgotten`."""
    return result.params, result.opt_state


def judged(problem, record, forget, normalizer="batch"):
    """Parameters and inner state of the oracle."""
    return records.oracle(
        problem.tx, problem.loss_fn, problem.params,
        log=record.log, data=problem.data, forget=forget, normalizer=normalizer,
    )  # fmt: skip


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


# --- nothing is left ---------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["adamw", "hyperparams_set_in_chain", "apply_if_finite"])
def test_two_runs_that_differ_in_one_rows_content_agree_in_every_leaf_once_it_is_forgotten(inside):
    inside = next(i for i in INSIDE if i.name == inside)
    problem = problem_of(inside, verify="off")
    results = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        data = jax.tree.map(np.array, problem.data)
        data["x"][5], data["y"][5] = rng.normal(size=5) * 10**seed, rng.normal()
        other = dataclasses.replace(problem, data=data)
        params, state = other.train()
        data["x"][5], data["y"][5] = np.nan, np.nan
        results.append((params, everything(other.forget(params, state, [5]))))
    assert differing(results[0][0], results[1][0])
    assert differing(results[0][1], results[1][1]) == []
    assert differing(results[0][1], results[2][1]) == []


def test_only_the_seen_and_forgotten_bits_tell_a_forgotten_row_from_one_that_never_was():
    problem = run().problem
    forgotten = everything(run().forgotten)
    params, state = problem.start()
    for t in range(cases.STEPS):
        ids = cases.ids_of_step(t)
        rows, _ = problem.batch(ids)
        params, state = problem.step(params, state, rows, np.where(np.isin(ids, [3, 5]), -1, ids))
    num_rows = forgotten[1].record.log.step_num_rows
    assert not np.array_equal(num_rows, state.record.log.step_num_rows)
    log = state.record.log._replace(step_num_rows=num_rows)
    kept = state.record.participation
    bits = forgotten[1].record.participation
    assert oracles.has_bit(bits.seen_bits, 3)
    assert not oracles.has_bit(kept.seen_bits, 3)
    bits = bits._replace(seen_bits=kept.seen_bits, forgotten_bits=kept.forgotten_bits)
    assert differing(log, forgotten[1].record.log) == []
    assert differing(bits, kept) == []


def test_no_forgotten_id_is_left_in_the_log():
    before, after = run().state.record.log, run().forgotten.opt_state.record.log
    assert np.isin(before.step_ids, [3, 5]).sum() == 4
    assert np.isin(after.step_ids, [3, 5]).sum() == 0
    others = (before.step_ids >= 0) & ~np.isin(before.step_ids, [3, 5])
    assert np.array_equal(after.step_ids >= 0, others)
    assert np.array_equal(after.step_num_rows, before.step_num_rows)


def test_checkpoints_after_the_first_use_are_those_of_the_oracle():
    record = run().forgotten.opt_state.record
    steps = np.asarray(record.checkpoints.checkpoint_steps)
    assert len(set(steps[steps >= 0])) >= 2
    for slot, step in enumerate(steps):
        if step >= 0:
            params, inner = records.oracle(
                run().problem.tx, run().problem.loss_fn, run().problem.params,
                log=record.log, data=run().problem.data, num_steps=int(step),
            )  # fmt: skip
            assert differing((params, inner), records.read_slot(record.checkpoints, slot)) == []


# --- one deletion after another ----------------------------------------------------------------


@both_normalizers
@pytest.mark.parametrize("order", [[[3], [5]], [[5], [3]]], ids=["3-then-5", "5-then-3"])
def test_two_deletions_in_a_row_equal_one_of_both_in_every_leaf(case, order):
    both = trained(case.name)
    params, state = both.params, both.state
    for ids in order:
        params, state, _ = both.problem.forget(params, state, ids)
    assert differing((params, state), everything(both.forgotten)) == []


def test_every_row_can_be_deleted_one_at_a_time_or_at_once():
    params, state = run().params, run().state
    for i in range(cases.NUM_SEEN):
        params, state, _ = run().problem.forget(params, state, [i])
    at_once = run().problem.forget(run().params, run().state, range(cases.NUM_SEEN))
    assert differing((params, state), everything(at_once)) == []
    steps = int(state.record.participation.num_steps)
    judge = run().problem.start()[0], run().problem.tx.init(run().problem.params)
    update = jax.jit(run().problem.tx.update)
    for _ in range(steps):
        zeros = jax.tree.map(jnp.zeros_like, judge[0])
        updates, inner = update(zeros, judge[1], judge[0])
        judge = optax.apply_updates(judge[0], updates), inner
    assert_close((params, state.inner), judge)


@both_normalizers
@pytest.mark.parametrize("inside", ["adamw", "momentum"])
def test_a_step_without_a_kept_row_has_zero_gradient_and_counts(case, inside):
    inside = next(i for i in INSIDE if i.name == inside)
    problem = make_problem(case, inside)
    params, state = problem.train(2)
    gone = [int(i) for i in cases.ids_of_step(0)]
    result = problem.forget(params, state, gone)
    params, inner = problem.params, problem.tx.init(problem.params)
    updates, inner = problem.tx.update(jax.tree.map(jnp.zeros_like, params), inner, params)
    params = optax.apply_updates(params, updates)
    rows = jax.tree.map(lambda leaf: leaf[cases.ids_of_step(1)], problem.data)
    updates, inner = problem.tx.update(jax.grad(problem.loss_fn)(params, rows), inner, params)
    params = optax.apply_updates(params, updates)
    assert_close((result.params, result.opt_state.inner), (params, inner))


def test_training_goes_on_after_a_deletion_and_a_second_one_reaches_back():
    problem = run().problem
    start = cases.copied(everything(run().forgotten))
    ids = np.array([[0, 1, 2, 6], [7, 8, 9, -1]], np.int32)
    for step_ids in ids:
        start = problem.step(*start, *problem.batch(step_ids))
    params, state = start
    assert differing((params, state.inner), judged(problem, state.record, [])) == []
    result = problem.forget(params, state, [0, 7])
    assert differing(everything(result)[0], judged(problem, state.record, [0, 7])[0]) == []
    assert differing(result.opt_state.inner, judged(problem, state.record, [0, 7])[1]) == []


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_checkpoints", [1, 2, 16])
def test_the_number_of_checkpoints_changes_the_cost_and_not_the_result(num_checkpoints):
    problem = problem_of(num_checkpoints=num_checkpoints)
    params, state = problem.train()
    assert state.record.checkpoints.checkpoint_steps.shape == (num_checkpoints,)
    result = problem.forget(params, state, [3, 5])
    assert differing(result.params, run().forgotten.params) == []
    assert differing(result.opt_state.inner, run().forgotten.opt_state.inner) == []
    late = problem.forget(params, state, [12])
    assert differing(late.params, judged(problem, state.record, [12])[0]) == []


def test_checkpoints_stay_within_their_bytes():
    params, state = run().params, run().state
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state.inner)))
    shapes = jax.eval_shape(
        problem_of(num_checkpoints=16, max_checkpoint_bytes=2 * size + 1).unlearner.init, params
    )
    assert shapes.record.checkpoints.checkpoint_steps.shape == (2,)
    with pytest.raises(ValueError, match="room for one checkpoint"):
        jax.eval_shape(problem_of(max_checkpoint_bytes=size - 1).unlearner.init, params)


def test_a_row_used_late_costs_a_short_replay():
    problem = problem_of(num_checkpoints=16)
    params, state = problem.train()
    ids = np.array([13, 0, 1, 2], np.int32)
    params, state = problem.step(params, state, *problem.batch(ids))
    quote = problem.unlearner.quote(params, state, [13])
    result = problem.forget(params, state, [13])
    assert quote.num_steps == result.info.measurements["replayed_steps"] == 1
    assert quote.retrain_gradients == cases.STEPS + 1
    assert differing(result.params, judged(problem, state.record, [13])[0]) == []


# --- what is asked of the data -----------------------------------------------------------------


class Spy:
    """Data that notes every id it is asked for."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def __getitem__(self, ids):
        self.asked.extend(ids.tolist())
        return jax.tree.map(lambda leaf: leaf[ids], self.data)


def test_neither_padding_nor_a_row_to_forget_is_ever_read():
    spy = Spy(run().problem.data)
    unverified = problem_of(verify="off").unlearner
    result = unverified.forget(run().params, run().state, [3, 5], data=spy)
    assert differing(everything(result), everything(run().forgotten)) == []
    assert set(spy.asked) == set(range(cases.NUM_SEEN)) - {3, 5}
    spy.asked.clear()
    records.oracle(
        run().problem.tx, run().problem.loss_fn, run().problem.params,
        log=run().state.record.log, data=spy, forget=[3, 5],
    )  # fmt: skip
    assert set(spy.asked) == set(range(cases.NUM_SEEN)) - {3, 5}


def test_verification_reads_rows_that_are_still_in_the_model_and_no_tombstones():
    checking = problem_of(verify="report").unlearner
    params, state = everything(run().forgotten)
    spy = Spy(run().problem.data)
    checking.forget(params, state, [7], data=spy)
    assert 7 in spy.asked
    assert not {3, 5, -1} & set(spy.asked)


# --- forget_step -------------------------------------------------------------------------------


def _segment_operands(this, forget, steps=slice(None)):
    params, state, rows, ids, weights = cases.run_as_segment(this, forget)
    pick = lambda leaf: leaf[steps]
    return params, state, jax.tree.map(pick, rows), pick(ids), pick(weights)


def test_segments_of_forget_step_in_a_plain_loop_are_forget():
    step = jax.jit(run().problem.unlearner.forget_step)
    params, state, *_ = _segment_operands(run(), [3, 5])
    for t in range(cases.STEPS):
        segment = _segment_operands(run(), [3, 5], slice(t, t + 1))[2:]
        params, state, arrays = step(params, state, *segment)
        assert int(arrays["num_steps"]) == 1
    assert_close((params, state.inner), (run().forgotten.params, run().forgotten.opt_state.inner))
    assert differing(state.record.log, run().forgotten.opt_state.record.log) == []
    assert int(state.record.participation.num_steps) == cases.STEPS


def test_a_forget_after_forget_step_starts_from_no_checkpoint_that_still_knows_the_rows():
    problem = problem_of(num_checkpoints=16)
    this = cases.Trained(problem, *problem.train(), None)
    params, state, _ = jax.jit(problem.unlearner.forget_step)(*_segment_operands(this, [3, 5]))
    result = problem.forget(params, state, [12])
    assert_close(result.params, judged(problem, this.state.record, [3, 5, 12])[0])


def test_an_id_that_is_nowhere_in_the_log_costs_a_replay_and_changes_nothing():
    params, state = everything(run().forgotten)
    participation = state.record.participation._replace(
        forgotten_bits=run().state.record.participation.forgotten_bits
    )
    state = state._replace(record=state.record._replace(participation=participation))
    result = run().problem.forget(params, state, [3, 5])
    assert differing(everything(result), everything(run().forgotten)) == []


def test_steps_beyond_the_run_do_nothing():
    step = jax.jit(run().problem.unlearner.forget_step)
    _, _, *segment = _segment_operands(run(), [3, 5], slice(0, 1))
    params, state, arrays = step(run().params, run().state, *segment)
    assert int(arrays["num_steps"]) == 0
    assert differing((params, state.inner), (run().params, run().state.inner)) == []


def test_rows_at_weight_zero_leave_the_log_as_those_that_are_not_passed():
    operands = cases.run_with_the_rows(run(), [3, 5])
    _, state, _ = jax.jit(run().problem.unlearner.forget_step)(*operands)
    assert differing(state.record.log, run().forgotten.opt_state.record.log) == []


# --- a run that diverges -----------------------------------------------------------------------


def test_a_retained_run_that_diverges_is_refused_and_nothing_changes():
    problem = problem_of(tx=optax.chain(optax.scale(-1e38), optax.scale(1e3)))
    params, state = problem.train(2)
    before = cases.bits((params, state))
    with pytest.raises(errors.NonFiniteError, match="nothing was released"):
        problem.forget(params, state, [9])
    assert cases.bits((params, state)) == before
