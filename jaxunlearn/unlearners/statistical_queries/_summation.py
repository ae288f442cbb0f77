"""What a learner in summation form is made of, and the one whose statistics a caller brings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64, PyTree

from jaxunlearn import records
from jaxunlearn.types import Batch, Params

_ROWS_AT_ONCE = 256
_MAX_STATISTIC = 2**52


class Solved(NamedTuple):
    """Parameters from sums.

    aid: float64 arrays that make the next solve cheaper, `()` where there are none. The
      parameters do not depend on it.
    measurements: figures for `ForgetInfo`.
    """

    params: Params
    aid: PyTree
    measurements: dict[str, Any]


class Summation(NamedTuple):
    """A learner that sees its rows only through sums of integers.

    name: for messages.
    target: of its certificates.
    describe: one sentence on the grid, for the certificate.
    reproduced: (status, sentence): why a row gives the same integers when it is read again.
    integers: rows -> pytree of int64 arrays with the rows' leading axis: the rows on the grid.
    sums: those integers -> pytree of int64 arrays, exact.
    solve: (sums, number of rows, aid or None, integers of removed rows or None) -> `Solved`.
    predict: (params, batch) -> outputs.
    """

    name: str
    target: str
    describe: str
    reproduced: tuple[str, str]
    integers: Callable[[Batch], PyTree]
    sums: Callable[[PyTree], PyTree]
    solve: Callable[[PyTree, int, PyTree, PyTree], Solved]
    predict: Callable[[Params, Batch], PyTree]


def summation(
    statistics: Callable[[Batch], PyTree],
    solve: Callable[[PyTree, int], Params],
    predict: Callable[[Params, Batch], PyTree],
    *,
    grid: float,
) -> Summation:
    """A learner of your own in summation form, for `statistical_queries`.

        params = solve(sum_i round(statistics(row_i) / grid) grid,  number of rows)

    Args:
      statistics: one row (a pytree without the leading axis) -> pytree of floats, in JAX. Rows go
        through one compiled loop, one by one, so that a row's figures do not depend on its
        neighbours.
      solve: (sums as float64 NumPy arrays, number of rows) -> parameters; deterministic, on the
        host. What it returns becomes JAX arrays, float32 unless x64 is on.
      predict: (params, batch) -> outputs.
      grid: a power of two; each figure of a row is rounded to a multiple of it.

    Returns:
      A `Summation`.

    Cost: one call of `statistics` a row.

    Raises:
      ValueError: `grid` is no power of two.

    >>> mean = summation(
    ...     lambda row: row["x"], lambda sums, n: sums / n, lambda m, b: m, grid=2.0**-8
    ... )
    >>> mean.integers({"x": np.array([0.5, 0.25, -1.0], np.float32)})
    array([ 128,   64, -256])
    """
    records.check_grid(grid)

    @jax.jit
    def evaluate(rows, count):
        one = lambda i: statistics(jax.tree.map(lambda leaf: leaf[i], rows))
        empty = lambda leaf: jnp.zeros((_ROWS_AT_ONCE, *leaf.shape), leaf.dtype)
        out = jax.tree.map(empty, jax.eval_shape(one, 0))
        put = lambda i, out: jax.tree.map(lambda all, row: all.at[i].set(row), out, one(i))
        # The traced count keeps it a loop: unrolled, XLA could round a row unlike its neighbour.
        return jax.lax.fori_loop(0, count, put, out)

    def integers(rows):
        def block_from(start):
            count = min(_ROWS_AT_ONCE, size - start)
            block = jax.tree.map(lambda leaf: _padded(leaf[start : start + count]), rows)
            figures = jax.device_get(evaluate(block, count))
            return jax.tree.map(lambda leaf: _on_grid(leaf[:count], grid), figures)

        size = len(jax.tree.leaves(rows)[0])
        blocks = [block_from(start) for start in range(0, size, _ROWS_AT_ONCE)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)

    def total(units):
        return jax.tree.map(_exact_sum, units)

    def solve_sums(sums, count, aid, removed):
        del aid, removed
        floats = jax.tree.map(lambda leaf: leaf.astype(np.float64) * grid, sums)
        return Solved(jax.tree.map(jnp.asarray, solve(floats, count)), (), {})

    return Summation(
        name="summation",
        target="counterfactual",
        describe=f"Each figure of a row is rounded to a multiple of {grid!r} before it is summed.",
        reproduced=(
            "measured",
            "A row's figures are computed again by the same compiled loop; a fingerprint of what "
            "was added was compared with what was subtracted.",
        ),
        integers=integers,
        sums=total,
        solve=solve_sums,
        predict=predict,
    )


def _padded(leaf) -> np.ndarray:
    """A block of rows at the one size that is compiled."""
    leaf = np.asarray(leaf)
    rest = np.zeros((_ROWS_AT_ONCE - len(leaf), *leaf.shape[1:]), leaf.dtype)
    return np.concatenate([leaf, rest])


def _on_grid(leaf, grid: float) -> Int64[np.ndarray, "..."]:
    return records.quantise(leaf, grid, limit=_MAX_STATISTIC)


def _exact_sum(units: Int64[np.ndarray, "b ..."]) -> Int64[np.ndarray, "..."]:
    """A sum over at most 2^11 rows of at most 2^52 each fits 63 bits; more go in parts."""
    total = np.zeros(units.shape[1:], np.int64)
    for start in range(0, len(units), 2**10):
        total = records.add_exactly(total, np.sum(units[start : start + 2**10], axis=0))
    return total
