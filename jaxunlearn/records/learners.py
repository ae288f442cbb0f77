"""What every `ExactLearner` needs: who was fitted, the checks of a request, rows in blocks."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jaxunlearn import errors, tree
from jaxunlearn.records.ids import show_ids, validate_ids
from jaxunlearn.records.participation import (
    Participation,
    bury,
    check_num_examples,
    forgotten_ids,
    init_participation,
    seen_ids,
)
from jaxunlearn.records.rows import RowReader
from jaxunlearn.records.states import check_state
from jaxunlearn.types import Batch, Params, Request


class Fitted(NamedTuple):
    """The part of a record that every `ExactLearner` keeps.

    fitted_digest: SHA-256 of the parameters last returned.
    """

    participation: Participation
    fitted_digest: UInt8[Array, "32"]


def fit_ids(ids: Any, num_examples: int) -> np.ndarray:
    """The ids to fit on, sorted; all of them for None.

    Raises:
      IdError: no such id, or the same one twice: a row is summed once.
      RetainSetEmptyError: none.
    """
    check_num_examples(num_examples)
    if ids is None:
        return np.arange(num_examples, dtype=np.int32)
    ids, num_duplicates = validate_ids(ids, num_examples)
    if num_duplicates:
        raise errors.IdError(f"Expected each id once in fit, got {num_duplicates} repeats.")
    if not ids.size:
        raise errors.RetainSetEmptyError("Expected at least one id to fit on.")
    return ids


def mark_fitted(num_examples: int, ids: np.ndarray, params: Params) -> Fitted:
    """The record of a fresh fit on `ids`."""
    nobody = init_participation(num_examples)
    once = jnp.ones((), jnp.int32)
    participation = nobody._replace(
        seen_bits=bury(nobody, ids).forgotten_bits, num_steps=once, num_steps_with_ids=once
    )
    return Fitted(participation, _digest(params))


def mark_forgotten(fitted: Fitted, ids: np.ndarray, params: Params) -> Fitted:
    """The record after `ids` were forgotten and `params` returned."""
    return Fitted(bury(fitted.participation, ids), _digest(params))


def check_learner_request(
    params: Params,
    state: Any,
    ids: Any,
    requester: str | None,
    *,
    record_type: type,
    method: str,
    num_examples: int,
) -> Request:
    """A request that this state can serve; host work.

    Raises:
      WrongStateError: the state is another method's, or `params` are not what it returned.
      IdError: with its subclasses, naming the ids.
    """
    begun = time.perf_counter()
    check_state(state, record_type, method)
    ids, num_duplicates = validate_ids(ids, num_examples)
    fitted = state.record.fitted
    if tree.digest_bytes(params) != np.asarray(fitted.fitted_digest).tobytes():
        raise errors.WrongStateError(
            f"Expected the parameters that {method} returned together with this state, got others. "
            "Keep the pair together, unchanged."
        )
    again = ids[_among(ids, forgotten_ids(fitted.participation))]
    if again.size:
        raise errors.AlreadyForgottenError(
            f"Expected ids that are still in the model, got {show_ids(again)}, already forgotten. "
            "An id is never used again; a new row needs a new id."
        )
    strangers = ids[~_among(ids, seen_ids(fitted.participation))]
    if strangers.size:
        raise errors.NeverSeenError(
            f"Expected ids that fit has seen, got {show_ids(strangers)}. There is nothing of them "
            "to forget."
        )
    return Request(ids, num_duplicates, begun, requester)


def retained_ids(fitted: Fitted, ids: np.ndarray) -> np.ndarray:
    """Ids still in the model without `ids`, which are in it.

    Raises:
      RetainSetEmptyError: none is left.
    """
    seen = seen_ids(fitted.participation)
    retained = np.delete(seen, np.searchsorted(seen, ids))
    if not retained.size:
        raise errors.RetainSetEmptyError(
            "Expected at least one row to be retained: there is nothing left to fit. Start afresh."
        )
    return retained


def check_unchanged(before: np.ndarray, found: np.ndarray, ids: np.ndarray) -> None:
    """Refuse rows whose fingerprints are not those of the rows that were fitted.

    Raises:
      MissingDataError: naming the ids.
    """
    changed = ids[before != found]
    if changed.size:
        raise errors.MissingDataError(
            f"Expected the rows that fit read, got other values for {show_ids(changed)}. "
            "A deletion needs the row as it was trained on."
        )


def read_blocks(
    reader: RowReader, ids: np.ndarray, size: int = 4096
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(ids, rows) of at most `size` ids at a time."""
    for start in range(0, len(ids), size):
        block = np.asarray(ids[start : start + size], np.int32)
        yield block, reader(block)


def _among(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of the sorted `ids` are in the sorted `known`."""
    places = np.minimum(np.searchsorted(known, ids), max(0, len(known) - 1))
    return known[places] == ids if len(known) else np.zeros(len(ids), bool)


def _digest(params: Params) -> UInt8[Array, "32"]:
    return jnp.asarray(np.frombuffer(tree.digest_bytes(params), np.uint8))
