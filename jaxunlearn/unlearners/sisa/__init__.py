"""Sharded, isolated, sliced and aggregated training: a deletion retrains the end of one shard.

Bourtoule, Chandrasekaran, Choquette-Choo, Jia, Travers, Zhang, Lie, Papernot 2021, "Machine
Unlearning" (IEEE S&P, arXiv 1912.03817). Checkpoints hold the whole optimizer state, so that for
Adam or momentum too the resumed run is the run that never saw the row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree, UInt32

from jaxunlearn import certificates, errors, kernels, records, tree
from jaxunlearn.progress import progress as show_progress
from jaxunlearn.types import (
    ExactLearner,
    ForgetInfo,
    Forgotten,
    LossFn,
    Params,
    Quote,
    UnlearnerState,
)
from jaxunlearn.unlearners.sisa._schedule import (
    Schedule,
    check_schedule,
    key_of,
    lane_groups,
    places,
    slot_steps,
    slot_table,
    step_keys,
)

__all__ = ["SisaRecord", "sisa"]

_METHOD = "sisa"


class SisaRecord(NamedTuple):
    """What a deletion restarts from; never released.

    sisa_key: words of the key, from which shards, slices, order and initial parameters follow.
    sisa_checkpoints: after each slice but the last, (parameters, inner state) of all shards.
    """

    fitted: records.Fitted
    sisa_key: UInt32[Array, "2"]
    sisa_checkpoints: tuple[tuple[PyTree, PyTree], ...]


def sisa(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    init_params: Callable[[Array], Params],
    apply_fn: Callable[[Params, PyTree], Array],
    num_examples: int,
    num_shards: int,
    batch_size: int,
    num_slices: int = 1,
    epochs_per_slice: int = 1,
    aggregate: str | Callable[[Array], Array] = "mean",
    l2: float | None = None,
    shards_at_once: int | None = None,
    progress: bool | None = None,
) -> ExactLearner:
    """An ensemble of models on disjoint shards, of which a deletion retrains what saw the row.

    The key deals the ids into `num_shards` shards and each shard into slices. A shard trains
    `epochs_per_slice` epochs on its first slice, then on its first two, and so on, and keeps its
    parameters and its optimizer's whole state after each. `forget` takes, for each shard with
    a deleted row, the checkpoint before the row's slice, and trains on without the row.

    Args:
      tx: the whole optimizer, each shard has a state of its own.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      init_params: key -> parameters of one shard.
      apply_fn: (params of one shard, batch) -> outputs (b, classes) or (b, ...).
      num_examples: ids are dense in 0..num_examples-1.
      num_shards: S.  num_slices: R, of equal size.
      batch_size: rows of a shard in a step, divided by those that are left.
      epochs_per_slice: `accounting.slice_epochs(epochs, num_slices)`, rounded, costs what `epochs`
        without slices do.
      aggregate: "mean" of the shards' outputs, "majority" (the share of votes for each class), or
        a function of the outputs stacked along axis 0.
      l2: adds `l2 * params` to the gradient; None adds nothing.
      shards_at_once: shards trained as one vmapped program; None means 1 on CPU and all elsewhere.
      progress: None shows a bar in a terminal.

    Returns:
      An `ExactLearner`: `fit(data, ids=None, *, key)`, params with a leading axis of shards, and
      `inner` the stacked states of `tx`.

    Cost: `fit`: epochs_per_slice (R + 1) / 2 gradients of each row, R copies of the states of all
      shards. `forget`: `accounting.sliced_retraining(R)` of a shard's training for one row, on
      average; `accounting.sharded_retraining` for many.

    Guarantees:
      Parameters, inner state and checkpoints equal, bit for bit on one device and version, those
      of `fit` on the retained rows with the same key, for any Optax optimizer.
      Shards without a deleted row are not touched; deleted rows are not read.

    Raises (fit):
      IdError, MissingDataError, CoupledLossError, NonFiniteError.
    Raises (forget):
      IdError, WrongStateError, MissingDataError, RetainSetEmptyError, CoupledLossError,
      NonFiniteError; inputs are untouched.

    >>> loss = lambda w, batch: jnp.mean((batch["x"] * w - batch["y"]) ** 2)
    >>> learner = sisa(optax.adam(0.1), loss, init_params=lambda key: jnp.zeros(()),
    ...                apply_fn=lambda w, batch: batch["x"] * w, num_examples=8, num_shards=2,
    ...                num_slices=2, batch_size=2)
    >>> data = {"x": np.arange(8, dtype=np.float32), "y": np.ones(8, np.float32)}
    >>> params, state = learner.fit(data, key=jax.random.key(0))
    >>> forgotten = learner.forget(params, state, [3], data=data)
    >>> again, _ = learner.fit(data, [0, 1, 2, 4, 5, 6, 7], key=jax.random.key(0))
    >>> bool((again == forgotten.params).all())
    True

    References:
      Bourtoule et al. 2021, sections IV and V. Deviation: the authors' code keeps the weights of
      a slice alone, while Adam's state lives on from slice to slice in the process: resumed after
      a deletion it starts with fresh moments, and is not the run from scratch. Requests that
      depend on released ensembles are not covered (Gupta et al. 2021): an ensemble shows which
      shard a row was in.
    """
    plan = check_schedule(num_examples, num_shards, num_slices, batch_size, epochs_per_slice)
    combine = _combine(aggregate)
    tx = optax.with_extra_args_support(tx)
    width = shards_at_once or (1 if jax.default_backend() == "cpu" else num_shards)
    run = _make_run(tx, loss_fn, l2)
    keyed = kernels.takes_key(loss_fn)
    run_stage = functools.partial(_run_stage, plan, run, keyed)
    loss_checked: list[bool] = []

    def start(words, shard):
        """A shard before its first step."""
        params = init_params(jax.random.fold_in(key_of(words, "init"), shard))
        params = jax.tree.map(jnp.asarray, params)
        return params, tree.copy(tx.init(params))

    def check_loss_once(params, reader, ids):
        if not loss_checked:
            key = jax.random.key(0) if keyed else None
            kernels.check_loss(loss_fn, params, reader(ids[:8]), key=key)
            loss_checked.append(True)

    def train(words, states, lanes, table, reader, advance):
        """Train the shards of `lanes`, {shard: first stage}, from `states`; all their stages.

        Returns {(shard, stage): (params, inner) after it}.
        """
        after = {}
        for group in lane_groups(lanes, width, num_shards):
            first = min(lanes.get(shard, num_slices) for shard in group)
            held = _stack([states(shard, first) for shard in group])
            for stage in range(first, num_slices):
                held = run_stage(words, held, (group, stage), table, reader)
                for lane, shard in enumerate(group):
                    if lanes.get(shard, num_slices) <= stage:
                        after[shard, stage] = _take(held, lane)
                advance(sum(lanes.get(shard, num_slices) <= stage for shard in group))
        if not all(bool(tree.all_finite(p)) for p, _ in after.values()):
            raise errors.NonFiniteError(
                "Training a shard gave parameters that are not finite; nothing was released."
            )
        return after

    def fit(data, ids=None, *, key):
        words = records.key_words(key)
        ids = records.fit_ids(ids, num_examples)
        reader = records.RowReader(data)
        reader.prepare(ids)
        states = lambda shard, _: start(words, shard)
        check_loss_once(start(words, 0)[0], reader, ids)
        lanes = dict.fromkeys(range(num_shards), 0)
        with show_progress("fitting", num_shards * num_slices, show=progress) as advance:
            after = train(words, states, lanes, slot_table(plan, words, ids), reader, advance)
        levels = [
            _stack([after[shard, stage] for shard in range(num_shards)])
            for stage in range(num_slices)
        ]
        params, inner = levels[-1]
        fitted = records.mark_fitted(num_examples, ids, params)
        return params, UnlearnerState(inner, SisaRecord(fitted, words, tuple(levels[:-1])))

    def check_request(params, state, ids, requester=None):
        """Request, retained ids, and {shard: first stage to train again}."""
        request = records.check_learner_request(
            params, state, ids, requester,
            record_type=SisaRecord, method=_METHOD, num_examples=num_examples,
        )  # fmt: skip
        ids = request.ids
        retained = records.retained_ids(state.record.fitted, ids)
        lanes: dict[int, int] = {}
        shards, stages = places(plan, state.record.sisa_key)
        for shard, stage in zip(shards[ids].tolist(), stages[ids].tolist(), strict=True):
            lanes[shard] = min(stage, lanes.get(shard, stage))
        return request, retained, lanes

    def forget(params, state, ids, *, data=None, requester=None):
        request, retained, lanes = check_request(params, state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, state, ForgetInfo.of(_METHOD, request))
        record, reader = state.record, records.RowReader(data)
        reader.prepare(retained)
        words, levels = record.sisa_key, [*record.sisa_checkpoints, (params, state.inner)]
        check_loss_once(_take(params, 0), reader, retained)
        states = lambda shard, first: (
            _take(levels[first - 1], shard) if first else start(words, shard)
        )
        total = sum(num_slices - first for first in lanes.values())
        with show_progress("forgetting", total, show=progress) as advance:
            after = train(words, states, lanes, slot_table(plan, words, retained), reader, advance)
        for stage in range(num_slices):
            found = {shard: state for (shard, at), state in after.items() if at == stage}
            levels[stage] = _replace(levels[stage], found)
        new_params, inner = levels[-1]
        fitted = records.mark_forgotten(record.fitted, request.ids, new_params)
        new_state = UnlearnerState(inner, SisaRecord(fitted, words, tuple(levels[:-1])))
        measured = {
            "shards_retrained": len(lanes),
            "first_slices": tuple(sorted(lanes.items())),
            "replayed_steps": sum(plan.steps_from(first) for first in lanes.values()),
        }
        return certificates.concluded(
            request, (params, state), (new_params, new_state), measured, **_promise()
        )

    def quote(params, state, ids):
        try:
            request, _, lanes = check_request(params, state, ids)
        except (errors.IdError, errors.RetainSetEmptyError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="exact")
        steps = sum(plan.steps_from(first) for first in lanes.values())
        return Quote(
            feasible=True,
            reason="",
            guarantee="exact",
            num_forgotten=len(request.ids),
            num_steps=steps,
            num_gradients=steps,
            retrain_gradients=num_shards * plan.steps_from(0),
            memory_bytes=2 * tree.num_bytes((params, state)) if lanes else 0,
        )

    def predict(params, batch):
        return combine(jax.vmap(apply_fn, in_axes=(0, None))(params, batch))

    return ExactLearner(fit, predict, forget, quote)


def _combine(aggregate):
    """The function of outputs (shards, b, ...) that an ensemble answers with."""
    if callable(aggregate):
        return aggregate
    if aggregate == "mean":
        return lambda outputs: jnp.mean(outputs, axis=0)
    if aggregate == "majority":
        votes = lambda out: jax.nn.one_hot(jnp.argmax(out, axis=-1), out.shape[-1])
        return lambda outputs: jnp.mean(votes(outputs), axis=0)
    raise ValueError(f'Expected aggregate "mean", "majority" or a function, got {aggregate!r}.')


def _make_run(tx, loss_fn, l2):
    """A compiled function (params, inner, segment, active) -> (params, inner, flags) of lanes."""
    update = records.wrapped_update(tx, records.Penalty(l2))
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)
    keyed = kernels.takes_key(loss_fn)

    def step(params, inner, row: records.Segment):
        keys = kernels.example_keys(jax.random.wrap_key_data(row.keys), row.ids) if keyed else None
        grads, info = gradient(params, row.rows, row.weights, keys=keys)
        flags = records.StepFlags(~tree.all_finite(grads), info.num_non_finite)
        value_fn = lambda p: value(p, row.rows, row.weights, keys=keys)
        extra = {"value": info.value, "grad": grads, "value_fn": value_fn}
        updates, inner = update(grads, inner, params, **extra)
        return optax.apply_updates(params, updates), inner, flags

    one = records.loop_over_steps(step)

    def lanes(params, inner, segment, active):
        if segment.ids.shape[0] > 1:
            return jax.vmap(one, in_axes=(0, 0, 0, None))(params, inner, segment, active)
        # vmap would turn the kernel's branch for bad rows into the work of both branches.
        found = one(_take(params, 0), _take(inner, 0), _take(segment, 0), active)
        return jax.tree.map(lambda leaf: leaf[None], found)

    return jax.jit(lanes)


def _run_stage(plan: Schedule, run, keyed, words, held, where, table, reader):
    """States of a group of shards after the epochs of one stage."""
    (params, inner), (group, stage) = held, where
    length = records.default_segment_length()
    bad, no_keys = [], np.zeros((len(group), length, 2), np.uint32)
    for epoch in range(plan.epochs):
        steps = np.stack([slot_steps(plan, words, shard, stage, epoch) for shard in group])
        ids = np.where(steps < 0, -1, table[np.asarray(group)[:, None, None], steps])
        for at in range(0, ids.shape[1], length):
            active = min(length, ids.shape[1] - at)
            block = np.full((len(group), length, plan.batch_size), -1, np.int32)
            block[:, :active] = ids[:, at : at + active]
            operands: dict[str, Any] = {
                "rows": reader(block),
                "ids": block,
                "weights": (block >= 0).astype(np.float32),
                "num_rows": np.sum(block >= 0, axis=-1, dtype=np.int32),
                "keys": step_keys(words, group, stage, epoch, at, length) if keyed else no_keys,
            }
            segment = records.Segment(**operands, settings=())
            params, inner, flags = run(params, inner, segment, active)
            bad.append(flags.non_finite_rows)
    if sum(int(np.sum(jax.device_get(rows))) for rows in bad):
        raise errors.NonFiniteError("Expected finite rows and losses in training; nothing changed.")
    return params, inner


def _stack(states: list) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _take(stacked: Any, shard: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[shard], stacked)


def _replace(stacked: Any, found: dict[int, Any]) -> Any:
    """`stacked` with some shards replaced."""
    put = lambda shard: lambda leaf, new: jnp.asarray(leaf).at[shard].set(new)
    for shard, state in found.items():
        stacked = jax.tree.map(put(shard), stacked, state)
    return stacked


def _promise() -> dict[str, Any]:
    """The fields of the certificate."""
    return {
        "method": _METHOD,
        "paper": "Bourtoule et al. 2021, arXiv 1912.03817",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "assumptions": (
            certificates.Assumption(
                "isolation",
                "proven",
                "Shards share no row and no state. Each was trained again from a checkpoint of "
                "parameters and optimizer state from before it first saw a forgotten row.",
            ),
            certificates.divided("kept"),
            *certificates.assumed(
                "rows unchanged", "mean loss", "oblivious requests", "public settings",
                "secret record",
            ),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }  # fmt: skip
