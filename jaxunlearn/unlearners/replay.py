"""Exact deletion for any Optax optimizer: replay the recorded run without the forgotten rows.

The idea is old (Bourtoule et al. 2021 cut it into shards; "Unlearning at Scale", arXiv 2508.12220,
logs what a step needs); here it removes a row from parameters and every leaf of optimizer state.
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
_VERIFY = ("off", "report", "bitwise")
_WHY_ROUNDED = "exact up to the rounding listed as replay_distance, no noise added"
_ASSUMED = (
    "rows unchanged",
    "ids complete",
    "mean loss",
    "oblivious requests",
    "public settings",
    "secret record",
)


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
    _check_options(
        batch_size, max_steps, normalizer, num_checkpoints, verify, segment_length,
        checkpoint_every, l2,
    )  # fmt: skip
    records.check_num_examples(num_examples)
    penalty = records.Penalty(l2, l2_mask)
    inner_update = records.wrapped_update(tx, penalty)
    segment = records.make_segment(tx, loss_fn, normalizer=normalizer, penalty=penalty)
    run = jax.jit(segment)
    rewrite = jax.jit(records.rewrite_slot, donate_argnums=0)
    every = checkpoint_every or max(1, max_steps // 256)
    keyed = kernels.takes_key(loss_fn)
    info_of = functools.partial(ForgetInfo.of, "replay")
    seconds_per_step: list[float] = []
    extras_seen: set[str] = set()
    loss_checked: list[bool] = []

    def init(params):
        inner = tree.copy(optax.with_extra_args_support(tx).init(params))
        slots = records.num_slots(
            params, inner, num_checkpoints=num_checkpoints, max_bytes=max_checkpoint_bytes
        )
        record = ReplayRecord(
            participation=records.init_participation(num_examples),
            log=records.init_log(max_steps, batch_size, has_key=keyed, inner=inner),
            checkpoints=records.init_checkpoints(params, inner, slots=slots, every=every),
        )
        return UnlearnerState(inner=inner, record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch
        records.check_update(opt_state, params, ids, ReplayRecord, "replay")
        _check_step(ids, key, batch_size, keyed)
        ids = None if ids is None else jnp.asarray(ids)
        extras_seen.update(name for name in extra if name not in _RECOMPUTED)
        record, inner = opt_state.record, opt_state.inner
        step = record.participation.num_steps
        participation = records.observe(record.participation, ids, num_examples)
        overrun = jnp.where(step >= max_steps, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32)
        non_finite = ~tree.all_finite(updates)
        new_record = ReplayRecord(
            participation=participation._replace(status=participation.status | overrun),
            log=records.write_step(
                record.log, step, ids=ids, key=key,
                settings=records.get_settings(inner), non_finite=non_finite,
            ),
            checkpoints=records.take_checkpoint(
                record.checkpoints, step, params, inner, every=every
            ),
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
            settings=jax.tree.map(window, record.log.step_settings),
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
        state = UnlearnerState(
            inner=tree.poison(inner, failed),
            record=ReplayRecord(
                participation=participation,
                log=log,
                checkpoints=records.drop_after(record.checkpoints, cursor[0]),
            ),
        )
        arrays = {"status": status, "num_steps": active, "non_finite": bad.non_finite}
        return tree.poison(new_params, failed), state, arrays

    def run_from(record, log, reader, *, slot, start, stop, label, on_cut=None, cuts=()):
        params, inner = tree.copy(records.read_slot(record.checkpoints, slot))
        length = segment_length or records.default_segment_length()
        begun = time.perf_counter()
        result = records.run_log(
            run, params, inner, log, reader, start=start, stop=stop, segment_length=length,
            cuts=cuts, on_cut=on_cut or (lambda *_: None), label=label, show=progress,
        )  # fmt: skip
        seconds_per_step[:] = [(time.perf_counter() - begun) / max(1, stop - start)]
        return result

    def check_request(params, opt_state, ids):
        records.check_state(opt_state, ReplayRecord, "replay")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        records.check_participation(opt_state.record.participation, ids)
        template = jax.eval_shape(
            lambda c: records.read_slot(c, 0)[0], opt_state.record.checkpoints
        )
        records.check_params(params, template, "replay")
        return ids, num_duplicates

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
        log = jax.device_get(record.log)
        kept = records.without(log, ids)
        slot, start, stop = _span(record, log, ids)
        kept_ids = np.asarray(kept.step_ids)
        retained = kept_ids[kept_ids >= 0]
        reader.prepare(retained, may_be_empty=True)
        check_loss_once(params, reader, retained)
        verified = records.compare_replay(
            verify, verify_tolerance, (params, opt_state.inner), extras_seen,
            lambda: run_from(record, log, reader, slot=slot, start=start, stop=stop,
                             label="verifying the replay")[:2],
        )  # fmt: skip
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
                "Replaying without the forgotten rows gave parameters that are not finite; nothing "
                "was released. The retained run itself diverges."
            )
        flags = np.array(log.step_non_finite)
        flags[start:stop] = bad.non_finite
        inner = records.set_settings(inner, records.get_settings(opt_state.inner))
        new_state = UnlearnerState(
            inner=tree.match_weak_types(inner, opt_state.inner),
            record=ReplayRecord(
                participation=records.bury(record.participation, ids),
                log=jax.tree.map(jnp.asarray, kept._replace(step_non_finite=flags)),
                checkpoints=fresh[0],
            ),
        )
        new_params = tree.match_weak_types(new_params, params)
        measured = {
            "replayed_steps": stop - start,
            "first_step": start,
            "non_finite_rows": int(np.sum(bad.non_finite_rows)),
            "non_finite_updates": int(np.sum(flags)),
            **verified,
        }
        certificate, salt = certificates.issue(
            ids, num_duplicates, (params, opt_state.inner), (new_params, new_state.inner),
            **_promise(measured, normalizer, verify_tolerance),
        )  # fmt: skip
        info = info_of(
            ids, num_duplicates, begun, requester=requester,
            certificate=certificate, commitment_salt=salt, measurements=measured,
        )  # fmt: skip
        return Forgotten(new_params, new_state, info)

    def quote(params, opt_state, ids):
        try:
            ids, _ = check_request(params, opt_state, ids)
        except (errors.IdError, errors.TrainingRecordError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="exact")
        record = opt_state.record
        span = _span(record, jax.device_get(record.log), ids) if ids.size else (0, 0, 0)
        _, start, stop = span
        runs = 1 if verify == "off" else 2
        state_bytes = tree.num_bytes(params) + tree.num_bytes(opt_state.inner)
        return Quote(
            num_forgotten=len(ids),
            feasible=True,
            reason="",
            guarantee="exact",
            num_steps=stop - start,
            num_gradients=runs * (stop - start),
            retrain_gradients=int(record.participation.num_steps),
            memory_bytes=tree.num_bytes(record.checkpoints) + 2 * state_bytes if ids.size else 0,
            seconds=runs * (stop - start) * seconds_per_step[0] if seconds_per_step else None,
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _check_options(
    batch_size, max_steps, normalizer, num_checkpoints, verify, segment_length, checkpoint_every, l2
):
    """Refuse a bad configuration at the factory."""
    positive = {
        "batch_size": batch_size,
        "max_steps": max_steps,
        "num_checkpoints": num_checkpoints,
    }
    if segment_length is not None:
        positive["segment_length"] = segment_length
    for name, value in positive.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"Expected an integer {name}={value} >= 1.")
    if checkpoint_every is not None and not (
        isinstance(checkpoint_every, int) and checkpoint_every >= 1
    ):
        raise ValueError(f"Expected an integer checkpoint_every={checkpoint_every} >= 1.")
    if l2 is not None and not (isinstance(l2, int | float) and l2 >= 0):
        raise ValueError(f"Expected l2={l2} >= 0, or None.")
    if normalizer not in ("batch", "kept"):
        raise ValueError(f'Expected normalizer "batch" or "kept", got {normalizer!r}.')
    if verify not in _VERIFY:
        raise ValueError(f"Expected verify to be one of {_VERIFY}, got {verify!r}.")


def _default_key_impl():
    return jax.random.key_impl(jax.random.key(0))


def _check_step(ids, key, batch_size, keyed):
    """Refuse a step that the log could not hold or a replay could not repeat."""
    if ids is None:
        return
    if jnp.shape(ids)[0] > batch_size:
        raise ValueError(f"Expected at most batch_size={batch_size} ids, got {jnp.shape(ids)[0]}.")
    if keyed and key is not None and jax.random.key_impl(key) != _default_key_impl():
        raise ValueError(
            f"Expected a key of the default implementation {_default_key_impl()}, got "
            f"{jax.random.key_impl(key)}: the log keeps its words only."
        )
    if keyed and key is None:
        raise ValueError("Expected key=step_key in update: the loss takes one, and so does replay.")


def _span(record: ReplayRecord, log: records.StepLog, ids: np.ndarray) -> tuple[int, int, int]:
    """Slot and step to restart from, and the step to stop before."""
    used = np.isin(log.step_ids, ids).any(axis=1)
    first = int(np.argmax(used))
    slot, start = records.last_slot_before(record.checkpoints, first)
    return slot, start, int(record.participation.num_steps)


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
    divided = {
        "batch": "Sums over rows stay divided by the scheduled number of rows.",
        "kept": "Sums over rows are divided by the number of rows that are left.",
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
            certificates.Assumption("normalizer", "proven", divided[normalizer]),
            *certificates.assumed(*_ASSUMED),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }
