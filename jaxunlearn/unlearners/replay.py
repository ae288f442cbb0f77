"""Exact deletion for any Optax optimizer: replay the recorded run without the forgotten rows.

The idea is old (Bourtoule et al. 2021 cut it into shards; "Unlearning at Scale", arXiv 2508.12220,
logs what a step needs); here it removes a row from parameters and every leaf of optimizer state.
"""

from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import PyTree

from jaxunlearn import certificates, errors, records, tree
from jaxunlearn.types import (
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Unlearner,
    UnlearnerState,
)

_WHY_ROUNDED = "exact up to the rounding listed as replay_distance, no noise added"


class ReplayRecord(NamedTuple):
    """What a replay needs: who took part, the step log, and checkpoints to start from."""

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints


def replay(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    max_steps: int,
    normalizer: str = "batch",
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    num_checkpoints: int = 16,
    max_checkpoint_bytes: int | None = None,
    checkpoint_every: int | None = None,
    segment_length: int | None = None,
    verify: str = "report",
    verify_tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that `forget` returns what training without the rows would have returned.

    `update` logs the ids (and key) of every step and keeps checkpoints; `forget` restarts from the
    last checkpoint before the first use of a forgotten id and trains on with its weight at zero.
    Train with `kernels.weighted_grad` and the result is bitwise the oracle's on one device and
    version; with other gradients it is the oracle's up to their rounding.

    Args:
      tx: the whole optimizer; `replay(optax.chain(clip, adamw), ...)`, never the other way round.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      num_examples: ids are dense in 0..num_examples-1.
      batch_size: the most rows a step may have.
      max_steps: the most steps a run may have; the log is allocated for them.
      normalizer: "batch" divides by the rows the step was scheduled with; "kept" by those left.
      l2: adds `l2 * params` to the gradient where `l2_mask` is true; None adds nothing.
      num_checkpoints: copies of (params, inner state), at most; >= 1.
      max_checkpoint_bytes: fewer copies, to stay within this bound.
      checkpoint_every: steps between candidates; None means max_steps // 256, at least 1.
      segment_length: steps compiled as one loop; None means 1 on CPU and 32 elsewhere.
      verify: "report" first replays without deletion, measures the distance to the given state, and
        refuses above `verify_tolerance` (relative L2 of parameters and of inner state); "bitwise"
        refuses any difference; "off" halves the cost, and the certificate says "assumed".
      progress: None shows a bar in a terminal.

    Returns:
      An `Unlearner`. The record takes `num_checkpoints` copies of the state, 4 * max_steps *
      batch_size bytes of log and two bits an example.

    Cost: `update` adds O(batch_size log batch_size), and one copy of the state when a checkpoint is
    due. `forget`: two gradients per step replayed, one with verify="off".
    `forget_step` runs one segment from a state whose record stands at its first step.

    Guarantees:
      Parameters and inner state equal `records.oracle(...)`, bit for bit, when training took its
      gradients from `weighted_grad`.
      Afterwards no leaf of the state but the seen and forgotten bits depends on a forgotten row.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      VerificationError, NonFiniteError; inputs are untouched.
    """
    records.check_choices(
        normalizer=(normalizer, ("batch", "kept")), verify=(verify, ("report", "bitwise", "off"))
    )
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    segment = records.make_segment(tx, loss_fn, normalizer=normalizer, penalty=penalty)
    rerun = records.Rerun(segment, segment_length=segment_length, show=progress)
    recorder = records.Recorder(
        "replay", ReplayRecord, loss_fn,
        num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        num_checkpoints=num_checkpoints, max_checkpoint_bytes=max_checkpoint_bytes,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip

    def init(params):
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        return UnlearnerState(inner, ReplayRecord(*recorder.start(params, inner)))

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        record = recorder.note(updates, opt_state, params, ids, key, extra)
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record)

    def forget_step(params, state, rows, ids, weights):
        window = records.window_of(state.record, rows, ids, weights)
        return records.run_window(segment, params, state, window)

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = recorder.request(params, opt_state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("replay", request))
        record, given = opt_state.record, (params, opt_state.inner)
        plan = records.plan_deletion(record, request.ids)
        reader = recorder.open(data, plan.retained, params)
        verified = records.compare_replay(
            verify, verify_tolerance, given, recorder.extras_seen,
            lambda: rerun.unchanged(plan, record.checkpoints, reader),
        )  # fmt: skip
        reached, met, checkpoints = rerun.without(plan, record.checkpoints, reader)
        if not bool(tree.all_finite(reached[0])):
            raise errors.NonFiniteError(
                "Replaying without the forgotten rows gave parameters that are not finite; nothing "
                "was released. The retained run itself diverges."
            )
        new_params, inner = records.as_given(reached, given)
        new_record = records.after_deletion(
            record, request.ids, plan, checkpoints, plan.start, met.non_finite
        )
        measured = {
            "replayed_steps": plan.stop - plan.start,
            "first_step": plan.start,
            "non_finite_rows": int(np.sum(met.non_finite_rows)),
            "non_finite_updates": int(np.sum(new_record.log.step_non_finite)),
            **verified,
        }
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)), measured,
            **_promise(measured, normalizer, verify_tolerance),
        )  # fmt: skip

    @records.refusals_as_quotes(guarantee="exact")
    def quote(params, opt_state, ids):
        ids, record = recorder.request(params, opt_state, ids).ids, opt_state.record
        plan = records.plan_deletion(record, ids)
        steps = plan.stop - plan.start if ids.size else 0
        runs = 1 if verify == "off" else 2
        state_bytes = tree.num_bytes((params, opt_state.inner))
        seconds = rerun.seconds_per_step
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason="",
            guarantee="exact",
            num_steps=steps,
            num_gradients=runs * steps,
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=tree.num_bytes(record.checkpoints) + 2 * state_bytes if ids.size else 0,
            seconds=None if seconds is None else runs * steps * seconds,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _promise(measured, normalizer, tolerance) -> dict[str, Any]:
    """The fields of the certificate: the oracle's state, as far as the replay was verified."""
    how = {
        "bitwise": ("measured", "The run replayed to the given state bit for bit before deletion."),
        "within tolerance": (
            "measured",
            "The run replayed to the given state within the residual listed, below the tolerance "
            f"{tolerance:g}, before deletion.",
        ),
        "no": ("assumed", "Replaying reproduces the run on this device; this was not verified."),
    }
    rounded = measured["verified"] == "within tolerance"
    return {
        "method": "replay",
        "paper": "exact replay of the recorded run (Unlearning at Scale, arXiv 2508.12220)",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": _WHY_ROUNDED if rounded else certificates.WHY_EXACT,
        "residuals": {"replay_distance": measured["replay_distance"]} if rounded else {},
        "assumptions": (
            certificates.Assumption("replay fidelity", *how[measured["verified"]]),
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }
