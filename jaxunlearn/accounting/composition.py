"""Several releases, and several rows, under (epsilon, delta).

Gaussian releases compose exactly (`compose_gaussian`), zCDP and Renyi curves add. What is here
needs nothing but (epsilon, delta) of each part, and gives more away.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxunlearn.accounting._checks import expect, expect_count, expect_delta
from jaxunlearn.accounting.rounding import above, raised


class Privacy(NamedTuple):
    """epsilon and delta of one guarantee; an upper bound of both."""

    epsilon: float
    delta: float


def group_privacy(*, epsilon: float, delta: float, size: int) -> Privacy:
    """What an (epsilon, delta) guarantee for one row says of `size` rows: an upper bound.

        (m epsilon, delta (e^(m epsilon) - 1) / (e^epsilon - 1))

    [D]: m neighbours in a row, delta_m = delta (1 + e^epsilon + ... + e^((m-1) epsilon)).
    delta e^((m-1) epsilon), which published code uses, is its last term alone. Under zCDP use
    `group_zcdp`, which loses far less.

    >>> group_privacy(epsilon=0.1, delta=1e-8, size=10).delta < 1.6339e-7
    True

    References:
      Vadhan, "The complexity of differential privacy", 2017, Lemma 2.2.
    """
    expect("epsilon", epsilon, at_least=0.0)
    expect("delta", delta, at_least=0.0)
    size = expect_count("size", size)
    total = round_sum([Fraction(epsilon) * size])
    if epsilon == 0.0:
        return Privacy(0.0, min(1.0, round_sum([Fraction(delta) * size])))
    if total > 700.0 or delta == 0.0:
        return Privacy(total, 1.0 if delta else 0.0)
    return Privacy(total, min(1.0, raised(delta * math.expm1(total) / math.expm1(epsilon))))


def basic_composition(parts: Iterable[tuple[float, float]]) -> Privacy:
    """Sums of the epsilons and of the deltas, rounded up: an upper bound.

    Dwork and Roth 2014, Theorem 3.16; the parts may be chosen adaptively while the totals stay
    within limits set in advance (Rogers et al. 2016). Exact rational sums: no drift.

    >>> basic_composition([(0.1, 0.0)] * 10)[0] >= 1.0
    True
    """
    parts = [(float(epsilon), float(delta)) for epsilon, delta in parts]
    for epsilon, delta in parts:
        expect("epsilon", epsilon, at_least=0.0)
        expect("delta", delta, at_least=0.0)
    epsilons = round_sum(Fraction(epsilon) for epsilon, _ in parts)
    return Privacy(epsilons, min(1.0, round_sum(Fraction(delta) for _, delta in parts)))


def optimal_composition(
    *, epsilon: float, delta: float, num_releases: int, total_delta: float
) -> float:
    """Least total epsilon at `total_delta` of k releases, each (epsilon, delta): an upper bound.

    Kairouz, Oh and Viswanath 2015, Theorem 3.3: the worst releases are k randomised responses,

        delta_0(e) = sum_j C(k, j) p^j (1-p)^(k-j) (1 - exp(e - (2 j - k) epsilon))_+,
        total delta = 1 - (1 - delta)^k (1 - delta_0(e)),      p = e^epsilon / (1 + e^epsilon),

    of which every term is positive. Never above basic composition.

    Args:
      epsilon: of each, > 0.  delta: of each, in [0, 1).  num_releases: k >= 1.
      total_delta: in (0, 1).

    Returns:
      The total epsilon; inf where (1 - delta)^k alone exceeds `total_delta`.

    Cost: about 60 sums over k terms.

    >>> e = optimal_composition(epsilon=0.1, delta=0.0, num_releases=100, total_delta=1e-5)
    >>> round(e, 2)
    4.31
    """
    expect("epsilon", epsilon, above_=0.0)
    expect("delta", delta, at_least=0.0)
    expect_delta(total_delta)
    count = expect_count("num_releases", num_releases)
    spent = raised(-math.expm1(count * math.log1p(-delta))) if delta else 0.0
    if not spent < total_delta:
        return math.inf
    left = (total_delta - spent) / (1 - spent) * (1 - 2.0**-40)
    good, bad = above(raised(count * epsilon)), 0.0
    if _response_delta(0.0, epsilon, count) <= left:
        return 0.0
    while good - bad > 1e-12 * good:
        middle = (good + bad) / 2
        good, bad = (
            (middle, bad)
            if _response_delta(middle, epsilon, count) <= left
            else (
                good,
                middle,
            )
        )
    return good


def _response_delta(total, epsilon, count):
    """delta at `total` of `count` randomised responses, rounded up."""
    from scipy import special

    j = np.arange(count + 1, dtype=np.float64)
    log_factorial = special.gammaln(j + 1)
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    log_p = -np.log1p(np.exp(-epsilon))
    log_weight = log_choose + j * log_p + (count - j) * (log_p - epsilon)
    loss = (2 * j - count) * epsilon
    gain = -np.expm1(np.minimum(total - loss, 0.0))
    # gammaln and its multiples carry about count * log(count) ulp.
    slack = 1 + 2.0**-48 * (count + 16) * math.log(count + 16)
    return float(np.sum(np.exp(log_weight) * gain)) * slack


def round_sum(terms: Iterable[Fraction]) -> float:
    """The least float64 not below an exact sum."""
    total = sum(terms, start=Fraction(0))
    near = float(total)
    return near if Fraction(near) >= total else above(near)
