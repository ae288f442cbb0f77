"""Contributions of the forgotten rows taken out of the optimizer's state along the recorded path.

Momentum, moving averages and accumulators are folds over gradients. With the parameters held at
those that the run recorded, a row's part in such a fold can be taken out algebraically. It is not
what a run without the row would have reached, whose later gradients are taken elsewhere.
"""

import functools
import time
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

_RECOMPUTED = {"value", "grad", "value_fn"}
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
    _check_options(batch_size, max_steps, num_checkpoints, parameters, normalizer, verify)
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    segment = _make_segment(tx, loss_fn, normalizer=normalizer, penalty=penalty)
    run = jax.jit(segment)
    rewrite = jax.jit(records.rewrite_slot, donate_argnums=0)
    every = max(1, max_steps // 256)
    keyed = kernels.takes_key(loss_fn)
    info_of = functools.partial(ForgetInfo.of, "fixed_path")
    extras_seen: set[str] = set()
    loss_checked: list[bool] = []
    fresh_inner = optax.with_extra_args_support(tx).init

    def init(params):
        inner = tree.copy(fresh_inner(params))
        slots = records.num_slots(
            params, inner, num_checkpoints=num_checkpoints, max_bytes=max_checkpoint_bytes
        )
        path = lambda leaf: jnp.array(jnp.broadcast_to(leaf, (max_steps, *leaf.shape)), copy=True)
        record = FixedPathRecord(
            participation=records.init_participation(num_examples),
            log=records.init_log(max_steps, batch_size, has_key=keyed, inner=inner),
            checkpoints=records.init_checkpoints(params, inner, slots=slots, every=every),
            path_params=jax.tree.map(path, params),
        )
        return UnlearnerState(inner=inner, record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        records.check_update(opt_state, params, ids, FixedPathRecord, "fixed_path")
        records.check_logged_step(ids, key, batch_size, keyed)
        ids = None if ids is None else jnp.asarray(ids)
        extras_seen.update(name for name in extra if name not in _RECOMPUTED)
        record, inner = opt_state.record, opt_state.inner
        step = record.participation.num_steps
        participation = records.observe(record.participation, ids, num_examples)
        overrun = jnp.where(step >= max_steps, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32)
        put = lambda leaf, value: leaf.at[step].set(value, mode="drop")
        new_record = FixedPathRecord(
            participation=participation._replace(status=participation.status | overrun),
            log=records.write_step(
                record.log, step, ids=ids, key=key, settings=records.get_settings(inner),
                non_finite=~tree.all_finite(updates),
            ),
            checkpoints=records.take_checkpoint(
                record.checkpoints, step, params, inner, every=every
            ),
            path_params=jax.tree.map(put, record.path_params, params),
        )  # fmt: skip
        updates, inner = inner_update(updates, inner, params, **extra)
        return updates, UnlearnerState(inner=inner, record=new_record)

    def forget_step(params, state, rows, ids, weights):
        record, length = state.record, ids.shape[0]
        cursor = record.participation.num_steps + jnp.arange(length)
        window = lambda leaf, fill=0: leaf.at[cursor].get(mode="fill", fill_value=fill)
        num_rows = window(record.log.step_num_rows, -1)
        active = jnp.sum(num_rows >= 0, dtype=jnp.int32)
        steps = records.Segment(
            rows=rows, ids=ids, weights=weights, num_rows=num_rows,
            keys=window(record.log.step_keys),
            settings=jax.tree.map(window, (record.log.step_settings, record.path_params)),
        )  # fmt: skip
        new_params, inner, bad = segment(params, state.inner, steps, active)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(active > 0, n, o), new, old)
        new_params, inner = keep(new_params, params), keep(inner, state.inner)
        failed = ~tree.all_finite(new_params)
        status = jnp.where(failed, int(Status.NON_FINITE), 0).astype(jnp.int32)
        participation = record.participation._replace(
            num_steps=record.participation.num_steps + active,
            status=record.participation.status | status,
        )
        log = record.log._replace(
            step_ids=record.log.step_ids.at[cursor].set(ids, mode="drop"),
            step_non_finite=record.log.step_non_finite.at[cursor].set(bad.non_finite, mode="drop"),
        )
        new_record = FixedPathRecord(
            participation=participation,
            log=log,
            checkpoints=records.drop_after(record.checkpoints, cursor[0]),
            path_params=record.path_params,
        )
        new_params = new_params if parameters == "path" else params
        state = UnlearnerState(inner=tree.poison(inner, failed), record=new_record)
        arrays = {"status": status, "num_steps": active, "non_finite": bad.non_finite}
        return tree.poison(new_params, failed), state, arrays

    def run_from(record, log, reader, *, slot, start, stop, label, on_cut=None, cuts=()):
        # The path rides along with the settings: both are given to every step from the record.
        path = jax.device_get(record.path_params)
        log = log._replace(step_settings=(log.step_settings, path))
        params, inner = tree.copy(records.read_slot(record.checkpoints, slot))
        return records.run_log(
            run, params, inner, log, reader, start=start, stop=stop, label=label, show=progress,
            segment_length=segment_length or records.default_segment_length(),
            cuts=cuts, on_cut=on_cut or (lambda *_: None),
        )  # fmt: skip

    def check_request(params, opt_state, ids):
        records.check_state(opt_state, FixedPathRecord, "fixed_path")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        records.check_participation(opt_state.record.participation, ids)
        path = opt_state.record.path_params
        template = jax.eval_shape(lambda p: jax.tree.map(lambda leaf: leaf[0], p), path)
        records.check_params(params, template, "fixed_path")
        return ids, num_duplicates

    def check_loss_once(params, reader, retained):
        if not loss_checked and retained.size:
            few = reader(np.unique(retained)[:8])
            kernels.check_loss(loss_fn, params, few, key=jax.random.key(0) if keyed else None)
            loss_checked.append(True)

    def forget(params, opt_state, ids, *, data=None, requester=None):
        begun = time.perf_counter()
        ids, num_duplicates = check_request(params, opt_state, ids)
        if not ids.size:
            return Forgotten(params, opt_state, info_of(ids, num_duplicates, begun))
        record, reader = opt_state.record, records.RowReader(data)
        log = jax.device_get(record.log)
        kept = records.without(log, ids)
        slot, start, stop = _span(record, log, ids)
        retained = np.asarray(kept.step_ids)[np.asarray(kept.step_ids) >= 0]
        reader.prepare(retained, may_be_empty=True)
        check_loss_once(params, reader, retained)
        returned = lambda found: found if parameters == "path" else params

        def unchanged():
            found, inner, _ = run_from(
                record, log, reader, slot=slot, start=start, stop=stop, label="verifying the path"
            )
            return returned(found), inner

        verified = records.compare_replay(
            verify, verify_tolerance, (params, opt_state.inner), extras_seen, unchanged
        )
        taken_at = np.asarray(jax.device_get(record.checkpoints.checkpoint_steps))
        later = {int(step): i for i, step in enumerate(taken_at) if step > start}
        fresh = [tree.copy(record.checkpoints)]

        def save(step, params, inner):
            fresh[0] = rewrite(fresh[0], later[step], params, inner)

        new_params, inner, bad = run_from(
            record, kept, reader, slot=slot, start=start, stop=stop,
            label="forgetting", cuts=later, on_cut=save,
        )  # fmt: skip
        if not bool(tree.all_finite(new_params)):
            raise errors.NonFiniteError(
                "Taking the rows out along the path gave parameters that are not finite; nothing "
                "was released."
            )
        flags = np.array(log.step_non_finite)
        flags[start:stop] = bad.non_finite
        inner = records.set_settings(inner, records.get_settings(opt_state.inner))
        inner = tree.match_weak_types(inner, opt_state.inner)
        new_params = tree.match_weak_types(returned(new_params), params)
        new_record = FixedPathRecord(
            participation=records.bury(record.participation, ids),
            log=jax.tree.map(jnp.asarray, kept._replace(step_non_finite=flags)),
            checkpoints=fresh[0],
            path_params=record.path_params,
        )
        measured = {
            "replayed_steps": stop - start,
            "first_step": start,
            "non_finite_rows": int(np.sum(bad.non_finite_rows)),
            "change_of_state": tree.relative_distance(inner, opt_state.inner),
            "change_by_reset": tree.relative_distance(fresh_inner(new_params), opt_state.inner),
            **verified,
        }
        certificate, salt = certificates.issue(
            ids, num_duplicates, (params, opt_state.inner), (new_params, inner),
            **_promise(measured, normalizer, parameters),
        )  # fmt: skip
        info = info_of(
            ids, num_duplicates, begun, requester=requester,
            certificate=certificate, commitment_salt=salt, measurements=measured,
        )  # fmt: skip
        return Forgotten(new_params, UnlearnerState(inner, new_record), info)

    def quote(params, opt_state, ids):
        try:
            ids, _ = check_request(params, opt_state, ids)
        except (errors.IdError, errors.TrainingRecordError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="heuristic")
        record = opt_state.record
        _, start, stop = _span(record, jax.device_get(record.log), ids) if ids.size else (0, 0, 0)
        state_bytes = tree.num_bytes(params) + tree.num_bytes(opt_state.inner)
        copied = tree.num_bytes((record.checkpoints, record.path_params))
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason=_CONDITIONS[verify] if ids.size else "",
            guarantee="heuristic",
            num_steps=stop - start,
            num_gradients=(1 if verify == "off" else 2) * (stop - start),
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=copied + 2 * state_bytes if ids.size else 0,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _make_segment(tx, loss_fn: LossFn, *, normalizer: str, penalty: records.Penalty):
    """(params, inner, segment, num_active) -> (params, inner, non-finite flags), along the path.

    `segment.settings` is (settings, path): gradients and updates are those at the path's
    parameters, and the updates move `params`.
    """
    update = records.wrapped_update(tx, penalty)
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)
    keyed = kernels.takes_key(loss_fn)

    def step(params, inner, row: records.Segment):
        settings, here = row.settings
        inner = records.set_settings(inner, settings)
        keys = kernels.example_keys(jax.random.wrap_key_data(row.keys), row.ids) if keyed else None
        options = {"num_rows": row.num_rows if normalizer == "batch" else None, "keys": keys}
        grads, info = gradient(here, row.rows, row.weights, **options)
        flags = records.StepFlags(~tree.all_finite(grads), info.num_non_finite)
        value_fn = lambda p: value(p, row.rows, row.weights, **options)
        extra = {"value": info.value, "grad": grads, "value_fn": value_fn}
        updates, inner = update(grads, inner, here, **extra)
        return optax.apply_updates(params, updates), inner, flags

    return records.loop_over_steps(step)


def _check_options(batch_size, max_steps, num_checkpoints, parameters, normalizer, verify):
    """Refuse a bad configuration at the factory."""
    sizes = {"batch_size": batch_size, "max_steps": max_steps, "num_checkpoints": num_checkpoints}
    for name, value in sizes.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"Expected an integer {name}={value} >= 1.")
    choices = {
        "parameters": (parameters, ("path", "keep")),
        "normalizer": (normalizer, ("batch", "kept")),
        "verify": (verify, ("off", "report", "bitwise")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"Expected {name} to be one of {allowed}, got {value!r}.")


def _span(record: FixedPathRecord, log: records.StepLog, ids: np.ndarray) -> tuple[int, int, int]:
    """Slot and step to restart from, and the step to stop before."""
    first = int(np.argmax(np.isin(log.step_ids, ids).any(axis=1)))
    slot, start = records.last_slot_before(record.checkpoints, first)
    return slot, start, int(record.participation.num_steps)


def _promise(measured, normalizer: str, parameters: str) -> dict[str, Any]:
    """The fields of the certificate: what was computed, and that nothing is claimed of it."""
    divided = {"batch": "scheduled number of rows", "kept": "number of rows that are left"}
    text = f"Sums over rows are divided by the {divided[normalizer]}."
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
            certificates.Assumption("normalizer", "proven", text),
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
