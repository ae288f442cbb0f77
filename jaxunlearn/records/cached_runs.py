"""A recorded run with its trajectory: where to take it up again, and whether it explains itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records.checkpoints import Checkpoints, last_slot_before, read_slot
from jaxunlearn.records.corrected import CorrectedSteps
from jaxunlearn.records.log import StepLog, get_settings, set_settings
from jaxunlearn.records.rows import RowReader
from jaxunlearn.records.trajectory import Trajectory, read_trajectory
from jaxunlearn.types import LossFn, Params


class CachedRun(NamedTuple):
    """The parts of a record that hold a run: the host's log, checkpoints and trajectory.

    foretold_steps: whether the cached gradient of a step was foretold by an earlier deletion.
    """

    log: StepLog
    checkpoints: Checkpoints
    trajectory: Trajectory
    foretold_steps: np.ndarray


class Retake(NamedTuple):
    """Which steps a deletion takes again.

    slot, start: the checkpoint to start from.  first: the first step taken again.  stop: the end.
    needs_loss: whether the optimizer reads the loss, so that nothing goes without rows.
    """

    slot: int
    start: int
    first: int
    stop: int
    needs_loss: bool


def plan_retake(run: CachedRun, ids: np.ndarray, stop: int, *, needs_loss: bool) -> Retake:
    """From the first step that used one of `ids`, or from the checkpoint before it."""
    first = int(np.argmax(np.isin(run.log.step_ids, ids).any(axis=1)))
    slot, start = last_slot_before(run.checkpoints, first)
    return Retake(slot, start, start if needs_loss else first, stop, needs_loss)


class CachedRunTools(NamedTuple):
    """What `make_cached_run` compiles.

    start_of: (run, retake) -> (params, inner) before its first step, from cached gradients alone.
    check: (run, retake, start, given, reader, avoid) -> the largest relative distance of the
      state that the cached gradients lead to from the `given` one, and of two cached gradients
      from those of loss and data. Rows of `avoid` are not read.
    """

    start_of: Callable[..., tuple[Params, PyTree]]
    check: Callable[..., float]


def make_cached_run(steps: CorrectedSteps, loss_fn: LossFn, *, normalizer: str) -> CachedRunTools:
    """The two checks of a run with a trajectory. `steps` are pure."""
    gradient, keyed = kernels.weighted_grad(loss_fn), kernels.takes_key(loss_fn)
    unchanged, read = jax.jit(steps.unchanged), jax.jit(read_trajectory)
    setting_at = lambda settings, t: jax.tree.map(lambda leaf: leaf[t], settings)

    @jax.jit
    def gradient_at(params, rows, weights, num_rows, keys):
        return gradient(params, rows, weights, num_rows=num_rows, keys=keys)

    @jax.jit
    def run_unchanged(start, trajectory, settings, first, stop):
        def body(t, carry):
            return steps.unchanged(
                *carry, read_trajectory(trajectory, t)[1], setting_at(settings, t)
            )

        return jax.lax.fori_loop(first, stop, body, start)

    def start_of(run: CachedRun, retake: Retake):
        params, inner = tree.copy(read_slot(run.checkpoints, retake.slot))
        for t in range(retake.start, retake.first):
            params, grads = read(run.trajectory, t)
            params, inner = unchanged(params, inner, grads, setting_at(run.log.step_settings, t))
        if retake.first > retake.start:
            params, _ = read(run.trajectory, retake.first)
        return params, inner

    def whole_step(log: StepLog, t: int, reader: RowReader):
        ids, keys = np.asarray(log.step_ids[t]), None
        num_rows = log.step_num_rows[t] if normalizer == "batch" else None
        if keyed:
            key = jax.random.wrap_key_data(jnp.asarray(log.step_keys[t]))
            keys = kernels.example_keys(key, jnp.asarray(ids))
        return reader(ids), (ids >= 0).astype(np.float32), num_rows, keys

    def check(run: CachedRun, retake: Retake, start, given, reader: RowReader, avoid) -> float:
        distance = 0.0
        if not retake.needs_loss:
            settings = run.log.step_settings
            params, inner = run_unchanged(
                start, run.trajectory, settings, retake.first, retake.stop
            )
            inner = set_settings(inner, get_settings(given[1]))
            distance = max(map(tree.relative_distance, (params, inner), given))
        for t in _sampled_steps(run, retake, avoid):
            params, cached = read(run.trajectory, t)
            found = gradient_at(params, *whole_step(run.log, t, reader))
            distance = max(distance, tree.relative_distance(found, cached))
        return distance

    return CachedRunTools(start_of, check)


def check_cached_run(
    distance: float, tolerance: float, trajectory: Trajectory, extras: Any = ()
) -> None:
    """Refuse a run that its cached gradients do not explain; rounding in storage is forgiven.

    Raises:
      VerificationError: naming the extra arguments that a replay cannot know.
    """
    gradients = jax.tree.leaves(trajectory.trajectory_gradients)
    rounding = 8 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in gradients)
    if not distance <= max(tolerance, rounding):
        dropped = (
            f" Extra arguments of update that a replay cannot know: {sorted(extras)}."
            if extras
            else ""
        )
        raise errors.VerificationError(
            "Expected the cached gradients to lead to the given state, and to be those of loss_fn "
            f"and data, got a relative distance of {distance:.3g} (tolerance {tolerance:.3g})."
            f"{dropped} Were params, state or data changed outside update, or were other gradients "
            "used in training?"
        )


def _sampled_steps(run: CachedRun, retake: Retake, avoid) -> list[int]:
    """The first and the last step whose cached gradient was handed in or evaluated."""
    at = np.arange(retake.first, retake.stop)
    step_ids = run.log.step_ids[at]
    usable = ~run.foretold_steps[at] & (step_ids >= 0).any(axis=1)
    usable &= ~run.log.step_non_finite[at] & ~np.isin(step_ids, avoid).any(axis=1)
    steps = at[usable]
    return sorted({int(steps[0]), int(steps[-1])}) if steps.size else []


def check_logged_step(ids, key, batch_size: int, keyed: bool) -> None:
    """Refuse a step that the log could not hold or a replay could not repeat."""
    if ids is None:
        return
    if jnp.shape(ids)[0] > batch_size:
        raise ValueError(f"Expected at most batch_size={batch_size} ids, got {jnp.shape(ids)[0]}.")
    if keyed and key is None:
        raise ValueError("Expected key=step_key in update: the loss takes one, and so does replay.")
    default = jax.random.key_impl(jax.random.key(0))
    if keyed and jax.random.key_impl(key) != default:
        raise ValueError(
            f"Expected a key of the default implementation {default}, got "
            f"{jax.random.key_impl(key)}: the log keeps its words only."
        )
