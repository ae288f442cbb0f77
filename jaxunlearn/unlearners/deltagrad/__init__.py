"""DeltaGrad (Wu, Dobriban and Davidson 2020): retraining with most of its gradients foretold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, DTypeLike, Int, PyTree

from jaxunlearn import certificates, errors, kernels, records, tree
from jaxunlearn.types import (
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Unlearner,
    UnlearnerState,
)
from jaxunlearn.unlearners.deltagrad._cached_runs import (
    CachedRun,
    check_cached_run,
    make_cached_run,
)
from jaxunlearn.unlearners.deltagrad._corrected import (
    CorrectedSteps,
    GoneRows,
    StepRows,
    make_corrected,
    make_corrected_segment,
    reads_loss,
    run_corrected,
    settle_steps,
)
from jaxunlearn.unlearners.deltagrad._trajectory import (
    Trajectory,
    check_trajectory_bytes,
    init_trajectory,
    trajectory_bytes,
    write_trajectory,
)

__all__ = ["DeltaGradRecord", "deltagrad", "trajectory_bytes"]

PAPER = "Wu, Dobriban and Davidson 2020, DeltaGrad (ICML 2020, arXiv 2006.14755)"


class DeltaGradRecord(NamedTuple):
    """What DeltaGrad needs: who took part, the step log, checkpoints, the cached trajectory.

    delta_pairs, delta_first: the L-BFGS pairs, and the first step that lost a row (-1: none yet),
      of a correction under way in `forget_step`; empty before one, and after `forget`.
    foretold_steps: whether the cached gradient of a step was foretold by an earlier deletion.
    """

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    trajectory: Trajectory
    delta_pairs: kernels.lbfgs.LBFGSMemory
    delta_first: Int[Array, ""]
    foretold_steps: Bool[Array, "steps"]


def deltagrad(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    max_steps: int,
    period: int = 5,
    burn_in: int = 10,
    settle: int | None = None,
    memory_size: int = 2,
    normalizer: str = "kept",
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    if_nonconvex: str = "exact",
    storage_dtype: DTypeLike | None = None,
    max_bytes: int | None = 4 * 2**30,
    num_checkpoints: int = 8,
    verify: str = "report",
    verify_tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that `forget` retrains without the rows, most gradients foretold by L-BFGS.

    `update` caches the parameters w_t and the gradient g_t of every step. `forget` goes through the
    steps again at w'_t. An exact step evaluates the gradient of the retained rows, and keeps the
    pair (w'_t - w_t, change of the gradient). Between them it is foretold, n rows of which k go:

        g'_t = (n (g_t + B (w'_t - w_t)) - sum_forgotten grad loss_i(w'_t)) / (n - k)

    Either way `tx.update` then runs as it stands, so momentum, Nesterov's, clipping and schedules
    are those of the run without the rows, and the optimizer state follows. For SGD and momentum on
    smooth losses; Adam did as well on logistic regression (digits, 80 steps: both left 0.04 of the
    distance of doing nothing in the parameters).

    Args:
      tx: the whole optimizer. One that reads the loss (a line search) takes exact steps only.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      num_examples: ids are dense in 0..num_examples-1.
      batch_size, max_steps: the most rows of a step and steps of a run; both are allocated.
      period: every period-th step is exact, >= 1; with 1 all are: exact retraining.
      burn_in: exact steps from the first step that used a forgotten row on, >= 0.
      settle: exact steps at the end, >= 0; None: 10 where the optimizer's state has floats beside
        injected hyperparameters, made of the last gradients (of momentum's, 0.83 of the do-nothing
        distance were left, 0.23 with 10; of Adam's 0.65 and 0.41).
      memory_size: pairs, >= 1.
      normalizer: "kept" divides by the rows left, as retraining on the smaller data set (the
        paper's) does: hence a default that is not `replay`'s; "batch" by the rows scheduled. Give
        the same to `oracle`.
      l2: adds `l2 * params` where `l2_mask` is true, at w' and so without error; None adds nothing.
      if_nonconvex: "exact" takes an exact step where the last pair had no positive curvature, or
        the correction is beyond the smoothness that the pairs measured; "ignore" trusts B always.
      storage_dtype: of the cached gradients; None is that of the parameters. bfloat16 saves a
        quarter, and its rounding hides what pairs are made of, so that all steps become exact.
      max_bytes: refuse a larger trajectory before training; None allows any.
      num_checkpoints: copies of (params, inner state), to start from.
      verify: "report" runs the cached gradients through `tx` to the end and evaluates two of them,
        and refuses above `verify_tolerance` (relative); "off" assumes that all is well.
      progress: None shows a bar in a terminal.

    Returns:
      An `Unlearner`. The trajectory takes `unlearners.trajectory_bytes(params, max_steps)`: two
      parameter counts a step.

    Cost: `update` copies params and gradient. `forget`: one gradient an exact step, that of the
      forgotten rows in a foretold one (none where the batch has none), and a copy of the
      trajectory. `data` is asked for the batches of exact steps and for the forgotten rows.
      `forget_step` runs a segment from a state whose record stands at its first step: `ids` as
      logged, weight 0 for the rows to forget, whose content it needs; all rows are differentiated.

    Guarantees:
      With period=1 the result is that of `oracle` up to rounding, and no forgotten row is read.
      Steps before the first use of a forgotten row evaluate nothing.
      Cached steps are overwritten by the corrected ones, so a later deletion builds on them.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      VerificationError, NonFiniteError; inputs are untouched.

    References: Wu et al. 2020: full batch, mini-batches, deletions one after another, and networks
      (`if_nonconvex`). Deviations: burn-in counts from the first step that used a forgotten row; L2
      is outside B; a pair without positive curvature, or at the level of rounding, is not admitted;
      the smoothness bound is 1.5 times the largest y'y / s'y of the pairs.
    """
    records.check_choices(
        normalizer=(normalizer, ("kept", "batch")),
        verify=(verify, ("report", "off")),
        if_nonconvex=(if_nonconvex, ("exact", "ignore")),
    )
    records.check_integers(period=period, memory_size=memory_size)
    records.check_integers(0, burn_in=burn_in, settle=0 if settle is None else settle)
    records.check_storage(storage_dtype)
    all_exact = period == 1
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    steps = make_corrected(
        tx, loss_fn, normalizer=normalizer, penalty=penalty,
        learns=not all_exact, guarded=if_nonconvex == "exact",
    )  # fmt: skip
    compiled = CorrectedSteps(*map(jax.jit, steps))
    is_due = lambda since: (since < burn_in) | ((since - burn_in) % period == 0)
    write = jax.jit(write_trajectory, donate_argnums=0)
    tools = make_cached_run(steps, loss_fn, normalizer=normalizer)
    recorder = records.Recorder(
        "deltagrad", DeltaGradRecord, loss_fn,
        num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        num_checkpoints=num_checkpoints,
    )  # fmt: skip
    seconds_per_step: list[float] = []

    def init(params):
        check_trajectory_bytes(params, max_steps, storage_dtype, max_bytes)
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        record = DeltaGradRecord(
            *recorder.start(params, inner),
            trajectory=init_trajectory(params, max_steps, storage_dtype=storage_dtype),
            delta_pairs=kernels.lbfgs.init(params, memory_size),
            delta_first=jnp.full((), -1, jnp.int32),
            foretold_steps=jnp.zeros((max_steps,), bool),
        )
        return UnlearnerState(inner, record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        record = recorder.note(updates, opt_state, params, ids, key, extra)
        step = opt_state.record.participation.num_steps
        trajectory = write_trajectory(record.trajectory, step, params, updates)
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record._replace(trajectory=trajectory))

    def forget_step(params, state, rows, ids, weights):
        record, begin = state.record, state.record.participation.num_steps
        window = records.window_of(record, rows, ids, weights)
        segment, ids = window.segment, window.segment.ids
        kept = jnp.where(ids >= 0, segment.weights, 0).astype(jnp.float32)
        gone = ((ids >= 0) & (segment.weights == 0)).astype(jnp.float32)
        step_rows = StepRows(
            *(rows, ids, kept), *(rows, ids, gone), jnp.sum(kept, axis=1),
            segment.num_rows, segment.keys, segment.settings,
        )  # fmt: skip
        carry = (params, state.inner, record.delta_pairs, record.trajectory, record.delta_first)
        always = all_exact or reads_loss(tx, params, state.inner)
        run = make_corrected_segment(steps, is_due, always=always)
        num_logged = jnp.sum(record.log.step_num_rows >= 0)
        settled = num_logged - settle_steps(settle, state.inner)
        spoilt = window.of(record.log.step_non_finite) | (window.cursor >= settled)
        carry, told, bad = run(carry, step_rows, spoilt, begin, window.active)
        new_params, inner, pairs, trajectory, first = carry
        foretold = record.foretold_steps.at[window.cursor].set(told, mode="drop")
        record = records.passed(record, window, bad)._replace(
            trajectory=trajectory, delta_pairs=pairs, delta_first=first, foretold_steps=foretold
        )
        figures = {"num_steps": window.active, "num_foretold": jnp.sum(told)}
        return records.finished(new_params, inner, record, **figures)

    def plan_of(params, opt_state, ids):
        """The run to take up again, and which of its steps are exact by schedule."""
        record = opt_state.record
        plan = records.plan_deletion(record, ids)
        needs_loss = reads_loss(tx, params, opt_state.inner)
        plan = plan._replace(first=plan.start if needs_loss else plan.first)
        foretold = np.array(jax.device_get(record.foretold_steps))
        run = CachedRun(plan, record.checkpoints, record.trajectory, foretold, needs_loss)
        at = np.arange(plan.first, plan.stop)
        settled = plan.stop - settle_steps(settle, opt_state.inner)
        due = is_due(at - plan.first) | needs_loss | all_exact | (at >= settled)
        return run, due | plan.log.step_non_finite[plan.first : plan.stop]

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = recorder.request(params, opt_state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("deltagrad", request))
        record, given = opt_state.record, (params, opt_state.inner)
        run, due = plan_of(params, opt_state, request.ids)
        reader = recorder.open(data, run.plan.retained, params)
        start = tools.start_of(run)
        verified: dict[str, Any] = {"verified": "no"}
        if verify == "report":
            distance = tools.check(run, start, given, reader, request.ids if all_exact else ())
            check_cached_run(distance, verify_tolerance, run.trajectory, recorder.extras_seen)
            verified = {"verified": "within tolerance", "replay_distance": distance}
        gone = GoneRows(request.ids, run.plan, reader, wanted=not all_exact)
        begin = (*start, kernels.lbfgs.init(params, memory_size), tree.copy(run.trajectory))
        (*reached, _, trajectory), checkpoints, met = run_corrected(
            compiled, write, begin, gone, reader, due, run.plan, run.checkpoints, show=progress
        )
        if not bool(tree.all_finite(reached[0])):
            raise errors.NonFiniteError(
                "The corrected run gave parameters that are not finite; nothing was released. It "
                "diverges, or its foretold steps do: lower period."
            )
        figures = {"first_step": run.plan.first} | met.figures(due) | verified
        new_params, inner = records.as_given(reached, given)
        run.foretold_steps[run.plan.first : run.plan.stop] = met.told
        new_record = records.after_deletion(
            record, request.ids, run.plan, checkpoints, run.plan.first, met.non_finite
        )._replace(
            trajectory=trajectory,
            delta_pairs=kernels.lbfgs.init(params, memory_size),
            delta_first=jnp.full((), -1, jnp.int32),
            foretold_steps=jnp.asarray(run.foretold_steps),
        )
        result = certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)), figures,
            **_promise(figures, normalizer, run.foretold_steps, reads_gone=not all_exact),
        )  # fmt: skip
        seconds_per_step[:] = [result.info.seconds / max(1, len(due))]
        return result

    @records.refusals_as_quotes(guarantee="heuristic")
    def quote(params, opt_state, ids):
        ids, record = recorder.request(params, opt_state, ids).ids, opt_state.record
        due = plan_of(params, opt_state, ids)[1] if ids.size else np.zeros(0, bool)
        state_bytes = tree.num_bytes((params, opt_state.inner))
        copied = tree.num_bytes((record.trajectory, record.checkpoints, record.delta_pairs))
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason="more gradients where a foretold one is not trusted",
            guarantee="heuristic",
            num_steps=len(due),
            num_gradients=int(due.sum()) + (2 * (verify == "report") if ids.size else 0),
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=copied + 2 * state_bytes if ids.size else 0,
            seconds=len(due) * seconds_per_step[0] if seconds_per_step else None,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _promise(figures, normalizer, foretold_steps, *, reads_gone: bool) -> dict[str, Any]:
    """The fields of the certificate: aimed at the oracle's state, and nothing proven.

    foretold_steps: of the whole run, by this deletion or an earlier one.
    reads_gone: whether the rows that go were read.
    """
    fidelity = {
        "no": ("assumed", "The cached run is that of tx, loss_fn and data; this was not verified."),
        "within tolerance": ("measured", "Cached gradients led to the state, as replay_distance."),
    }[figures["verified"]]
    exact, total = figures["exact_steps"], figures["num_steps"]
    taken = f"{exact} of {total} steps took the evaluated gradient"
    why = f"{taken}: the oracle's run up to rounding, which nothing bounds"
    left: tuple[str, ...] = ()
    if np.any(foretold_steps):
        others = "the others a foretold one" if exact < total else "earlier ones a foretold one"
        why = f"{taken}, {others}: its error is measured at some steps and bounded at none"
        settled = (
            "; the optimizer's state, of those before the last "
            f"{figures['settled_steps']} steps, which were exact"
        )
        left = (f"What foretold gradients still carry of the forgotten rows{settled}.",)
    if reads_gone:
        left += ("The deletion itself: it reads the forgotten rows to subtract their gradients.",)
    names = ("gradient_mismatch", "correction_mismatch", "replay_distance")
    return {
        "method": "deltagrad",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "heuristic",
        "scope": "full-state",
        "why_no_epsilon": why,
        "residuals": {name: figures[name] for name in names if name in figures},
        "assumptions": (
            certificates.Assumption("replay fidelity", *fidelity),
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": (
            *left,
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
        ),
    }
