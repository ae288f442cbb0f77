"""Find, eagerly, a loss that is not the mean of per-example losses, and say which kind it is."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxunlearn import errors
from jaxunlearn.kernels.rowwise import check_params, num_rows_of, takes_key
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
_MAX_SEEN = 32
_NUM_KEYS = 32


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
    `params` and near them (a zero-initialised head hides a coupling): once for eight rows from all
    over the batch, and once for those that differ most in how many of their numbers are zero, as
    rows of masks and tokens do. Runs eagerly; a traced `update` sees each row alone and cannot see
    this. What no subset of these rows shows is not found: a count that is equal in all of them.

    Args:
      loss_fn: loss_fn(params, batch[, key]) -> scalar.
      batch: at least two rows that differ, if a coupling is to be seen. A row whose own loss is not
        finite is left out; where none is left, nothing is compared.
      key: for a loss that takes one. A loss that draws for each row agrees in expectation only:
        means over 32 keys are compared, up to eight of their standard errors; a weak coupling below
        strong noise passes.
      tolerance: relative; None means 1e-4 in float32, 1e-9 in float64, 5e-2 below.

    Cost: about 100 losses of one to eight rows, and four compilations; 32 times that with a key.

    Raises:
      CoupledLossError: naming the kind of coupling, each with its own advice.
      LossSignatureError: not a scalar, or not callable with (params, batch[, key]).
      TypeError: a parameter is not real floating point.
      ValueError: no row.

    >>> check_loss(lambda w, x: jnp.mean((x - w) ** 2), 0.0, jnp.array([1.0, 2.0]))
    >>> check_loss(lambda w, x: jnp.sum((x - w) ** 2), 0.0, jnp.array([1.0, 2.0]))
    Traceback (most recent call last):
    ...
    jaxunlearn.errors.CoupledLossError: loss_fn is not the mean of per-example losses: it is the ...
    """
    check_params(params)
    if num_rows_of(batch) == 0:
        raise ValueError("Expected a batch of at least one row, got none.")
    keyed = takes_key(loss_fn)
    if keyed and key is None:
        raise errors.LossSignatureError(
            "Expected key= for a loss that takes one: jax.random.key(0)."
        )
    batch = jax.tree.map(jnp.asarray, batch)
    of_a_key = lambda p, b, *own: jnp.asarray(loss_fn(p, b, *own))
    if key is not None and keyed:
        _check_scalar(jax.eval_shape(loss_fn, params, batch, key))
        keys = jax.random.split(key, _NUM_KEYS)
        over_keys = jax.vmap(of_a_key, (None, None, 0))
        evaluate = jax.jit(lambda p, b: over_keys(p, b, keys))
    else:
        _check_scalar(jax.eval_shape(loss_fn, params, batch))
        evaluate = jax.jit(lambda p, b: of_a_key(p, b)[None])
    for point in (params, _nearby(params)):
        losses = _Subsets(evaluate, point, batch)
        for rows in _selections(losses, batch):
            kind = _kind(losses, rows, tolerance or _default_tolerance(params))
            if kind:
                raise errors.CoupledLossError(
                    f"loss_fn is not the mean of per-example losses: {_ADVICE[kind]}"
                )


class _Subsets:
    """The loss of any multiset of rows, on the host in float64: the mean over the keys.

    noise: the largest standard error of such a mean so far.
    """

    def __init__(self, evaluate, params, batch):
        self._evaluate, self._params, self._batch = evaluate, params, batch
        self._seen: dict[tuple[int, ...], float] = {}
        self.noise = 0.0

    def __call__(self, *rows: int) -> float:
        if rows not in self._seen:
            index = np.asarray(rows)
            subset = jax.tree.map(lambda leaf: leaf[index], self._batch)
            values = np.asarray(self._evaluate(self._params, subset), np.float64)
            self._seen[rows] = float(np.mean(values))
            if values.size > 1 and np.all(np.isfinite(values)):
                self.noise = max(self.noise, float(np.std(values)) / (values.size - 1) ** 0.5)
        return self._seen[rows]


def _selections(loss: _Subsets, batch: Batch) -> list[tuple[int, ...]]:
    """Rows to compare: some from all over the batch, and those most unlike in their zeros."""
    num_rows = num_rows_of(batch)
    finite = lambda rows: [i for i in rows if np.isfinite(loss(i))]
    even = finite(_spread(range(num_rows), _MAX_SEEN))
    if num_rows <= _MAX_ROWS:
        return [tuple(even)] if even else []
    unlike = finite(_unlike(batch)[:_MAX_SEEN])
    even = _spread(even, _MAX_ROWS)
    mixed = list(dict.fromkeys([*unlike[: _MAX_ROWS - 2], *even]))[:_MAX_ROWS]
    return list(dict.fromkeys(tuple(rows) for rows in (even, mixed) if rows))


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of `rows`, evenly."""
    count = min(count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]


def _unlike(batch: Batch) -> list[int]:
    """The rows with the fewest and the most zeros in any leaf of numbers, two of each."""
    found: list[int] = []
    for leaf in jax.tree.leaves(batch):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        counts = np.count_nonzero(np.asarray(leaf).reshape(leaf.shape[0], -1), axis=1)
        order = np.argsort(counts, kind="stable")
        if counts[order[0]] != counts[order[-1]]:
            found += [int(order[k]) for k in (0, -1, 1, -2)]
    return list(dict.fromkeys(found))


def _kind(loss: _Subsets, rows: tuple[int, ...], tolerance: float) -> str | None:
    """The kind of coupling, or None: by the sum, by duplicates, by the weights of pairs."""
    singles = [loss(i) for i in rows]
    whole = loss(*rows)
    doubled = [loss(i, i) for i in rows]
    scale = tolerance * max(*map(abs, singles), 1e-30) + 8 * loss.noise
    close = lambda a, b, slack=1.0: abs(a - b) <= slack * scale
    alone_is_enough = all(map(close, doubled, singles))
    if alone_is_enough and close(whole, np.mean(singles)):
        return None
    if alone_is_enough:
        return _kind_of_pairs(loss, rows, singles, scale)
    is_sum = close(whole, np.sum(singles), len(rows)) and close(doubled[0], 2 * singles[0], 2)
    return "sum" if is_sum else "interaction"


def _kind_of_pairs(loss: _Subsets, rows: tuple[int, ...], singles, scale: float) -> str:
    """The kind whose model, fitted to the most coupled pair i, j, predicts (i, i, j) and (i, j, j).

    Counts: rows average with one positive count n each. Pairs: the mean of f(a, b) over all
    pairs of rows, or over neighbours in a ring. A model must leave a fiftieth of what the plain
    mean leaves.
    """
    alone = dict(zip(rows, singles))
    excess = lambda i, j: abs(loss(i, j) - (alone[i] + alone[j]) / 2)
    i, j = max(itertools.combinations(rows, 2), key=lambda pair: excess(*pair))
    l_i, l_j, pair = alone[i], alone[j], loss(i, j)
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
