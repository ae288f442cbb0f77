"""Amounts of a budget as integers: the printed decimal in units of 10^-30, rounded to a side."""

import decimal
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting.rounding import above, below

PLACES = 30
"""Decimal places: amounts are whole multiples of 10^-30."""

_CONTEXT = decimal.Context(prec=1000)


def units_up(amount: float) -> int:
    """`amount` in units of 10^-30, rounded up: what a cost takes.

    >>> units_up(0.1) * 10 == units_up(1.0)
    True
    """
    return _units(amount, decimal.ROUND_CEILING)


def units_down(amount: float) -> int:
    """`amount` in units of 10^-30, rounded down: what a total holds.

    >>> units_down(1e-31), units_up(1e-31)
    (0, 1)
    """
    return _units(amount, decimal.ROUND_FLOOR)


def amount_of(units: int) -> float:
    """The least float64 not below `units` of 10^-30.

    >>> amount_of(units_up(0.3))
    0.3
    """
    amount = float(decimal.Decimal(units).scaleb(-PLACES, _CONTEXT))
    return amount if units_down(amount) >= units else above(amount)


def amount_below(units: int) -> float:
    """The greatest float64 not above `units` of 10^-30.

    >>> amount_below(units_down(0.3))
    0.3
    """
    amount = float(decimal.Decimal(units).scaleb(-PLACES, _CONTEXT))
    return amount if units_up(amount) <= units else below(amount)


def split_budget(total: float, weights: Sequence[float]) -> Float64[np.ndarray, " parts"]:
    """Shares of `total` in proportion to `weights`, which never sum above it.

    The sum is at most `total` as exact binary numbers, as the decimals that Python prints, and
    added up in float64 in any order (the shares are multiples of one power of two). It falls short
    by less than 2^-48 of the total and one multiple for each share.

    >>> split_budget(1.0, [1, 1, 2]).round(12).tolist()
    [0.25, 0.25, 0.5]
    """
    shares = np.asarray(weights, np.float64)
    if not (total > 0 and math.isfinite(total)):
        raise ValueError(f"Expected a finite total={total} > 0.")
    if not (shares.ndim == 1 and np.all(shares >= 0) and 0 < shares.sum() < math.inf):
        raise ValueError("Expected a list of weights >= 0 with a finite, positive sum.")
    _, exponent = math.frexp(total)
    multiple = math.ldexp(1.0, max(exponent - 52, -1074))
    # 2^-49 below: each printed decimal may exceed its binary share by half an ulp.
    count = math.floor(total * (1 - 2.0**-49) / multiple)
    cumulative = np.cumsum(shares)
    ends = np.minimum(np.floor(count * (cumulative / cumulative[-1])), count)
    return np.diff(ends, prepend=0.0) * multiple


def _units(amount, rounding):
    """The printed decimal of `amount`, in units of 10^-30."""
    if isinstance(amount, (int, np.integer)):
        return int(amount) * 10**PLACES
    if not math.isfinite(amount):
        raise ValueError(f"Expected a finite amount, got {amount}.")
    exact = decimal.Decimal(repr(float(amount))).scaleb(PLACES, _CONTEXT)
    return int(exact.to_integral_value(rounding, _CONTEXT))
