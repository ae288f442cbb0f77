"""Renyi curves: a bound on D_alpha at every order, what they imply, and how they combine.

Every order gives a valid (epsilon, delta) on its own, with the divergence taken *at that order*;
the search below only decides which is the smallest. D_alpha has a direction: a curve of P against
Q bounds P(S) - e^epsilon Q(S), and a two-sided guarantee needs the curve of Q against P too.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxunlearn.accounting._checks import expect, expect_count, expect_delta
from jaxunlearn.accounting.rounding import above, raised

_GRID = tuple(1.0 + float(x) for x in np.geomspace(1e-3, 1e10, 241))
_GOLDEN = (math.sqrt(5.0) - 1) / 2


def renyi_epsilon(
    *, order: float, divergence: float, delta: float, paper_constants: bool = False
) -> float:
    """epsilon at `delta` from D_order <= divergence: an upper bound.

        epsilon = D + ln(1 - 1/alpha) - ln(alpha delta) / (alpha - 1)

    Canonne, Kamath and Steinke 2020, Proposition 12 [C: dp_accounting]. 0 where delta covers the
    total variation sqrt(1 - e^-D) (Bretagnolle and Huber, as D >= KL). `paper_constants=True`:
    D + ln(1/delta)/(alpha - 1) (Mironov 2017, Proposition 3), which is larger.

    >>> round(renyi_epsilon(order=8.0, divergence=1.0, delta=1e-5), 10)
    2.2141091678
    """
    _expect_order(order)
    expect_delta(delta)
    if not divergence < math.inf:
        return math.inf
    expect("divergence", divergence, at_least=0.0)
    if paper_constants:
        return raised(divergence - math.log(delta) / (order - 1))
    if delta * delta >= raised(-math.expm1(-divergence)):
        return 0.0
    tail = -(math.log(order) + math.log(delta)) / (order - 1)
    epsilon = divergence + tail + math.log1p(-1 / order)
    slack = 2.0**-46 * (divergence + abs(tail) + 1 + abs(math.log(delta)) / (order - 1))
    return max(0.0, above(epsilon + slack))


def renyi_delta(*, order: float, divergence: float, epsilon: float) -> float:
    """delta at `epsilon` from D_order <= divergence: an upper bound.

        delta = exp((alpha - 1) (D - epsilon + ln(1 - 1/alpha))) / alpha

    and never above the total variation sqrt(1 - e^-D). References: see `renyi_epsilon`.

    >>> round(renyi_delta(order=8.0, divergence=1.0, epsilon=2.0), 14)
    4.476153908e-05
    """
    _expect_order(order)
    expect("epsilon", epsilon, at_least=0.0)
    if not divergence < math.inf:
        return 1.0
    expect("divergence", divergence, at_least=0.0)
    variation = math.sqrt(raised(-math.expm1(-divergence)))
    gap = divergence - epsilon + math.log1p(-1 / order)
    exponent = (order - 1) * gap - math.log(order)
    slack = 2.0**-46 * ((order - 1) * (divergence + epsilon + 1) + math.log(order) + 1)
    return min(variation, math.exp(min(exponent + slack, 0.0)))


class RenyiCurve:
    """A bound on D_alpha(P || Q) at every order alpha > 1. Curves add as releases compose.

    divergence: order -> an upper bound, inf where there is none.
    orders: where to look for the best order; None searches (1, 10^10) continuously.

    Sums are of bounds that hold whatever was released before (Mironov 2017, Proposition 1).

    >>> curve = RenyiCurve.gaussian(0.5) + 3 * RenyiCurve.gaussian(0.5)
    >>> 1.0 <= curve(2.0) < 1.0000001
    True
    """

    def __init__(self, divergence: Callable[[float], float], orders: Sequence[float] | None = None):
        self._divergence = divergence
        self.orders = None if orders is None else tuple(float(order) for order in orders)

    def __call__(self, order: float) -> float:
        """The bound at `order`; inf for NaN."""
        _expect_order(order)
        divergence = float(self._divergence(order))
        return math.inf if math.isnan(divergence) else max(divergence, 0.0)

    @classmethod
    def linear(cls, rho: float) -> "RenyiCurve":
        """alpha rho: zCDP, and what amplification by iteration gives."""
        expect("rho", rho, at_least=0.0)
        return cls(lambda order: above(order * rho) if rho else 0.0)

    @classmethod
    def gaussian(cls, mu: float) -> "RenyiCurve":
        """alpha mu^2 / 2, exactly, for two Gaussians `mu` standard deviations apart."""
        expect("mu", mu, at_least=0.0)
        return cls.linear(raised(mu * mu / 2))

    def __add__(self, other: "RenyiCurve") -> "RenyiCurve":
        orders = self.orders
        if other.orders is not None:
            orders = (
                other.orders
                if orders is None
                else tuple(order for order in orders if order in set(other.orders))
            )
        return RenyiCurve(lambda order: raised(self(order) + other(order)), orders)

    def __radd__(self, other) -> "RenyiCurve":
        return self if other == 0 else NotImplemented

    def __mul__(self, count: int) -> "RenyiCurve":
        count = expect_count("count", count, at_least=0)
        return RenyiCurve(lambda order: raised(self(order) * count) if count else 0.0, self.orders)

    __rmul__ = __mul__

    def epsilon(self, *, delta: float, paper_constants: bool = False) -> float:
        """Least epsilon at `delta` over the orders, by `renyi_epsilon`: an upper bound."""
        cost = lambda order: renyi_epsilon(
            order=order,
            divergence=self(order),
            delta=delta,
            paper_constants=paper_constants,
        )
        return self._least(cost)

    def delta(self, *, epsilon: float) -> float:
        """Least delta at `epsilon` over the orders, by `renyi_delta`: an upper bound."""
        cost = lambda order: renyi_delta(order=order, divergence=self(order), epsilon=epsilon)
        return min(1.0, self._least(cost))

    def _least(self, cost):
        """The least cost found; every order's is valid, so the search need not be exact."""
        if self.orders is not None:
            return min((cost(order) for order in self.orders), default=math.inf)
        costs = [cost(order) for order in _GRID]
        best = int(np.argmin(costs))
        low = math.log(_GRID[max(best - 1, 0)] - 1)
        high = math.log(_GRID[min(best + 1, len(_GRID) - 1)] - 1)
        least = costs[best]
        for _ in range(40):
            span = _GOLDEN * (high - low)
            left, right = high - span, low + span
            at_left, at_right = (cost(1 + math.exp(x)) for x in (left, right))
            least = min(least, at_left, at_right)
            low, high = (low, right) if at_left <= at_right else (left, high)
        return least


def renyi_triangle(first: RenyiCurve, second: RenyiCurve, *, split: float = 2.0) -> RenyiCurve:
    """D_alpha(P || R) from curves of P against Q and of Q against R: an upper bound.

        D_alpha(P || R) <= (alpha - 1/p)/(alpha - 1) D_(p alpha)(P || Q)
                           + D_(q (alpha - 1/p))(Q || R)

    with 1/p + 1/q = 1: Hoelder's inequality, Mironov 2017, Proposition 11 [R; checked against
    Gaussians in the tests]. p = q = 2 is the usual form, with orders 2 alpha and 2 alpha - 1.

    Args:
      split: p > 1.

    >>> chain = renyi_triangle(RenyiCurve.gaussian(1.0), RenyiCurve.gaussian(1.0))
    >>> round(chain(2.0), 6)  # the truth, of Gaussians 2 apart, is 4
    4.5
    """
    expect("split - 1", split - 1, above_=0.0)
    conjugate = split / (split - 1)

    def divergence(order):
        outer = (order - 1 / split) / (order - 1)
        near = first(above(split * order))
        # The order q (alpha - 1/p) exceeds 1 by q (alpha - 1), which is computed without loss.
        far = second(above(1 + conjugate * (order - 1)))
        return raised(raised(outer * near) + far)

    return RenyiCurve(divergence)


def renyi_group(curve: RenyiCurve, *, doublings: int) -> RenyiCurve:
    """The curve of 2^c rows from that of one: an upper bound, 3^c D_(2^c alpha), for alpha >= 2.

    Mironov 2017, Proposition 2 [R]; for curves alpha rho, 4^c rho (`group_zcdp`) is smaller.

    Args:
      doublings: c >= 0.

    >>> round(renyi_group(RenyiCurve.gaussian(1.0), doublings=1)(2.0), 6)
    6.0
    """
    times = expect_count("doublings", doublings, at_least=0)
    if times == 0:
        return curve
    factor, inner = 2.0**times, curve.orders
    orders = None if inner is None else [o / factor for o in inner if o >= 2 * factor]
    divergence = lambda order: raised(3.0**times * curve(order * factor))
    return RenyiCurve(lambda order: divergence(order) if order >= 2 else math.inf, orders)


def _expect_order(order):
    """Raises unless 1 < order < inf."""
    if not 1 < order < math.inf:
        raise ValueError(f"Expected a finite order={order} > 1.")
