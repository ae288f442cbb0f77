"""`forget_step` along the log: the steps at which a record stands, run and counted, pure."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxunlearn import tree
from jaxunlearn.records.checkpoints import drop_after
from jaxunlearn.records.replay import Segment
from jaxunlearn.types import Batch, Params, Status, UnlearnerState


class Window(NamedTuple):
    """Steps of the log. cursor: their indices.  active: how many of them were taken."""

    segment: Segment
    cursor: Int[Array, "steps"]
    active: Int[Array, ""]

    def of(self, stacks: PyTree) -> PyTree:
        """The entries of leaves with an axis of all steps; zeros beyond its end."""
        return jax.tree.map(lambda leaf: _taken(leaf, self.cursor), stacks)


def _taken(leaf: Array, cursor, fill=0) -> Array:
    return leaf.at[cursor].get(mode="fill", fill_value=fill)


def window_of(record: Any, rows: Batch, ids, weights) -> Window:
    """The window where a record stands; the arguments are those of `forget_step`.

    rows (S, B, ...), ids and weights (S, B).
    """
    cursor = record.participation.num_steps + jnp.arange(ids.shape[0])
    num_rows = _taken(record.log.step_num_rows, cursor, -1)
    segment = Segment(
        rows=rows,
        ids=jnp.asarray(ids),
        weights=jnp.asarray(weights),
        num_rows=num_rows,
        keys=_taken(record.log.step_keys, cursor),
        settings=jax.tree.map(lambda leaf: _taken(leaf, cursor), record.log.step_settings),
    )
    return Window(segment, cursor, jnp.sum(num_rows >= 0, dtype=jnp.int32))


def passed(record: Any, window: Window, non_finite) -> Any:
    """The record after a window: its steps counted, rows of weight zero out of the log, and no
    checkpoint that still knows them."""
    segment, at = window.segment, window.cursor
    kept = (segment.ids >= 0) & (segment.weights != 0)
    step_ids = jnp.where(kept, segment.ids, -1).astype(jnp.int32)
    participation, log = record.participation, record.log
    return record._replace(
        participation=participation._replace(num_steps=participation.num_steps + window.active),
        log=log._replace(
            step_ids=log.step_ids.at[at].set(step_ids, mode="drop"),
            step_non_finite=log.step_non_finite.at[at].set(non_finite, mode="drop"),
        ),
        checkpoints=drop_after(record.checkpoints, at[0]),
    )


def run_window(run, params: Params, state: UnlearnerState, window: Window):
    """`forget_step` by a segment's function (params, inner, segment, active) -> (.., flags)."""
    new_params, inner, met = run(params, state.inner, window.segment, window.active)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(window.active > 0, n, o), new, old)
    return finished(
        keep(new_params, params), keep(inner, state.inner),
        passed(state.record, window, met.non_finite),
        num_steps=window.active, non_finite=met.non_finite,
    )  # fmt: skip


def finished(params: Params, inner, record: Any, status=0, **arrays: Array):
    """What `forget_step` returns: poisoned where `status` is not OK or a value is not finite."""
    broken = ~tree.all_finite(params)
    status = status | jnp.where(broken, int(Status.NON_FINITE), 0).astype(jnp.int32)
    failed = status != 0
    participation = record.participation
    record = record._replace(
        participation=participation._replace(status=participation.status | status)
    )
    state = UnlearnerState(inner=tree.poison(inner, failed), record=record)
    return tree.poison(params, failed), state, {"status": status} | arrays
