"""Zero-concentrated privacy: D_alpha <= rho alpha at every order, so that rho simply adds."""

import math
from collections.abc import Iterable
from fractions import Fraction

from jaxunlearn.accounting._checks import expect, expect_count, expect_delta
from jaxunlearn.accounting.composition import round_sum
from jaxunlearn.accounting.renyi import RenyiCurve, renyi_epsilon
from jaxunlearn.accounting.rounding import above, lowered, raised


def zcdp_rho(*, sensitivity: float, noise_stddev: float) -> float:
    """rho of one Gaussian release, sensitivity^2 / (2 noise_stddev^2): an upper bound, and exact.

    Bun and Steinke 2016, Proposition 1.6.

    >>> 0.5 <= zcdp_rho(sensitivity=1.0, noise_stddev=1.0) < 0.5000001
    True
    """
    expect("sensitivity", sensitivity, at_least=0.0)
    expect("noise_stddev", noise_stddev, above_=0.0)
    return raised((sensitivity / noise_stddev) ** 2 / 2)


def compose_zcdp(rhos: Iterable[float]) -> float:
    """rho of several releases together, their sum: the least float64 not below it.

    Bun and Steinke 2016, Lemma 1.7; each may depend on what came before, while the total stays
    within a limit set in advance (Feldman and Zrnic 2021).

    >>> compose_zcdp([0.25, 0.5])
    0.75
    """
    rhos = [float(rho) for rho in rhos]
    for rho in rhos:
        expect("rho", rho, at_least=0.0)
    return round_sum(Fraction(rho) for rho in rhos)


def group_zcdp(rho: float, size: int) -> float:
    """rho of `size` rows, size^2 rho: an upper bound.

    Bun and Steinke 2016, Proposition 1.9; exact for the Gaussian mechanism.

    >>> group_zcdp(0.5, 3)
    4.5
    """
    expect("rho", rho, at_least=0.0)
    return round_sum([Fraction(rho) * expect_count("size", size) ** 2])


def zcdp_epsilon(rho: float, *, delta: float, paper_constants: bool = False) -> float:
    """Least epsilon that rho-zCDP implies at `delta`: an upper bound.

    The tight conversion of `renyi_epsilon` at the best order, which solves
    rho (alpha - 1)^2 = -ln(alpha delta). `paper_constants=True` gives
    rho + 2 sqrt(rho ln(1/delta)) (Bun and Steinke 2016, Proposition 1.3), which is larger. Where
    the releases were Gaussian, `gaussian_epsilon` at mu = sqrt(2 rho) is exact and smaller still.

    >>> round(zcdp_epsilon(0.5, delta=1e-5, paper_constants=True), 9)
    5.298525912
    >>> zcdp_epsilon(0.5, delta=1e-5) < 4.74
    True
    """
    expect("rho", rho, at_least=0.0)
    expect_delta(delta)
    simple = raised(rho + 2 * math.sqrt(rho * -math.log(delta)))
    if paper_constants or rho == 0.0:
        return simple
    order = _best_order(rho, delta)
    return min(simple, renyi_epsilon(order=order, divergence=above(order * rho), delta=delta))


def zcdp_delta(rho: float, *, epsilon: float) -> float:
    """Least delta that rho-zCDP implies at `epsilon`: an upper bound, by the tight conversion.

    >>> 0 < zcdp_delta(0.5, epsilon=5.0) < 1e-5
    True
    """
    expect("rho", rho, at_least=0.0)
    return RenyiCurve.linear(rho).delta(epsilon=epsilon)


def zcdp_budget(*, epsilon: float, delta: float, paper_constants: bool = False) -> float:
    """Largest rho that implies (epsilon, delta): a lower bound, the inverse of `zcdp_epsilon`.

    `paper_constants=True`: (sqrt(ln(1/delta) + epsilon) - sqrt(ln(1/delta)))^2.

    >>> rho = zcdp_budget(epsilon=1.0, delta=1e-5)
    >>> 0 <= 1 - zcdp_epsilon(rho, delta=1e-5) < 1e-6
    True
    """
    expect("epsilon", epsilon, above_=0.0)
    expect_delta(delta)
    inverse_delta = -math.log(delta)
    # sqrt(a + e) - sqrt(a) = e / (sqrt(a + e) + sqrt(a)), which does not cancel.
    root = epsilon / (math.sqrt(inverse_delta + epsilon) + math.sqrt(inverse_delta))
    simple = lowered(root * root)
    if paper_constants:
        return simple
    good, bad = simple, 2 * simple
    fits = lambda rho: zcdp_epsilon(rho, delta=delta) <= epsilon
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1e-9 * good:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _best_order(rho, delta):
    """The root of rho (alpha - 1)^2 + ln(alpha delta), to a few digits: any order is valid."""
    low, high = 1.0, 1.0 + math.sqrt(-math.log(delta) / rho)
    for _ in range(60):
        middle = (low + high) / 2
        gap = rho * (middle - 1) ** 2 + math.log(middle) + math.log(delta)
        low, high = (middle, high) if gap < 0 else (low, middle)
    return min(max(high, 1.0 + 1e-9), 1e100)
