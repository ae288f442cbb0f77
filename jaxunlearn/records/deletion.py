"""Deletion from a logged run on the host: what has to run again, running it, and what is left."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxunlearn import tree
from jaxunlearn.records.checkpoints import (
    Checkpoints,
    last_slot_before,
    read_slot,
    rewrite_slot,
)
from jaxunlearn.records.log import StepLog, get_settings, set_settings
from jaxunlearn.records.options import check_integers
from jaxunlearn.records.participation import bury
from jaxunlearn.records.replay import StepFlags, default_segment_length, run_log, without
from jaxunlearn.records.rows import RowReader


class DeletionPlan(NamedTuple):
    """What a deletion has to run again.

    log, kept: the step log on the host, and the same without the ids.
    slot, start: the last checkpoint before their first use, and its step.
    first: the first step that used them.  stop: the steps taken so far.
    later: slot of each checkpoint taken after `start`, by its step.
    """

    log: StepLog
    kept: StepLog
    slot: int
    start: int
    first: int
    stop: int
    later: dict[int, int]

    @property
    def retained(self) -> np.ndarray:
        """Ids that the log still names, once a use."""
        ids = np.asarray(self.kept.step_ids)
        return ids[ids >= 0]


def plan_deletion(record: Any, ids: np.ndarray) -> DeletionPlan:
    """The plan for ids that the log of `record` holds; host work."""
    log = jax.device_get(record.log)
    first = int(np.argmax(np.isin(log.step_ids, ids).any(axis=1)))
    slot, start = last_slot_before(record.checkpoints, first)
    taken = np.asarray(jax.device_get(record.checkpoints.checkpoint_steps))
    later = {int(step): i for i, step in enumerate(taken) if step > start}
    stop = int(record.participation.num_steps)
    return DeletionPlan(log, without(log, ids), slot, start, first, stop, later)


class Rerun:
    """Runs the steps of a plan again by one compiled segment.

    Args:
      segment: as `make_segment` returns it.
      segment_length: steps compiled as one loop; None: `default_segment_length()`.
      show: of the progress bar.
    """

    def __init__(self, segment, *, segment_length: int | None = None, show: bool | None = None):
        if segment_length is not None:
            check_integers(segment_length=segment_length)
        self._run, self._rewrite = jax.jit(segment), jax.jit(rewrite_slot, donate_argnums=0)
        self._length, self._show = segment_length, show
        self.seconds_per_step: float | None = None
        """Of the last run."""

    def unchanged(self, plan: DeletionPlan, checkpoints: Checkpoints, reader: RowReader):
        """(params, inner) where the recorded steps lead as they are."""
        return self(plan.log, plan, read_slot(checkpoints, plan.slot), reader, label="verifying")[0]

    def without(
        self, plan: DeletionPlan, checkpoints: Checkpoints, reader: RowReader
    ) -> tuple[tuple[PyTree, PyTree], StepFlags, Checkpoints]:
        """(params, inner) where they lead without the ids, what was met, and its checkpoints."""
        start = read_slot(checkpoints, plan.slot)
        return self(plan.kept, plan, start, reader, rewrite=checkpoints)

    def __call__(
        self,
        log: StepLog,
        plan: DeletionPlan,
        start: tuple[PyTree, PyTree],
        reader: RowReader,
        *,
        label: str = "forgetting",
        rewrite: Any = None,
        reached=lambda *state: state,
    ):
        """The steps of `log` that `plan` names, from `start`.

        Args:
          rewrite: checkpoints; in a copy, those after the first step become this run's.
          reached: (params, inner) of this run -> (params, inner) to be kept in a checkpoint.

        Returns:
          ((params, inner), flags, that copy).
        """
        fresh = [tree.copy(rewrite)]

        def save(step, params, inner):
            fresh[0] = self._rewrite(fresh[0], plan.later[step], *reached(params, inner))

        begun, (params, inner) = time.perf_counter(), tree.copy(start)
        params, inner, flags = run_log(
            self._run, params, inner, log, reader,
            start=plan.start, stop=plan.stop,
            segment_length=self._length or default_segment_length(),
            cuts=() if rewrite is None else plan.later, on_cut=save,
            label=label, show=self._show,
        )  # fmt: skip
        self.seconds_per_step = (time.perf_counter() - begun) / max(1, plan.stop - plan.start)
        return (params, inner), flags, fresh[0]


def as_given(reached: tuple[PyTree, PyTree], given: tuple[PyTree, PyTree]):
    """(params, inner) of a rerun like a given pair: its weak types, and the hyperparameters that
    were set from outside since the last step."""
    params, inner = reached
    inner = set_settings(inner, get_settings(given[1]))
    return tree.match_weak_types((params, inner), given)


def after_deletion(
    record: Any,
    ids: np.ndarray,
    plan: DeletionPlan,
    checkpoints: Checkpoints,
    since: int = 0,
    non_finite: Any = (),
) -> Any:
    """The record once ids are gone: noted, out of the log, and with other checkpoints.

    since, non_finite: whether each step, from that one on, met an update that is not finite.
    """
    flags = np.array(plan.log.step_non_finite)
    flags[since : since + len(non_finite)] = non_finite
    return record._replace(
        participation=bury(record.participation, ids),
        log=jax.tree.map(jnp.asarray, plan.kept._replace(step_non_finite=flags)),
        checkpoints=checkpoints,
    )
