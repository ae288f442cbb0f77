"""Reading and writing rows of a stack, on the device or in the host's memory.

A stack that lives on the host is only sliced and written in slices: that XLA does as transfers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(stack: Array) -> bool:
    """Whether a stack lives in the host's memory, which is part of its type."""
    return jax.typeof(stack).memory_space == HOST


def on_device(array: Array) -> Array:
    """An array in the device's memory."""
    return jax.device_put(array, DEVICE) if is_on_host(array) else array


def placed_like(array: Array, stack: Array) -> Array:
    """An array in the memory that a stack lives in."""
    return jax.device_put(array, HOST) if is_on_host(stack) else array


def read_block(stack: Array, start, size: int) -> Array:
    """`size` consecutive rows, on the device."""
    return on_device(lax.dynamic_slice_in_dim(stack, start, size))


def write_block(stack: Array, rows: Array, start) -> Array:
    """The stack with consecutive rows replaced."""
    return lax.dynamic_update_slice_in_dim(stack, placed_like(rows, stack), start, 0)


def read_row(stack: Array, slot) -> Array:
    """One row, on the device."""
    return on_device(lax.dynamic_index_in_dim(stack, slot, keepdims=False))


def read_rows(stack: Array, slots: Int[Array, " b"]) -> Array:
    """Rows at `slots`, zeros where a slot is beyond the stack; on the device."""
    if not is_on_host(stack):
        return stack.at[slots].get(mode="fill", fill_value=0)
    num_rows = stack.shape[0]

    def one(j, rows):
        row = read_row(stack, jnp.minimum(slots[j], num_rows - 1))
        return rows.at[j].set(jnp.where(slots[j] < num_rows, row, 0))

    zeros = jnp.zeros((slots.shape[0], *stack.shape[1:]), stack.dtype)
    return lax.fori_loop(0, slots.shape[0], one, zeros)


def add_rows(stack: Array, slots: Int[Array, " b"], more: Array) -> Array:
    """The stack with `more` added at `slots`; what is beyond the stack is dropped."""
    more = more.astype(stack.dtype)
    if not is_on_host(stack):
        return stack.at[slots].add(more, mode="drop")
    num_rows = stack.shape[0]

    def one(j, stack):
        slot = jnp.minimum(slots[j], num_rows - 1)
        row = read_block(stack, slot, 1)
        return write_block(stack, row + jnp.where(slots[j] < num_rows, more[j], 0), slot)

    return lax.fori_loop(0, slots.shape[0], one, stack)


def moved_by_rows(leaf: Array, stack: Array, slots: Array, amounts: Array) -> Array:
    """leaf + sum_j amounts[j] stack[slots[j]], added one after the other in float32 or wider."""
    wide = jnp.promote_types(jnp.promote_types(leaf.dtype, stack.dtype), jnp.float32)
    num_units = stack.shape[0]
    is_real = (slots >= 0) & (slots < num_units)
    amounts = jnp.where(is_real, amounts, 0).astype(wide)
    safe = jnp.where(is_real, slots, 0)

    def one(j, total):
        tangent = read_row(stack, safe[j]).astype(wide)
        return total + jnp.where(amounts[j] != 0, amounts[j] * tangent, 0)

    start = leaf.astype(wide)
    count = slots.shape[0]
    total = one(0, start) if count == 1 else lax.fori_loop(0, count, one, start)
    return total.astype(leaf.dtype)
