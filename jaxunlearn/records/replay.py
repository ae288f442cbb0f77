"""Running a recorded training again, some example weights at zero: the oracle of all methods."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree

from jaxunlearn import errors, kernels, tree
from jaxunlearn.progress import progress
from jaxunlearn.records.ids import validate_ids
from jaxunlearn.records.log import AnyArray, StepLog, get_settings, init_log, set_settings
from jaxunlearn.records.rows import RowReader
from jaxunlearn.types import Batch, LossFn, Params

_SEGMENT_LENGTH = 32


class Segment(NamedTuple):
    """What a few consecutive steps need; leaves have a leading axis of steps."""

    rows: Batch
    ids: Int[Array, "steps batch"]
    weights: Array
    num_rows: Int[Array, "steps"]
    keys: Array
    settings: PyTree


class StepFlags(NamedTuple):
    """What a replayed step met.

    non_finite: whether its gradient was not finite.
    non_finite_rows: rows left out because their inputs or loss were not finite.
    """

    non_finite: Bool[AnyArray, "steps"]
    non_finite_rows: Int[AnyArray, "steps"]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """`l2 * params` added to the gradient, where `mask` (None: everywhere) is true."""

    l2: float | None
    mask: PyTree | Callable[[Params], PyTree] | None = None

    def __post_init__(self):
        if self.l2 is not None and not self.l2 >= 0:
            raise ValueError(f"Expected l2={self.l2} >= 0, or None.")

    def gradient(self, updates: PyTree, params: Params) -> PyTree:
        """`updates + l2 * params`."""
        if self.l2 is None:
            return updates
        add = lambda on, g, p: g + (self.l2 * p).astype(g.dtype) if on else g
        return jax.tree.map(add, self._mask(params), updates, params)

    def value(self, params: Params):
        """`(l2 / 2) ||params||^2` over the mask."""
        if self.l2 is None:
            return 0.0
        squares = jax.tree.map(
            lambda on, p: tree.vdot(p, p) if on else jnp.zeros(()), self._mask(params), params
        )
        return 0.5 * self.l2 * sum(jax.tree.leaves(squares))

    def _mask(self, params: Params) -> PyTree:
        mask = self.mask(params) if callable(self.mask) else self.mask
        return jax.tree.map(lambda _: True, params) if mask is None else mask


def wrapped_update(tx: optax.GradientTransformation, penalty: Penalty):
    """`tx.update` with the penalty added, compiled alike in training and in replay.

    The barriers keep XLA from fusing it with what stands before or after it, which differs.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, inner, params, **extra):
        extra = _penalise_extra(extra, penalty, params)
        updates = penalty.gradient(updates, params)
        given = inner
        updates, inner, params = jax.lax.optimization_barrier((updates, inner, params))
        updates, inner = jax.lax.optimization_barrier(tx.update(updates, inner, params, **extra))
        return updates, tree.match_weak_types(inner, given)

    return update


def _penalise_extra(extra: dict[str, Any], penalty: Penalty, params: Params) -> dict[str, Any]:
    """`value`, `grad` and `value_fn` of the loss become those of the objective."""
    if penalty.l2 is None:
        return extra
    extra = dict(extra)
    if extra.get("value") is not None:
        extra["value"] = extra["value"] + penalty.value(params)
    if extra.get("grad") is not None:
        extra["grad"] = penalty.gradient(extra["grad"], params)
    if extra.get("value_fn") is not None:
        value_fn = extra["value_fn"]
        extra["value_fn"] = lambda p, *args, **kw: value_fn(p, *args, **kw) + penalty.value(p)
    return extra


def make_segment(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    normalizer: str,
    penalty: Penalty,
    along_path: bool = False,
):
    """A function (params, inner, segment, num_active) -> (params, inner, flags) that trains.

    Runs the first `num_active` steps of the segment. One step is straight-line code, more are one
    loop; `flags` are `StepFlags`. With `along_path`, `segment.settings` is (settings, path), and
    gradients and updates are those at the path's parameters; the updates move `params`.
    """
    update = wrapped_update(tx, penalty)
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)
    keyed = kernels.takes_key(loss_fn)

    def step(params, inner, row: Segment):
        settings, here = row.settings if along_path else (row.settings, params)
        inner = set_settings(inner, settings)
        keys = kernels.example_keys(jax.random.wrap_key_data(row.keys), row.ids) if keyed else None
        options = {"num_rows": row.num_rows if normalizer == "batch" else None, "keys": keys}
        grads, info = gradient(here, row.rows, row.weights, **options)
        flags = StepFlags(~tree.all_finite(grads), info.num_non_finite)
        value_fn = lambda p: value(p, row.rows, row.weights, **options)
        extra = {"value": info.value, "grad": grads, "value_fn": value_fn}
        updates, inner = update(grads, inner, here, **extra)
        return optax.apply_updates(params, updates), inner, flags

    return loop_over_steps(step)


def loop_over_steps(step):
    """A function (params, inner, segment, num_active) -> (params, inner, flags) of many steps.

    step: (params, inner, row of the segment) -> (params, inner, `StepFlags`).
    """

    def run(params, inner, segment: Segment, num_active) -> tuple[Params, PyTree, StepFlags]:
        length = segment.ids.shape[0]
        if length == 1:
            params, inner, bad = step(params, inner, jax.tree.map(lambda leaf: leaf[0], segment))
            return params, inner, jax.tree.map(lambda leaf: leaf[None], bad)

        def body(i, carry):
            params, inner, flags = carry
            row = jax.tree.map(lambda leaf: leaf[i], segment)
            params, inner, bad = step(params, inner, row)
            return params, inner, jax.tree.map(lambda all, one: all.at[i].set(one), flags, bad)

        flags = StepFlags(jnp.zeros((length,), bool), jnp.zeros((length,), jnp.int32))
        return jax.lax.fori_loop(0, num_active, body, (params, inner, flags))

    return run


def default_segment_length() -> int:
    """Steps per compiled segment: 1 on a CPU, where a loop inside XLA saves nothing, is not bitwise
    the straight-line step, and runs convolutions 20 to 49 times slower; 32 elsewhere, where a
    launch costs more than a small step."""
    return 1 if jax.default_backend() == "cpu" else _SEGMENT_LENGTH


def slice_log(log: StepLog, start: int, length: int, num_active: int, reader: RowReader) -> Segment:
    """Steps start .. start + num_active - 1 of a host log as a segment of `length` steps."""

    def take(leaf):
        leaf = np.asarray(leaf[start : start + num_active])
        return np.concatenate([leaf, np.zeros((length - num_active, *leaf.shape[1:]), leaf.dtype)])

    ids = take(log.step_ids)
    ids[num_active:] = -1
    return Segment(
        rows=reader(ids),
        ids=ids,
        weights=(ids >= 0).astype(np.float32),
        num_rows=take(log.step_num_rows),
        keys=take(log.step_keys),
        settings=jax.tree.map(take, log.step_settings),
    )


def run_log(
    run,
    params: Params,
    inner: PyTree,
    log: StepLog,
    reader: RowReader,
    *,
    start: int,
    stop: int,
    segment_length: int,
    cuts: Iterable[int] = (),
    on_cut: Callable[[int, Params, PyTree], None] = lambda step, params, inner: None,
    label: str = "replaying",
    show: bool | None = None,
) -> tuple[Params, PyTree, StepFlags]:
    """Run steps start .. stop-1 of a host log from (params, inner).

    `run` is `jax.jit(make_segment(...))`; one trace serves every range. It donates nothing: written
    in place, XLA rounds some updates (Adam with traced decay rates) unlike the training step.
    `on_cut(step, params, inner)` sees the state before each step in `cuts`. The rows of a segment
    are read while the device computes the one before it.
    """
    edges = sorted({c for c in cuts if start <= c < stop} | {stop})
    flags: list[tuple[StepFlags, int]] = []
    with progress(label, stop - start, show=show) as advance:
        at = start
        for edge in edges:
            while at < edge:
                active = min(segment_length, edge - at)
                segment = slice_log(log, at, segment_length, active, reader)
                params, inner, bad = run(params, inner, segment, active)
                flags.append((bad, active))
                if len(flags) > 2:
                    jax.block_until_ready(flags[-3][0])
                at += active
                advance(active)
            if edge < stop:
                on_cut(edge, params, inner)
    jax.block_until_ready((params, inner))
    met = [[leaf[:active] for leaf in jax.device_get(bad)] for bad, active in flags]
    nothing = [np.zeros((0,), bool), np.zeros((0,), np.int32)]
    return params, inner, StepFlags(*map(np.concatenate, zip(nothing, *met)))


def log_of(step_ids, *, num_rows=None, keys=None) -> StepLog:
    """A step log from plain arrays: ids (T, B), rows per step (T,), typed keys (T,)."""
    step_ids = np.asarray(step_ids, np.int32)
    log = init_log(*step_ids.shape, has_key=keys is not None, inner=())
    rows = np.sum(step_ids >= 0, axis=1) if num_rows is None else np.asarray(num_rows)
    words = log.step_keys if keys is None else jax.random.key_data(keys)
    return log._replace(step_ids=step_ids, step_num_rows=rows.astype(np.int32), step_keys=words)


def without(log: StepLog, ids: np.ndarray) -> StepLog:
    """The host log with every use of `ids` overwritten by -1; the row counts stay."""
    log = jax.device_get(log)
    step_ids = np.array(log.step_ids)
    step_ids[np.isin(step_ids, ids) & (step_ids >= 0)] = -1
    return log._replace(step_ids=step_ids)


def compare_replay(
    mode: str, tolerance: float, given: PyTree, extras: set[str], replay_unchanged: Callable
) -> dict[str, Any]:
    """Replay without deletion and compare with the state that was handed in.

    mode: "off", "report" (refuse above `tolerance`, relative L2) or "bitwise" (refuse any gap).
    extras: names of extra arguments that training passed to `update`, for the message.

    Raises:
      VerificationError: the replay does not reproduce the given state.
    """
    if mode == "off":
        return {"verified": "no"}
    params, inner = replay_unchanged()
    reached = params, set_settings(inner, get_settings(given[1]))
    bitwise = tree.same_bits(reached, given)
    distance = 0.0 if bitwise else max(map(tree.relative_distance, reached, given))
    if bitwise:
        return {"verified": "bitwise", "replay_distance": 0.0}
    if mode == "bitwise" or not distance <= tolerance:
        dropped = (
            f" Extra arguments of update that a replay cannot know: {sorted(extras)}."
            if extras
            else ""
        )
        raise errors.VerificationError(
            f"Expected the recorded run to replay {'bit for bit ' if mode == 'bitwise' else ''}to "
            f"the given state, got a relative distance of {distance:.3g} (tolerance "
            f"{tolerance:.3g}).{dropped} Were params, state or data changed outside update? "
            "Gradients from kernels.weighted_grad replay bitwise."
        )
    return {"verified": "within tolerance", "replay_distance": distance}


def oracle(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    params: Params,
    *,
    log: StepLog,
    data: Any,
    forget: Any = (),
    num_steps: int | None = None,
    normalizer: str = "batch",
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    segment_length: int | None = None,
    show: bool | None = None,
) -> tuple[Params, optax.OptState]:
    """Train from `params` over the logged steps, with the weight of the `forget` ids at zero.

    The oracle of every method with target `counterfactual`: same algorithm, initialisation,
    schedule and keys. It never reads a row of `forget`.

    Args:
      params: initial parameters; not donated.
      log: the record's step log, or `records.log_of(step_ids)`.
      data: `data[ids]`, or a pytree of arrays.
      forget: ids, host integers.
      num_steps: steps of the log to run; None runs every step that was logged.
      normalizer: "batch" divides by the scheduled rows, "kept" by the rows that are left.

    Returns:
      Parameters and the state of `tx`. Cost: one gradient a step.
    """
    forgotten, _ = validate_ids(forget, np.iinfo(np.int32).max)
    host_log = without(log, forgotten)
    taken = int(np.sum(np.asarray(host_log.step_num_rows) >= 0))
    steps = taken if num_steps is None else min(num_steps, taken)
    reader = RowReader(data)
    used = np.asarray(host_log.step_ids)
    reader.prepare(used[used >= 0], may_be_empty=True)
    penalty = Penalty(l2, l2_mask)
    segment = make_segment(tx, loss_fn, normalizer=normalizer, penalty=penalty)
    run = jax.jit(segment)
    length = segment_length or default_segment_length()
    params, inner = tree.copy((params, optax.with_extra_args_support(tx).init(params)))
    params, inner, _ = run_log(
        run, params, inner, host_log, reader,
        start=0, stop=steps, segment_length=length, label="retraining the oracle", show=show,
    )  # fmt: skip
    return params, inner
