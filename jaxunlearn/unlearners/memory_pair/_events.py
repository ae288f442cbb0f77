"""A stream of insert, delete and predict events: what goes in, what comes out, and who takes it."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree

from jaxunlearn.types import Batch, Params, Unlearner, UnlearnerState


class EventKind(enum.IntEnum):
    """What an event asks for."""

    INSERT = 0
    DELETE = 1
    PREDICT = 2
    NOTHING = 3


class Outcome(enum.IntEnum):
    """What became of an event."""

    DONE = 0
    NOTHING_LEFT = 1
    """A deletion whose influence on parameters and pairs had decayed below rounding.

    Noted, and taken out of the counters and the sum of squares; else the model is left alone.
    """
    REFUSED = 2
    """An id out of range, forgotten already, or (in a deletion) never inserted. Unchanged."""
    EXHAUSTED = 3
    """The odometer has no deletion left, or the step exceeds its sensitivity. Unchanged."""
    FULL = 4
    """The ledger has no room for another insert. Unchanged."""
    UNTRUSTED = 5
    """First order predicts a move too large to be believed. Unchanged."""


class Event(NamedTuple):
    """One event; a stream of T has a leading axis T on every leaf.

    event_kind: int32, an `EventKind`.
    event_ids: int32 (b,), padded with -1. A deletion removes all of them together.
    event_rows: leaves (b, ...): what is inserted or predicted. A deletion does not look at them.
    """

    event_kind: Int[Array, ""]
    event_ids: Int[Array, "b"]
    event_rows: Batch


class StreamState(NamedTuple):
    """Parameters, the unlearner's state, and the rows of every insert, zeros where deleted."""

    stream_params: Params
    stream_opt_state: UnlearnerState
    stream_rows: PyTree


class StreamOutput(NamedTuple):
    """What an event did.

    outcome: an `Outcome`.
    loss: mean loss over the event's rows before it (inserts and predictions; else 0).
    num_replayed: steps of the ledger that a deletion ran again.
    step_norm: norm of a deletion's step where it takes one, without noise.
    noise_stddev: of the noise added.
    influence: relative distance of the first-order counterfactual, where it was worked out.
    """

    outcome: Int[Array, ""]
    loss: Float[Array, ""]
    num_replayed: Int[Array, ""]
    step_norm: Float[Array, ""]
    noise_stddev: Float[Array, ""]
    influence: Float[Array, ""]


class Stream(NamedTuple):
    """init(params, event) -> StreamState; step(state, event) -> (state, StreamOutput)."""

    init: Callable[[Params, Event], StreamState]
    step: Callable[[StreamState, Event], tuple[StreamState, StreamOutput]]

    def run(self, state: StreamState, events: Event) -> tuple[StreamState, StreamOutput]:
        """`lax.scan` of `step` over events with a leading axis of time."""
        return jax.lax.scan(self.step, state, events)


class StreamUnlearner(Unlearner):
    """An `Unlearner` that also takes a stream of events, through its attribute `stream`."""

    _names = (*Unlearner._names, "stream")
    stream: Stream
