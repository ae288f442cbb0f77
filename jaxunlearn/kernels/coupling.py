"""Find, eagerly, a loss that is not the mean of per-example losses, and say which kind it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxunlearn import errors
from jaxunlearn.kernels.rowwise import num_rows_of, takes_key
from jaxunlearn.types import Batch, LossFn, Params

_ADVICE = {
    "sum": (
        "it is the sum over the rows. Divide by the batch size: jnp.mean(losses) instead of "
        "jnp.sum(losses)."
    ),
    "normalised": (
        "rows are weighted by a count taken over the whole batch (tokens that are not padding, "
        "say). Normalise inside each row, or divide by a constant number of tokens."
    ),
    "statistics": (
        "the model uses statistics of the batch (BatchNorm in training mode). Freeze them with "
        "use_running_average=True (NNX: model.eval() or nnx.view), or use LayerNorm or GroupNorm."
    ),
    "interaction": (
        "rows are compared with one another (contrastive or pairwise losses, in-batch negatives, "
        "MixUp). A row's influence is then not its own; delete with a method that retrains. "
        "(A model that draws its own random numbers, dropout with its own rngs, looks the same: "
        "give the loss a third argument, key.)"
    ),
}
_MAX_ROWS = 8


def check_loss(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    key: Key[Array, ""] | None = None,
    tolerance: float | None = None,
) -> None:
    """Check that `loss_fn` is the mean of per-example losses; return nothing when it is.

    Compares the loss of up to eight rows with the mean of the losses of each row alone, at
    `params` and near them (a zero-initialised head hides a coupling). Runs eagerly; a traced
    `update` cannot see this.

    Args:
      loss_fn: loss_fn(params, batch[, key]) -> scalar.
      batch: at least two rows that differ, if a coupling is to be seen.
      key: for a loss that takes one. Randomness shared by rows is taken as it comes: rows are
        compared under the same key, so a loss that draws per row is compared in expectation only
        and is checked for shape alone.
      tolerance: relative; None means 1e-4 in float32, 1e-9 in float64, 5e-2 below.

    Raises:
      CoupledLossError: naming the kind of coupling, each with its own advice.
      LossSignatureError: not a scalar, or not callable with (params, batch[, key]).

    >>> check_loss(lambda w, x: jnp.mean((x - w) ** 2), 0.0, jnp.array([1.0, 2.0]))
    >>> check_loss(lambda w, x: jnp.sum((x - w) ** 2), 0.0, jnp.array([1.0, 2.0]))
    Traceback (most recent call last):
    ...
    jaxunlearn.errors.CoupledLossError: loss_fn is not the mean of per-example losses: it is the ...
    """
    rows = min(num_rows_of(batch), _MAX_ROWS)
    keyed = takes_key(loss_fn)
    if keyed and key is None:
        raise errors.LossSignatureError(
            "Expected key= for a loss that takes one: jax.random.key(0)."
        )
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:rows], batch)
    evaluate = jax.jit(lambda p, b: loss_fn(p, b, key) if keyed else loss_fn(p, b))
    for point in (params, _nearby(params)):
        _check_scalar(jax.eval_shape(evaluate, point, batch))
        if keyed:
            continue
        losses = _Subsets(evaluate, point, batch)
        scale = tolerance or _default_tolerance(params)
        kind = _kind(losses, rows, scale)
        if kind:
            raise errors.CoupledLossError(
                f"loss_fn is not the mean of per-example losses: {_ADVICE[kind]}"
            )


class _Subsets:
    """The loss of any multiset of rows, on the host in float64."""

    def __init__(self, evaluate, params, batch):
        self._evaluate, self._params, self._batch = evaluate, params, batch

    def __call__(self, *rows: int) -> float:
        index = np.asarray(rows)
        subset = jax.tree.map(lambda leaf: leaf[index], self._batch)
        return float(self._evaluate(self._params, subset))


def _kind(loss: _Subsets, rows: int, tolerance: float) -> str | None:
    """The kind of coupling, or None: by the sum, by duplicates, by the weights of pairs."""
    singles = [loss(i) for i in range(rows)]
    if not np.all(np.isfinite(singles)):
        return None
    scale = tolerance * max(*map(abs, singles), 1e-30)
    close = lambda a, b, slack=1.0: abs(a - b) <= slack * scale
    whole = loss(*range(rows))
    doubled = [loss(i, i) for i in range(rows)]
    alone_is_enough = all(map(close, doubled, singles))
    if alone_is_enough and close(whole, np.mean(singles)):
        return None
    if alone_is_enough:
        return _kind_of_pairs(loss, singles, scale)
    is_sum = close(whole, np.sum(singles), rows) and close(doubled[0], 2 * singles[0], 2)
    return "sum" if is_sum else "interaction"


def _kind_of_pairs(loss: _Subsets, singles, scale: float) -> str:
    """The kind whose model, fitted to the most coupled pair i, j, predicts (i, i, j) and (i, j, j).

    Counts: rows average with one positive count n each. Pairs: the mean of f(a, b) over all
    pairs of rows, or over neighbours in a ring. A model must leave a fiftieth of what the plain
    mean leaves.
    """
    excess = lambda i, j: abs(loss(i, j) - (singles[i] + singles[j]) / 2)
    i, j = max(itertools.combinations(range(len(singles)), 2), key=lambda pair: excess(*pair))
    l_i, l_j, pair = singles[i], singles[j], loss(i, j)
    seen = np.array([loss(i, i, j), loss(i, j, j)])
    plain = np.array([2 * l_i + l_j, l_i + 2 * l_j]) / 3
    left_by = lambda predicted: np.max(np.abs(seen - predicted))
    enough = 0.02 * left_by(plain) + 0.1 * scale
    above, below = pair - l_i, l_j - pair
    if above * below > 0:
        n = above / below  # n_j / n_i
        counts = np.array([(2 * l_i + n * l_j) / (2 + n), (l_i + 2 * n * l_j) / (1 + 2 * n)])
        if left_by(counts) <= enough:
            return "normalised"
    pairs = (8 * pair + np.array([2 * l_i - l_j, 2 * l_j - l_i])) / 9
    ring = (2 * pair + np.array([l_i, l_j])) / 3
    return "interaction" if min(left_by(pairs), left_by(ring)) <= enough else "statistics"


def _check_scalar(value) -> None:
    """Refuse a loss that is not one number."""
    if getattr(value, "shape", None) != ():
        raise errors.LossSignatureError(
            "Expected loss_fn to return a scalar, the mean over the batch, got "
            f"{jax.tree.map(lambda leaf: leaf.shape, value)}. Take jnp.mean over the rows."
        )


def _nearby(params: Params) -> Params:
    """Parameters moved by about a tenth, so that zeros at initialisation hide nothing."""
    rng = np.random.default_rng(0)

    def move(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return leaf
        noise = rng.normal(size=jnp.shape(leaf))
        return jnp.asarray(leaf + 0.1 * jnp.asarray(noise, jnp.result_type(leaf)))

    return jax.tree.map(move, params)


def _default_tolerance(params: Params) -> float:
    """What rounding explains: by the narrowest parameter."""
    widths = [jnp.finfo(jnp.result_type(leaf)).bits for leaf in jax.tree.leaves(params)]
    return {16: 5e-2, 32: 1e-4}.get(min(widths, default=32), 1e-9)
