"""Contributions of the forgotten rows taken out of the optimizer's state along the recorded path.

Momentum, moving averages and accumulators are folds over gradients. With the parameters held at
those that the run recorded, a row's part in such a fold can be taken out algebraically. It is not
what a run without the row would have reached, whose later gradients are taken elsewhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

_WHY = "heuristic: the recorded path was itself shaped by the forgotten rows, and stays"
_PATH_STAYS = (
    "What the forgotten rows did to the path: every retained gradient is taken at parameters that "
    "depend on them."
)
_PARAMS_STAY = "The parameters: they are returned as they were, and still carry the rows."

_CONDITIONS = {
    "off": "",
    "report": "unless the recorded run, taken again, ends elsewhere than the given state",
    "bitwise": "unless the recorded run, taken again, differs from the given state in any bit",
}


class FixedPathRecord(NamedTuple):
    """Who took part, the step log, purged states to start from, and the path.

    path_params: the parameters before each step; leaves (max_steps, *shape). A deletion leaves
      them, since rows that are gone cannot be read to find them again.
    """

    participation: records.Participation
    log: records.StepLog
    checkpoints: records.Checkpoints
    path_params: PyTree


def fixed_path(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    max_steps: int,
    parameters: str = "path",
    normalizer: str = "batch",
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    num_checkpoints: int = 16,
    max_checkpoint_bytes: int | None = None,
    segment_length: int | None = None,
    verify: str = "report",
    verify_tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that `forget` reruns its state along the recorded parameters, without the rows.

    With w_t the recorded parameters, B_t the rows of step t and u the forgotten ones,

        updates_t, s'_{t+1} = tx.update(g_{B_t \\ u}(w_t), s'_t, w_t),
        w'_{t+1} = w'_t + updates_t.

    Momentum, averages and Adam's moments lose exactly what the rows' gradients put into them,
    m' = m + (1 - b1) sum_t b1^(T-t) d_t and v' = v + (1 - b2) sum_t b2^(T-t) (2 g_t d_t + d_t^2),
    d_t the change of step t's gradient. Compare it with `tx.init(params)`, a plain reset, which is
    cheaper and has been measured to serve as well; `forget` reports how far both are.

    Args:
      tx, loss_fn, num_examples, batch_size, max_steps, normalizer, l2, l2_mask, num_checkpoints,
        max_checkpoint_bytes, segment_length, progress: as in `unlearners.replay`.
      parameters: "path" returns w', the direct updates of the rows undone; "keep" returns the
        parameters as they are, to mend the state alone.
      verify: "report" first reruns without deletion, measures the distance to the given state, and
        refuses above `verify_tolerance`; "bitwise" refuses any difference; "off" halves the cost.

    Returns:
      An `Unlearner`, target "fixed_path", guarantee "heuristic". The record takes max_steps
      parameter counts for the path beside what `replay` takes.

    Cost: `update` writes one parameter count. `forget`: two gradients per step since the first use
      of a forgotten id, one with verify="off"; it copies the path to the host, max_steps parameter
      counts (`quote` counts them in memory_bytes).
    `forget_step` runs one segment from a state whose record stands at its first step.

    Guarantees:
      The state is that of the recursion above, to rounding, whatever was forgotten before.
      Two deletions in a row equal one of both.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      VerificationError, NonFiniteError; inputs are untouched.

    References: the project's own; for Adam's moments the closed form is that of fixed-path memory
      repair (2026), which lost to a reset of the moments in eight seeds of eight.
    """
    records.check_choices(
        parameters=(parameters, ("path", "keep")),
        normalizer=(normalizer, ("batch", "kept")),
        verify=(verify, tuple(_CONDITIONS)),
    )
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    segment = records.make_segment(
        tx, loss_fn, normalizer=normalizer, penalty=penalty, along_path=True
    )
    rerun = records.Rerun(segment, segment_length=segment_length, show=progress)
    recorder = records.Recorder(
        "fixed_path", FixedPathRecord, loss_fn,
        num_examples=num_examples, batch_size=batch_size, max_steps=max_steps,
        num_checkpoints=num_checkpoints, max_checkpoint_bytes=max_checkpoint_bytes,
    )  # fmt: skip
    fresh_inner = optax.with_extra_args_support(tx).init

    def init(params):
        inner = tree.copy(fresh_inner(params))
        stack = lambda leaf: jnp.array(jnp.broadcast_to(leaf, (max_steps, *leaf.shape)), copy=True)
        path = jax.tree.map(stack, params)
        return UnlearnerState(inner, FixedPathRecord(*recorder.start(params, inner), path))

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        record = recorder.note(updates, opt_state, params, ids, key, extra)
        step = opt_state.record.participation.num_steps
        put = lambda leaf, value: leaf.at[step].set(value, mode="drop")
        record = record._replace(path_params=jax.tree.map(put, record.path_params, params))
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record)

    def forget_step(params, state, rows, ids, weights):
        window = records.window_of(state.record, rows, ids, weights)
        settings = window.segment.settings, window.of(state.record.path_params)
        window = window._replace(segment=window.segment._replace(settings=settings))
        new_params, new_state, arrays = records.run_window(segment, params, state, window)
        if parameters == "keep":
            new_params = tree.poison(params, arrays["status"] != 0)
        return new_params, new_state, arrays

    def along_path(plan, record):
        """The plan with the path beside the settings: both are given to every step."""
        path = jax.device_get(record.path_params)
        ride = lambda log: log._replace(step_settings=(log.step_settings, path))
        return plan._replace(log=ride(plan.log), kept=ride(plan.kept))

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = recorder.request(params, opt_state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("fixed_path", request))
        record, given = opt_state.record, (params, opt_state.inner)
        plan = records.plan_deletion(record, request.ids)
        reader = recorder.open(data, plan.retained, params)
        returned = lambda pair: pair if parameters == "path" else (params, pair[1])
        path = along_path(plan, record)
        verified = records.compare_replay(
            verify, verify_tolerance, given, recorder.extras_seen,
            lambda: returned(rerun.unchanged(path, record.checkpoints, reader)),
        )  # fmt: skip
        reached, met, checkpoints = rerun.without(path, record.checkpoints, reader)
        if not bool(tree.all_finite(reached[0])):
            raise errors.NonFiniteError(
                "Taking the rows out along the path gave parameters that are not finite; nothing "
                "was released."
            )
        new_params, inner = records.as_given(returned(reached), given)
        new_record = records.after_deletion(
            record, request.ids, plan, checkpoints, plan.start, met.non_finite
        )
        measured = {
            "replayed_steps": plan.stop - plan.start,
            "first_step": plan.start,
            "non_finite_rows": int(np.sum(met.non_finite_rows)),
            "change_of_state": tree.relative_distance(inner, opt_state.inner),
            "change_by_reset": tree.relative_distance(fresh_inner(new_params), opt_state.inner),
            **verified,
        }
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)), measured,
            **_promise(measured, normalizer, parameters),
        )  # fmt: skip

    @records.refusals_as_quotes(guarantee="heuristic")
    def quote(params, opt_state, ids):
        ids, record = recorder.request(params, opt_state, ids).ids, opt_state.record
        plan = records.plan_deletion(record, ids)
        steps = plan.stop - plan.start if ids.size else 0
        state_bytes = tree.num_bytes((params, opt_state.inner))
        copied = tree.num_bytes((record.checkpoints, record.path_params))
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason=_CONDITIONS[verify] if ids.size else "",
            guarantee="heuristic",
            num_steps=steps,
            num_gradients=(1 if verify == "off" else 2) * steps,
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=copied + 2 * state_bytes if ids.size else 0,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _promise(measured, normalizer: str, parameters: str) -> dict[str, Any]:
    """The fields of the certificate: what was computed, and that nothing is claimed of it."""
    left = (_PATH_STAYS, _PARAMS_STAY) if parameters == "keep" else (_PATH_STAYS,)
    return {
        "method": "fixed_path",
        "paper": "fixed-path removal along the recorded run; named after optimizer memory repair",
        "target": "fixed_path",
        "guarantee": "heuristic",
        "scope": "full-state",
        "why_no_epsilon": _WHY,
        "residuals": {name: measured[name] for name in ("replay_distance",) if measured.get(name)},
        "assumptions": (
            certificates.divided(normalizer),
            *certificates.assumed(
                *("rows unchanged", "ids complete", "mean loss", "public settings"),
                *("secret record",),
            ),
        ),
        "not_covered": (
            *left,
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
        ),
    }
