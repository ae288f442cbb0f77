"""First-order deletion by recollection: tangents of the training state, carried along and added.

Qiao, Zhang, Tang, Wei 2025, "Hessian-Free Online Certified Unlearning" (arXiv 2404.01712), carry
for each sample the first-order change of SGD's parameters when its weight goes to zero. Here the
whole training step is linearised, so that any Optax optimizer will do, and its state is corrected
with the parameters. There is no certificate of distance: how linear the run was is measured.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxunlearn import certificates, errors, kernels, records, tree
from jaxunlearn.types import (
    ForgetInfo,
    Forgotten,
    LossFn,
    Params,
    Quote,
    Unlearner,
    UnlearnerState,
)
from jaxunlearn.unlearners.recollect._checks import (
    EPS_ROOT,
    check_gradients,
    check_options,
    complain,
    judge,
)
from jaxunlearn.unlearners.recollect._lockstep import Lockstep, end_shadows, without_states
from jaxunlearn.unlearners.recollect._promises import promise
from jaxunlearn.unlearners.recollect._training import (
    RecollectRecord,
    Routes,
    Setting,
    make_add_step,
    make_joint_step,
)
from jaxunlearn.unlearners.recollect._units import Units

__all__ = ["RecollectRecord", "Recollector", "recollect"]


class Recollector(Unlearner):
    """An `Unlearner` with two more functions.

    refresh(params, opt_state, *, data) -> (params, opt_state)
    describe(params) -> bytes of the record by part, before training starts
    """

    _names = (*Unlearner._names, "refresh", "describe")
    refresh: Callable[..., tuple[Params, UnlearnerState]]
    describe: Callable[[Params], dict[str, int]]


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
    offload: str | None = None,
    units_at_once: int | None = None,
    microbatch_size: int | None = None,
    num_probes: int = 2,
    if_rough: str = "warn",
    rough_above: float = 0.1,
    max_bytes: int | None = None,
    verify: str = "report",
    verify_tolerance: float = 1e-3,
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
      offload: "host" keeps the tangents in the host's memory: slower, for more units than fit.
      units_at_once, microbatch_size: see `kernels.state_tangents`.
      num_probes: shadow runs, each with one tracked unit of the first batch left out, trained
        beside the run to compare the change that its tangent predicts with the actual one. 0
        measures nothing.
      if_rough: what to do where that error exceeds `rough_above` or a tangent is not finite: "warn"
        goes on where it can, "refuse" raises RoughRunError, "replay" trains again without the rows.
      max_bytes: refuse to start where the record would be larger; `describe(params)` has its size.
      verify: "report" compares the gradients of training with those of the loss, step by step (with
        `joint`, the end of the replayed run with the given state, at the first deletion), and
        refuses above `verify_tolerance` (relative L2 over the run; its square root in one step);
        "off" assumes that they agree, and no certificate is exact.

    Returns:
      An `Unlearner` with `refresh(params, opt_state, *, data)`, which trains again from the initial
      state without what was forgotten, and returns its parameters and state with new tangents; and
      `describe(params)`, bytes by part, which takes shapes too.
      `forget_step(params, state, rows, ids, weights)`: ids (m,) of units, padded with -1, weights
      (m,) the new weights, zero to forget; rows are not looked at. With `joint` one segment, as
      that of `replay`: rows (S, B, ...), ids and weights (S, B), weight 0 for rows to forget.

    Cost: `update`: one Hessian product and one update a tracked unit, a gradient for each probe and
      one to verify; memory of 1 + num_probes + tracked units times that of the state. `forget`: one
      addition of the state for each unit. With `joint`, about 4 (1 + num_probes) gradients a
      recorded step.

    Guarantees:
      On quadratic losses with SGD, momentum or Nesterov, parameters and state of any single
      forgotten unit equal `records.oracle(...)` up to rounding.

    Raises (forget):
      IdError, NotTrackedError, WrongStateError, TrainingRecordError, VerificationError,
      RoughRunError, NonFiniteError (also a state from which no step is finite), CoupledLossError
      (where data is given), MissingDataError (joint, replay); inputs untouched.

    References: Qiao et al. 2025, equation (6) is recursion="paper" with optax.sgd.
    """
    check_options(num_probes, if_rough, rough_above, storage_dtype, verify, verify_tolerance)
    penalty = records.Penalty(l2, l2_mask)
    table = Units(num_examples, units, track)
    lockstep = functools.partial(
        Lockstep, tx, loss_fn, normalizer=normalizer, penalty=penalty,
        recursion=recursion, track_leaves=track_leaves, storage_dtype=storage_dtype,
        offload=offload, units_at_once=units_at_once, microbatch_size=microbatch_size,
    )  # fmt: skip
    recorder = records.Recorder(
        "recollect", RecollectRecord, loss_fn,
        num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        num_checkpoints=1, checkpoint_every=max_steps,
        num_units=table.num_units, examples_of=None if units is None else table.examples,
    )  # fmt: skip
    setting = Setting(
        tx=tx, loss_fn=loss_fn, table=table, penalty=penalty, recorder=recorder,
        beside=lockstep(slots=table.slots), along_log=lockstep(own_slots=1),
        normalizer=normalizer, num_probes=num_probes, joint=joint, max_bytes=max_bytes,
        progress=progress,
    )  # fmt: skip
    beside, routes = setting.beside, Routes(setting)
    add_step, add_at_once = make_add_step(setting)
    was_smoothness_told: list[bool] = []

    def init(params):
        setting.check_size(params)
        check_smooth_once(params)
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        return UnlearnerState(inner=inner, record=setting.fresh_record(params, inner))

    def check_smooth_once(params):
        if was_smoothness_told or if_rough == "replay" or beside.is_smooth_at_rest(params):
            return
        was_smoothness_told.append(True)
        text = (
            f"The optimizer has no finite derivative at zero gradient and fresh state. {EPS_ROOT}"
        )
        if if_rough == "refuse":
            raise errors.RoughRunError(text)
        warnings.warn(text, stacklevel=3)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        record = recorder.note(updates, opt_state, params, ids, key, extra)
        if batch is None and ids is not None and not joint:
            raise ValueError(
                "Expected batch= in update, beside ids=: tangents are taken from its rows."
            )
        inner = opt_state.inner
        grads, along = updates, record.along
        updates, new_inner = beside.inner_update(grads, inner, params, **extra)
        if ids is not None and not joint:
            ids = jnp.asarray(ids)
            num_rows = jnp.sum(ids >= 0, dtype=jnp.int32)
            traced = setting.step_of_training(
                batch, ids, num_rows, setting.keys_of(key, ids), along.slot_is_live
            )
            after = optax.apply_updates(params, updates), new_inner
            if verify != "off":
                along = beside.compared(along, params, grads, traced)
            along = beside.go_along(along, (params, inner), after, grads, traced, extra)
        return updates, UnlearnerState(inner=new_inner, record=record._replace(along=along))

    def checked(params, opt_state, ids, requester=None):
        request = recorder.request(params, opt_state, ids, requester)
        if not joint:
            table.check_tracked(request.ids)
        return request

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        ids, record = request.ids, opt_state.record
        if not ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("recollect", request))
        examples = table.examples(ids)
        if verify != "off":
            check_gradients(record.along, verify_tolerance)
        if data is not None or joint:  # a few retained rows are read wherever there is data
            few = np.setdiff1d(records.seen_ids(record.participation), examples)[:8]
            recorder.open(data, few, params)(few)
        new_params, new_state, measured = decide(params, opt_state, ids, examples, data)
        participation = records.bury(new_state.record.participation, examples)
        new_state = UnlearnerState(
            new_state.inner, new_state.record._replace(participation=participation)
        )
        return certificates.concluded(
            request, (params, opt_state), (new_params, new_state), measured,
            **promise(
                measured, normalizer, joint, track_leaves is not None,
                num_left_out(new_state.record), verify,
            ),
        )  # fmt: skip

    def num_left_out(record):
        """Units forgotten since the tangents were made; with `joint`, in the whole run."""
        if not joint:
            return int(np.sum(~np.asarray(record.along.slot_is_live)))
        return table.count(records.forgotten_ids(record.participation))

    def decide(params, opt_state, ids, examples, data):
        """First order where it can be trusted, else what `if_rough` says."""
        linearity = opt_state.record.along.shadows.linearity
        details: dict[str, Any] = {"route": "tangents"}
        if joint:
            along, end, num_bad = routes.tangent_along_log(opt_state, examples, data)
            steps = int(opt_state.record.participation.num_steps)
            details = {"route": "joint", "replayed_steps": steps, "non_finite_rows": num_bad}
            details |= compared_with_run(end, params, opt_state)
            linearity = along.shadows.linearity
        measured, is_rough = judge(linearity, rough_above)
        if is_rough and if_rough != "replay":
            complain(measured, rough_above, if_rough)
        if not (is_rough and if_rough == "replay"):
            moved = (
                routes.add_tangent(params, opt_state, along, examples)
                if joint
                else add(params, opt_state, ids)
            )
            if not int(moved[2]["status"]):
                return *moved[:2], details | measured
            if if_rough != "replay":
                raise errors.NonFiniteError(
                    "Expected finite tangents and a state that training can go on from, got others "
                    "(a negative second moment, say); nothing was released. "
                    f"{EPS_ROOT}"
                )
        new_params, new_state, again = routes.train_again(params, opt_state, examples, data)
        return new_params, without_shadows(new_state, ids), details | again | measured

    def compared_with_run(end, params, opt_state):
        """The replayed run beside the given state, which is its end until a first deletion."""
        if verify == "off" or records.forgotten_ids(opt_state.record.participation).size:
            return {}
        given = params, opt_state.inner
        return records.compare_replay(
            "report", verify_tolerance, given, recorder.extras_seen, lambda: end
        )

    def add(params, opt_state, ids):
        padded = records.bucket(ids)
        return add_at_once(params, opt_state, padded, np.zeros((len(padded),), np.float32))

    def without_shadows(state, ids):
        """After training again: what goes along is still of the old path, its shadows end."""
        along = state.record.along
        live = np.array(along.slot_is_live)
        if not joint:
            live[np.asarray(table.slots(jnp.asarray(ids)))] = False
        ended = end_shadows(without_states(along.shadows))
        along = along._replace(slot_is_live=jnp.asarray(live), shadows=ended)
        return UnlearnerState(state.inner, state.record._replace(along=along))

    def refresh(params, opt_state, *, data):
        records.check_state(opt_state, RecollectRecord, "recollect")
        records.check_status(opt_state.record.participation)
        if verify != "off":
            check_gradients(opt_state.record.along, verify_tolerance)
        again = routes.refresh(params, opt_state, data)
        compared_with_run((again[0], again[1].inner), params, opt_state)
        return again

    @records.refusals_as_quotes(guarantee="heuristic")
    def quote(params, opt_state, ids):
        ids, record = checked(params, opt_state, ids).ids, opt_state.record
        steps = int(record.participation.num_steps)
        measured, is_rough = judge(record.along.shadows.linearity, rough_above)
        again, guarantee = is_rough and if_rough == "replay", "heuristic"
        if again and verify != "off":
            guarantee = "exact"
        if not ids.size:
            return Quote(feasible=True, reason="", guarantee=guarantee, retrain_gradients=steps)
        each = 4 * (1 + num_probes) if joint else int(again)
        copies = 3 + 2 * num_probes if joint else 1 + int(again)
        refused = is_rough and if_rough == "refuse"
        return Quote(
            num_forgotten=len(ids),
            feasible=not refused,
            reason=f"the run is not linear enough: {measured}" if is_rough and not again else "",
            guarantee=guarantee,
            num_steps=steps if each else 0,
            num_gradients=each * steps,
            retrain_gradients=steps,
            memory_bytes=copies * tree.num_bytes((params, opt_state.inner)),
        )

    forget_step = make_joint_step(setting) if joint else add_step
    return Recollector(
        init, update, forget, quote, forget_step, refresh=refresh, describe=setting.describe
    )
