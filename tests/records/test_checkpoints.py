"""Which steps have a checkpoint, and what it costs, against a simulation in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import tree
from jaxunlearn.records import (
    init_checkpoints,
    last_slot_before,
    num_slots,
    read_slot,
    rewrite_slot,
    take_checkpoint,
)
from tests import oracles

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros((), jnp.bfloat16)}
INNER = (jnp.zeros((), jnp.int32), {"m": jnp.zeros(2)})
CONFIGS = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 3), (8, 1), (16, 1), (16, 7)]


def state_at(step):
    """A state that tells the step it belongs to."""
    step = jnp.asarray(step)
    params = {"w": jnp.full(2, step, jnp.float32), "b": step.astype(jnp.bfloat16)}
    return params, (step.astype(jnp.int32), {"m": jnp.full(2, -step, jnp.float32)})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def simulate(num_steps, slots, every):
    """The steps and the interval held after meeting each step, and the last checkpoints."""

    def body(checkpoints, step):
        checkpoints = take_checkpoint(checkpoints, step, *state_at(step), every=every)
        return checkpoints, (checkpoints.checkpoint_steps, checkpoints.checkpoint_interval)

    start = init_checkpoints(PARAMS, INNER, slots=slots, every=every)
    return jax.lax.scan(body, start, jnp.arange(num_steps, dtype=jnp.int32))


@functools.cache
def history(slots, every, num_steps=10_000):
    last, (steps, intervals) = simulate(num_steps, slots, every)
    return last, np.asarray(steps), np.asarray(intervals)


@pytest.mark.parametrize(("slots", "every"), CONFIGS)
def test_it_holds_what_the_slow_simulation_holds(slots, every):
    _, steps, intervals = history(slots, every)
    slow = oracles.SlowCheckpoints(slots, every)
    for now in range(len(steps)):
        slow.meet(now)
        held = {int(s) for s in steps[now] if s >= 0}
        assert slow.held() <= held
        assert slow.interval == intervals[now]
        stale = {int(s) for s in steps[now][: slow.num_even] if s % slow.interval}
        assert held - slow.held() <= stale


@pytest.mark.parametrize(("slots", "every"), CONFIGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10_000])
def test_slot_zero_is_step_zero_for_ever(slots, every, num_steps):
    _, steps, _ = history(slots, every)
    assert np.all(steps[:num_steps, 0] == 0)


@pytest.mark.parametrize(("slots", "every"), CONFIGS)
def test_every_past_step_has_an_even_checkpoint_less_than_an_interval_before_it(slots, every):
    _, steps, intervals = history(slots, every)
    num_even = max(1, slots - slots // 2)
    for now in range(0, len(steps), 37):
        even = np.sort([s for s in steps[now][:num_even] if s >= 0])
        gaps = np.diff(np.append(even, now + 1))
        assert np.all(gaps <= intervals[now])
        # and the interval is no wider than the number of slots asks for
        assert intervals[now] == every or intervals[now] <= 2 * (now + 1) / num_even


@pytest.mark.parametrize(("slots", "every"), [(4, 1), (8, 1), (16, 1), (16, 7)])
def test_a_row_used_recently_costs_a_replay_of_at_most_five_times_its_age(slots, every):
    _, steps, _ = history(slots, every)
    farthest = 2 ** (slots // 2 - 2)
    for now in range(0, len(steps), 13):
        for age in range(1, min(now // every, farthest) + 1):
            usable = [s for s in steps[now] if 0 <= s <= now - age * every]
            assert now - max(usable) < (5 * age + 1) * every


@pytest.mark.parametrize(("slots", "every"), [(4, 3), (16, 7)])
def test_nothing_is_taken_between_candidates(slots, every):
    _, steps, _ = history(slots, every)
    taken = steps[steps >= 0]
    assert np.all(taken % every == 0)


@pytest.mark.parametrize(("slots", "every"), CONFIGS)
def test_each_slot_holds_the_state_of_its_step(slots, every):
    checkpoints, steps, _ = history(slots, every)
    assert len(steps[-1]) == slots
    for slot, step in enumerate(steps[-1]):
        if step >= 0:
            assert tree.same_bits(read_slot(checkpoints, slot), state_at(step))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_short_run_keeps_every_step(num_steps):
    _, steps, _ = history(8, 1)
    assert sorted(s for s in steps[num_steps - 1] if s >= 0) == list(range(num_steps))


def test_the_last_slot_before_a_step_is_found():
    checkpoints, steps, _ = history(16, 7)
    held = [int(s) for s in steps[-1] if s >= 0]
    for step in (0, 1, 6, 7, 500, 5000, 9_993, 9_999):
        slot, start = last_slot_before(checkpoints, step)
        assert start == max(s for s in held if s <= step)
        assert steps[-1][slot] == start


def test_empty_slots_are_never_found():
    checkpoints = init_checkpoints(PARAMS, INNER, slots=4, every=1)
    checkpoints = take_checkpoint(checkpoints, jnp.int32(0), *state_at(0), every=1)
    assert last_slot_before(checkpoints, 100) == (0, 0)


def test_rewriting_a_slot_changes_that_slot_alone():
    checkpoints, steps, _ = history(8, 1)
    changed = rewrite_slot(checkpoints, 3, *state_at(77))
    assert np.array_equal(changed.checkpoint_steps, checkpoints.checkpoint_steps)
    for slot in range(8):
        want = state_at(77 if slot == 3 else int(steps[-1][slot]))
        assert tree.same_bits(read_slot(changed, slot), want)


@pytest.mark.parametrize("max_bytes", [30, 59, 60, 61, 1000])
def test_the_memory_bound_is_honoured(max_bytes):
    size = tree.num_bytes(PARAMS) + tree.num_bytes(INNER)
    assert size == 8 + 2 + 4 + 8
    slots = num_slots(PARAMS, INNER, num_checkpoints=16, max_bytes=max_bytes)
    checkpoints = init_checkpoints(PARAMS, INNER, slots=slots, every=1)
    kept = (checkpoints.checkpoint_params, checkpoints.checkpoint_inner)
    assert tree.num_bytes(kept) <= max_bytes
    assert slots == 16 or tree.num_bytes(kept) + size > max_bytes


def test_without_a_bound_it_keeps_as_many_as_it_was_told():
    assert num_slots(PARAMS, INNER, num_checkpoints=5, max_bytes=None) == 5


@pytest.mark.parametrize("max_bytes", [0, 21])
def test_room_for_not_even_one_is_refused(max_bytes):
    with pytest.raises(ValueError, match="room for one checkpoint of 22 bytes"):
        num_slots(PARAMS, INNER, num_checkpoints=4, max_bytes=max_bytes)


def test_it_updates_in_place_under_donation():
    params, inner = {"w": jnp.zeros(20_000)}, (jnp.zeros(20_000),)
    take = jax.jit(functools.partial(take_checkpoint, every=1), donate_argnums=0)
    checkpoints = take(init_checkpoints(params, inner, slots=4, every=1), 0, params, inner)
    large = lambda c: [c.checkpoint_params["w"], c.checkpoint_inner[0]]
    where = [leaf.unsafe_buffer_pointer() for leaf in large(checkpoints)]
    for step in range(1, 6):
        checkpoints = take(checkpoints, step, params, inner)
    assert [leaf.unsafe_buffer_pointer() for leaf in large(checkpoints)] == where


def test_slots_do_not_share_memory_with_the_state_they_copy():
    params = {"w": np.zeros(3, np.float32)}
    checkpoints = init_checkpoints(params, (), slots=2, every=1)
    checkpoints = take_checkpoint(checkpoints, jnp.int32(0), params, (), every=1)
    params["w"][:] = 9.0
    assert np.array_equal(read_slot(checkpoints, 0)[0]["w"], np.zeros(3))


def test_avals_stay_as_they_are():
    avals = lambda t: jax.tree.map(lambda leaf: (leaf.aval, leaf.weak_type), t)
    start = init_checkpoints(PARAMS, INNER, slots=4, every=2)
    taken = take_checkpoint(start, jnp.int32(0), *state_at(0), every=2)
    assert avals(taken) == avals(start)
    assert avals(rewrite_slot(taken, 1, *state_at(5))) == avals(start)
