"""Flax Linen: a `TrainState` that passes extra arguments, a loss, and a one-line `forget`.

The stock `TrainState.apply_gradients` takes its keywords for dataclass fields, so ids cannot reach
the optimizer through it; the subclass here is that one change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import linen
from flax.training import train_state
from jaxtyping import Array

from jaxunlearn import errors, kernels
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
