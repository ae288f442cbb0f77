"""Blocks of stacks of tangents that are read, and written where they were read."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxunlearn.kernels import _cpu

Tangents = tuple[Array, ...]
"""One stack (num_units, *leaf.shape) a tracked leaf: of the parameters, then of the state."""

CACHE_BYTES = 1 << 21
"""On CPU a chunk of tangents has at most this many bytes: it is read and written in cache."""

ACCELERATOR_BYTES = 1 << 28
"""Elsewhere."""


def units_in_cache(tangents: Tangents) -> int:
    """As many tangents as stay in cache, at least one."""
    size = sum(leaf[0].size * max(4, leaf.dtype.itemsize) for leaf in tangents)
    room = CACHE_BYTES if _cpu.on_cpu() else ACCELERATOR_BYTES
    return max(1, room // max(1, size))


def in_blocks(function, stacks: Tangents, live, carried: Tangents, at_once: int):
    """`function` of blocks of the stacks, each written where it was read; and `carried`, unchanged.

    `carried` was read from the stacks: it goes through the loop, so that it is read before they
    change. On several devices a block takes its part of every shard: slicing moves nothing.
    """
    num_units, num_devices = stacks[0].shape[0], jax.device_count()
    if at_once >= num_units:
        return function(stacks, live), carried
    if num_devices > 1 and num_units % num_devices == 0:
        per_device = num_units // num_devices
        block = max(size for size in range(1, at_once + 1) if per_device % size == 0)
        return _strided(function, stacks, live, carried, block * num_devices)

    def body(start, size, stacks):
        take = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size)
        new = function(jax.tree.map(take, stacks), jax.tree.map(take, live))
        return tuple(
            lax.dynamic_update_slice_in_dim(leaf, part, start, 0) for leaf, part in zip(stacks, new)
        )

    def step(i, carry):
        stacks, carried = carry
        return body(i * at_once, at_once, stacks), _touched(carried, i)

    blocks, rest = divmod(num_units, at_once)
    stacks, carried = lax.fori_loop(0, blocks, step, (stacks, carried))
    return (body(blocks * at_once, rest, stacks) if rest else stacks), carried


def _strided(function, stacks, live, carried, at_once: int):
    """Block i takes the slots i, i + n, i + 2n, ...: some of every shard."""
    num_units = stacks[0].shape[0]
    num_blocks = num_units // at_once
    fold = lambda leaf: leaf.reshape(at_once, num_blocks, *leaf.shape[1:])
    folded = jax.tree.map(fold, live)

    def body(i, carry):
        stacks, carried = carry
        take = lambda leaf: lax.dynamic_index_in_dim(leaf, i, axis=1, keepdims=False)
        new = function(jax.tree.map(take, stacks), jax.tree.map(take, folded))
        stacks = tuple(
            lax.dynamic_update_index_in_dim(leaf, part, i, axis=1)
            for leaf, part in zip(stacks, new)
        )
        return stacks, _touched(carried, i)

    views = tuple(map(fold, stacks))
    views, carried = lax.fori_loop(0, num_blocks, body, (views, carried))
    return tuple(leaf.reshape(num_units, *leaf.shape[2:]) for leaf in views), carried


def _touched(carried: Tangents, i) -> Tangents:
    """`carried`, in a way that XLA cannot see: it would read it again, from a copy of the stacks.

    One row is written back as it is, since no number is both zero and different from itself.
    """

    def touch(leaf):
        row = i % leaf.shape[0]
        old = lax.dynamic_index_in_dim(leaf, row, keepdims=False)
        never = (old != old) & (old == 0)
        return lax.dynamic_update_index_in_dim(leaf, jnp.where(never, 0, old), row, 0)

    return tuple(map(touch, carried))


def over_rows(function, tangents: Tangents, parts, at_once: int, nobody: int) -> Tangents:
    """`function(tangents, part)` over parts of `at_once` rows; rows that fill up are nobody's."""
    num_rows = parts[0].shape[0]
    if at_once >= num_rows:
        return function(tangents, parts)
    missing = -num_rows % at_once

    def split(leaf):
        more = jnp.repeat(leaf[:1], missing, axis=0)
        return jnp.concatenate([leaf, more]).reshape(-1, at_once, *leaf.shape[1:])

    slots, rest = parts
    slots = jnp.concatenate([slots, jnp.full((missing,), nobody, slots.dtype)])
    parts = slots.reshape(-1, at_once), jax.tree.map(split, rest)
    body = lambda tangents, part: (function(tangents, part), None)
    return lax.scan(body, tangents, parts)[0]
