"""Gaussian and multinomial naive Bayes from integer sums."""

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64

from jaxunlearn import errors, records
from jaxunlearn.types import Batch
from jaxunlearn.unlearners.statistical_queries._summation import Solved, Summation

_MEASURED = (
    "measured",
    "Rounding a row to the grid is exact on every machine; a fingerprint of what was added was "
    "compared with what was subtracted.",
)


def gaussian_naive_bayes(
    *,
    num_classes: int,
    grid: float = 2.0**-16,
    var_smoothing: float = 1e-9,
    features: Callable[[Batch], Array] = operator.itemgetter("x"),
    labels: Callable[[Batch], Array] = operator.itemgetter("y"),
) -> Summation:
    """Gaussian naive Bayes in summation form, for `statistical_queries`.

        log p(c | x) = log n_c / n - 1/2 sum_j (log 2 pi v_cj + (x_j - m_cj)^2 / v_cj) + const
        m_c = sum_{i in c} x_i / n_c,   v_c = sum_{i in c} x_i^2 / n_c - m_c^2 + smoothing

    Variances are differences of exact integers: nothing cancels.

    Args:
      num_classes: labels are 0..num_classes-1.
      grid: power of two to which features are rounded; they must lie within 2^24 of it.
      var_smoothing: times the largest variance of a feature over all rows, added to each variance.
      features: rows -> (b, d).  labels: rows -> int (b,).

    Returns:
      A `Summation` with params {"log_prior": (classes,), "mean", "variance": (classes, d)} and a
      `predict` that gives log probabilities (b, classes). A class without rows has log prior -inf.

    Cost: O(classes d) a row to fit; a deletion costs as much, and one division a figure.

    Raises:
      ValueError: an option is out of range.  MissingDataError: a label is none of the classes.

    >>> query = gaussian_naive_bayes(num_classes=2)
    >>> rows = {"x": np.array([[0.0], [2.0], [5.0], [7.0]]), "y": np.array([0, 0, 1, 1])}
    >>> params = query.solve(query.sums(query.integers(rows)), 4, None, None).params
    >>> params["mean"].ravel(), params["variance"].ravel()
    (Array([1., 6.], dtype=float32), Array([1., 1.], dtype=float32))
    """
    records.check_grid(grid)
    _check_classes(num_classes)
    if not 0 <= var_smoothing < math.inf:
        raise ValueError(f"Expected var_smoothing={var_smoothing} >= 0.")

    def integers(rows):
        return _labelled(features(rows), labels(rows), num_classes, grid)

    def sums(units):
        member, x = _members(units, num_classes), units["x"]
        return {
            "count": member.sum(axis=0),
            "first": records.cross_product(member, x),
            "second": records.cross_product(member, x * x),
        }

    def solve(totals, count, aid, removed):
        del count, aid, removed
        n = totals["count"].astype(object)[:, None]
        first, second = totals["first"].astype(object), totals["second"].astype(object)
        safe = np.where(n > 0, n, 1)
        mean = (first / safe).astype(np.float64) * grid
        spread = ((safe * second - first**2) / safe**2).astype(np.float64) * grid**2
        rows, all_first = n.sum(), first.sum(axis=0)
        overall = (rows * second.sum(axis=0) - all_first**2) / rows**2
        smoothing = var_smoothing * float(max(overall)) * grid**2
        variance = spread + (smoothing or grid**2 / 12)  # the variance of rounding, at the least
        params = {
            "log_prior": _log_prior(totals["count"]),
            "mean": mean,
            "variance": np.where(n > 0, variance, 1.0),
        }
        return Solved(_float32(params), (), {})

    def predict(params, batch):
        x = jnp.asarray(features(batch))[:, None, :]
        terms = jnp.log(2 * jnp.pi * params["variance"])
        terms = terms + (x - params["mean"]) ** 2 / params["variance"]
        return jax.nn.log_softmax(params["log_prior"] - 0.5 * jnp.sum(terms, axis=-1))

    return Summation(
        name="gaussian_naive_bayes", target="counterfactual", describe=_describe(grid),
        reproduced=_MEASURED, integers=integers, sums=sums, solve=solve, predict=predict,
    )  # fmt: skip


def multinomial_naive_bayes(
    *,
    num_classes: int,
    smoothing: float = 1.0,
    grid: float = 1.0,
    features: Callable[[Batch], Array] = operator.itemgetter("x"),
    labels: Callable[[Batch], Array] = operator.itemgetter("y"),
) -> Summation:
    """Multinomial naive Bayes in summation form, for `statistical_queries`.

        log p(c | x) = log n_c / n + sum_j x_j log theta_cj + const
        theta_cj = (N_cj + smoothing) / (sum_j N_cj + smoothing d),   N_c = sum_{i in c} x_i

    Args:
      num_classes: labels are 0..num_classes-1.
      smoothing: > 0, added to each count.
      grid: power of two to which counts are rounded; 1 for whole counts.
      features: rows -> (b, d), counts >= 0 within 2^24 grid steps.  labels: rows -> int (b,).

    Returns:
      A `Summation` with params {"log_prior": (classes,), "log_theta": (classes, d)} and a
      `predict` that gives log probabilities (b, classes). A class without rows has log prior -inf.

    Cost: O(classes d) a row to fit; a deletion costs as much, and one logarithm a figure.

    Raises:
      ValueError: an option is out of range.
      MissingDataError: a label is none of the classes, or a count is negative.

    >>> query = multinomial_naive_bayes(num_classes=2)
    >>> rows = {"x": np.array([[3, 0], [0, 1]]), "y": np.array([0, 1])}
    >>> params = query.solve(query.sums(query.integers(rows)), 2, None, None).params
    >>> np.exp(params["log_theta"][0]).round(3)
    array([0.8, 0.2], dtype=float32)
    """
    records.check_grid(grid)
    _check_classes(num_classes)
    if not 0 < smoothing < math.inf:
        raise ValueError(f"Expected smoothing={smoothing} > 0.")

    def integers(rows):
        units = _labelled(features(rows), labels(rows), num_classes, grid)
        if np.any(units["x"] < 0):
            raise errors.MissingDataError("Expected counts >= 0 as features, got a negative one.")
        return units

    def sums(units):
        member = _members(units, num_classes)
        return {"count": member.sum(axis=0), "total": records.cross_product(member, units["x"])}

    def solve(totals, count, aid, removed):
        del count, aid, removed
        counts = totals["total"].astype(np.float64) * grid
        in_class = totals["total"].astype(object).sum(axis=1).astype(np.float64)[:, None] * grid
        theta = (counts + smoothing) / (in_class + smoothing * counts.shape[1])
        params = {"log_prior": _log_prior(totals["count"]), "log_theta": np.log(theta)}
        return Solved(_float32(params), (), {})

    def predict(params, batch):
        x = jnp.asarray(features(batch), params["log_theta"].dtype)
        exact = jax.lax.Precision.HIGHEST
        return jax.nn.log_softmax(
            params["log_prior"] + jnp.matmul(x, params["log_theta"].T, precision=exact)
        )

    return Summation(
        name="multinomial_naive_bayes", target="counterfactual", describe=_describe(grid),
        reproduced=_MEASURED, integers=integers, sums=sums, solve=solve, predict=predict,
    )  # fmt: skip


def _describe(grid: float) -> str:
    return f"Features are rounded to multiples of {grid!r} before they are summed."


def _check_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or int(num_classes) != num_classes or num_classes < 2:
        raise ValueError(f"Expected an integer num_classes={num_classes} >= 2.")


def _labelled(x, y, num_classes: int, grid: float) -> dict[str, Int64[np.ndarray, "b ..."]]:
    """Features on the grid and checked labels."""
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 1 or y.dtype.kind not in "iu":
        raise errors.MissingDataError(
            f"Expected features (b, d) and integer labels (b,), got {x.shape} and {y.dtype} "
            f"{y.shape}."
        )
    if np.any((y < 0) | (y >= num_classes)):
        raise errors.MissingDataError(f"Expected labels in 0..{num_classes - 1}.")
    return {"x": records.quantise(x, grid), "label": y.astype(np.int64)}


def _members(units, num_classes: int) -> Int64[np.ndarray, "b classes"]:
    """One column a class, 1 where the row is of it."""
    return (units["label"][:, None] == np.arange(num_classes)).astype(np.int64)


def _log_prior(count: Int64[np.ndarray, "classes"]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(count / count.sum())


def _float32(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
