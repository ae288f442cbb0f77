"""Who may be deleted and what is noted of it, inside a traced step: bits, ledger, checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxunlearn.records import Participation, StepLog, drop_after
from jaxunlearn.types import Status


def each_once(ids: Int[Array, "b"]) -> Int[Array, "b"]:
    """The ids with every repeat turned to -1.

    >>> each_once(jnp.array([4, 7, 4, -1])).tolist()
    [4, 7, -1, -1]
    """
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    again = jnp.concatenate([jnp.zeros((1,), bool), ordered[1:] == ordered[:-1]])
    return ids.at[order].set(jnp.where(again, -1, ordered))


def count_ids(ids: Int[Array, "b"]) -> Int[Array, ""]:
    """Different ids that are not padding."""
    return jnp.sum(each_once(ids) >= 0, dtype=jnp.int32)


def faults_of(
    participation: Participation, ids: Int[Array, "b"], num_examples: int
) -> tuple[Bool[Array, "b"], Bool[Array, "b"], Bool[Array, "b"]]:
    """(out of range, forgotten already, never seen) for each id; -1 has no fault."""
    real = ids >= 0
    strange = (ids < -1) | (ids >= num_examples)
    gone = real & has_bit(participation.forgotten_bits, ids)
    return strange, gone, real & ~has_bit(participation.seen_bits, ids)


def deletion_status(
    record: Any, ids: Int[Array, "b"], num_examples: int, max_deletions: int | None
) -> Int[Array, ""]:
    """The `Status` of a request to delete `ids`; `record` as in `erase`. No capacity: None."""
    strange, gone, unseen = faults_of(record.participation, ids, num_examples)
    flag = lambda wrong, status: jnp.where(wrong, int(status), 0).astype(jnp.int32)
    status = flag(jnp.any(strange), Status.ID_OUT_OF_RANGE)
    status |= flag(jnp.any(gone | (unseen & ~strange)), Status.NOT_IN_THE_MODEL)
    if max_deletions is None:
        return status
    exhausted = record.num_deletions + count_ids(ids) > max_deletions
    return status | flag(exhausted & jnp.any(ids >= 0), Status.BUDGET_EXHAUSTED)


def erase(record: Any, ids: Int[Array, "b"]) -> Any:
    """`record` after the ids were deleted from the model at its present state.

    `record` has participation, log, checkpoints and num_deletions. The ids are noted, taken out of
    the ledger and counted, and checkpoints that knew them are emptied. -1 is nobody.
    """
    used = uses(record.log, ids)
    met = jnp.any(used, axis=1)
    first = jnp.where(jnp.any(met), jnp.argmax(met), met.shape[0])
    _, start = slot_before(record.checkpoints, first)
    return record._replace(
        participation=bury_traced(record.participation, ids),
        log=record.log._replace(step_ids=jnp.where(used, -1, record.log.step_ids)),
        checkpoints=drop_after(record.checkpoints, start),
        num_deletions=record.num_deletions + count_ids(ids),
    )


def uses(log: StepLog, ids: Int[Array, "b"]) -> Bool[Array, "steps k"]:
    """Where the ledger uses any of the ids."""
    return jnp.any(log.step_ids[..., None] == jnp.where(ids >= 0, ids, -2), axis=-1)


def slot_before(checkpoints, step) -> tuple[Array, Array]:
    """Slot and step of the last checkpoint taken before or at `step`, traced."""
    taken = checkpoints.checkpoint_steps
    usable = jnp.where((taken >= 0) & (taken <= step), taken, -1)
    slot = jnp.argmax(usable)
    return slot, usable[slot]


def has_bit(bits, ids) -> Bool[Array, "b"]:
    """Whether each id's bit is set; false for padding and strangers."""
    inside = (ids >= 0) & (ids < 32 * bits.shape[0])
    word = bits[jnp.where(inside, ids // 32, 0)]
    return inside & ((word >> (ids % 32).astype(jnp.uint32)) & 1).astype(bool)


def bury_traced(participation: Participation, ids) -> Participation:
    """`bury` inside a traced step; -1 is nobody."""

    def mark(i, bits):
        word = jnp.where(ids[i] >= 0, ids[i] // 32, bits.shape[0])
        bit = jnp.uint32(1) << (ids[i] % 32).astype(jnp.uint32)
        return bits.at[word].set(bits.at[word].get(mode="fill", fill_value=0) | bit, mode="drop")

    bits = jax.lax.fori_loop(0, ids.shape[0], mark, participation.forgotten_bits)
    return participation._replace(forgotten_bits=bits)
