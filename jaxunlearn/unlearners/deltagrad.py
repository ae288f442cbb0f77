"""DeltaGrad (Wu, Dobriban and Davidson 2020): retraining with most of its gradients foretold."""

import functools
import time
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
    Status,
    Unlearner,
    UnlearnerState,
)

PAPER = "Wu, Dobriban and Davidson 2020, DeltaGrad (ICML 2020, arXiv 2006.14755)"
_RECOMPUTED = {"value", "grad", "value_fn"}


class DeltaGradRecord(NamedTuple):
    """What DeltaGrad needs: who took part, the step log, checkpoints, the cached trajectory.

    delta_pairs, delta_first: the L-BFGS pairs, and the first step that lost a row (-1: none yet),
      of a correction under way in `forget_step`; empty before one, and after `forget`.
    foretold_steps: whether the cached gradient of a step was foretold by an earlier deletion.
    """

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    trajectory: records.Trajectory
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
    settle: int = 0,
    memory: int = 2,
    normalizer: str = "kept",
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    if_nonconvex: str = "exact",
    storage: DTypeLike | None = None,
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
    smooth losses; Adam is allowed, and did as well on logistic regression (digits, 80 steps: 0.07
    of the distance of doing nothing, momentum 0.06). Momentum's own state needs `settle`.

    Args:
      tx: the whole optimizer. One that reads the loss (a line search) takes exact steps only.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      num_examples: ids are dense in 0..num_examples-1.
      batch_size, max_steps: the most rows of a step and steps of a run; both are allocated.
      period: every period-th step is exact, >= 1; with 1 all are: exact retraining.
      burn_in: exact steps from the first step that used a forgotten row on, >= 0.
      settle: exact steps at the end, >= 0: the optimizer's state remembers the last gradients only.
      memory: pairs, >= 1.
      normalizer: "kept" divides by the rows left, as retraining on the smaller data set (the
        paper's) does; "batch" by the rows scheduled. Give the same to `oracle`.
      l2: adds `l2 * params` where `l2_mask` is true, at w' and so without error; None adds nothing.
      if_nonconvex: "exact" takes an exact step where the last pair had no positive curvature, or
        the correction is beyond the smoothness that the pairs measured; "ignore" trusts B always.
      storage: dtype of the cached gradients; None is that of the parameters. bfloat16 saves a
        quarter, and its rounding hides what pairs are made of, so that all steps become exact.
      max_bytes: refuse a larger trajectory before training; None allows any.
      num_checkpoints: copies of (params, inner state), to start from.
      verify: "report" runs the cached gradients through `tx` to the end and evaluates two of them,
        and refuses above `verify_tolerance` (relative); "off" assumes that all is well.
      progress: None shows a bar in a terminal.

    Returns:
      An `Unlearner`. The trajectory takes `records.trajectory_bytes(params, max_steps)`: two
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
    _check_options(
        {"batch_size": batch_size, "max_steps": max_steps, "period": period, "memory": memory,
         "num_checkpoints": num_checkpoints},
        {"normalizer": (normalizer, ("kept", "batch")), "verify": (verify, ("report", "off")),
         "if_nonconvex": (if_nonconvex, ("exact", "ignore"))},
        {"burn_in": burn_in, "settle": settle}, l2, storage,
    )  # fmt: skip
    records.check_num_examples(num_examples)
    keyed, all_exact = kernels.takes_key(loss_fn), period == 1
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    steps = records.make_corrected(
        tx, loss_fn, normalizer=normalizer, penalty=penalty,
        learns=not all_exact, guarded=if_nonconvex == "exact",
    )  # fmt: skip
    compiled = records.CorrectedSteps(*map(jax.jit, steps))
    is_due = lambda since: (since < burn_in) | ((since - burn_in) % period == 0)
    write = jax.jit(records.write_trajectory, donate_argnums=0)
    every = max(1, max_steps // 256)
    info_of = functools.partial(ForgetInfo.of, "deltagrad")
    tools = records.make_cached_run(steps, loss_fn, normalizer=normalizer)
    extras_seen: set[str] = set()
    loss_checked: list[bool] = []
    seconds_per_step: list[float] = []

    def init(params):
        records.check_trajectory_bytes(params, max_steps, storage, max_bytes)
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        record = DeltaGradRecord(
            participation=records.init_participation(num_examples),
            log=records.init_log(max_steps, batch_size, has_key=keyed, inner=inner),
            checkpoints=records.init_checkpoints(params, inner, slots=num_checkpoints, every=every),
            trajectory=records.init_trajectory(params, max_steps, storage=storage),
            delta_pairs=kernels.lbfgs.init(params, memory),
            delta_first=jnp.full((), -1, jnp.int32),
            foretold_steps=jnp.zeros((max_steps,), bool),
        )
        return UnlearnerState(inner=inner, record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        records.check_update(opt_state, params, ids, DeltaGradRecord, "deltagrad")
        records.check_logged_step(ids, key, batch_size, keyed)
        ids = None if ids is None else jnp.asarray(ids)
        extras_seen.update(name for name in extra if name not in _RECOMPUTED)
        record, inner = opt_state.record, opt_state.inner
        step = record.participation.num_steps
        participation = records.observe(record.participation, ids, num_examples)
        overrun = jnp.where(step >= max_steps, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32)
        new_record = record._replace(
            participation=participation._replace(status=participation.status | overrun),
            log=records.write_step(
                record.log, step, ids=ids, key=key, settings=records.get_settings(inner),
                non_finite=~tree.all_finite(updates),
            ),
            checkpoints=records.take_checkpoint(
                record.checkpoints, step, params, inner, every=every
            ),
            trajectory=records.write_trajectory(record.trajectory, step, params, updates),
        )  # fmt: skip
        updates, inner = inner_update(updates, inner, params, **extra)
        return updates, UnlearnerState(inner=inner, record=new_record)

    def forget_step(params, state, rows, ids, weights):
        record, begin = state.record, state.record.participation.num_steps
        cursor = begin + jnp.arange(ids.shape[0])
        window = lambda leaf, fill=0: leaf.at[cursor].get(mode="fill", fill_value=fill)
        log, num_scheduled = record.log, window(record.log.step_num_rows, -1)
        kept = jnp.where(ids >= 0, weights, 0).astype(jnp.float32)
        gone = ((ids >= 0) & (weights == 0)).astype(jnp.float32)
        step_rows = records.StepRows(
            *(rows, ids, kept), *(rows, ids, gone), jnp.sum(kept, axis=1), num_scheduled,
            window(log.step_keys), jax.tree.map(window, log.step_settings),
        )  # fmt: skip
        active = jnp.sum(num_scheduled >= 0, dtype=jnp.int32)
        carry = (params, state.inner, record.delta_pairs, record.trajectory, record.delta_first)
        always = all_exact or records.reads_loss(tx, params, state.inner)
        segment = records.make_corrected_segment(steps, is_due, always=always)
        num_logged = jnp.sum(log.step_num_rows >= 0)
        spoilt = window(log.step_non_finite) | (cursor >= num_logged - settle)
        carry, told, bad = segment(carry, step_rows, spoilt, begin, active)
        new_params, inner, pairs, trajectory, first = carry
        failed = ~tree.all_finite(new_params)
        status = jnp.where(failed, int(Status.NON_FINITE), 0).astype(jnp.int32)
        put = lambda leaf, values: leaf.at[cursor].set(values, mode="drop")
        new_record = DeltaGradRecord(
            participation=record.participation._replace(
                num_steps=begin + active, status=record.participation.status | status
            ),
            log=log._replace(
                step_ids=put(log.step_ids, jnp.where(gone > 0, -1, ids).astype(jnp.int32)),
                step_non_finite=put(log.step_non_finite, bad),
            ),
            checkpoints=records.drop_after(record.checkpoints, begin),
            trajectory=trajectory,
            delta_pairs=pairs,
            delta_first=first,
            foretold_steps=put(record.foretold_steps, told),
        )
        arrays = {"status": status, "num_steps": active, "num_foretold": jnp.sum(told)}
        new_state = UnlearnerState(tree.poison(inner, failed), new_record)
        return tree.poison(new_params, failed), new_state, arrays

    def check_request(params, opt_state, ids):
        records.check_state(opt_state, DeltaGradRecord, "deltagrad")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        template = jax.eval_shape(lambda r: records.read_trajectory(r, 0)[0], record.trajectory)
        records.check_params(params, template, "deltagrad")
        return ids, num_duplicates

    def plan_of(params, opt_state, ids):
        """The run, the steps to take again, and which of them are exact by schedule."""
        record = opt_state.record
        log, foretold = jax.device_get((record.log, record.foretold_steps))
        run = records.CachedRun(log, record.checkpoints, record.trajectory, np.array(foretold))
        stop = int(record.participation.num_steps)
        needs_loss = records.reads_loss(tx, params, opt_state.inner)
        retake = records.plan_retake(run, ids, stop, needs_loss=needs_loss)
        due = is_due(np.arange(stop - retake.first)) | needs_loss | all_exact
        due |= np.arange(retake.first, stop) >= stop - settle
        return run, retake, due | log.step_non_finite[retake.first : stop]

    def check_loss_once(params, reader, retained):
        if loss_checked or not retained.size:
            return
        few = reader(np.unique(retained)[:8])
        kernels.check_loss(loss_fn, params, few, key=jax.random.key(0) if keyed else None)
        loss_checked.append(True)

    def forget(params, opt_state, ids, *, data=None, requester=None):
        begun = time.perf_counter()
        ids, num_duplicates = check_request(params, opt_state, ids)
        if not ids.size:
            return Forgotten(params, opt_state, info_of(ids, num_duplicates, begun))
        record, reader = opt_state.record, records.RowReader(data)
        run, retake, due = plan_of(params, opt_state, ids)
        kept_log = records.without(run.log, ids)
        retained = np.asarray(kept_log.step_ids[kept_log.step_ids >= 0])
        reader.prepare(retained, may_be_empty=True)
        check_loss_once(params, reader, retained)
        start = tools.start_of(run, retake)
        verified: dict[str, Any] = {"verified": "no"}
        if verify == "report":
            given, avoid = (params, opt_state.inner), ids if all_exact else ()
            distance = tools.check(run, retake, start, given, reader, avoid)
            records.check_cached_run(distance, verify_tolerance, run.trajectory, extras_seen)
            verified = {"verified": "within tolerance", "replay_distance": distance}
        gone = records.GoneRows(ids, run.log, reader, *retake[2:4], wanted=not all_exact)
        begin = (*start, kernels.lbfgs.init(params, memory), tree.copy(run.trajectory))
        (new_params, inner, _, trajectory), checkpoints, met = records.run_corrected(
            compiled, write, begin, gone, reader, due,
            start=retake.first, checkpoints=run.checkpoints, show=progress,
        )  # fmt: skip
        if not bool(tree.all_finite(new_params)):
            raise errors.NonFiniteError(
                "The corrected run gave parameters that are not finite; nothing was released. It "
                "diverges, or its foretold steps do: lower period."
            )
        figures = {"first_step": retake.first} | met.figures(due) | verified
        inner = records.set_settings(inner, records.get_settings(opt_state.inner))
        new_params, inner = tree.match_weak_types((new_params, inner), (params, opt_state.inner))
        new_state = UnlearnerState(
            inner=inner,
            record=_next_record(record, ids, kept_log, retake, trajectory, checkpoints, met),
        )
        certificate, salt = certificates.issue(
            ids, num_duplicates, (params, opt_state.inner), (new_params, new_state.inner),
            **_promise(figures, normalizer),
        )  # fmt: skip
        info = info_of(
            ids, num_duplicates, begun, requester=requester,
            certificate=certificate, commitment_salt=salt, measurements=figures,
        )  # fmt: skip
        seconds_per_step[:] = [info.seconds / max(1, len(due))]
        return Forgotten(new_params, new_state, info)

    def quote(params, opt_state, ids):
        try:
            ids, _ = check_request(params, opt_state, ids)
        except (errors.IdError, errors.TrainingRecordError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="heuristic")
        record = opt_state.record
        due = plan_of(params, opt_state, ids)[2] if ids.size else np.zeros(0, bool)
        state_bytes = tree.num_bytes(params) + tree.num_bytes(opt_state.inner)
        copied = tree.num_bytes((record.trajectory, record.checkpoints, record.delta_pairs))
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason="more gradients where a foretold one is not trusted",
            guarantee="heuristic",
            num_steps=len(due),
            num_gradients=int(due.sum()) + 2 * (verify == "report"),
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=copied + 2 * state_bytes,
            seconds=len(due) * seconds_per_step[0] if seconds_per_step else None,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _next_record(record, ids, kept_log, retake, trajectory, checkpoints, met) -> DeltaGradRecord:
    """The record of the run without the rows."""
    flags = np.array(kept_log.step_non_finite)
    flags[retake.first : retake.stop] = met.non_finite
    foretold = np.array(jax.device_get(record.foretold_steps))
    foretold[retake.first : retake.stop] = met.told
    log = jax.tree.map(jnp.asarray, kept_log._replace(step_non_finite=flags))
    return DeltaGradRecord(
        participation=records.bury(record.participation, ids),
        log=log,
        checkpoints=checkpoints,
        trajectory=trajectory,
        delta_pairs=jax.tree.map(jnp.zeros_like, record.delta_pairs)._replace(
            pair_owners=jnp.full_like(record.delta_pairs.pair_owners, -1)
        ),
        delta_first=jnp.full((), -1, jnp.int32),
        foretold_steps=jnp.asarray(foretold),
    )


def _promise(figures, normalizer) -> dict[str, Any]:
    """The fields of the certificate: aimed at the oracle's state, and nothing proven."""
    divided = {
        "batch": "Sums over rows stay divided by the scheduled number of rows.",
        "kept": "Sums over rows are divided by the number of rows that are left.",
    }
    fidelity = {
        "no": ("assumed", "The cached run is that of tx, loss_fn and data; this was not verified."),
        "within tolerance": ("measured", "Cached gradients led to the state, as replay_distance."),
    }[figures["verified"]]
    exact, total = figures["exact_steps"], figures["num_steps"]
    names = ("gradient_mismatch", "correction_mismatch", "replay_distance")
    return {
        "method": "deltagrad",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "heuristic",
        "scope": "full-state",
        "why_no_epsilon": (
            f"{exact} of {total} steps took the evaluated gradient, the others a foretold one: its "
            "error is measured at some steps and bounded at none"
        ),
        "residuals": {name: figures[name] for name in names if name in figures},
        "assumptions": (
            certificates.Assumption("replay fidelity", *fidelity),
            certificates.Assumption("normalizer", "proven", divided[normalizer]),
            *certificates.assumed(
                *("rows unchanged", "ids complete", "mean loss", "oblivious requests"),
                *("public settings", "secret record"),
            ),
        ),
        "not_covered": (
            "What foretold gradients still carry of the forgotten rows.",
            "The deletion itself: it reads the forgotten rows to subtract their gradients.",
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
        ),
    }


def _check_options(positive, choices, counts, l2, storage) -> None:
    """Refuse a bad configuration at the factory."""
    for name, value in (positive | counts).items():
        least = int(name in positive)
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"Expected an integer {name}={value} >= {least}.")
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"Expected {name} to be one of {allowed}, got {value!r}.")
    if l2 is not None and not (isinstance(l2, int | float) and l2 >= 0):
        raise ValueError(f"Expected l2={l2} >= 0, or None.")
    if storage is not None and not jnp.issubdtype(storage, jnp.floating):
        raise ValueError(f"Expected storage to be a floating dtype, got {storage!r}.")
