"""The Memory Pair: online L-BFGS on a stream whose inserts can be deleted again.

Stewart 2025 (arXiv 2508.10193) pairs a learner, one step of online L-BFGS per event, with an
unlearner that steps back along H g of the deleted row and adds noise. The state is the parameters
and the curvature pairs; the published step leaves the pairs alone, and after some steps it moves
away from the model that never saw the row. Four ways to delete are here, and only one is exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxunlearn import accounting, certificates, errors, kernels, records, transforms, tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.types import (
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    UnlearnerState,
)
from jaxunlearn.unlearners.memory_pair._events import (
    Event,
    EventKind,
    Outcome,
    Stream,
    StreamOutput,
    StreamState,
    StreamUnlearner,
)
from jaxunlearn.unlearners.memory_pair._online import (
    make_online_step,
    make_twin_segment,
    make_twin_step,
    relative_gap,
    twins_of,
)
from jaxunlearn.unlearners.memory_pair._promises import promise, terms
from jaxunlearn.unlearners.memory_pair._steps import (
    correct_now,
    correction,
    insert_of,
    other_of,
)
from jaxunlearn.unlearners.memory_pair._stream import (
    Learner,
    is_gone,
    is_trusted,
    make_stream,
    moved_by,
    without_sums,
)

__all__ = [
    "Event",
    "EventKind",
    "MemoryPairRecord",
    "Outcome",
    "Stream",
    "StreamOutput",
    "StreamState",
    "StreamUnlearner",
    "memory_pair",
]

MODES = ("replay", "tangent", "drop_pair", "paper")


class MemoryPairRecord(NamedTuple):
    """What deletion needs: the ledger of inserts, checkpoints, and how many ids were deleted."""

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    num_deletions: Int[Array, ""]


class _Deleted(NamedTuple):
    """What one way of deleting gives back."""

    params: Any
    inner: transforms.OnlineLBFGSState
    checkpoints: records.Checkpoints
    measured: dict[str, Any]


def memory_pair(
    loss_fn: LossFn,
    *,
    num_examples: int,
    max_steps: int,
    batch_size: int = 1,
    mode: str = "replay",
    learning_rate: Any = 0.5,
    memory_size: int = 10,
    admission: lbfgs.Admission | None = None,
    l2: float | None = None,
    normalizer: str = "kept",
    optimizer_options: dict[str, Any] | None = None,
    paper: transforms.PaperDeletion | None = None,
    odometer: accounting.DeletionOdometer | None = None,
    nothing_below: float | None = 32.0,
    num_checkpoints: int = 16,
    checkpoint_every: int | None = None,
    segment_length: int | None = None,
    verify: str = "report",
    verify_tolerance: float = 1e-4,
    progress: bool | None = None,
) -> StreamUnlearner:
    """Online L-BFGS whose inserts can be deleted, by single requests or within the stream itself.

    The optimizer is `transforms.online_lbfgs(loss_fn, ...)`, and `inner` is its state. In a loop,
    `update(grads, state, params, batch=rows, ids=ids)` is one insert: the incoming updates move the
    parameters, and the pair is made from `loss_fn` on `batch`, at both ends of the step. Incoming
    updates are taken to be `kernels.weighted_grad(loss_fn)` of that batch; where they were not,
    `verify` refuses to delete. Without `batch` the step is taken and no pair is offered.

    Args:
      num_examples: ids are dense in 0..num_examples-1.
      max_steps: inserts that a run may have; the ledger is allocated for them.
      batch_size: the most rows an insert may have; each pair carries that many ids.
      mode: "replay": the ledger runs again from the last checkpoint without the rows, admissions
        taken anew; exact. "tangent": the same with gradients to first order around the recorded
        run; exact where the loss is quadratic, and no cheaper.
        "drop_pair": the rows' own pairs go, the parameters stay. "paper": the published step back,
        which leaves the pairs; `paper=` chooses the version.
      learning_rate, memory_size, admission, l2: of `transforms.online_lbfgs`;
        `optimizer_options`: its others.
      normalizer: "kept" divides a step by the rows that are left, as if the others had not come;
        "batch" by the rows it had. A step that keeps none is not taken. The default is not
        `replay`'s, since a stream has no schedule that would say how many rows were to come.
      odometer: how many deletions "paper" may make, and with which noise; told by `quote`.
      nothing_below: in units of the parameters' rounding. "paper" and "drop_pair" first follow the
        rows' influence to the present; where both runs agreed to that since before the oldest pair,
        nothing is left in parameters and pairs, and they stay. The counters and S_t, which forget
        nothing, become those of the run without the rows, to first order. None does not look.
      num_checkpoints, checkpoint_every, segment_length, verify, verify_tolerance, progress: as in
        `unlearners.replay`; "paper" and "drop_pair" verify nothing.

    Returns:
      An `Unlearner` with the attribute `stream`, an `unlearners.Stream`. `forget_step` takes,
      for "replay", a segment of steps as `unlearners.replay` does; for "tangent" one whose ids are
      in place, with weight 0 for rows to go; else the rows (b, ...) to go, with weight 1. That one
      is a deletion like those of `forget`, noted and charged, and does not look whether anything
      is left. It is poisoned, with a status, where an id was forgotten already or never seen, and
      where capacity or sensitivity are exceeded.

    Cost: an insert: three gradients, two with optimizer_options={"incoming": "gradient"}. A
      deletion: as many for each step replayed, again to verify. To first order six more instead:
      two gradients and two Hessian products, counted as two; "paper" adds one for each id.

    Guarantees:
      Mode "replay" returns, bit for bit on one device, the parameters, pairs, counters and
      accumulators of a run in which the rows never came.
      The other modes promise nothing: their certificates say "heuristic" and name no epsilon.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      VerificationError, BudgetExhaustedError, NonFiniteError; inputs are untouched.

    References: Stewart 2025, arXiv 2508.10193. Deviations: a ledger says who was inserted and who
      is gone; noise is calibrated by `accounting.DeletionOdometer`; see also `transforms`.
    """
    _check_options(mode, normalizer, paper, odometer, verify)
    options = {"learning_rate": learning_rate, "l2": l2} | dict(optimizer_options or {})
    tx = transforms.online_lbfgs(
        loss_fn, memory_size=memory_size, owners_per_pair=batch_size, admission=admission, **options
    )
    inner_update = records.wrapped_update(tx, records.Penalty(None))
    online_step = make_online_step(tx, loss_fn, normalizer=normalizer)
    looks = mode == "tangent" or (mode != "replay" and nothing_below is not None)
    twin_step = make_twin_step(
        tx, loss_fn, normalizer=normalizer, rounding_units=nothing_below or 0.0
    )
    per_step = 2 if options.get("incoming") == "gradient" else 3
    back = correction(loss_fn, mode, paper, odometer, options)
    segment_of = records.loop_over_steps(online_step)
    twin_segment = make_twin_segment(twin_step)
    correct, drop_after = jax.jit(back), jax.jit(records.drop_after)
    rerun, rerun_twins = (
        records.Rerun(segment, segment_length=segment_length, show=progress)
        for segment in (segment_of, twin_segment)
    )
    recorder = records.Recorder(
        "memory_pair", MemoryPairRecord, loss_fn,
        num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        num_checkpoints=num_checkpoints, checkpoint_every=checkpoint_every,
    )  # fmt: skip

    def init(params):
        inner = tree.copy(tx.init(params))
        none = jnp.zeros((), jnp.int32)
        return UnlearnerState(inner, MemoryPairRecord(*recorder.start(params, inner), none))

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del extra
        record = recorder.note(updates, opt_state, params, ids, key, ())
        if ids is not None and batch is None:
            raise ValueError("Expected batch= with ids=: the pair of an insert is made of them.")
        insert = insert_of(batch, None if ids is None else jnp.asarray(ids), key)
        updates, inner = inner_update(updates, opt_state.inner, params, **insert)
        return updates, UnlearnerState(inner, record)

    def forget_step(params, state, rows, ids, weights):
        if mode in ("replay", "tangent"):
            runner = segment_of if mode == "replay" else other_of(twin_segment)
            window = records.window_of(state.record, rows, ids, weights)
            return records.run_window(runner, params, state, window)
        return correct_now(back, num_examples, odometer, params, state, rows, ids, weights)

    def checked(params, opt_state, ids, requester=None):
        request = recorder.request(params, opt_state, ids, requester)
        if odometer is not None:
            odometer.spend(int(opt_state.record.num_deletions), len(request.ids))
        return request

    def by_replay(params, opt_state, ids, reader, plan):
        """The state without the rows, checkpoints rewritten on the way."""
        del ids
        checkpoints = opt_state.record.checkpoints
        measured = records.compare_replay(
            verify, verify_tolerance, (params, opt_state.inner), set(),
            lambda: rerun.unchanged(plan, checkpoints, reader),
        )  # fmt: skip
        (new, inner), met, fresh = rerun.without(plan, checkpoints, reader)
        measured["non_finite_rows"] = int(np.sum(met.non_finite_rows))
        return _Deleted(new, inner, fresh, measured)

    def follow(opt_state, ids, reader, plan, rewrite=None):
        """Both runs at the present, to first order; and checkpoints of the one without the rows."""
        start = twins_of(*records.read_slot(opt_state.record.checkpoints, plan.slot))
        carry = (start, jnp.asarray(records.bucket(ids)))
        other = lambda twins, ids: (twins.other_params, twins.other_inner)
        run = rerun_twins(plan.log, plan, carry, reader, rewrite=rewrite, reached=other)
        return run[0][0], run[2]

    def by_tangent(params, opt_state, ids, reader, plan):
        """The given parameters moved as the linearised run is from the recorded one."""
        twins, fresh = follow(opt_state, ids, reader, plan, opt_state.record.checkpoints)
        how = "off" if int(opt_state.record.num_deletions) else verify
        given = (params, opt_state.inner)
        measured = records.compare_replay(
            how, verify_tolerance, given, set(), lambda: (twins.params, twins.inner)
        )
        influence = float(relative_gap(twins.other_params, twins.params))
        if not bool(is_trusted(twins)):
            raise errors.VerificationError(
                f"Expected a first-order move well below the parameters' norm, got {influence:.3g} "
                "of it: this run is not smooth enough for first order. Nothing was changed; use "
                'mode="replay".'
            )
        new, inner = moved_by(params, opt_state.inner, twins)
        return _Deleted(new, inner, fresh, measured | {"influence": influence})

    def by_correction(params, opt_state, ids, reader, plan):
        """The published step, or the rows' pairs dropped, unless nothing of them is left."""
        measured: dict[str, Any] = {"nothing_left": False}
        checkpoints = drop_after(opt_state.record.checkpoints, plan.start)
        ids = records.bucket(ids)
        if looks:
            twins, _ = follow(opt_state, ids, reader, plan)
            measured["influence"] = float(relative_gap(twins.other_params, twins.params))
            if bool(is_gone(opt_state.inner, twins, jnp.asarray(ids))):
                measured["nothing_left"] = True
                inner = tree.copy(without_sums(opt_state.inner, twins))
                return _Deleted(tree.copy(params), inner, checkpoints, measured)
        before = opt_state.record.num_deletions
        new, inner, norm, stddev, _ = correct(params, opt_state.inner, reader(ids), ids, before)
        if odometer is not None:
            odometer.check_step(float(norm))
        measured |= {"step_norm": float(norm), "noise_stddev": float(stddev)}
        return _Deleted(new, inner, checkpoints, measured)

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        ids, record = request.ids, opt_state.record
        if not ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("memory_pair", request))
        plan = records.plan_deletion(record, ids)
        reader = recorder.open(data, plan.retained, params)
        by = {"replay": by_replay, "tangent": by_tangent}.get(mode, by_correction)
        done = by(params, opt_state, ids, reader, plan)
        if not bool(tree.all_finite(done.params)):
            raise errors.NonFiniteError(
                "The deletion gave parameters that are not finite; nothing was released."
            )
        measured = done.measured | {"first_step": plan.start, "last_step": plan.stop}
        given = (params, opt_state.inner)
        new_params, inner = tree.match_weak_types((done.params, done.inner), given)
        new_record = records.after_deletion(record, ids, plan, done.checkpoints)
        new_record = new_record._replace(num_deletions=record.num_deletions + len(ids))
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)), measured,
            **promise(mode, measured, normalizer, verify_tolerance),
        )  # fmt: skip

    guarantee = "exact" if mode == "replay" else "heuristic"

    @records.refusals_as_quotes(guarantee=guarantee)
    def quote(params, opt_state, ids):
        ids, record = checked(params, opt_state, ids).ids, opt_state.record
        plan = records.plan_deletion(record, ids)
        steps = plan.stop - plan.start if ids.size and (mode == "replay" or looks) else 0
        passes = 1 if verify == "off" else 2
        cost = per_step * passes if mode == "replay" else per_step + 6
        state_bytes = tree.num_bytes((params, opt_state.inner))
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason=terms(odometer, record, opt_state.inner, len(ids)),
            guarantee=guarantee,
            num_steps=steps,
            num_gradients=cost * steps + (len(ids) if mode == "paper" else 0),
            retrain_gradients=per_step * int(record.participation.num_steps),
            memory_bytes=(tree.num_bytes(record.checkpoints) + 2 * state_bytes) if ids.size else 0,
        )

    learner = Learner(
        online_step, kernels.weighted_loss(loss_fn), twin_step if looks else None, back
    )
    stream = make_stream(
        init, learner, num_examples=num_examples, mode=mode, every=recorder.every,
        max_deletions=None if odometer is None else odometer.max_deletions, keyed=recorder.keyed,
    )  # fmt: skip
    return StreamUnlearner(init, update, forget, quote, forget_step, stream=stream)


def _check_options(mode, normalizer, paper, odometer, verify):
    """Refuse a bad configuration at the factory."""
    records.check_choices(
        mode=(mode, MODES),
        normalizer=(normalizer, ("batch", "kept")),
        verify=(verify, ("report", "bitwise", "off")),
    )
    if not isinstance(paper, transforms.PaperDeletion | None):
        raise TypeError(f"Expected paper to be a transforms.PaperDeletion, got {paper!r:.80}.")
    if odometer is not None and mode != "paper":
        raise ValueError(
            f'Expected mode="paper" with an odometer, got {mode!r}: no noise is added.'
        )
