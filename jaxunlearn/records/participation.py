"""Who took part: a seen and a forgotten bit for each example, step counters, a sticky status."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxunlearn import errors
from jaxunlearn.records.ids import show_ids
from jaxunlearn.records.options import check_integers
from jaxunlearn.types import Status


class Participation(NamedTuple):
    """The part of a deletion record that every method keeps.

    seen_bits, forgotten_bits: bit i % 32 of word i // 32 belongs to example i.
    num_steps: calls of `update` so far.
    num_steps_with_ids: those that got ids.
    status: sticky `Status` flags of what went wrong inside traced updates.
    """

    seen_bits: UInt32[Array, "words"]
    forgotten_bits: UInt32[Array, "words"]
    num_steps: Int[Array, ""]
    num_steps_with_ids: Int[Array, ""]
    status: Int[Array, ""]


def check_num_examples(num_examples: int) -> None:
    """Refuse a count that int32 ids cannot index."""
    check_integers(num_examples=num_examples)
    if num_examples > np.iinfo(np.int32).max:
        raise ValueError(f"Expected num_examples={num_examples} < 2**31: ids are int32.")


def init_participation(num_examples: int) -> Participation:
    """Nobody has been seen."""
    check_num_examples(num_examples)
    words = -(-num_examples // 32)
    return Participation(
        seen_bits=jnp.zeros((words,), jnp.uint32),
        forgotten_bits=jnp.zeros((words,), jnp.uint32),
        num_steps=jnp.zeros((), jnp.int32),
        num_steps_with_ids=jnp.zeros((), jnp.int32),
        status=jnp.zeros((), jnp.int32),
    )


def observe(
    participation: Participation, ids: Int[Array, "b"] | None, num_examples: int
) -> Participation:
    """The record after one call of `update`: O(b log b) work, whatever the number of examples.

    Never raises for a value: a bad id sets the sticky status and is not recorded.
    """
    seen, forgotten = participation.seen_bits, participation.forgotten_bits
    status, steps = participation.status, participation.num_steps
    with_ids = participation.num_steps_with_ids
    if ids is None:
        status |= jnp.where(with_ids > 0, int(Status.IDS_MISSING), 0).astype(jnp.int32)
    else:
        status |= jnp.where(with_ids < steps, int(Status.IDS_MISSING), 0).astype(jnp.int32)
        ids = _narrowed(ids)
        strange = jnp.any((ids < -1) | (ids >= num_examples))
        status |= jnp.where(strange, int(Status.ID_OUT_OF_RANGE), 0).astype(jnp.int32)
        word, bit = _bits(ids, num_examples)
        buried = jnp.any(forgotten.at[word].get(mode="fill", fill_value=0) & bit)
        status |= jnp.where(buried, int(Status.FORGOTTEN_ID_USED), 0).astype(jnp.int32)
        new = bit & ~seen.at[word].get(mode="fill", fill_value=0)
        seen = seen.at[word].add(new, mode="drop")
        with_ids = with_ids + 1
    return Participation(seen, forgotten, steps + 1, with_ids, status)


def _narrowed(ids: Int[Array, "b"]) -> Int[Array, "b"]:
    """Ids as int32; one that does not fit becomes -2, which is neither an example nor padding."""
    narrow = ids.astype(jnp.int32)
    return jnp.where((narrow.astype(ids.dtype) == ids) & ((narrow < 0) == (ids < 0)), narrow, -2)


def _bits(ids: Int[Array, "b"], num_examples: int):
    """Word and bit of each id, zero bits for padding, strangers and repeats (so that add is or)."""
    order = jnp.sort(ids)
    repeated = jnp.concatenate([jnp.zeros((1,), bool), order[1:] == order[:-1]])
    real = (order >= 0) & (order < num_examples) & ~repeated
    word = jnp.where(real, order // 32, jnp.iinfo(jnp.int32).max)
    bit = jnp.where(real, jnp.uint32(1) << (order % 32).astype(jnp.uint32), jnp.uint32(0))
    return word, bit


def seen_ids(participation: Participation) -> np.ndarray:
    """Ids passed to `update` in this run and not forgotten since, sorted, on the host."""
    seen, forgotten = jax.device_get((participation.seen_bits, participation.forgotten_bits))
    return _unpack(np.asarray(seen) & ~np.asarray(forgotten))


def forgotten_ids(participation: Participation) -> np.ndarray:
    """Ids forgotten so far, sorted, on the host."""
    return _unpack(np.asarray(jax.device_get(participation.forgotten_bits)))


def bury(participation: Participation, ids: np.ndarray) -> Participation:
    """The record with the forgotten bit of `ids` set; host work."""
    bits = np.array(jax.device_get(participation.forgotten_bits))
    np.bitwise_or.at(bits, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return participation._replace(forgotten_bits=jnp.asarray(bits))


def check_participation(
    participation: Participation,
    ids: np.ndarray,
    examples_of: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Refuse a record that training spoilt, ids never seen, and ids already forgotten.

    examples_of: where ids are of units of several examples, (1,) unit ids -> its examples. Such an
      id is seen if one of them was, and forgotten if one of them is.

    Raises:
      TrainingRecordError: the sticky status is set; the message tells what happened.
      AlreadyForgottenError, NeverSeenError: naming the ids.
    """
    check_status(participation)
    if ids.size == 0:
        return
    seen, forgotten = jax.device_get((participation.seen_bits, participation.forgotten_bits))

    def have(bits):
        if examples_of is None:
            return _has(bits, ids)
        return np.array([_has(bits, examples_of(one)).any() for one in ids[:, None]])

    again = ids[have(forgotten)]
    if again.size:
        raise errors.AlreadyForgottenError(
            f"Expected ids that are still in the model, got {show_ids(again)}, already forgotten. "
            "An id is never used again; a new row needs a new id."
        )
    strangers = ids[~have(seen)]
    if strangers.size:
        never = int(participation.num_steps_with_ids) == 0
        hint = (
            "update never received ids: pass ids= on every step."
            if never
            else "There is nothing of them to forget in this run."
        )
        raise errors.NeverSeenError(
            f"Expected ids that update has seen, got {show_ids(strangers)}. {hint}"
        )


def check_status(participation: Participation) -> None:
    """Raise `TrainingRecordError` with its story when the sticky status is set."""
    status = Status(int(participation.status))
    if status:
        raise errors.TrainingRecordError(
            f"This run cannot be deleted from: {status.story} (status {status!r}). "
            "Nothing was changed. Retrain without the rows, and keep the record whole."
        )


def _has(bits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return (np.asarray(bits)[ids // 32] >> (ids % 32).astype(np.uint32)) & 1 == 1


def _unpack(bits: np.ndarray) -> np.ndarray:
    flags = np.unpackbits(bits.astype("<u4").view(np.uint8), bitorder="little")
    return np.flatnonzero(flags).astype(np.int32)
