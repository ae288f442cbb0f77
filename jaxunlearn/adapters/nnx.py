"""Flax NNX: the stock `nnx.Optimizer` with an unlearner inside, a loss, and a one-line `forget`.

Nothing wraps the model. Ids travel as a keyword: `optimizer.update(model, grads, ids=ids)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array

from jaxunlearn import errors, kernels
from jaxunlearn.types import Batch, ForgetInfo, LossFn, Params, Quote, Unlearner


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
    nnx.update(model, result.params)
    nnx.update(optimizer.opt_state, nnx.state(result.opt_state, graph=optimizer.graph))
    return result.info


def quote(model: nnx.Module, optimizer: nnx.Optimizer, ids: Any) -> Quote:
    """What `forget` would cost; see `Unlearner.quote`."""
    return _unlearner(optimizer).quote(*_opened(model, optimizer), ids)


def released(optimizer: nnx.Optimizer) -> optax.OptState:
    """The optimizer state that may leave the house, without the deletion record."""
    return nnx.as_pure(optimizer.opt_state).inner


def _opened(model: nnx.Module, optimizer: nnx.Optimizer):
    """Parameters and optimizer state as plain arrays, the way `nnx.Optimizer.update` sees them."""
    return nnx.as_pure(params(model, optimizer)), nnx.as_pure(optimizer.opt_state)


def _unlearner(optimizer: nnx.Optimizer) -> Unlearner:
    if isinstance(optimizer, nnx.Optimizer) and isinstance(optimizer.tx, Unlearner):
        return optimizer.tx
    inside = type(getattr(optimizer, "tx", optimizer)).__name__
    raise errors.WrongStateError(
        f"Expected an nnx.Optimizer made with an Unlearner, got one with {inside}. Write "
        "nnx.Optimizer(model, unlearners.replay(tx, loss_fn, ...), wrt=nnx.Param)."
    )
