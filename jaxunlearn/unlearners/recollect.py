"""First-order deletion by recollection: tangents of the training state, carried along and added.

Qiao, Zhang, Tang, Wei 2025, "Hessian-Free Online Certified Unlearning" (arXiv 2404.01712), carry
for each sample the first-order change of SGD's parameters when its weight goes to zero. Here the
whole training step is linearised, so that any Optax optimizer will do, and its state is corrected
with the parameters. There is no certificate of distance: how linear the run was is measured.
"""

import functools
import math
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxunlearn import certificates, errors, kernels, records, tree
from jaxunlearn.types import (
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Status,
    Unlearner,
    UnlearnerState,
)

PAPER = "Qiao et al. 2025, arXiv 2404.01712, for the whole state of any optimizer"
POLICIES = ("warn", "refuse", "replay")
EPS_ROOT = (
    "Adam's square root has no derivative where a second moment is zero: give it eps_root=1e-8 or "
    "more (optax.adam(..., eps_root=1e-8)); the larger, the more linear its first steps."
)


class RecollectRecord(NamedTuple):
    """What deletion needs: who took part, the log, the initial state, tangents and shadows."""

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    along: records.Along


class Recollector(Unlearner):
    """An `Unlearner` with two more functions.

      refresh(params, opt_state, *, data) -> (params, opt_state)
      describe(params) -> bytes of the record by part, before training starts
    """

    def __new__(cls, init, update, forget, quote, forget_step, refresh, describe):
        self = super().__new__(cls, init, update, forget, quote, forget_step)
        self.refresh, self.describe = refresh, describe
        return self

    @classmethod
    def _make(cls, fields):
        fields = tuple(fields)
        if len(fields) != 7:
            raise TypeError(
                f"Expected 7 functions (init, update, forget, quote, forget_step, refresh, "
                f"describe), got {len(fields)}. An Unlearner is not a pytree."
            )
        return cls(*fields)

    def _asdict(self):
        return super()._asdict() | {"refresh": self.refresh, "describe": self.describe}


def recollect(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    max_steps: int,
    normalizer: str = "batch",
    recursion: str = "leave_one_out",
    units: Any = None,
    track: Any = None,
    track_leaves: kernels.TrackLeaves = None,
    joint: bool = False,
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    storage_dtype: Any = None,
    units_at_once: int | None = None,
    microbatch_size: int | None = None,
    num_probes: int = 2,
    if_rough: str = "warn",
    rough_above: float = 0.1,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> Recollector:
    """Wrap `tx` so that `forget` adds the first-order effect of the rows' absence.

    `update` carries one tangent a tracked unit, dz_u' = J_t dz_u + source_u of the training state z
    (parameters and float leaves of the optimizer state); `forget` returns z + sum_u dz_u. With
    `joint`, training carries nothing, and `forget` carries one tangent for the whole forget set
    along the recorded steps: more accurate past about ten rows, at more than the price of an exact
    `unlearners.replay`.

    Args:
      tx: the whole optimizer; `recollect(optax.chain(clip, adamw), ...)`. Smooth where it is used:
        Adam needs eps_root > 0.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      num_examples: example ids are dense in 0..num_examples-1.
      batch_size, max_steps: the most rows of a step, the most steps of a run.
      normalizer: "batch" divides by the rows a step was scheduled with, "kept" by those left.
      recursion: "leave_one_out" takes the linear part with the unit's own weight at zero, and is
        exact for quadratics; "paper" with that weight in place.
      units: (num_examples,) integers, the unit (user) of each example; None: each its own. What an
        id passed to `forget` and `quote` deletes is a unit: with `units`, ids are unit ids.
      track: ids of the units that get a tangent; None: all. Others are refused.
      track_leaves: which leaves of params get tangents, as booleans or a function of params; the
        others, and what belongs to them in the state, stay as they are.
      l2: adds `l2 * params` to the gradient where `l2_mask` is true; None adds nothing.
      storage_dtype: of the tangents; None keeps float32 or what is wider. bfloat16 halves them.
      units_at_once, microbatch_size: see `kernels.state_tangents`.
      num_probes: shadow runs, each with one tracked unit of the first batch left out, trained
        beside the run to compare the change that its tangent predicts with the actual one. 0
        measures nothing.
      if_rough: what to do where that error exceeds `rough_above` or a tangent is not finite: "warn"
        goes on where it can, "refuse" raises RoughRunError, "replay" trains again without the rows.
      max_bytes: refuse to start where the record would be larger; `describe(params)` has its size.

    Returns:
      An `Unlearner` with `refresh(params, opt_state, *, data)`, which trains again from the initial
      state without what was forgotten, and returns its parameters and state with new tangents; and
      `describe(params)`, bytes by part, which takes shapes too.
      `forget_step(params, state, rows, ids, weights)`: ids (m,) of units, padded with -1, weights
      (m,) the new weights, zero to forget; rows are not looked at. With `joint` one segment, as
      that of `replay`: rows (S, B, ...), ids and weights (S, B), weight 0 for rows to forget.

    Cost: `update`: one Hessian product and one update a tracked unit, a gradient for each probe;
      memory of 1 + num_probes + tracked units times that of the state. `forget`: one addition of
      the state for each unit. With `joint`, about 4 (1 + num_probes) gradients a recorded step.

    Guarantees:
      On quadratic losses with SGD, momentum or Nesterov, parameters and state of any single
      forgotten unit equal `records.oracle(...)` up to rounding.

    Raises (forget):
      IdError, NotTrackedError, WrongStateError, TrainingRecordError, CoupledLossError (where data
      is given), RoughRunError, NonFiniteError, MissingDataError (joint or replay); inputs untouched.

    References: Qiao et al. 2025, equation (6) is recursion="paper" with optax.sgd.
    """
    _check_options(batch_size, max_steps, normalizer, num_probes, if_rough, rough_above, l2)
    table = records.Units(num_examples, units, track)
    num_slots = 1 if joint else table.num_slots
    penalty = records.Penalty(l2, l2_mask)
    tangent_options = {
        "recursion": recursion,
        "track_leaves": track_leaves,
        "storage_dtype": storage_dtype,
        "units_at_once": units_at_once,
        "microbatch_size": microbatch_size,
    }
    lockstep = functools.partial(
        records.Lockstep, tx, loss_fn, normalizer=normalizer, penalty=penalty, **tangent_options
    )
    beside = lockstep(slots=table.slots)  # along the training
    along_log = lockstep(own_slots=1)  # one tangent for a forget set, the others for shadows
    keyed, inner_update = beside.keyed, beside.inner_update
    segment = records.make_segment(tx, loss_fn, normalizer=normalizer, penalty=penalty)
    run_plainly = jax.jit(segment)
    info_of = functools.partial(ForgetInfo.of, "recollect")
    loss_checked: list[bool] = []
    smooth_checked: list[bool] = []

    def keys_of(key, ids):
        return kernels.example_keys(key, ids) if keyed else None

    def step_of_training(rows, ids, num_rows, keys, live):
        units_of_rows = table.of_examples(ids)
        slots = table.slots(units_of_rows)
        drawable = live.at[slots].get(mode="fill", fill_value=False)
        weights = (ids >= 0).astype(jnp.float32)
        return records.Step(rows, weights, num_rows, keys, units_of_rows, slots, drawable)

    def step_of_log(row: records.Segment):
        """A logged step: weight zero marks rows of the forget set, which trained nevertheless."""
        ids = jnp.asarray(row.ids)
        trained, kept = ids >= 0, (ids >= 0) & (row.weights != 0)
        units_of_rows = jnp.where(kept, table.of_examples(ids), -1)
        slots = jnp.where(trained & ~kept, 0, jnp.iinfo(jnp.int32).max)
        keys = keys_of(jax.random.wrap_key_data(row.keys), ids) if keyed else None
        weights = trained.astype(jnp.float32)
        return records.Step(row.rows, weights, row.num_rows, keys, units_of_rows, slots, kept)

    def step_again(row: records.Segment):
        ids = jnp.asarray(row.ids)
        keys = keys_of(jax.random.wrap_key_data(row.keys), ids) if keyed else None
        return step_of_training(row.rows, ids, row.num_rows, keys, jnp.ones((num_slots,), bool))

    along_segment = along_log.run(step_of_log)
    run_along = jax.jit(along_segment, donate_argnums=2)
    run_again = jax.jit(beside.run(step_again), donate_argnums=2)

    def fresh_along(params, inner, slots, shadows):
        stacks = beside.tangents().init(params, inner, num_units=slots)
        return records.init_along(stacks, params, inner, num_shadows=shadows)

    def fresh_record(params, inner):
        return RecollectRecord(
            participation=records.init_participation(num_examples),
            log=records.init_log(max_steps, batch_size, has_key=keyed, inner=inner),
            checkpoints=records.init_checkpoints(params, inner, slots=1, every=max_steps),
            along=fresh_along(params, inner, num_slots, 0 if joint else num_probes),
        )

    def describe(params):
        shapes = jax.eval_shape(lambda p: optax.with_extra_args_support(tx).init(p), params)
        record = jax.eval_shape(fresh_record, params, shapes)
        parts = {
            "tangents": record.along.tangents,
            "probes": record.along.shadows,
            "initial_state": record.checkpoints,
            "log": (record.log, record.participation, record.along.slot_is_live),
        }
        sizes = {name: tree.num_bytes(part) for name, part in parts.items()}
        return sizes | {"total": sum(sizes.values())}

    def init(params):
        size = describe(params)["total"]
        if max_bytes is not None and size > max_bytes:
            raise errors.RecordTooLargeError(
                f"Expected a record of at most max_bytes={max_bytes}, got {size}: "
                f"{describe(params)}. Track fewer units or leaves, or store bfloat16."
            )
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        check_smooth_once(params)
        return UnlearnerState(inner=inner, record=fresh_record(params, inner))

    def check_smooth_once(params):
        if smooth_checked or if_rough == "replay":
            return
        smooth_checked.append(True)
        if not beside.is_smooth_at_rest(params):
            text = f"The optimizer has no finite derivative at zero gradient and fresh state. {EPS_ROOT}"
            if if_rough == "refuse":
                raise errors.RoughRunError(text)
            warnings.warn(text, stacklevel=3)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        records.check_update(opt_state, params, ids, RecollectRecord, "recollect")
        _check_step(ids, key, batch, batch_size, keyed, joint)
        ids = None if ids is None else jnp.asarray(ids)
        record, inner = opt_state.record, opt_state.inner
        step = record.participation.num_steps
        participation = records.observe(record.participation, ids, num_examples)
        overrun = jnp.where(step >= max_steps, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32)
        participation = participation._replace(status=participation.status | overrun)
        log = records.write_step(
            record.log, step, ids=ids, key=key, settings=records.get_settings(inner),
            non_finite=~tree.all_finite(updates),
        )  # fmt: skip
        checkpoints = records.take_checkpoint(
            record.checkpoints, step, params, inner, every=max_steps
        )
        grads = updates
        updates, new_inner = inner_update(grads, inner, params, **extra)
        along = record.along
        if ids is not None and not joint:
            num_rows = jnp.sum(ids >= 0, dtype=jnp.int32)
            row_step = step_of_training(
                batch, ids, num_rows, keys_of(key, ids), along.slot_is_live
            )
            after = optax.apply_updates(params, updates), new_inner
            along = beside.go_along(along, (params, inner), after, grads, row_step, extra)
        new_record = RecollectRecord(participation, log, checkpoints, along)
        return updates, UnlearnerState(inner=new_inner, record=new_record)

    def failed_from(params, inner, new_params, new_inner):
        lost = tree.all_finite(inner) & ~tree.all_finite(new_inner)
        return ~tree.all_finite(new_params) | lost

    def concluded(params, state, new_params, new_inner, record):
        failed = failed_from(params, state.inner, new_params, new_inner)
        status = jnp.where(failed, int(Status.NON_FINITE), 0).astype(jnp.int32)
        participation = record.participation._replace(
            status=record.participation.status | status
        )
        new_state = UnlearnerState(
            inner=tree.match_weak_types(tree.poison(new_inner, failed), state.inner),
            record=record._replace(participation=participation),
        )
        new_params = tree.match_weak_types(tree.poison(new_params, failed), params)
        return new_params, new_state, {"status": status}

    def add_step(params, state, rows, ids, weights):
        del rows
        record, ids = state.record, jnp.asarray(ids)
        slots = table.slots(ids)
        amounts = jnp.where(ids >= 0, 1 - jnp.asarray(weights, jnp.float32), 0)
        moved = beside.tangents().add(params, state.inner, record.along.tangents, slots, amounts)
        along = records.Along(
            tangents=record.along.tangents,
            slot_is_live=record.along.slot_is_live.at[slots].set(False, mode="drop"),
            shadows=records.end_shadows(record.along.shadows),
        )
        logged = record.log.step_ids
        gone = jnp.isin(table.of_examples(logged), ids) & (logged >= 0)
        log = record.log._replace(step_ids=jnp.where(gone, -1, logged))
        return concluded(params, state, *moved, record._replace(log=log, along=along))

    def joint_step(params, state, rows, ids, weights):
        record, length = state.record, ids.shape[0]
        cursor = record.participation.num_steps + jnp.arange(length)
        window = lambda leaf, fill=0: leaf.at[cursor].get(mode="fill", fill_value=fill)
        num_rows = window(record.log.step_num_rows, -1)
        active = jnp.sum(num_rows >= 0, dtype=jnp.int32)
        steps = records.Segment(
            rows=rows, ids=ids, weights=weights, num_rows=num_rows,
            keys=window(record.log.step_keys),
            settings=jax.tree.map(window, record.log.step_settings),
        )  # fmt: skip
        kernel, one = beside.tangents(), jnp.ones((1,))
        slot = jnp.zeros((1,), jnp.int32)
        run = kernel.add(params, state.inner, record.along.tangents, slot, -one)
        *run, along, bad = along_segment(*run, record.along, steps, active)
        moved = kernel.add(*run, along.tangents, slot, one)
        participation = record.participation._replace(
            num_steps=record.participation.num_steps + active
        )
        kept = jnp.where((jnp.asarray(ids) >= 0) & (weights != 0), ids, -1)
        log = record.log._replace(step_ids=record.log.step_ids.at[cursor].set(kept, mode="drop"))
        record = record._replace(participation=participation, log=log, along=along)
        new_params, new_state, arrays = concluded(params, state, *moved, record)
        return new_params, new_state, arrays | {"num_steps": active, "non_finite": bad.non_finite}

    forget_step = joint_step if joint else add_step
    add_jitted = jax.jit(add_step)

    def check_request(params, opt_state, ids):
        records.check_state(opt_state, RecollectRecord, "recollect")
        ids, num_duplicates = records.validate_ids(ids, table.num_units)
        _check_seen(opt_state.record.participation, table, ids)
        template = jax.eval_shape(
            lambda c: records.read_slot(c, 0)[0], opt_state.record.checkpoints
        )
        records.check_params(params, template, "recollect")
        if not joint:
            table.check_tracked(ids)
        return ids, num_duplicates

    def check_loss(params, reader, record, examples):
        """A few retained rows are read whenever there is data, and judged once."""
        retained = np.setdiff1d(records.seen_ids(record.participation), examples)[:8]
        if not retained.size:
            return
        few = reader(retained)
        if not loss_checked:
            key = jax.random.key(0) if keyed else None
            kernels.check_loss(loss_fn, params, few, key=key)
            loss_checked.append(True)

    def length_of_segments():
        return records.default_segment_length()

    def run_log(run, start, log, reader, label, num_steps):
        return records.run_log(
            run, *start, log, reader, start=0, stop=num_steps,
            segment_length=length_of_segments(), label=label, show=progress,
        )  # fmt: skip

    def with_along(run):
        """A segment's function for `run_log`: what goes along travels with the parameters."""

        def wrapped(pair, inner, segment, active):
            params, along = pair
            params, inner, along, flags = run(params, inner, along, segment, active)
            return (params, along), inner, flags

        return wrapped

    def prepared(record, data, examples):
        """A reader, the log without what was forgotten, and the initial state."""
        reader = records.RowReader(data)
        gone = np.union1d(records.forgotten_ids(record.participation), examples)
        log = records.without(record.log, gone)
        used = np.asarray(log.step_ids)
        reader.prepare(used[used >= 0], may_be_empty=True)
        return reader, log, tree.copy(records.read_slot(record.checkpoints, 0))

    def replayed(params, opt_state, examples, data):
        record = opt_state.record
        reader, log, start = prepared(record, data, examples)
        steps = int(record.participation.num_steps)
        new_params, inner, _ = run_log(run_plainly, start, log, reader, "training again", steps)
        return new_params, inner, log

    def forget(params, opt_state, ids, *, data=None, requester=None):
        begun = time.perf_counter()
        ids, num_duplicates = check_request(params, opt_state, ids)
        if not ids.size:
            return Forgotten(params, opt_state, info_of(ids, num_duplicates, begun))
        examples = table.examples(ids)
        record = opt_state.record
        if data is not None or joint:
            check_loss(params, records.RowReader(data), record, examples)
        route = jointly if joint else additively
        new_params, new_state, measured = route(params, opt_state, ids, examples, data)
        new_state = new_state._replace(
            record=new_state.record._replace(
                participation=records.bury(new_state.record.participation, examples)
            )
        )
        certificate, salt = certificates.issue(
            ids, num_duplicates, (params, opt_state.inner), (new_params, new_state.inner),
            **_promise(measured, normalizer, recursion, joint, track_leaves is not None),
        )  # fmt: skip
        info = info_of(
            ids, num_duplicates, begun, requester=requester,
            certificate=certificate, commitment_salt=salt, measurements=measured,
        )  # fmt: skip
        return Forgotten(new_params, new_state, info)

    def again(params, opt_state, ids, examples, data, measured):
        """The exact route: training again, tangents as they are."""
        new_params, inner, log = replayed(params, opt_state, examples, data)
        if not bool(tree.all_finite(new_params)):
            raise errors.NonFiniteError("Training again gave parameters that are not finite.")
        inner = records.set_settings(inner, records.get_settings(opt_state.inner))
        record = opt_state.record
        along = record.along
        if not joint:
            slots = np.asarray(table.slots(jnp.asarray(ids)))
            live = np.array(along.slot_is_live)
            live[slots[slots < num_slots]] = False
            along = along._replace(
                slot_is_live=jnp.asarray(live), shadows=records.end_shadows(along.shadows)
            )
        state = UnlearnerState(
            inner=tree.match_weak_types(inner, opt_state.inner),
            record=record._replace(log=jax.tree.map(jnp.asarray, log), along=along),
        )
        steps = int(record.participation.num_steps)
        measured = measured | {"route": "replay", "replayed_steps": steps}
        return tree.match_weak_types(new_params, params), state, measured

    def judged(linearity):
        """Measurements, and whether the run is too rough to trust."""
        in_params, in_state = (float(x) for x in jax.device_get(linearity))
        measured = {"linearity_params": in_params, "linearity_state": in_state}
        was_measured = {
            name: value for name, value in measured.items() if value != records.NOT_MEASURED
        }
        is_rough = any(not value <= rough_above for value in was_measured.values())
        return was_measured, is_rough

    def complain(measured):
        text = (
            f"The run is not linear enough to trust first-order deletion: for probes it predicted "
            f"changes with a relative error of {measured} (rough_above={rough_above}). Train more "
            "smoothly (larger eps_root or eps, smaller steps), or use unlearners.replay."
        )
        if any(math.isnan(value) for value in measured.values()):
            text += f" {EPS_ROOT}"
        if if_rough == "refuse":
            raise errors.RoughRunError(text)
        warnings.warn(text, stacklevel=4)

    def additively(params, opt_state, ids, examples, data):
        measured, is_rough = judged(opt_state.record.along.shadows.linearity)
        if is_rough and if_rough == "replay":
            return again(params, opt_state, ids, examples, data, measured)
        if is_rough:
            complain(measured)
        padded = records.bucket(ids)
        weights = np.zeros((len(padded),), np.float32)
        new_params, new_state, arrays = add_jitted(params, opt_state, None, padded, weights)
        if int(arrays["status"]):
            if if_rough == "replay":
                return again(params, opt_state, ids, examples, data, measured)
            raise errors.NonFiniteError(
                f"Expected finite tangents, got some that are not; nothing was released. {EPS_ROOT}"
            )
        return new_params, new_state, measured | {"route": "tangents"}

    def jointly(params, opt_state, ids, examples, data):
        record = opt_state.record
        reader = records.RowReader(data)
        buried = records.forgotten_ids(record.participation)
        log = records.without(record.log, buried)
        used = np.asarray(log.step_ids)
        reader.prepare(used[used >= 0])
        start = tree.copy(records.read_slot(record.checkpoints, 0))
        steps = int(record.participation.num_steps)
        along = fresh_along(*start, 1 + num_probes, num_probes)

        def marked(pair, inner, segment, active):
            weights = np.where(np.isin(segment.ids, examples), 0, segment.weights)
            marked_segment = segment._replace(weights=weights.astype(np.float32))
            return with_along(run_along)(pair, inner, marked_segment, active)

        (_, along), _, bad = run_log(
            marked, ((start[0], along), start[1]), log, reader, "carrying the tangent", steps
        )
        measured, is_rough = judged(along.shadows.linearity)
        if is_rough and if_rough == "replay":
            return again(params, opt_state, ids, examples, data, measured)
        if is_rough:
            complain(measured)
        moved = add_once(params, opt_state.inner, along.tangents)
        kept = records.without(record.log, np.union1d(buried, examples))
        record = record._replace(log=jax.tree.map(jnp.asarray, kept))
        new_params, new_state, arrays = finish(params, opt_state, *moved, record)
        if int(arrays["status"]):
            if if_rough == "replay":
                return again(params, opt_state, ids, examples, data, measured)
            raise errors.NonFiniteError(
                f"Expected a finite tangent, got one that is not; nothing was released. {EPS_ROOT}"
            )
        measured |= {"route": "joint", "replayed_steps": steps}
        return new_params, new_state, measured | {"non_finite_rows": int(np.sum(bad.non_finite_rows))}

    @jax.jit
    def add_once(params, inner, tangents):
        return beside.tangents().add(
            params, inner, tangents, jnp.zeros((1,), jnp.int32), jnp.ones((1,))
        )

    finish = jax.jit(concluded)

    def refresh(params, opt_state, *, data):
        records.check_state(opt_state, RecollectRecord, "recollect")
        record = opt_state.record
        records.check_status(record.participation)
        reader, log, start = prepared(record, data, ())
        along = fresh_along(*start, num_slots, 0 if joint else num_probes)
        steps = int(record.participation.num_steps)
        run = run_plainly if joint else with_along(run_again)
        first = start if joint else ((start[0], along), start[1])
        reached, inner, _ = run_log(run, first, log, reader, "refreshing", steps)
        new_params, along = (reached, along) if joint else reached
        inner = records.set_settings(inner, records.get_settings(opt_state.inner))
        state = UnlearnerState(
            inner=tree.match_weak_types(inner, opt_state.inner),
            record=record._replace(log=jax.tree.map(jnp.asarray, log), along=along),
        )
        return tree.match_weak_types(new_params, params), state

    def quote(params, opt_state, ids):
        try:
            ids, _ = check_request(params, opt_state, ids)
        except (errors.IdError, errors.TrainingRecordError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="heuristic")
        record = opt_state.record
        steps = int(record.participation.num_steps)
        state_bytes = tree.num_bytes(params) + tree.num_bytes(opt_state.inner)
        measured, is_rough = judged(record.along.shadows.linearity)
        terms = {"num_steps": 0, "num_gradients": 0, "memory_bytes": state_bytes}
        feasible, reason, guarantee = True, "", "heuristic"
        if joint:
            each = 4 * (1 + num_probes)
            terms = {
                "num_steps": steps,
                "num_gradients": each * steps,
                "memory_bytes": (3 + 2 * num_probes) * state_bytes,
            }
        elif is_rough and if_rough == "replay":
            terms = {
                "num_steps": steps, "num_gradients": steps, "memory_bytes": 2 * state_bytes,
            }  # fmt: skip
            guarantee = "exact"
        elif is_rough:
            feasible = if_rough == "warn"
            reason = f"the run is not linear enough: relative errors {measured}"
        return Quote(
            num_forgotten=len(ids),
            feasible=feasible,
            reason=reason,
            guarantee=guarantee,
            retrain_gradients=steps,
            **terms,
        )

    return Recollector(init, update, forget, quote, forget_step, refresh, describe)


def _check_options(batch_size, max_steps, normalizer, num_probes, if_rough, rough_above, l2):
    """Refuse a bad configuration at the factory."""
    for name, value, least in (
        ("batch_size", batch_size, 1), ("max_steps", max_steps, 1), ("num_probes", num_probes, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"Expected an integer {name}={value} >= {least}.")
    if if_rough not in POLICIES:
        raise ValueError(f"Expected if_rough to be one of {POLICIES}, got {if_rough!r}.")
    if not rough_above > 0:
        raise ValueError(f"Expected rough_above={rough_above} > 0.")
    if l2 is not None and not (isinstance(l2, int | float) and l2 >= 0):
        raise ValueError(f"Expected l2={l2} >= 0, or None.")


def _check_step(ids, key, batch, batch_size, keyed, joint):
    """Refuse a step that could not be recorded."""
    if ids is None:
        return
    if jnp.shape(ids)[0] > batch_size:
        raise ValueError(f"Expected at most batch_size={batch_size} ids, got {jnp.shape(ids)[0]}.")
    if keyed and key is None:
        raise ValueError("Expected key=step_key in update: the loss takes one.")
    if batch is None and not joint:
        raise ValueError("Expected batch= in update, beside ids=: tangents are taken from its rows.")


def _check_seen(participation, table, ids):
    """The refusals of `records.check_participation`, for units."""
    records.check_status(participation)
    if not ids.size:
        return
    seen, gone = records.seen_ids(participation), records.forgotten_ids(participation)
    again = [u for u in ids if np.isin(table.examples(np.array([u])), gone).any()]
    if again:
        raise errors.AlreadyForgottenError(
            f"Expected ids that are still in the model, got {records.show_ids(again)}, already "
            "forgotten. An id is never used again; a new row needs a new id."
        )
    strangers = [u for u in ids if not np.isin(table.examples(np.array([u])), seen).any()]
    if strangers:
        never = int(participation.num_steps_with_ids) == 0
        hint = (
            "update never received ids: pass ids= on every step."
            if never
            else "There is nothing of them to forget in this run."
        )
        raise errors.NeverSeenError(
            f"Expected ids that update has seen, got {records.show_ids(strangers)}. {hint}"
        )


def _promise(measured, normalizer, recursion, joint, is_partial) -> dict[str, Any]:
    """The fields of the certificate."""
    if measured["route"] == "replay":
        return _exact_promise(normalizer)
    figures = {k: v for k, v in measured.items() if k.startswith("linearity") and math.isfinite(v)}
    seen = (
        certificates.Assumption(
            "linearity", "measured",
            "The run is as linear for the forgotten rows as it was measured to be for the probes: "
            "the relative errors listed.",
        )
        if figures
        else certificates.Assumption("linearity", "assumed", "The run is linear; not measured.")
    )  # fmt: skip
    path = (
        "Tangents of the other units were taken on the path with the forgotten rows in it, and "
        "remain in the record until refresh."
    )
    left_out = (
        ("Leaves that track_leaves leaves out: they still carry the forgotten rows.",)
        if is_partial
        else ()
    )
    return {
        "method": "recollect",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "heuristic",
        "scope": "params" if is_partial else "full-state",
        "why_no_epsilon": "a first-order prediction: its distance to the oracle is not bounded",
        "residuals": figures,
        "assumptions": (
            seen,
            certificates.Assumption("normalizer", "proven", _DIVIDED[normalizer]),
            *certificates.assumed(*_ASSUMED),
        ),
        "not_covered": (
            *(() if joint else (path,)),
            *left_out,
            "Second order: what remains of the rows after a linear correction.",
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
        ),
    }


def _exact_promise(normalizer) -> dict[str, Any]:
    return {
        "method": "recollect",
        "paper": "exact replay of the recorded run, where first order could not be trusted",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "assumptions": (
            certificates.Assumption(
                "replay fidelity", "assumed",
                "Replaying reproduces the run on this device; this was not verified.",
            ),
            certificates.Assumption("normalizer", "proven", _DIVIDED[normalizer]),
            *certificates.assumed(*_ASSUMED),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }  # fmt: skip


_DIVIDED = {
    "batch": "Sums over rows stay divided by the scheduled number of rows.",
    "kept": "Sums over rows are divided by the number of rows that are left.",
}
_ASSUMED = (
    "rows unchanged",
    "ids complete",
    "mean loss",
    "oblivious requests",
    "public settings",
    "secret record",
)
