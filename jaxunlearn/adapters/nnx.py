"""Flax NNX: the stock `nnx.Optimizer` with an unlearner inside, a loss, and a one-line `forget`.

Nothing wraps the model. Ids travel as a keyword: `optimizer.update(model, grads, ids=ids)`, and
`batch=batch` beside them where the method wants it. What a method offers beside `forget` is here
too: `refresh` and `describe` of `unlearners.recollect`,

    tx = unlearners.recollect(optax.sgd(0.1), adapters.nnx.loss_fn(model, loss), ...)
    print(adapters.nnx.describe(model, tx))               # bytes of the record, before training
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ...                                                   # update(model, grads, batch=, ids=)
    info = adapters.nnx.forget(model, optimizer, [17])    # an addition
    adapters.nnx.refresh(model, optimizer, data=data)     # tangents along the path without row 17

and the event stream of `unlearners.memory_pair`,

    tx = unlearners.memory_pair(adapters.nnx.loss_fn(model, loss), ...)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rows = adapters.nnx.start_stream(model, optimizer, events)
    rows, output = nnx.jit(adapters.nnx.run_stream)(model, optimizer, rows, events)
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from jaxunlearn import errors, kernels, unlearners
from jaxunlearn.adapters import _offers
from jaxunlearn.types import Batch, ForgetInfo, LossFn, Params, Quote, Unlearner, UnlearnerState


def loss_fn(
    model: nnx.Module,
    loss: Callable[..., Array],
    *,
    wrt: Any = nnx.Param,
    graph: bool | None = None,
) -> LossFn:
    """`loss(model, batch[, key])` as the `loss_fn(params, batch[, key])` that unlearners take.

    Everything of the model but `wrt` (batch statistics, other variables) is frozen at its present
    value; changes that the loss makes to it are dropped.

    Args:
      model: the module whose structure is used; not changed.
      loss: mean over the batch of per-example losses.
      wrt: the variables that train, as given to `nnx.Optimizer`.
      graph: graph mode or tree mode; None takes the present `nnx.set_graph_mode`.

    Returns:
      A function of `nnx.state(model, wrt)`.
    """
    keyed = kernels.takes_key(loss)
    graphdef, _, rest = nnx.split(model, wrt, ..., graph=graph)  # type: ignore[misc]
    rest = nnx.as_pure(rest)  # Variables of this trace could not be written to in another

    def merged(params: Params) -> nnx.Module:
        return nnx.merge(graphdef, params, rest)

    if keyed:
        return lambda params, batch, key: loss(merged(params), batch, key)
    return lambda params, batch: loss(merged(params), batch)


def params(model: nnx.Module, optimizer: nnx.Optimizer) -> Params:
    """The variables that `optimizer` trains: what `loss_fn` and the kernels take."""
    return nnx.state(model, optimizer.wrt, graph=optimizer.graph)


def check_loss(
    model: nnx.Module, loss: Callable[..., Array], batch: Batch, *, wrt: Any = nnx.Param
):
    """`kernels.check_loss` for a loss of a module; a typed error names the kind of coupling."""
    frozen = loss_fn(model, loss, wrt=wrt)
    key = jax.random.key(0) if kernels.takes_key(frozen) else None
    kernels.check_loss(frozen, nnx.state(model, wrt), batch, key=key)


def forget(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    ids: Any,
    *,
    data: Any = None,
    requester: str | None = None,
) -> ForgetInfo:
    """Delete `ids` from `model` and `optimizer`, in place; returns what happened.

    Args:
      optimizer: a stock `nnx.Optimizer` whose transform is an `Unlearner`.
      ids, data, requester: as `Unlearner.forget`.

    Raises:
      Whatever `Unlearner.forget` raises; model and optimizer are then unchanged.
    """
    arrays, state = _opened(model, optimizer)
    result = _unlearner(optimizer).forget(arrays, state, ids, data=data, requester=requester)
    _write(model, optimizer, result.params, result.opt_state)
    return result.info


def quote(model: nnx.Module, optimizer: nnx.Optimizer, ids: Any) -> Quote:
    """What `forget` would cost; see `Unlearner.quote`."""
    return _unlearner(optimizer).quote(*_opened(model, optimizer), ids)


def refresh(model: nnx.Module, optimizer: nnx.Optimizer, *, data: Any) -> None:
    """Train again without what was forgotten, in place: model, optimizer state, new tangents.

    See `unlearners.recollect`; after it, later deletions rest on the path without the rows. The
    step counter stays, since the schedule is public.

    Raises:
      WrongStateError: the unlearner has no `refresh`.
      Whatever `refresh` raises; model and optimizer are then unchanged.
    """
    again = _offers.offered(_unlearner(optimizer), "refresh")
    _write(model, optimizer, *again(*_opened(model, optimizer), data=data))


def describe(
    model: nnx.Module, tx: Unlearner | nnx.Optimizer, *, wrt: Any = nnx.Param
) -> dict[str, int]:
    """Bytes of the deletion record by part, from shapes alone: ask before training starts.

    Args:
      tx: the unlearner, before anything is allocated; or an optimizer made with it, whose own
        `wrt` then holds.
      wrt: the variables that will train.

    Raises:
      WrongStateError: the unlearner has no `describe`.
    """
    if isinstance(tx, nnx.Optimizer):
        wrt, tx = tx.wrt, tx.tx
    return _offers.offered(tx, "describe")(nnx.as_pure(nnx.state(model, wrt)))


def start_stream(model: nnx.Module, optimizer: nnx.Optimizer, events: unlearners.Event) -> PyTree:
    """The rows that a stream of events will hold, none of them yet.

    Args:
      optimizer: with `unlearners.memory_pair` inside, and no step taken.
      events: with a leading axis of time; only shapes and dtypes matter.

    Returns:
      Zeros (max_steps, b, ...), to be handed to `run_stream`.

    Raises:
      WrongStateError: the unlearner has no stream, or training has begun.
    """
    return _offers.fresh_rows(_unlearner(optimizer), *_opened(model, optimizer), events)


def run_stream(
    model: nnx.Module, optimizer: nnx.Optimizer, rows: PyTree, events: unlearners.Event
) -> tuple[PyTree, unlearners.StreamOutput]:
    """Inserts, deletions and predictions, one after another, in place; pure inside, for `nnx.jit`.

    Args:
      rows: of `start_stream`, or of the last call. They hold what was inserted, zeros where it was
        deleted by an event; a deletion by `forget` leaves its row in them.
      events: `unlearners.Event` with a leading axis of time.

    Returns:
      The rows for the next call, and what each event did, `unlearners.StreamOutput`. The step
      counter advances by the inserts that were made.

    Raises:
      WrongStateError: the unlearner has no stream.
    """
    tx = _unlearner(optimizer)
    state, output, inserted = _offers.run_stream(tx, *_opened(model, optimizer), rows, events)
    _write(model, optimizer, state.stream_params, state.stream_opt_state)
    optimizer.step[...] += inserted.astype(optimizer.step.dtype)
    return state.stream_rows, output


def released(optimizer: nnx.Optimizer) -> optax.OptState:
    """The optimizer state that may leave the house, without the deletion record."""
    return nnx.as_pure(optimizer.opt_state).inner


def _opened(model: nnx.Module, optimizer: nnx.Optimizer) -> tuple[Params, UnlearnerState]:
    """Parameters and optimizer state as plain arrays, the way `nnx.Optimizer.update` sees them."""
    return nnx.as_pure(params(model, optimizer)), nnx.as_pure(optimizer.opt_state)


def _write(model: nnx.Module, optimizer: nnx.Optimizer, new_params: Params, opt_state) -> None:
    """Both, in place, the way `nnx.Optimizer.update` does it."""
    nnx.update(model, new_params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state, graph=optimizer.graph))


def _unlearner(optimizer: nnx.Optimizer) -> Unlearner:
    if isinstance(optimizer, nnx.Optimizer) and isinstance(optimizer.tx, Unlearner):
        return optimizer.tx
    inside = type(getattr(optimizer, "tx", optimizer)).__name__
    raise errors.WrongStateError(
        f"Expected an nnx.Optimizer made with an Unlearner, got one with {inside}. Write "
        "nnx.Optimizer(model, unlearners.replay(tx, loss_fn, ...), wrt=nnx.Param)."
    )
