"""Figures with their confidence intervals, in float64 on the host."""

from typing import NamedTuple

import numpy as np
import scipy.special


class Interval(NamedTuple):
    """A figure and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values, *, confidence: float = 0.95) -> Interval:
    """The mean of independent draws, and Student's interval; (-inf, inf) for a single draw.

    >>> mean_interval([1.0, 1.0, 1.0])
    Interval(value=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"Expected at least one value along one axis, got shape {values.shape}.")
    mean = float(np.mean(values))
    if not np.isfinite(mean) or values.size == 1:
        return Interval(mean, -np.inf, np.inf)
    quantile = scipy.special.stdtrit(values.size - 1, 0.5 + confidence / 2)
    half = float(quantile * np.std(values, ddof=1) / np.sqrt(values.size))
    return Interval(mean, mean - half, mean + half)


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """The share of successes, and an interval that covers at least as often as it says.

    References: Clopper and Pearson 1934, Biometrika 26.

    >>> [round(end, 4) for end in clopper_pearson(0, 10)]
    [0.0, 0.0, 0.3085]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"Expected 0 <= successes={successes} <= trials={trials} >= 1.")
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = scipy.special.betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = scipy.special.betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return Interval(successes / trials, float(low), float(high))
