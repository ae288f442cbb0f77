"""State alignment after Stewart 2026: how far a training state is from the counterfactual one.

The four measures are those that the abstract of "Form and Function" (arXiv 2605.17590) names. Their
formulas here are the project's own, since the paper's were not available when they were written.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jaxunlearn import tree
from jaxunlearn.audits.intervals import Interval, mean_interval
from jaxunlearn.audits.pairs import Curvature, curvature_of, norm_distance, unread_leaves
from jaxunlearn.types import Batch, LossFn, Params, UnlearnerState

TrainingState = tuple[Params, PyTree]
Operator = Callable[[Params, PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateAlignment:
    """Distances of a state to its counterfactual, relative to the latter; 0 where they agree.

    parameter_error: ||w - w'|| / ||w'||.
    memory_error: mean over probes v of ||H v - H' v|| / ||H' v||, H and H' the actions of the two
      states on a vector, at the same parameters.
    memory_norm_error: ||H - H'||_2 / ||H'||_2, over all vectors; None where no exact form is known.
    carry_error: ||c - c'|| / ||c'||, c what `tx.update` makes of a gradient of zero: momentum.
    state_error: sqrt(a parameter_error^2 + b memory_error^2), (a, b) = `weights`.
    update_error: mean over held-out batches of ||u - u'|| / ||u'||, u the next `tx.update` of each
      state from its own parameters, whatever H is; None without batches.
    update_cosine: of u and u', the same mean.
    operator: "inverse Hessian", "update" or "given".
    unread: paths of the leaves in which the states differ though H, an inverse Hessian, does not
      read them, so that memory_error and state_error know nothing of them: what momentum, step
      sizes, counters and unfinished pairs are made of. Empty for another H.
    """

    parameter_error: float
    memory_error: Interval
    memory_norm_error: float | None
    carry_error: float
    state_error: float
    weights: tuple[float, float]
    update_error: Interval | None
    update_cosine: Interval | None
    operator: str
    unread: tuple[str, ...]
    num_probes: int
    num_batches: int


def state_alignment(
    actual: TrainingState, counterfactual: TrainingState, *, tx, loss_fn=None, **options
) -> StateAlignment:
    """`make_state_alignment(tx, loss_fn, **options)(actual, counterfactual)`, for a single use.

    >>> tx, w = optax.sgd(1.0, momentum=0.5), jnp.ones(3)
    >>> one = optax.tree.map_params(tx, lambda leaf: leaf + 1.0, tx.init(w))
    >>> measured = state_alignment((w, tx.init(w)), (w, one), tx=tx, key=jax.random.key(0))
    >>> measured.parameter_error, measured.carry_error
    (0.0, 1.0)
    """
    return make_state_alignment(tx, loss_fn, **options)(actual, counterfactual)


def make_state_alignment(
    tx: optax.GradientTransformation,
    loss_fn: LossFn | None = None,
    *,
    key: Key[Array, ""],
    batches: Sequence[Batch] = (),
    l2: float = 0.0,
    num_probes: int = 64,
    probe_scale: float | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    operator: Operator | None = None,
    initial_scale: Callable[[float], float] | None = None,
    confidence: float = 0.95,
) -> Callable[[TrainingState, TrainingState], StateAlignment]:
    """The four measures for the states of one optimizer, compiled once.

    The action H of a state on a vector is, for a state with one L-BFGS memory (`optax.lbfgs`,
    `kernels.lbfgs`), the inverse Hessian of its pairs, exact and without what stands around it: a
    rate, momentum, the pair that Optax has not finished (`StateAlignment.unread` names it). For any
    other it is `tx.update(v, state, w')[0]`: for Adam and RMSProp the preconditioned step, for
    momentum v plus the carry, at the counterfactual parameters w' for both states, so that the
    figure is of the memory alone. Carry and next update are those of `tx.update` for all; it gets
    `value`, `grad` and `value_fn`, for a line search or online L-BFGS.

    Args:
      tx: whose states they are.
      loss_fn: the mean over a batch, without a key; needed for held-out batches.
      key: seeds the probes; the same key gives the same probes for every pair of states.
      batches: held-out batches of one shape, for the update error.
      l2: adds `l2 * params` to the gradients.
      num_probes: Gaussian probes; their number is what the interval of `memory_error` is about.
      probe_scale: standard deviation of their entries. None takes, leaf by leaf, the root mean
        square of the counterfactual's held-out gradients, and 1 without batches. A probe much
        larger than a gradient tells nothing of second moments: it drowns them.
      weights: of the squares in `state_error`.
      operator: (params, state, vector) -> vector instead of H, for a state that acts otherwise.
      initial_scale: gamma -> c, for an inverse Hessian that starts from c I and not from gamma I,
        gamma = s'y / y'y of the newest pair: `lambda gamma: 1.0` for `scale_init_precond=False`,
        `lambda gamma: np.clip(gamma, *scale_range)` for `online_lbfgs(scale_range=...)`.
      confidence: of the intervals.

    Returns:
      A function ((params, state), (params, state) of the counterfactual) -> `StateAlignment`.
      States may be an `UnlearnerState`, whose record is not looked at.

    Cost: 2 num_probes updates of `tx`, and three gradients and two updates a batch; H of L-BFGS on
      the host, 4 m num_probes parameter counts of float64 work, and
      `kernels.lbfgs.operator_distance`.

    References: the measures' names, Stewart 2026, arXiv 2605.17590, abstract; the formulas are not
      the paper's.
    """
    if num_probes < 2:
        raise ValueError(f"Expected num_probes={num_probes} >= 2, for an interval.")
    if len(batches) and loss_fn is None:
        raise ValueError("Expected loss_fn with batches: the update error needs gradients.")
    if min(weights) < 0:
        raise ValueError(f"Expected weights={weights} >= 0.")
    update, next_update, gradient = _updates_of(tx, loss_fn, l2)
    act = jax.jit(operator) if operator else update
    flat, gap = tree.flatten, tree.relative_distance
    mean = functools.partial(mean_interval, confidence=confidence)

    def measure(actual: TrainingState, counterfactual: TrainingState) -> StateAlignment:
        (params, state), (ideal, ideal_state) = map(_opened, (actual, counterfactual))
        found = [] if operator else _curvatures(state, ideal_state, ideal, initial_scale)
        if found:
            run = [lambda v, c=curve: c(flat(v)[None])[0] for curve in found]
        else:
            run = [lambda v, s=one: flat(act(ideal, s, v)) for one in (state, ideal_state)]
        probes = _probes(key, ideal, [gradient(ideal, b) for b in batches], num_probes, probe_scale)
        nothing = jax.tree.map(jnp.zeros_like, ideal)
        carries = [flat(update(ideal, one, nothing)) for one in (state, ideal_state)]
        memory_error = mean([gap(run[0](v), run[1](v)) for v in probes])
        step = lambda at, one, batch: flat(next_update(at, one, batch))
        moves = [(step(params, state, b), step(ideal, ideal_state, b)) for b in batches]
        parameter_error = gap(params, ideal)
        return StateAlignment(
            parameter_error=parameter_error,
            memory_error=memory_error,
            memory_norm_error=norm_distance(*found) if found else None,
            carry_error=gap(*carries),
            state_error=float(
                np.sqrt(weights[0] * parameter_error**2 + weights[1] * memory_error.value**2)
            ),
            weights=weights,
            update_error=mean([gap(*move) for move in moves]) if moves else None,
            update_cosine=mean([_cosine(*move) for move in moves]) if moves else None,
            operator="given" if operator else "inverse Hessian" if found else "update",
            unread=unread_leaves(state, ideal_state) if found else (),
            num_probes=num_probes,
            num_batches=len(batches),
        )

    return measure


def _probes(key, params: Params, gradients, num_probes: int, scale: float | None) -> list[Params]:
    """Gaussian vectors like the parameters, leaf by leaf as large as the gradients or `scale`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    squares = [[np.mean(np.square(leaf)) for leaf in jax.tree.leaves(g)] for g in gradients]
    scales = np.sqrt(np.mean(squares, axis=0)) if squares else np.ones(len(leaves))
    scales = np.where(scales > 0, scales, 1.0)
    if scale is not None:
        scales = np.full(len(leaves), scale)
    draw = lambda k, leaf, size: size * jax.random.normal(k, (num_probes, *jnp.shape(leaf)))
    stacks = [np.asarray(draw(*args)) for args in zip(keys, leaves, scales)]
    row = lambda i: [s[i].astype(np.asarray(p).dtype) for s, p in zip(stacks, leaves)]
    return [jax.tree.unflatten(structure, row(i)) for i in range(num_probes)]


def _curvatures(state, ideal_state, params: Params, initial_scale) -> list[Curvature]:
    """The inverse Hessians of both states, of all parameters; none unless both have one."""
    found = [
        curve if initial_scale is None else curve._replace(gamma=float(initial_scale(curve.gamma)))
        for curve in map(curvature_of, (state, ideal_state))
        if curve and curve.steps.shape[1] == tree.num_parameters(params)
    ]
    return found if len(found) == 2 else []


def _opened(pair: TrainingState) -> tuple[Params, PyTree]:
    """(params, the optimizer's own state)."""
    params, state = pair
    return params, state.inner if isinstance(state, UnlearnerState) else state


def _updates_of(tx, loss_fn: LossFn | None, l2: float):
    """What `tx` does with a vector, and with a batch's gradient; and that gradient. Compiled.

    (params, state, vector) -> updates, the loss being linear with the vector for its slope;
    (params, state, batch) -> updates;  (params, batch) -> gradient.
    """
    plain = optax.with_extra_args_support(tx).update

    def take(params, state, grads, value_fn):
        extra = {"value": value_fn(params), "grad": grads, "value_fn": value_fn}
        return plain(grads, state, params, **extra)[0]

    def update(params, state, vector):
        change = lambda p: jax.tree.map(jnp.subtract, p, params)
        return take(params, state, vector, lambda p: tree.vdot(vector, change(p)))

    def objective(params, batch):
        return loss_fn(params, batch) + (l2 / 2 * tree.vdot(params, params) if l2 else 0)  # type: ignore[misc]

    def next_update(params, state, batch):
        at = lambda p: objective(p, batch)
        return take(params, state, jax.grad(at)(params), at)

    return jax.jit(update), jax.jit(next_update), jax.jit(jax.grad(objective))


def _cosine(found: np.ndarray, ideal: np.ndarray) -> float:
    lengths = np.linalg.norm(found) * np.linalg.norm(ideal)
    return float(found @ ideal / lengths) if lengths > 0 else float(not np.any(found - ideal))
