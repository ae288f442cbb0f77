"""Steps of a recorded run taken again without some rows, from its cached trajectory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxunlearn import kernels, tree
from jaxunlearn.progress import progress
from jaxunlearn.records import (
    Checkpoints,
    DeletionPlan,
    Penalty,
    RowReader,
    bucket,
    get_settings,
    rewrite_slot,
    set_settings,
    wrapped_update,
)
from jaxunlearn.records.log import AnyArray
from jaxunlearn.types import Batch, LossFn, Params
from jaxunlearn.unlearners.deltagrad._trajectory import (
    Trajectory,
    read_trajectory,
    write_trajectory,
)

_rewrite = jax.jit(rewrite_slot, donate_argnums=0)
SETTLE = 10
"""Momentum 0.9 keeps a third of what it held that many steps ago."""
_FEWEST_ROWS = 8  # places for the rows that go, so that small requests share one trace


class StepRows(NamedTuple):
    """What one step takes from outside.

    kept_rows, kept_ids, kept_weights: the rows that stay; None where the gradient is foretold.
    gone_rows, gone_ids, gone_weights: those that go; weight 1 for each, 0 for padding.
    num_kept: how many stay.  num_scheduled: how many rows the step was scheduled with.
    key_words, settings: of the step, from the log.
    """

    kept_rows: Batch | None
    kept_ids: Int[AnyArray, "b"] | None
    kept_weights: Float[AnyArray, "b"] | None
    gone_rows: Batch
    gone_ids: Int[AnyArray, "k"]
    gone_weights: Float[AnyArray, "k"]
    num_kept: Float[AnyArray, ""] | np.floating
    num_scheduled: Int[AnyArray, ""]
    key_words: AnyArray
    settings: PyTree


class Moved(NamedTuple):
    """A step taken: the new state, the gradient it took, how it stands, and what it met."""

    params: Params
    inner: optax.OptState
    pairs: kernels.lbfgs.LBFGSMemory
    gradient: PyTree
    foretold: kernels.Foretold
    non_finite: Bool[Array, ""]
    num_non_finite_rows: Int[Array, ""]


class StepsMet(NamedTuple):
    """What a range of steps was like, in host arrays with one entry a step.

    told: whether the gradient was foretold.  The others are those of `Moved`.
    """

    told: np.ndarray
    foretold: kernels.Foretold
    non_finite: np.ndarray
    num_non_finite_rows: np.ndarray

    def figures(self, due: np.ndarray) -> dict[str, int | float]:
        """Counts, and the mismatch at exact steps: after foretold ones, where there are such.

        settled_steps: exact steps at the end, in a row.
        gradient_mismatch: largest ||foretold - evaluated|| / ||evaluated|| of the gradient.
        correction_mismatch: median ||B v - y|| / ||y||; 1 is what leaving B v out would give.
        """
        found, after = self.foretold, np.append(False, self.told[:-1])
        usable = ~self.told & found.trusted & (found.change_norm > 0) & (found.gradient_norm > 0)
        at = usable & after if (usable & after).any() else usable
        figures: dict[str, int | float] = {
            "num_steps": len(self.told),
            "exact_steps": int(np.sum(~self.told)),
            "fallback_steps": int(np.sum(~self.told & ~due)),
            "settled_steps": int(np.argmax(np.append(self.told[::-1], True))),
            "non_finite_rows": int(np.sum(self.num_non_finite_rows)),
            "non_finite_updates": int(np.sum(self.non_finite)),
        }
        if at.any():
            error = found.error_norm[at]
            figures["gradient_mismatch"] = float(np.max(error / found.gradient_norm[at]))
            figures["correction_mismatch"] = float(np.median(error / found.change_norm[at]))
        return figures


def settle_steps(settle: int | None, inner: PyTree) -> int:
    """Exact steps at the end; where none are asked for, `SETTLE` if the optimizer has a memory.

    Injected hyperparameters are no memory: each step has its own from the log.
    """
    if settle is not None:
        return settle
    inner = set_settings(inner, {path: {} for path in get_settings(inner)})
    return SETTLE if any(map(tree.is_inexact, jax.tree.leaves(inner))) else 0


class CorrectedSteps(NamedTuple):
    """Three ways to take a step, pure; the caller jits.

    exact, foretold: (params, inner, pairs, trajectory, t, StepRows) -> `Moved`, with the gradient
      of the rows that stay, evaluated; and with what the cached one and the pairs foretell.
    unchanged: (params, inner, gradient, settings) -> (params, inner), the recorded step itself,
      from its cached gradient: no rows are needed.
    """

    exact: Callable[..., Moved]
    foretold: Callable[..., Moved]
    unchanged: Callable[..., tuple[Params, PyTree]]


def make_corrected(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    normalizer: str,
    penalty: Penalty,
    learns: bool = True,
    guarded: bool = True,
) -> CorrectedSteps:
    """The steps of `kernels.retained_gradients` with `tx` behind them."""
    update = wrapped_update(tx, penalty)
    evaluate, foretell = kernels.retained_gradients(loss_fn, learns=learns, guarded=guarded)
    value = kernels.weighted_loss(loss_fn)
    keyed = kernels.takes_key(loss_fn)

    def weighted(rows, ids, weights, words):
        keys = kernels.example_keys(jax.random.wrap_key_data(words), ids) if keyed else None
        return kernels.WeightedRows(rows, weights, keys)

    def cached(trajectory: Trajectory, t, rows: StepRows) -> kernels.CachedStep:
        params, gradient = read_trajectory(trajectory, t)
        words, kept = rows.key_words, rows[:3]
        return kernels.CachedStep(
            cached_params=params,
            cached_gradient=gradient,
            kept=None if rows.kept_rows is None else weighted(*kept, words),
            gone=weighted(rows.gone_rows, rows.gone_ids, rows.gone_weights, words),
            num_kept=jnp.asarray(rows.num_kept),
            num_rows=jnp.asarray(rows.num_scheduled) if normalizer == "batch" else None,
        )

    def move(params, inner, pairs, grads, foretold, num_bad, **extra) -> Moved:
        non_finite = ~tree.all_finite(grads)
        updates, inner = update(grads, inner, params, grad=grads, **extra)
        params = optax.apply_updates(params, updates)
        return Moved(params, inner, pairs, grads, foretold, non_finite, num_bad)

    def exact(params, inner, pairs, trajectory, t, rows: StepRows) -> Moved:
        inner, step = set_settings(inner, rows.settings), cached(trajectory, t, rows)
        kept: Any = step.kept
        grads, info, pairs, foretold = evaluate(params, pairs, step)
        options = {"num_rows": step.num_rows, "keys": kept.row_keys}
        value_fn = lambda p: value(p, kept.batch, kept.row_weights, **options)
        extra = {"value": info.value, "value_fn": value_fn}
        return move(params, inner, pairs, grads, foretold, info.num_non_finite, **extra)

    def foretold(params, inner, pairs, trajectory, t, rows: StepRows) -> Moved:
        inner, step = set_settings(inner, rows.settings), cached(trajectory, t, rows)
        grads, found = foretell(params, pairs, step)
        return move(params, inner, pairs, grads, found, jnp.zeros((), jnp.int32))

    def unchanged(params, inner, grads, settings):
        grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, params)
        updates, inner = update(grads, set_settings(inner, settings), params, grad=grads)
        return optax.apply_updates(params, updates), inner

    return CorrectedSteps(exact, foretold, unchanged)


def reads_loss(tx: optax.GradientTransformation, params: Params, inner: PyTree) -> bool:
    """Whether `tx.update` looks at `value` or `value_fn`, as a line search does.

    Such an optimizer cannot run on a gradient alone. Nothing is computed.
    """
    update = optax.with_extra_args_support(tx).update
    called: list[bool] = []

    def value_fn(p, *args, **kwargs):
        del args, kwargs
        called.append(True)
        return tree.vdot(p, p)

    def run(value, grads, inner, params):
        return update(grads, inner, params, value=value, grad=grads, value_fn=value_fn)

    jaxpr = jax.make_jaxpr(run)(jnp.zeros(()), params, inner, params).jaxpr
    used = [var for eqn in jaxpr.eqns for var in eqn.invars] + list(jaxpr.outvars)
    return bool(called) or any(var is jaxpr.invars[0] for var in used)


def make_corrected_segment(steps: CorrectedSteps, is_due: Callable, *, always: bool):
    """A function that takes a few consecutive steps again, in one loop, and is pure.

    Args:
      is_due: since -> whether a step is exact that many steps after the first that lost a row.
      always: every step is exact.

    Returns:
      A function (carry, rows, spoilt, begin, active) -> (carry, told, non_finite).
      carry: (params, inner, pairs, trajectory, first), first the step that first lost a row, or -1.
      rows: `StepRows` with a leading axis of steps.  spoilt: (S,), steps that must be exact.
    """

    def take(i, carry, rows: StepRows, spoilt, begin):
        params, inner, pairs, trajectory, first = carry
        t, row = begin + i, jax.tree.map(lambda leaf: leaf[i], rows)
        first = jnp.where((first < 0) & jnp.any(row.gone_weights > 0), t, first)
        operands = (params, inner, pairs, trajectory, t, row)
        exactly = lambda _: (steps.exact(*operands), jnp.zeros((), bool))

        def attempt(_):
            moved = steps.foretold(*operands)
            as_told = lambda _: (moved, first >= 0)
            return jax.lax.cond(moved.foretold.trusted, as_told, exactly, None)

        due = ((first >= 0) & is_due(t - first)) | spoilt[i]
        moved, told = exactly(None) if always else jax.lax.cond(due, exactly, attempt, None)
        trajectory = write_trajectory(trajectory, t, params, moved.gradient)
        carry = (moved.params, moved.inner, moved.pairs, trajectory, first)
        return carry, told, moved.non_finite

    def run(carry, rows: StepRows, spoilt, begin, active):
        def body(i, state):
            carry, told, bad = state
            carry, was_told, was_bad = take(i, carry, rows, spoilt, begin)
            return carry, told.at[i].set(was_told), bad.at[i].set(was_bad)

        nothing = jnp.zeros_like(spoilt)
        return jax.lax.fori_loop(0, active, body, (carry, nothing, nothing))

    return run


class GoneRows:
    """The rows of a request, read once, and handed out step by step at one shape.

    Args:
      wanted: False reads nothing, and hands out zeros.
    """

    def __init__(self, ids, plan: DeletionPlan, reader: RowReader, *, wanted: bool = True):
        self._ids, self._log = ids, plan.log
        used = np.isin(plan.log.step_ids[plan.first : plan.stop], ids)
        most = max(int(used.sum(axis=1).max()), _FEWEST_ROWS)
        self._width = min(used.shape[1], len(bucket(np.zeros(most, np.int32))))
        self._rows = reader(ids if wanted else np.full(len(ids), -1, np.int32))

    def step_rows(self, t: int, reader: RowReader | None) -> StepRows:
        """What step t needs; without a reader, what a foretold step does."""
        log, step_ids = self._log, self._log.step_ids[t]
        goes = np.isin(step_ids, self._ids)
        kept_ids = np.where(goes, -1, step_ids)
        stays = (kept_ids >= 0).astype(np.float32)
        gone_ids = np.full(self._width, -1, np.int32)
        gone_ids[: goes.sum()] = step_ids[goes]
        place = np.where(gone_ids >= 0, np.searchsorted(self._ids, gone_ids), 0)
        has_kept = reader is not None
        return StepRows(
            kept_rows=reader(kept_ids) if reader is not None else None,
            kept_ids=kept_ids if has_kept else None,
            kept_weights=stays if has_kept else None,
            gone_rows=jax.tree.map(lambda leaf: leaf[place], self._rows),
            gone_ids=gone_ids,
            gone_weights=(gone_ids >= 0).astype(np.float32),
            num_kept=np.sum(stays),
            num_scheduled=log.step_num_rows[t],
            key_words=log.step_keys[t],
            settings=jax.tree.map(lambda leaf: leaf[t], log.step_settings),
        )


def run_corrected(
    steps: CorrectedSteps,
    write: Callable[..., Trajectory],
    carry: tuple,
    gone: GoneRows,
    reader: RowReader,
    due: np.ndarray,
    plan: DeletionPlan,
    checkpoints: Checkpoints,
    *,
    label: str = "forgetting",
    show: bool | None = None,
):
    """Steps plan.first .. plan.stop - 1 again, on the host, a foretold one where it is trusted.

    Args:
      steps: compiled.  write: `write_trajectory`, compiled, and donating: the trajectory of `carry`
        is overwritten with the parameters and gradients of the corrected run.
      carry: (params, inner, pairs, trajectory) before the first step.
      due: whether each step is exact by schedule.
      checkpoints: those taken after the first step become the corrected run's, in a copy.

    Returns:
      (carry, checkpoints, StepsMet). A foretold step reads no row but those that go.
    """
    params, inner, pairs, trajectory = carry
    told, met = np.zeros(len(due), bool), []
    checkpoints = tree.copy(checkpoints)
    with progress(label, len(due), show=show) as advance:
        for i, t in enumerate(range(plan.first, plan.stop)):
            if t in plan.later:
                checkpoints = _rewrite(checkpoints, plan.later[t], params, inner)
            operands = (params, inner, pairs, trajectory, t)
            if not due[i]:
                moved = steps.foretold(*operands, gone.step_rows(t, None))
                told[i] = bool(moved.foretold.trusted)
            if not told[i]:
                moved = steps.exact(*operands, gone.step_rows(t, reader))
            trajectory = write(trajectory, t, params, moved.gradient)
            params, inner, pairs = moved[:3]
            met.append(moved[4:])
            advance(1)
    met = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(met))
    return (params, inner, pairs, trajectory), checkpoints, StepsMet(told, *met)
