"""Blocks of stacks of tangents that are read, and written where they were read."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxunlearn.kernels import _cpu
from jaxunlearn.kernels._stacks import (
    is_on_host,
    on_device,
    placed_like,
    read_block,
    write_block,
)

Tangents = tuple[Array, ...]
"""One stack (num_units, *leaf.shape) a tracked leaf: of the parameters, then of the state."""

CACHE_BYTES = 1 << 20
"""On CPU a chunk of tangents has at most this many bytes: it is read and written in cache."""

ACCELERATOR_BYTES = 1 << 28
"""Elsewhere."""

LEAST_AT_ONCE = 2
"""An MLP of 270 thousand parameters takes 1.7 ms a tangent two at a time, 3.0 one at a time."""


def block_size(tangents: Sequence[Any], units_at_once: int | None) -> int:
    """Rows of a stack that go side by side: what was asked for, or as many as stay in cache."""
    if units_at_once is not None:
        return units_at_once
    size = sum(leaf.size // leaf.shape[0] * max(4, leaf.dtype.itemsize) for leaf in tangents)
    room = CACHE_BYTES if _cpu.on_cpu() else ACCELERATOR_BYTES
    return max(LEAST_AT_ONCE, room // max(1, size))


def padded_units(num_units: int, at_once: int) -> int:
    """`num_units`, rounded up to whole blocks, each with the same share of every device."""
    if at_once >= num_units:
        return num_units
    num_devices = jax.device_count()
    blocks = -(-num_units // (at_once * num_devices))
    return blocks * num_devices * -(-num_units // (blocks * num_devices))


def in_blocks(function, stacks: Tangents, live, carried: Tangents, at_once: int):
    """`function` of blocks of the stacks, each written where it was read; and `carried`, unchanged.

    A block takes its part of every shard, so that nothing moves between devices. It is written in
    the iteration after the one that reads it: written in the same one, XLA on CPU would compute
    some leaves from stacks that others have already overwritten, and copies whole stacks to be
    safe. `carried` was read from the stacks: it goes through the loop, to be read before they
    change.
    """
    num_units, num_shards = stacks[0].shape[0], jax.device_count()
    num_blocks = _num_blocks(num_units, at_once)
    if num_blocks == 1:
        new = function(tuple(map(on_device, stacks)), live)
        return tuple(placed_like(part, leaf) for part, leaf in zip(new, stacks)), carried
    if is_on_host(stacks[0]):
        return _from_host(function, stacks, live, num_units // num_blocks), carried
    if num_units % (num_blocks * num_shards):
        num_shards = 1
    rows = num_units // num_blocks

    def fold(leaf):
        return leaf.reshape(num_shards, num_blocks, rows // num_shards, *leaf.shape[1:])

    def take(i, leaf):
        block = lax.dynamic_index_in_dim(leaf, i, axis=1, keepdims=False)
        return block.reshape(rows, *leaf.shape[3:])

    def put(i, leaf, part):
        part = part.reshape(leaf.shape[0], *leaf.shape[2:])
        return lax.dynamic_update_index_in_dim(leaf, part, i, axis=1)

    def body(i, carry):
        views, last, carried = carry
        views = tuple(put(jnp.maximum(i - 1, 0), leaf, part) for leaf, part in zip(views, last))

        def ahead():
            block = tuple(take(i, leaf) for leaf in views)
            return function(block, None if live is None else take(i, fold(live)))

        return views, lax.cond(i < num_blocks, ahead, lambda: last), _touched(carried, i)

    views = tuple(map(fold, stacks))
    first = tuple(take(0, leaf) for leaf in views)
    views, _, carried = lax.fori_loop(0, num_blocks + 1, body, (views, first, carried))
    return tuple(leaf.reshape(num_units, *leaf.shape[3:]) for leaf in views), carried


def _from_host(function, stacks: Tangents, live, rows: int) -> Tangents:
    """`function` of blocks that come from the host's memory and go back to it."""

    def body(i, stacks):
        block = tuple(read_block(leaf, i * rows, rows) for leaf in stacks)
        own = None if live is None else lax.dynamic_slice_in_dim(live, i * rows, rows)
        new = function(block, own)
        return tuple(write_block(leaf, part, i * rows) for leaf, part in zip(stacks, new))

    return lax.fori_loop(0, stacks[0].shape[0] // rows, body, stacks)


def _num_blocks(num_units: int, at_once: int) -> int:
    """How many blocks of at most `at_once` rows a device there are: the smallest that fits."""
    if at_once >= num_units:
        return 1
    least = -(-num_units // (at_once * jax.device_count()))
    return next(count for count in range(least, num_units + 1) if num_units % count == 0)


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
