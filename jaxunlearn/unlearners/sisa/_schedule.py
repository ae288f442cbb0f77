"""Who is in which shard and slice, and in which order: functions of the key and of sizes alone."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxunlearn import records


class Schedule(NamedTuple):
    """The public plan: sizes only, no data."""

    num_examples: int
    num_shards: int
    num_slices: int
    batch_size: int
    epochs: int

    @property
    def slots(self) -> int:
        """Rows of a shard, the last of which may be missing."""
        return -(-self.num_examples // self.num_shards)

    def slots_of(self, stage: int) -> int:
        """Slots in slices 0..stage."""
        return -(-self.slots * (stage + 1) // self.num_slices)

    def steps_from(self, stage: int) -> int:
        """Steps of one shard from the start of `stage` to the end."""
        stages = range(stage, self.num_slices)
        return self.epochs * sum(-(-self.slots_of(r) // self.batch_size) for r in stages)


def check_schedule(num_examples, num_shards, num_slices, batch_size, epochs) -> Schedule:
    """Refuse a bad configuration at the factory."""
    records.check_num_examples(num_examples)
    plan = Schedule(num_examples, num_shards, num_slices, batch_size, epochs)
    records.check_integers(**plan._asdict())
    if num_shards > num_examples or num_slices > plan.slots:
        raise ValueError(
            f"Expected a row for each slice of each shard, got num_examples={num_examples}, "
            f"num_shards={num_shards}, num_slices={num_slices}."
        )
    return plan


def key_of(words, purpose: str):
    """The key of one purpose."""
    names = ("deal", "init", "order", "step")
    return jax.random.fold_in(jax.random.wrap_key_data(words), names.index(purpose))


def _fold(key, *numbers: int):
    """A key folded with several numbers, in order."""
    return functools.reduce(jax.random.fold_in, numbers, key)


@jax.jit
def _words_of_steps(base, steps):
    return jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(base, t)))(steps)


def step_keys(words, group, stage, epoch, at, length) -> np.ndarray:
    """Key words of `length` steps of each shard of a group, (shards, steps, 2)."""
    base = key_of(words, "step")
    steps = np.arange(at, at + length)
    found = [_words_of_steps(_fold(base, shard, stage, epoch), steps) for shard in group]
    return np.stack(jax.device_get(found))


def _dealt(plan: Schedule, words) -> np.ndarray:
    """The ids in the order in which they are dealt to shards, one each in turn."""
    draws = records.row_draws(key_of(words, "deal"), np.arange(plan.num_examples), 1)
    return np.argsort(draws[:, 0], kind="stable")


def places(plan: Schedule, words) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """(shard, slice) of every id."""
    place = np.empty((plan.num_examples,), np.int64)
    place[_dealt(plan, words)] = np.arange(plan.num_examples)
    ends = [plan.slots_of(stage) for stage in range(plan.num_slices)]
    return place % plan.num_shards, np.searchsorted(ends, place // plan.num_shards, side="right")


def slot_table(plan: Schedule, words, ids) -> Int[np.ndarray, "shards slots"]:
    """The id in each slot, -1 where there is none of `ids`."""
    table = np.full((plan.slots * plan.num_shards,), -1, np.int32)
    order = _dealt(plan, words)
    table[: plan.num_examples] = np.where(np.isin(order, ids), order, -1)
    return table.reshape(plan.slots, plan.num_shards).T


def slot_steps(plan: Schedule, words, shard, stage, epoch) -> Int[np.ndarray, "steps batch"]:
    """Slots of each step of an epoch, in an order of its own, padded with -1."""
    slots, size = plan.slots_of(stage), plan.batch_size
    draws = records.row_draws(
        _fold(key_of(words, "order"), shard, stage, epoch), np.arange(slots), 1
    )
    padded = np.full((-(-slots // size) * size,), -1, np.int64)
    padded[:slots] = np.argsort(draws[:, 0], kind="stable")
    return padded.reshape(-1, size)


def lane_groups(lanes: dict[int, int], width: int, num_shards: int) -> list[list[int]]:
    """Groups of `width` shards with one in `lanes`: a shard always has the same lane."""
    groups = [list(range(at, at + width)) for at in range(0, num_shards, width)]
    groups = [[min(shard, num_shards - 1) for shard in group] for group in groups]
    return [group for group in groups if any(shard in lanes for shard in group)]
