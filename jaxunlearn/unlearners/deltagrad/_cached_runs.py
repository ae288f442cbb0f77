"""A recorded run with its trajectory: where to take it up again, and whether it explains itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records import Checkpoints, DeletionPlan, RowReader, StepLog, as_given, read_slot
from jaxunlearn.types import LossFn, Params
from jaxunlearn.unlearners.deltagrad._corrected import CorrectedSteps
from jaxunlearn.unlearners.deltagrad._trajectory import Trajectory, read_trajectory


class CachedRun(NamedTuple):
    """A run with its trajectory, and the deletion that takes up its steps again at `plan.first`.

    foretold_steps: whether the cached gradient of a step was foretold by an earlier deletion.
    needs_loss: whether the optimizer reads the loss, so that nothing goes without rows; the steps
      are then taken up at the checkpoint.
    """

    plan: DeletionPlan
    checkpoints: Checkpoints
    trajectory: Trajectory
    foretold_steps: np.ndarray
    needs_loss: bool


class CachedRunTools(NamedTuple):
    """What `make_cached_run` compiles.

    start_of: (run) -> (params, inner) before its first step, from cached gradients alone.
    check: (run, start, given, reader, avoid) -> the largest relative distance of the state that the
      cached gradients lead to from the `given` one, and of two cached gradients from those of loss
      and data. Rows of `avoid` are not read.
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

    def start_of(run: CachedRun):
        plan = run.plan
        params, inner = tree.copy(read_slot(run.checkpoints, plan.slot))
        for t in range(plan.start, plan.first):
            params, grads = read(run.trajectory, t)
            params, inner = unchanged(params, inner, grads, setting_at(plan.log.step_settings, t))
        if plan.first > plan.start:
            params, _ = read(run.trajectory, plan.first)
        return params, inner

    def whole_step(log: StepLog, t: int, reader: RowReader):
        ids, keys = np.asarray(log.step_ids[t]), None
        num_rows = log.step_num_rows[t] if normalizer == "batch" else None
        if keyed:
            key = jax.random.wrap_key_data(jnp.asarray(log.step_keys[t]))
            keys = kernels.example_keys(key, jnp.asarray(ids))
        return reader(ids), (ids >= 0).astype(np.float32), num_rows, keys

    def check(run: CachedRun, start, given, reader: RowReader, avoid) -> float:
        distance, plan = 0.0, run.plan
        if not run.needs_loss:
            settings = plan.log.step_settings
            reached = run_unchanged(start, run.trajectory, settings, plan.first, plan.stop)
            distance = max(map(tree.relative_distance, as_given(reached, given), given))
        for t in _sampled_steps(run, avoid):
            params, cached = read(run.trajectory, t)
            found = gradient_at(params, *whole_step(plan.log, t, reader))
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


def _sampled_steps(run: CachedRun, avoid) -> list[int]:
    """The first and the last step whose cached gradient was handed in or evaluated."""
    at, log = np.arange(run.plan.first, run.plan.stop), run.plan.log
    step_ids = log.step_ids[at]
    usable = ~run.foretold_steps[at] & (step_ids >= 0).any(axis=1)
    usable &= ~log.step_non_finite[at] & ~np.isin(step_ids, avoid).any(axis=1)
    steps = at[usable]
    return sorted({int(steps[0]), int(steps[-1])}) if steps.size else []
