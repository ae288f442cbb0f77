"""The training that recollect records: its steps, the pure steps of a deletion, its replays."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxunlearn import errors, kernels, records, tree
from jaxunlearn.types import LossFn, Params, Status, UnlearnerState
from jaxunlearn.unlearners.recollect._lockstep import (
    ENDED,
    Along,
    Lockstep,
    TracedStep,
    init_along,
    without_states,
)
from jaxunlearn.unlearners.recollect._units import Units


class RecollectRecord(NamedTuple):
    """What deletion needs: who took part, the log, the initial state, tangents and shadows."""

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    along: Along


@dataclasses.dataclass(frozen=True)
class Setting:
    """The arguments of `recollect`, made usable.

    beside: what goes along with training, one slot a tracked unit.
    along_log: what goes along with a replay of the log, slot 0 for a forget set, the others for
      shadows.
    """

    tx: optax.GradientTransformation
    loss_fn: LossFn
    table: Units
    penalty: records.Penalty
    recorder: records.Recorder
    beside: Lockstep
    along_log: Lockstep
    normalizer: str
    num_probes: int
    joint: bool
    max_bytes: int | None
    progress: bool | None

    def fresh_along(self, params: Params, inner: PyTree, *, slots: int, shadows: int):
        """Zero tangents for so many units, and shadows not yet drawn."""
        stacks = self.beside.tangents().init(params, inner, num_units=slots)
        return init_along(stacks, params, inner, num_shadows=shadows)

    def fresh_training_along(self, params: Params, inner: PyTree):
        """What goes along with training; nothing but a place for one tangent with `joint`."""
        if self.joint:
            return self.fresh_along(params, inner, slots=1, shadows=0)
        return self.fresh_along(params, inner, slots=self.table.num_slots, shadows=self.num_probes)

    def fresh_record(self, params: Params, inner: PyTree) -> RecollectRecord:
        """The record before the first step."""
        along = self.fresh_training_along(params, inner)
        return RecollectRecord(*self.recorder.start(params, inner), along)

    def describe(self, params: Params) -> dict[str, int]:
        """Bytes of the record by part, from shapes alone."""
        init = optax.with_extra_args_support(self.tx).init
        record = jax.eval_shape(lambda p: self.fresh_record(p, init(p)), params)
        along = record.along
        parts = {
            "tangents": along.tangents,
            "probes": along.shadows,
            "initial_state": record.checkpoints,
            "log": (
                *(record.log, record.participation, along.slot_is_live),
                *(along.gradient_squares, along.step_squares),
            ),
        }
        sizes = {name: tree.num_bytes(part) for name, part in parts.items()}
        return sizes | {"total": sum(sizes.values())}

    def check_size(self, params: Params) -> None:
        """Refuse a record above `max_bytes`.

        Raises:
          RecordTooLargeError: with what each part takes.
        """
        sizes = self.describe(params)
        if self.max_bytes is not None and sizes["total"] > self.max_bytes:
            raise errors.RecordTooLargeError(
                f"Expected a record of at most max_bytes={self.max_bytes}, got {sizes}. Track "
                "fewer units or leaves, or store tangents in bfloat16."
            )

    def step_of_training(self, rows, ids, num_rows, keys, live) -> TracedStep:
        """A step of the run itself."""
        units = self.table.of_examples(ids)
        slots = self.table.slots(units)
        return TracedStep(
            rows=rows,
            weights=(ids >= 0).astype(jnp.float32),
            num_rows=num_rows,
            keys=keys,
            units=units,
            slots=slots,
            drawable=(slots >= 0) & live[slots],
        )

    def step_again(self, row: records.Segment) -> TracedStep:
        """A logged step as one of training."""
        ids = jnp.asarray(row.ids)
        live = jnp.ones((self.table.num_slots,), bool)
        return self.step_of_training(row.rows, ids, row.num_rows, self._logged_keys(row), live)

    def step_of_log(self, row: records.Segment) -> TracedStep:
        """A logged step whose rows at weight zero, which trained, are the forget set in slot 0."""
        ids = jnp.asarray(row.ids)
        kept = (ids >= 0) & (row.weights != 0)
        return TracedStep(
            rows=row.rows,
            weights=(ids >= 0).astype(jnp.float32),
            num_rows=row.num_rows,
            keys=self._logged_keys(row),
            units=jnp.where(kept, self.table.of_examples(ids), -1),
            slots=jnp.where((ids >= 0) & ~kept, 0, -1),
            drawable=kept,
        )

    def keys_of(self, key: Any, ids):
        """Each example's own key, None for a loss without."""
        return kernels.example_keys(key, ids) if self.recorder.keyed else None

    def _logged_keys(self, row: records.Segment):
        key = jax.random.wrap_key_data(row.keys) if self.recorder.keyed else None
        return self.keys_of(key, row.ids)


def make_add_step(setting: Setting):
    """`forget_step` from tangents, state + sum_u (1 - weight_u) tangent_u; and the same compiled.

    The compiled one computes what changes and hands on the rest of the record as it is: what goes
    through a compiled program without donation is copied, tangents and all. It poisons nothing,
    since its caller looks at the status, and looks whether training can go on from the result.
    """
    table, kernel = setting.table, setting.beside.tangents()

    def changes(params, inner, tangents, is_live, step_ids, shadow_units, ids, weights):
        slots = table.slots(ids)
        amounts = jnp.where(ids >= 0, 1 - jnp.asarray(weights, jnp.float32), 0)
        moved = kernel.add(params, inner, tangents, slots, amounts)
        nowhere = jnp.where(slots >= 0, slots, jnp.iinfo(jnp.int32).max)
        gone = jnp.isin(table.of_examples(step_ids), ids) & (step_ids >= 0)
        step_ids = jnp.where(gone, -1, step_ids)
        is_live = is_live.at[nowhere].set(False, mode="drop")
        return is_live, step_ids, jnp.full_like(shadow_units, ENDED), moved

    def checked_changes(params, inner, *operands):
        *rest, moved = changes(params, inner, *operands)
        moved = tree.match_weak_types(moved, (params, inner))
        failed = _has_failed(inner, *moved) | ~setting.beside.goes_on(*moved)
        return *rest, moved, jnp.where(failed, int(Status.NON_FINITE), 0).astype(jnp.int32)

    def operands_of(params, state, ids, weights):
        record, along = state.record, state.record.along
        return (
            params, state.inner, along.tangents, along.slot_is_live, record.log.step_ids,
            along.shadows.shadow_units, jnp.asarray(ids), weights,
        )  # fmt: skip

    def recorded(record, is_live, step_ids, shadows):
        return record._replace(
            log=record.log._replace(step_ids=step_ids),
            along=record.along._replace(slot_is_live=is_live, shadows=shadows),
        )

    def add_step(params, state, rows, ids, weights):
        del rows
        is_live, step_ids, units, moved = changes(*operands_of(params, state, ids, weights))
        shadows = state.record.along.shadows._replace(shadow_units=units)
        record = recorded(state.record, is_live, step_ids, shadows)
        return concluded(params, state, moved, record)

    compiled, cleared = jax.jit(checked_changes), jax.jit(without_states)

    def add_at_once(params, state, ids, weights):
        out = compiled(*operands_of(params, state, ids, weights))
        is_live, step_ids, units, (new_params, inner), status = out
        shadows = state.record.along.shadows
        if (np.asarray(shadows.shadow_units) != ENDED).any():
            shadows = cleared(shadows)
        shadows = shadows._replace(shadow_units=units)
        record = recorded(state.record, is_live, step_ids, shadows)
        return new_params, UnlearnerState(inner, record), {"status": status}

    return add_step, add_at_once


def make_joint_step(setting: Setting):
    """`forget_step` along the log: one segment, with the tangent so far in the record."""
    kernel, segment = setting.beside.tangents(), setting.along_log.run(setting.step_of_log)

    def joint_step(params, state, rows, ids, weights):
        record = state.record
        window = records.window_of(record, rows, ids, weights)
        slot, one = jnp.zeros((1,), jnp.int32), jnp.ones((1,))
        run = kernel.add(params, state.inner, record.along.tangents, slot, -one)
        *run, along, bad = segment(*run, record.along, window.segment, window.active)
        moved = kernel.add(*run, along.tangents, slot, one)
        record = records.passed(record, window, bad.non_finite)._replace(along=along)
        figures = {"num_steps": window.active, "non_finite": bad.non_finite}
        return concluded(params, state, moved, record, **figures)

    return joint_step


def concluded(params, state, moved, record, **arrays):
    """What a step returns: the moved state, poisoned where it is no longer finite."""
    failed = _has_failed(state.inner, *moved)
    failure = jnp.where(failed, int(Status.NON_FINITE), 0).astype(jnp.int32)
    poisoned = tree.poison(moved, failed)
    new_params, inner = tree.match_weak_types(poisoned, (params, state.inner))
    participation = record.participation
    participation = participation._replace(status=participation.status | failure)
    state = UnlearnerState(inner, record._replace(participation=participation))
    return new_params, state, {"status": failure} | arrays


def _has_failed(inner, new_params, new_inner):
    """Whether the new state is not finite.

    A scalar of the optimizer state may have been infinite before: a line search starts with one.
    """
    pairs = zip(jax.tree.leaves(inner), jax.tree.leaves(new_inner), strict=True)
    held = [new if jnp.ndim(new) else _where_finite(old, new) for old, new in pairs]
    return ~jnp.isfinite(_largest([*jax.tree.leaves(new_params), *held]))


def _where_finite(old, new):
    """`new`, or zero where `old` is not finite."""
    return jnp.where(jnp.isfinite(old), new, 0) if tree.is_inexact(old) else new


def _largest(leaves):
    """The largest magnitude: NaN or infinite if some entry is. Cheaper than looking at each."""
    sizes = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves if tree.is_inexact(leaf)]
    return functools.reduce(jnp.maximum, [x.astype(jnp.float32) for x in sizes], jnp.zeros(()))


class Routes:
    """Replays of the recorded steps from the initial state; compiled once."""

    def __init__(self, setting: Setting):
        self._setting = setting
        self._plain = jax.jit(
            records.make_segment(
                setting.tx, setting.loss_fn,
                normalizer=setting.normalizer, penalty=setting.penalty,
            )
        )  # fmt: skip
        self._again = jax.jit(setting.beside.run(setting.step_again), donate_argnums=2)
        self._joint = jax.jit(setting.along_log.run(setting.step_of_log), donate_argnums=2)
        self._add = jax.jit(_add_first(setting))

    def train_again(
        self, params: Params, state: UnlearnerState, examples: np.ndarray, data: Any
    ) -> tuple[Params, UnlearnerState, dict[str, Any]]:
        """The state that training without these examples reaches, the tangents as they are."""
        record = state.record
        log, reader = self._read(record, data, examples)
        start = tree.copy(records.read_slot(record.checkpoints, 0))
        new_params, inner, _ = self._run(self._plain, start, log, reader, record, "training again")
        if not bool(tree.all_finite(new_params)):
            raise errors.NonFiniteError(
                "Training again without the forgotten rows gave parameters that are not finite; "
                "nothing was released. The retained run itself diverges."
            )
        measured = {"route": "replay", "replayed_steps": int(record.participation.num_steps)}
        return *self._reached(params, state, new_params, inner, log), measured

    def refresh(self, params: Params, state: UnlearnerState, data: Any):
        """Training again without what was forgotten, with new tangents."""
        setting, record = self._setting, state.record
        log, reader = self._read(record, data, ())
        start = tree.copy(records.read_slot(record.checkpoints, 0))
        along = setting.fresh_training_along(*start)
        if setting.joint:
            result = self._run(self._plain, start, log, reader, record, "refreshing")
            new_params, inner, _ = result
        else:
            first, again = ((start[0], along), start[1]), _carrying(self._again)
            result = self._run(again, first, log, reader, record, "refreshing")
            (new_params, along), inner, _ = result
        new_params, new_state = self._reached(params, state, new_params, inner, log)
        new_record = new_state.record._replace(along=along)
        return new_params, UnlearnerState(new_state.inner, new_record)

    def tangent_along_log(self, state: UnlearnerState, examples: np.ndarray, data: Any):
        """One tangent for all examples, and shadows; the run's end; number of spoilt rows."""
        setting, record = self._setting, state.record
        log, reader = self._read(record, data, ())
        start = tree.copy(records.read_slot(record.checkpoints, 0))
        along = setting.fresh_along(
            *start, slots=1 + setting.num_probes, shadows=setting.num_probes
        )

        def marked(pair, inner, segment, active):
            weights = np.where(np.isin(segment.ids, examples), 0, segment.weights)
            segment = segment._replace(weights=weights.astype(np.float32))
            return _carrying(self._joint)(pair, inner, segment, active)

        first = (start[0], along), start[1]
        (params, along), inner, bad = self._run(
            marked, first, log, reader, record, "carrying the tangent"
        )
        return along, (params, inner), int(np.sum(bad.non_finite_rows))

    def add_tangent(self, params, state: UnlearnerState, along: Along, examples):
        """The state moved by the tangent in slot 0, its log without these examples."""
        gone = np.union1d(records.forgotten_ids(state.record.participation), examples)
        log = jax.tree.map(jnp.asarray, records.without(state.record.log, gone))
        return self._add(params, state, state.record._replace(log=log), along.tangents)

    def _read(self, record, data, examples):
        """The log without what is forgotten and these examples, and a reader of the rest."""
        reader = records.RowReader(data)
        gone = np.union1d(records.forgotten_ids(record.participation), examples)
        log = records.without(record.log, gone)
        used = np.asarray(log.step_ids)
        reader.prepare(used[used >= 0], may_be_empty=True)
        return log, reader

    def _run(self, run, start, log, reader, record, label: str):
        return records.run_log(
            run, start[0], start[1], log, reader, start=0, stop=int(record.participation.num_steps),
            segment_length=records.default_segment_length(), label=label,
            show=self._setting.progress,
        )  # fmt: skip

    def _reached(self, params, state, new_params, inner, log):
        """A replay's end as a state like the given one, with the settings that one has now."""
        new_params, inner = records.as_given((new_params, inner), (params, state.inner))
        record = state.record._replace(log=jax.tree.map(jnp.asarray, log))
        return new_params, UnlearnerState(inner, record)


def _carrying(run):
    """A segment's function for `run_log`: what goes along travels with the parameters."""

    def wrapped(pair, inner, segment, active):
        params, along = pair
        params, inner, along, flags = run(params, inner, along, segment, active)
        return (params, along), inner, flags

    return wrapped


def _add_first(setting: Setting):
    kernel = setting.beside.tangents()

    def add(params, state, record, tangents):
        slot, one = jnp.zeros((1,), jnp.int32), jnp.ones((1,))
        moved = kernel.add(params, state.inner, tangents, slot, one)
        failed = ~setting.beside.goes_on(*moved)
        *end, arrays = concluded(params, state, moved, record)
        status = jnp.where(failed, int(Status.NON_FINITE), arrays["status"]).astype(jnp.int32)
        return *end, {"status": status}

    return add
