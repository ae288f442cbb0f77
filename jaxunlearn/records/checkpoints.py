"""Checkpoints of parameters and optimizer state, kept inside the record within a memory bound.

Half of the slots spread evenly over the past: the interval doubles whenever they are full. The
other half reach back logarithmically from now: the slot of level l holds the last checkpoint whose
number is an odd multiple of 2**l, so that a row used recently costs a short replay. Slot 0 keeps
step 0 for ever.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxunlearn import tree


class Checkpoints(NamedTuple):
    """Stacked copies of the training state before some steps.

    checkpoint_steps: the step each slot was taken before; -1 where empty.
    checkpoint_interval: steps between the evenly spaced ones.
    checkpoint_params, checkpoint_inner: leaves with a leading axis of slots.
    """

    checkpoint_steps: Int[Array, "slots"]
    checkpoint_interval: Int[Array, ""]
    checkpoint_params: PyTree
    checkpoint_inner: PyTree


def num_slots(params: PyTree, inner: PyTree, *, num_checkpoints: int, max_bytes: int | None) -> int:
    """How many checkpoints fit: `num_checkpoints`, or fewer to stay within `max_bytes`.

    Raises:
      ValueError: not even one fits.
    """
    size = tree.num_bytes(params) + tree.num_bytes(inner)
    slots = (
        num_checkpoints if max_bytes is None else min(num_checkpoints, max_bytes // max(size, 1))
    )
    if slots < 1:
        raise ValueError(
            f"Expected room for one checkpoint of {size} bytes, got max_checkpoint_bytes="
            f"{max_bytes}."
        )
    return slots


def init_checkpoints(params: PyTree, inner: PyTree, *, slots: int, every: int) -> Checkpoints:
    """No checkpoint taken yet; the first is taken before step 0."""
    stack = lambda leaf: jnp.array(jnp.broadcast_to(leaf, (slots, *jnp.shape(leaf))), copy=True)
    return Checkpoints(
        checkpoint_steps=jnp.full((slots,), -1, jnp.int32),
        checkpoint_interval=jnp.full((), every, jnp.int32),
        checkpoint_params=jax.tree.map(stack, params),
        checkpoint_inner=jax.tree.map(stack, inner),
    )


def take_checkpoint(
    checkpoints: Checkpoints, step: Int[Array, ""], params: PyTree, inner: PyTree, *, every: int
) -> Checkpoints:
    """The checkpoints after meeting `step`; one slot is written when one is due, in place."""
    steps, interval = checkpoints.checkpoint_steps, checkpoints.checkpoint_interval
    slots = steps.shape[0]
    num_even = max(1, slots - slots // 2)
    even = steps[:num_even]
    full = jnp.all(even >= 0) & jnp.all(even % interval == 0) & (step % interval == 0)
    interval = jnp.where(full, 2 * interval, interval)
    free = (even < 0) | (even % interval != 0)
    to_even = (step % interval == 0) & jnp.any(free)
    number = step // every
    level = _trailing_zeros(number)
    to_recent = (step % every == 0) & (num_even < slots)
    recent_slot = num_even + jnp.minimum(level, slots - num_even - 1)
    slot = jnp.where(to_even, jnp.argmax(free), jnp.where(to_recent, recent_slot, slots))
    put = lambda leaf, value: leaf.at[slot].set(value, mode="drop")
    # One conditional for all leaves: a step without a checkpoint then touches none of them.
    kept = (checkpoints.checkpoint_params, checkpoints.checkpoint_inner)
    write = lambda stacks: jax.tree.map(put, stacks, (params, inner))
    params_stack, inner_stack = jax.lax.cond(slot < slots, write, lambda stacks: stacks, kept)
    return Checkpoints(
        checkpoint_steps=put(steps, step),
        checkpoint_interval=interval,
        checkpoint_params=params_stack,
        checkpoint_inner=inner_stack,
    )


def rewrite_slot(checkpoints: Checkpoints, slot: int, params: PyTree, inner: PyTree) -> Checkpoints:
    """One slot replaced by a state reached without the forgotten rows."""
    put = lambda leaf, value: leaf.at[slot].set(value)
    return checkpoints._replace(
        checkpoint_params=jax.tree.map(put, checkpoints.checkpoint_params, params),
        checkpoint_inner=jax.tree.map(put, checkpoints.checkpoint_inner, inner),
    )


def drop_after(checkpoints: Checkpoints, step: Int[Array, ""]) -> Checkpoints:
    """Slots taken after `step` emptied, since they know rows that a replay from there leaves out.

    What they held is overwritten with slot 0.
    """
    stale = checkpoints.checkpoint_steps > step

    def clear(leaf):
        return jnp.where(stale.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf[:1], leaf)

    return checkpoints._replace(
        checkpoint_steps=jnp.where(stale, -1, checkpoints.checkpoint_steps),
        checkpoint_params=jax.tree.map(clear, checkpoints.checkpoint_params),
        checkpoint_inner=jax.tree.map(clear, checkpoints.checkpoint_inner),
    )


def read_slot(checkpoints: Checkpoints, slot: int) -> tuple[PyTree, PyTree]:
    """Parameters and inner state of one slot."""
    get = lambda leaf: leaf[slot]
    return (
        jax.tree.map(get, checkpoints.checkpoint_params),
        jax.tree.map(get, checkpoints.checkpoint_inner),
    )


def last_slot_before(checkpoints: Checkpoints, step: int) -> tuple[int, int]:
    """Slot and step of the last checkpoint taken before or at `step`."""
    steps = np.asarray(jax.device_get(checkpoints.checkpoint_steps))
    usable = np.where((steps >= 0) & (steps <= step), steps, -1)
    slot = int(np.argmax(usable))
    return slot, int(usable[slot])


def _trailing_zeros(number: Int[Array, ""]) -> Int[Array, ""]:
    """Trailing zero bits of a non-negative int32; 31 for zero."""
    lowest = number & -number
    zeros = jax.lax.population_count(jnp.maximum(lowest - 1, 0))
    return jnp.where(number == 0, 31, zeros).astype(jnp.int32)
