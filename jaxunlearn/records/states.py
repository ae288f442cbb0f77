"""What `forget` accepts as a state, and the refusal of everything else by name."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxunlearn import errors
from jaxunlearn.types import UnlearnerState

_OUTER = {
    "MultiStepsState": "optax.MultiSteps",
    "MaskedState": "optax.masked",
    "PartitionState": "optax.partition",
    "InjectHyperparamsState": "optax.inject_hyperparams",
    "InjectStatefulHyperparamsState": "optax.inject_hyperparams",
    "ApplyIfFiniteState": "optax.apply_if_finite",
    "tuple": "optax.chain",
    "dict": "optax.named_chain",
    "OrderedDict": "optax.named_chain",
}
_HOLDERS = {
    "TrainState": "adapters.linen.forget(state, ids, data=data)",
    "Optimizer": "adapters.nnx.forget(model, optimizer, ids, data=data)",
    "ModelAndOptimizer": "adapters.nnx.forget(model, optimizer, ids, data=data)",
}


def check_state(opt_state: Any, record_type: type, method: str) -> None:
    """Accept an `UnlearnerState` whose record is a `record_type`; name anything else.

    Raises:
      WrongNestingError: the unlearner stands inside another transform; the message has the nesting
        that works.
      WrongStateError: a holder (with the adapter that opens it), a bare optimizer state, or the
        state of another method.
    """
    if isinstance(opt_state, UnlearnerState):
        if isinstance(opt_state.record, record_type):
            return
        raise errors.WrongStateError(
            f"Expected the state of unlearners.{method}, got one whose record is "
            f"{type(opt_state.record).__name__}. Call forget of the unlearner that trained it."
        )
    holder = _holder(opt_state)
    if holder:
        raise errors.WrongStateError(
            f"Expected an UnlearnerState, got a {type(opt_state).__name__} that holds one. "
            f"Use jaxunlearn.{holder}."
        )
    if not _holds_unlearner_state(opt_state):
        raise errors.WrongStateError(
            f"Expected the UnlearnerState that tx.init or tx.update returned, got "
            f"{type(opt_state).__name__}."
        )
    outer = _OUTER.get(type(opt_state).__name__, type(opt_state).__name__)
    raise errors.WrongNestingError(
        f"Expected unlearners.{method} outermost, got it inside {outer}, where it cannot see what "
        f"the rest of the optimizer does. Write {method}({outer}(...), loss_fn, ...) instead of "
        f"{outer}(..., {method}(...))."
    )


def check_update(opt_state: Any, params: PyTree, ids: Any, record_type: type, method: str) -> None:
    """Refuse, at trace time, what the types of `update`'s arguments already show.

    Raises:
      WrongStateError, ValueError (params missing, ids not along one axis), IdTypeError.
    """
    check_state(opt_state, record_type, method)
    if params is None:
        raise ValueError("Expected params: call update(updates, opt_state, params, ids=ids).")
    if ids is None:
        return
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise errors.IdTypeError(f"Expected integer ids in update, got {jnp.result_type(ids)}.")
    if jnp.ndim(ids) != 1:
        raise ValueError(f"Expected ids of shape (b,), got {jnp.shape(ids)}.")


def check_params(params: PyTree, like: PyTree, method: str) -> None:
    """Refuse parameters whose structure, shapes or dtypes are not those of the run."""
    shapes = lambda x: [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(x)]
    same_structure: bool = jax.tree.structure(like) == jax.tree.structure(params)  # type: ignore[operator]
    if not same_structure or shapes(like) != shapes(params):
        raise errors.WrongStateError(
            f"Expected the parameters that {method} trained, with structure and shapes "
            f"{_brief(like)}, got {_brief(params)}."
        )


def _brief(tree: PyTree) -> str:
    text = str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))
    return text if len(text) <= 300 else text[:300] + " ..."


def _holder(value: Any) -> str | None:
    for base in type(value).__mro__:
        if base.__module__.split(".")[0] in ("flax", "jaxunlearn") and base.__name__ in _HOLDERS:
            return _HOLDERS[base.__name__]
    return None


def _holds_unlearner_state(value: Any) -> bool:
    is_state = lambda node: isinstance(node, UnlearnerState)
    leaves = jax.tree.leaves(value, is_leaf=is_state)
    return any(map(is_state, leaves))
