"""Seen and forgotten bits, counters and the sticky status, against a Python set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import errors, tree
from jaxunlearn.records import (
    bury,
    check_participation,
    check_status,
    forgotten_ids,
    init_participation,
    observe,
    seen_ids,
)
from jaxunlearn.types import Status
from tests import oracles

NUM_EXAMPLES, BATCH = 100, 8
step = jax.jit(functools.partial(observe, num_examples=NUM_EXAMPLES))
batches = st.lists(
    st.lists(st.integers(-1, NUM_EXAMPLES - 1), min_size=BATCH, max_size=BATCH), max_size=12
)


def after(stream, start=None):
    participation = init_participation(NUM_EXAMPLES) if start is None else start
    for ids in stream:
        participation = step(participation, None if ids is None else jnp.array(ids, jnp.int32))
    return participation


def status_of(participation) -> Status:
    return Status(int(participation.status))


@given(stream=batches)
def test_the_seen_bits_are_the_set_of_all_ids_met(stream):
    participation = after(stream)
    met = {i for ids in stream for i in ids if i >= 0}
    assert seen_ids(participation).tolist() == sorted(met)
    for i in range(NUM_EXAMPLES):
        assert oracles.has_bit(participation.seen_bits, i) == (i in met)
    assert int(participation.num_steps) == int(participation.num_steps_with_ids) == len(stream)
    assert status_of(participation) == Status.OK


def test_repeats_and_neighbours_in_one_word_do_not_carry_into_another_bit():
    participation = after([[31, 31, 0, 1, 1, 1, 32, 31], [31, 0, 0, 30, 2, 63, 62, 32]])
    assert seen_ids(participation).tolist() == [0, 1, 2, 30, 31, 32, 62, 63]


def test_a_whole_word_in_one_batch():
    observe_all = jax.jit(functools.partial(observe, num_examples=64))
    participation = observe_all(init_participation(64), jnp.arange(64, dtype=jnp.int32))
    assert np.array_equal(participation.seen_bits, [2**32 - 1, 2**32 - 1])


def test_padding_is_nobody():
    participation = after([[-1] * BATCH])
    assert seen_ids(participation).size == 0
    assert status_of(participation) == Status.OK
    assert int(participation.num_steps_with_ids) == 1


@pytest.mark.parametrize("num_examples", [1, 31, 32, 33])
def test_the_last_example_has_a_bit_and_the_next_has_none(num_examples):
    participation = init_participation(num_examples)
    assert participation.seen_bits.shape == (-(-num_examples // 32),)
    participation = observe(participation, jnp.array([num_examples - 1]), num_examples)
    assert seen_ids(participation).tolist() == [num_examples - 1]
    assert status_of(participation) == Status.OK
    participation = observe(participation, jnp.array([num_examples]), num_examples)
    assert seen_ids(participation).tolist() == [num_examples - 1]
    assert status_of(participation) == Status.ID_OUT_OF_RANGE


@given(bad=st.sampled_from([-2, -100, -(2**31), NUM_EXAMPLES, 128, 2**31 - 1]), others=batches)
def test_an_id_out_of_range_sticks_and_is_not_recorded(bad, others):
    participation = after([[bad] + [-1] * (BATCH - 1), *others])
    met = {i for ids in others for i in ids if i >= 0}
    assert seen_ids(participation).tolist() == sorted(met)
    assert status_of(participation) == Status.ID_OUT_OF_RANGE


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_ids_of_any_integer_type_are_the_same_ids(dtype):
    participation = observe(init_participation(300), jnp.array([3, 100, 7], dtype), 300)
    assert seen_ids(participation).tolist() == [3, 7, 100]
    assert status_of(participation) == Status.OK


@pytest.mark.parametrize("value", [2**32 - 1, 2**31, 2**32 - 5])
def test_a_large_unsigned_id_is_out_of_range_and_not_padding(value):
    participation = observe(init_participation(300), jnp.array([value], jnp.uint32), 300)
    assert seen_ids(participation).size == 0
    assert status_of(participation) == Status.ID_OUT_OF_RANGE


@pytest.mark.parametrize("value", [2**32 + 5, 2**32 - 1, -(2**32) + 5, 2**63 - 1])
def test_a_64_bit_id_does_not_wrap(value, x64):
    participation = observe(init_participation(300), jnp.array([value], jnp.int64), 300)
    assert seen_ids(participation).size == 0
    assert status_of(participation) == Status.ID_OUT_OF_RANGE


WITH, WITHOUT = [1] * BATCH, None


@pytest.mark.parametrize(
    "stream", [[WITH, WITHOUT], [WITHOUT, WITH], [WITH, WITH, WITHOUT, WITH], [WITHOUT, WITH, WITH]]
)
def test_ids_on_some_steps_only_is_noticed_in_either_order(stream):
    assert status_of(after(stream)) == Status.IDS_MISSING


@pytest.mark.parametrize("stream", [[], [WITH] * 3, [WITHOUT] * 3])
def test_ids_on_all_steps_or_on_none_is_fine(stream):
    assert status_of(after(stream)) == Status.OK


@given(stream=batches.filter(lambda stream: any(i >= 0 for ids in stream for i in ids)))
def test_burying_takes_an_id_out_of_the_seen_and_nothing_else(stream):
    before = after(stream)
    met = seen_ids(before)
    gone = met[::2]
    buried = bury(before, gone)
    assert forgotten_ids(buried).tolist() == gone.tolist()
    assert seen_ids(buried).tolist() == sorted(set(met.tolist()) - set(gone.tolist()))
    assert tree.same_bits(buried._replace(forgotten_bits=before.forgotten_bits), before)
    assert forgotten_ids(before).size == 0
    assert forgotten_ids(bury(buried, met[1::2])).tolist() == met.tolist()


def test_training_on_a_forgotten_id_sticks():
    participation = bury(after([[5, 40, 7, -1, -1, -1, -1, -1]]), np.array([40], np.int32))
    neighbour = after([[41] * BATCH], participation)
    assert status_of(neighbour) == Status.OK
    again = after([[41] * 7 + [40]], participation)
    assert status_of(again) == Status.FORGOTTEN_ID_USED
    assert status_of(after([[1] * BATCH], again)) == Status.FORGOTTEN_ID_USED


def test_statuses_add_up_and_the_story_tells_them_all():
    participation = bury(after([[3] * BATCH]), np.array([3], np.int32))
    spoilt = after([[3] * 7 + [1000], None], participation)
    assert status_of(spoilt) == (
        Status.FORGOTTEN_ID_USED | Status.ID_OUT_OF_RANGE | Status.IDS_MISSING
    )
    with pytest.raises(errors.TrainingRecordError) as caught:
        check_status(spoilt)
    for flag in (Status.FORGOTTEN_ID_USED, Status.ID_OUT_OF_RANGE, Status.IDS_MISSING):
        assert flag.story in str(caught.value)


def test_only_seen_ids_that_are_left_pass_the_check():
    participation = bury(after([[3, 4, 5, 99, -1, -1, -1, -1]]), np.array([4], np.int32))
    check_participation(participation, np.array([3, 5, 99], np.int32))
    check_participation(participation, np.array([], np.int32))
    with pytest.raises(errors.AlreadyForgottenError, match="got 4, already forgotten"):
        check_participation(participation, np.array([3, 4], np.int32))
    with pytest.raises(errors.NeverSeenError, match="got 6, 7"):
        check_participation(participation, np.array([3, 6, 7], np.int32))


def test_the_hint_tells_that_update_never_got_ids():
    with pytest.raises(errors.NeverSeenError, match="pass ids= on every step"):
        check_participation(after([None, None]), np.array([3], np.int32))


def test_a_spoilt_record_is_refused_even_for_a_request_for_nothing():
    with pytest.raises(errors.TrainingRecordError, match=r"outside 0\.\.num_examples-1"):
        check_participation(after([[1000] * BATCH]), np.array([], np.int32))


@pytest.mark.parametrize("num_examples", [0, -3, 1.5, True, 2**31])
def test_a_bad_number_of_examples_is_refused_at_once(num_examples):
    with pytest.raises(ValueError, match="Expected"):
        init_participation(num_examples)


def test_avals_stay_as_they_are():
    avals = lambda t: jax.tree.map(lambda leaf: (leaf.aval, leaf.weak_type), t)
    start = init_participation(NUM_EXAMPLES)
    assert avals(after([WITH, None])) == avals(start)
    assert avals(bury(start, np.array([3], np.int32))) == avals(start)


def test_it_updates_in_place_under_donation():
    num_examples = 1_000_000
    donated = jax.jit(functools.partial(observe, num_examples=num_examples), donate_argnums=0)
    participation = donated(init_participation(num_examples), jnp.arange(BATCH))
    where = [leaf.unsafe_buffer_pointer() for leaf in participation[:2]]
    for first in (100, 200, 300):
        participation = donated(participation, first + jnp.arange(BATCH))
    assert [leaf.unsafe_buffer_pointer() for leaf in participation[:2]] == where
    assert len(seen_ids(participation)) == 4 * BATCH
