"""What some unlearners offer beside `forget`, on plain arrays: for both kinds of Flax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxunlearn import errors, unlearners
from jaxunlearn.types import Params, Unlearner, UnlearnerState

_OFFERED_BY = {"refresh": "recollect", "describe": "recollect", "stream": "memory_pair"}


def offered(tx: optax.GradientTransformation, name: str) -> Any:
    """The attribute of an unlearner that has it.

    Raises:
      WrongStateError: it has none; the message names the method that does.
    """
    if isinstance(tx, Unlearner) and hasattr(tx, name):
        return getattr(tx, name)
    raise errors.WrongStateError(
        f"Expected an unlearner that offers {name}, as unlearners.{_OFFERED_BY[name]}(...) does; "
        f"this {type(tx).__name__} does not."
    )


def fresh_rows(tx: Unlearner, params: Params, opt_state: UnlearnerState, events: unlearners.Event):
    """Zeros for the rows of every insert that a run may have.

    Raises:
      WrongStateError: the run has begun, and the rows of its first steps are not at hand.
    """
    stream: unlearners.Stream = offered(tx, "stream")
    if int(opt_state.record.participation.num_steps):
        raise errors.WrongStateError(
            "Expected an optimizer that has taken no step: a stream keeps the rows of every "
            "insert, from the first on. Make a new one, or go on with update and forget."
        )
    shape = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf))
    state = jax.eval_shape(stream.init, params, jax.tree.map(shape, events))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.stream_rows)


def run_stream(
    tx: Unlearner, params: Params, opt_state: UnlearnerState, rows: PyTree, events: unlearners.Event
) -> tuple[unlearners.StreamState, unlearners.StreamOutput, Int[Array, ""]]:
    """The state after the events, what they did, and how many were inserts that were made."""
    stream: unlearners.Stream = offered(tx, "stream")
    state, output = stream.run(unlearners.StreamState(params, opt_state, rows), events)
    inserts = jnp.asarray(events.event_kind) == unlearners.EventKind.INSERT
    made = inserts & (output.outcome == unlearners.Outcome.DONE)
    return state, output, jnp.sum(made, dtype=jnp.int32)
