"""Flax Linen: a `TrainState` that passes extra arguments, a loss, and a one-line `forget`.

The stock `TrainState.apply_gradients` takes its keywords for dataclass fields, so ids cannot reach
the optimizer through it; the subclass here is that one change. What a method offers beside `forget`
is here too: `refresh` and `describe` of `unlearners.recollect`,

    tx = unlearners.recollect(optax.sgd(0.1), adapters.linen.loss_fn(module, loss), ...)
    print(tx.describe(params))                               # bytes of the record, before training
    state = adapters.linen.TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    ...                                                      # apply_gradients(grads=, batch=, ids=)
    state, info = adapters.linen.forget(state, [17])         # an addition
    state = adapters.linen.refresh(state, data=data)         # tangents without row 17

and the event stream of `unlearners.memory_pair`,

    tx = unlearners.memory_pair(adapters.linen.loss_fn(module, loss), ...)
    state = adapters.linen.TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    rows = adapters.linen.start_stream(state, events)
    state, rows, output = jax.jit(adapters.linen.run_stream)(state, rows, events)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import linen
from flax.training import train_state
from jaxtyping import Array, PyTree

from jaxunlearn import errors, kernels, unlearners
from jaxunlearn.adapters import _offers
from jaxunlearn.types import ForgetInfo, LossFn, Quote, Unlearner


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` passes extra arguments on."""

    def apply_gradients(self, *, grads, **kwargs) -> "TrainState":
        """As in Flax; keywords that are fields are replaced, all others go to `tx.update`.

        state = state.apply_gradients(grads=grads, ids=ids)
        """
        names = {field.name for field in dataclasses.fields(self)}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        fields = {name: value for name, value in kwargs.items() if name in names}
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra)
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **fields,
        )


def loss_fn(
    module: linen.Module,
    loss: Callable[..., Array],
    *,
    variables: dict[str, Any] | None = None,
    rng: str = "dropout",
    **apply_kwargs: Any,
) -> LossFn:
    """A `loss_fn(params, batch[, key])` from a Linen module.

    Args:
      module: applied as `module.apply({"params": params, **variables}, inputs, **apply_kwargs)`.
      loss: `loss(apply, batch)`, where `apply(inputs)` runs the module; or `loss(apply, batch,
        key)`, and then `apply(inputs)` uses the key for `rng`. The mean over the batch.
      variables: other collections (batch statistics), frozen; what the module writes is dropped.
      rng: the collection that the key feeds.
    """
    frozen = dict(variables or {})

    def bound(params, rngs=None):
        collections = {"params": params, **frozen}
        options = {"rngs": rngs, "mutable": list(frozen) or False, **apply_kwargs}

        def apply(*inputs):
            result = module.apply(collections, *inputs, **options)
            written = frozen and "mutable" not in apply_kwargs
            return result[0] if written else result

        return apply

    if kernels.takes_key(loss):
        return lambda params, batch, key: loss(bound(params, {rng: key}), batch, key)
    return lambda params, batch: loss(bound(params), batch)


def forget(
    state: train_state.TrainState, ids: Any, *, data: Any = None, requester: str | None = None
) -> tuple[train_state.TrainState, ForgetInfo]:
    """`state` without `ids`, and what happened; the step counter and other fields stay.

    Raises:
      Whatever `Unlearner.forget` raises.
    """
    result = _unlearner(state).forget(
        state.params, state.opt_state, ids, data=data, requester=requester
    )
    return state.replace(params=result.params, opt_state=result.opt_state), result.info


def quote(state: train_state.TrainState, ids: Any) -> Quote:
    """What `forget` would cost; see `Unlearner.quote`."""
    return _unlearner(state).quote(state.params, state.opt_state, ids)


def refresh(state: train_state.TrainState, *, data: Any) -> train_state.TrainState:
    """`state` trained again without what was forgotten, with new tangents; other fields stay.

    See `unlearners.recollect`; after it, later deletions rest on the path without the rows.

    Raises:
      WrongStateError: the unlearner has no `refresh`.
      Whatever `refresh` raises.
    """
    again = _offers.offered(_unlearner(state), "refresh")
    params, opt_state = again(state.params, state.opt_state, data=data)
    return state.replace(params=params, opt_state=opt_state)


def describe(state: train_state.TrainState) -> dict[str, int]:
    """Bytes of the deletion record by part; before there is a state, `tx.describe(params)`.

    Raises:
      WrongStateError: the unlearner has no `describe`.
    """
    return _offers.offered(_unlearner(state), "describe")(state.params)


def start_stream(state: train_state.TrainState, events: unlearners.Event) -> PyTree:
    """The rows that a stream of events will hold, none of them yet.

    Args:
      state: with `unlearners.memory_pair` as its optimizer, and no step taken.
      events: with a leading axis of time; only shapes and dtypes matter.

    Returns:
      Zeros (max_steps, b, ...), to be handed to `run_stream`.

    Raises:
      WrongStateError: the unlearner has no stream, or training has begun.
    """
    return _offers.fresh_rows(_unlearner(state), state.params, state.opt_state, events)


def run_stream(
    state: train_state.TrainState, rows: PyTree, events: unlearners.Event
) -> tuple[train_state.TrainState, PyTree, unlearners.StreamOutput]:
    """Inserts, deletions and predictions, one after another; pure, for `jax.jit`.

    Args:
      rows: of `start_stream`, or of the last call. They hold what was inserted, zeros where it was
        deleted by an event; a deletion by `forget` leaves its row in them.
      events: `unlearners.Event` with a leading axis of time.

    Returns:
      The state, the rows for the next call, and what each event did, `unlearners.StreamOutput`. The
      step counter advances by the inserts that were made.

    Raises:
      WrongStateError: the unlearner has no stream.
    """
    tx = _unlearner(state)
    new, output, inserted = _offers.run_stream(tx, state.params, state.opt_state, rows, events)
    state = state.replace(
        step=state.step + inserted, params=new.stream_params, opt_state=new.stream_opt_state
    )
    return state, new.stream_rows, output


def released(state: train_state.TrainState) -> optax.OptState:
    """The optimizer state that may leave the house, without the deletion record."""
    return state.opt_state.inner


def _unlearner(state: train_state.TrainState) -> Unlearner:
    if isinstance(getattr(state, "tx", None), Unlearner):
        return state.tx
    inside = type(getattr(state, "tx", state)).__name__
    raise errors.WrongStateError(
        f"Expected a TrainState made with an Unlearner, got one with {inside}. Write "
        "TrainState.create(apply_fn=..., params=..., tx=unlearners.replay(tx, loss_fn, ...))."
    )
