"""Numbers of 12 significant digits that err on the stated side, for what a certificate prints."""

import decimal
import math

DIGITS = 12
"""Significant digits of every privacy parameter in a certificate."""


def round_up(x: float) -> float:
    """The least number of 12 significant decimal digits that is not below `x`; idempotent.

    Rounds the shortest decimal that identifies `x`, and a decimal of up to 15 digits survives the
    way through float64, so `round_up(round_up(x)) == round_up(x)` and `round_up(x) >= x`.

    >>> round_up(0.1), round_up(1 / 3), round_up(-1 / 3)
    (0.1, 0.333333333334, -0.333333333333)
    """
    return _round(x, decimal.ROUND_CEILING)


def round_down(x: float) -> float:
    """The greatest number of 12 significant decimal digits that is not above `x`; idempotent.

    >>> round_down(0.1), round_down(2 / 3)
    (0.1, 0.666666666666)
    """
    return _round(x, decimal.ROUND_FLOOR)


def raised(x: float) -> float:
    """`x` >= 0, above it by 2^-40 of it: room for the rounding of a formula of a thousand steps.

    inf and NaN become inf, so that an upper bound that could not be computed fails closed.

    >>> 1.0 < raised(1.0) < 1.0 + 1e-12, raised(float("nan")), raised(0.0)
    (True, inf, 0.0)
    """
    return math.inf if math.isnan(x) else x * (1 + 2.0**-40)


def lowered(x: float) -> float:
    """`x` >= 0, below it by 2^-40 of it; NaN becomes 0.

    >>> 1.0 - 1e-12 < lowered(1.0) < 1.0, lowered(float("nan"))
    (True, 0.0)
    """
    return 0.0 if math.isnan(x) else x * (1 - 2.0**-40)


def _round(x, direction):
    """`x` to 12 digits in the given direction; infinities and NaN pass through."""
    if not math.isfinite(x):
        return float(x)
    context = decimal.Context(prec=DIGITS, rounding=direction)
    return float(context.plus(decimal.Decimal(repr(float(x)))))


def above(x: float) -> float:
    """The next float64 above `x`."""
    return math.nextafter(x, math.inf)


def below(x: float) -> float:
    """The next float64 below `x`."""
    return math.nextafter(x, -math.inf)
