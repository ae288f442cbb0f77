"""The step log: which rows each step used, by what it was divided, under which key and settings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree, UInt32

AnyArray = Array | np.ndarray
"""A log lives on a device in training and on the host in a replay."""


class StepLog(NamedTuple):
    """One row a step, for `max_steps` steps; a forgotten id is overwritten with -1.

    step_ids: ids of the rows, -1 for padding.
    step_num_rows: how many rows the step was scheduled with; -1 where no step was taken.
    step_keys: words of the step's key; one column of zeros for a loss without a key, since Orbax
      does not save a leaf of size zero.
    step_settings: hyperparameters that were set from outside (`inject_hyperparams`), by path.
    step_non_finite: whether the incoming update was not finite.
    """

    step_ids: Int[AnyArray, "steps batch"]
    step_num_rows: Int[AnyArray, "steps"]
    step_keys: UInt32[AnyArray, "steps words"]
    step_settings: PyTree
    step_non_finite: Bool[AnyArray, "steps"]


def init_log(max_steps: int, batch_size: int, *, has_key: bool, inner: optax.OptState) -> StepLog:
    """An empty log. `inner` is the wrapped optimizer's state, read for its settings only."""
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape[-1]
    stack = lambda leaf: jnp.zeros((max_steps, *jnp.shape(leaf)), jnp.result_type(leaf))
    return StepLog(
        step_ids=jnp.full((max_steps, batch_size), -1, jnp.int32),
        step_num_rows=jnp.full((max_steps,), -1, jnp.int32),
        step_keys=jnp.zeros((max_steps, words if has_key else 1), jnp.uint32),
        step_settings=jax.tree.map(stack, get_settings(inner)),
        step_non_finite=jnp.zeros((max_steps,), bool),
    )


def write_step(log: StepLog, step, *, ids, key, settings, non_finite) -> StepLog:
    """The log with one more row; a step beyond its end is dropped. In place under donation."""
    width = log.step_ids.shape[1]
    ids = jnp.full((width,), -1, jnp.int32) if ids is None else ids.astype(jnp.int32)
    padded = jnp.concatenate([ids, jnp.full((width - ids.shape[0],), -1, jnp.int32)])
    put = lambda leaf, value: leaf.at[step].set(value, mode="drop")
    if key is not None and log.step_keys.shape[1] > 1:
        log = log._replace(step_keys=put(log.step_keys, jax.random.key_data(key)))
    return StepLog(
        step_ids=put(log.step_ids, padded),
        step_num_rows=put(log.step_num_rows, jnp.sum(padded >= 0, dtype=jnp.int32)),
        step_keys=log.step_keys,
        step_settings=jax.tree.map(put, log.step_settings, settings),
        step_non_finite=put(log.step_non_finite, non_finite),
    )


def check_logged_step(ids: Any, key: Any, batch_size: int, keyed: bool) -> None:
    """Refuse, at trace time, a step that the log could not hold or a replay could not repeat."""
    if ids is None:
        return
    if jnp.shape(ids)[0] > batch_size:
        raise ValueError(f"Expected at most batch_size={batch_size} ids, got {jnp.shape(ids)[0]}.")
    if not keyed:
        return
    if key is None:
        raise ValueError("Expected key=step_key in update: the loss takes one, and so does replay.")
    own, default = (jax.random.key_impl(one) for one in (key, jax.random.key(0)))
    if own != default:
        raise ValueError(
            f"Expected a key of the default implementation {default}, got {own}: the log keeps its "
            "words only."
        )


def get_settings(inner: optax.OptState) -> dict[str, Any]:
    """The `hyperparams` of every `inject_hyperparams` state inside `inner`, by path."""
    found = {}

    def visit(path, node):
        if _is_injected(node):
            found[jax.tree_util.keystr(path)] = node.hyperparams
        return node

    _walk(visit, inner)
    return found


def set_settings(inner: optax.OptState, settings: dict[str, Any]) -> optax.OptState:
    """`inner` with those hyperparameters put back, as the run had them at some step."""
    if not settings:
        return inner

    def visit(path, node):
        name = jax.tree_util.keystr(path)
        return node._replace(hyperparams=settings[name]) if name in settings else node

    return _walk(visit, inner)


def _is_injected(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    return "hyperparams" in fields and isinstance(node.hyperparams, dict)


def _walk(visit, tree, prefix=()):
    """Rebuild `tree`, passing each `inject_hyperparams` state (nested ones too) through `visit`."""

    def descend(path, node):
        if not _is_injected(node):
            return node
        path = prefix + tuple(path)
        node = node._replace(
            inner_state=_walk(
                visit, node.inner_state, (*path, jax.tree_util.GetAttrKey("inner_state"))
            )
        )
        return visit(path, node)

    return jax.tree_util.tree_map_with_path(descend, tree, is_leaf=_is_injected)
