"""Deletion capacity: how many rows may go before the noise, or the drift, costs too much.

Capacity is the largest m for which the expected excess risk after deleting any m rows stays within
a limit gamma. Sekhari et al. 2021 give its order in n, d, epsilon and delta with constants that
they do not name; the functions called `..._order` return those expressions with the constant as an
argument. The others count with explicit constants, derived here for losses that are l2-strongly
convex, L-Lipschitz (with the L2 term) with an M-Lipschitz Hessian:

    F(released) - F* <= 2 L^2/(l2 n)  +  m L^2/(l2 (n - m))  +  L sqrt(d) sigma(m)             [D]

first the generalisation of the minimiser (replacing a row moves it by at most 2 L/(l2 n), so its
losses by 2 L^2/(l2 n)), then how far deletion may move it, then the norm of the noise. sigma(m) is

    output perturbation, a DP learner with zero work    m L / (l2 (n - m)) / mu*
    Newton (Sekhari)                                    M m^2 L^2 / (2 l2^3 (n - m)^2) / mu*

with mu* = gaussian_mu(epsilon, delta). Newton's noise is the smaller while
m < 2 l2^2 (n - m)/(M L).
"""

import dataclasses
import functools
import math

from jaxunlearn.accounting._checks import expect, expect_all, expect_count, least_count
from jaxunlearn.accounting.distances import minimiser_distance
from jaxunlearn.accounting.gaussian import gaussian_mu
from jaxunlearn.accounting.memory_pair import largest_within
from jaxunlearn.accounting.removal import newton_distance
from jaxunlearn.accounting.rounding import raised

METHODS = ("newton", "output_perturbation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StronglyConvex:
    """Constants of the loss with its L2 term, the dimension and the privacy wanted.

    l2: strong convexity.  lipschitz: L.  hessian_lipschitz: M.  dimension: d.
    epsilon, delta: of the deletion.

    >>> problem = StronglyConvex(l2=0.1, lipschitz=1.0, hessian_lipschitz=0.1, dimension=10,
    ...     epsilon=1.0, delta=1e-5)
    >>> newton = problem.noise("newton", num_examples=10**5, num_forgotten=10)
    >>> newton < problem.noise("output_perturbation", num_examples=10**5, num_forgotten=10)
    True
    """

    l2: float
    lipschitz: float
    hessian_lipschitz: float
    dimension: int
    epsilon: float
    delta: float

    def __post_init__(self):
        expect_all(above_=0.0, l2=self.l2, lipschitz=self.lipschitz, epsilon=self.epsilon)
        expect("hessian_lipschitz", self.hessian_lipschitz, at_least=0.0)
        expect_count("dimension", self.dimension)

    def noise(self, method: str, *, num_examples: int, num_forgotten: int) -> float:
        """sigma with which `num_forgotten` of `num_examples` rows can go: an upper bound [D]."""
        if method not in METHODS:
            raise ValueError(f"Expected method in {METHODS}, got {method!r}.")
        retained = num_examples - num_forgotten
        if method == "newton":
            distance = newton_distance(
                num_forgotten=num_forgotten,
                num_retained=retained,
                l2=self.l2,
                lipschitz=self.lipschitz,
                hessian_lipschitz=self.hessian_lipschitz,
            )
        else:
            distance = minimiser_distance(
                num_forgotten=num_forgotten,
                num_retained=retained,
                l2=self.l2,
                lipschitz=self.lipschitz,
            )
        return raised(distance / _mu(self.epsilon, self.delta))

    def excess_risk(self, method: str, *, num_examples: int, num_forgotten: int) -> float:
        """Expected excess risk after deleting the worst `num_forgotten` rows: an upper bound [D].

        With output perturbation nothing moves at deletion, but the minimiser that retraining would
        reach does; the same three terms bound both.
        """
        n, m = num_examples, expect_count("num_forgotten", num_forgotten, at_least=0)
        generalisation = 2 * self.lipschitz**2 / (self.l2 * n)
        if m == 0:
            return raised(generalisation)
        if m >= n:
            return math.inf
        moved = m * self.lipschitz**2 / (self.l2 * (n - m))
        sigma = self.noise(method, num_examples=n, num_forgotten=m)
        return raised(generalisation + moved + self.lipschitz * math.sqrt(self.dimension) * sigma)


def strongly_convex_capacity(
    problem: StronglyConvex, method: str, *, num_examples: int, excess_risk: float
) -> int:
    """The most rows that can go within `excess_risk`: a lower bound on the true capacity [D].

    Args:
      method: "newton" or "output_perturbation".  excess_risk: gamma; the paper takes 0.01.

    >>> problem = StronglyConvex(l2=0.1, lipschitz=1.0, hessian_lipschitz=0.1, dimension=10**6,
    ...     epsilon=1.0, delta=1e-5)
    >>> [strongly_convex_capacity(problem, m, num_examples=10**6, excess_risk=0.1)
    ...     for m in METHODS]
    [705, 2]
    """
    expect("excess_risk", excess_risk, above_=0.0)
    count = expect_count("num_examples", num_examples, at_least=2)
    cost = lambda m: problem.excess_risk(method, num_examples=count, num_forgotten=m)
    return largest_within(cost, excess_risk, count - 1)


def sample_complexity(
    problem: StronglyConvex, method: str, *, num_forgotten: int, excess_risk: float
) -> int:
    """The fewest rows with which `num_forgotten` can go within `excess_risk`: an upper bound [D].

    >>> problem = StronglyConvex(l2=0.1, lipschitz=1.0, hessian_lipschitz=0.1, dimension=100,
    ...     epsilon=1.0, delta=1e-5)
    >>> n = sample_complexity(problem, "newton", num_forgotten=10, excess_risk=0.1)
    >>> strongly_convex_capacity(problem, "newton", num_examples=n, excess_risk=0.1)
    10
    """
    expect("excess_risk", excess_risk, above_=0.0)
    forgotten = expect_count("num_forgotten", num_forgotten, at_least=0)

    def fits(n):
        return problem.excess_risk(method, num_examples=n, num_forgotten=forgotten) <= excess_risk

    found = least_count(fits, start=forgotten + 1, most=2**60)
    if found is None:
        raise ValueError(f"Expected an excess_risk={excess_risk} that some sample size reaches.")
    return found


def newton_beats_output_perturbation(problem: StronglyConvex, *, num_examples: int) -> int:
    """The most rows for which Newton needs less noise than output perturbation.

    m < 2 l2^2 (n - m)/(M L) [D]; with the published distances, 2 m L/(l2 n) and half of
    2 M m^2 L^2/(l2^3 n^2), m < 4 l2^2 n / (M L).

    >>> problem = StronglyConvex(l2=0.1, lipschitz=1.0, hessian_lipschitz=0.1, dimension=10,
    ...     epsilon=1.0, delta=1e-5)
    >>> newton_beats_output_perturbation(problem, num_examples=1300)
    216
    """
    count = expect_count("num_examples", num_examples, at_least=2)
    bend = problem.hessian_lipschitz * problem.lipschitz
    ahead = lambda m: 0.0 if m * bend < 2 * problem.l2**2 * (count - m) else 1.0
    return largest_within(ahead, 0.5, count - 1)


def newton_capacity_order(
    *, num_examples: int, dimension: int, epsilon: float, delta: float, constant: float = 1.0
) -> float:
    """c n sqrt(epsilon) / (d ln(1/delta))^(1/4): a lower bound on capacity up to its constant.

    Sekhari et al. 2021, Theorem 2, convex losses [S]; the paper leaves c unnamed. No certificate.

    >>> round(newton_capacity_order(num_examples=1000, dimension=16, epsilon=1.0, delta=0.5), 3)
    547.979
    """
    _expect_orders(num_examples, dimension, epsilon, delta)
    return constant * num_examples * epsilon**0.5 / (dimension * -math.log(delta)) ** 0.25


def dp_capacity_order(
    *, num_examples: int, dimension: int, epsilon: float, delta: float, constant: float = 1.0
) -> float:
    """c n epsilon / sqrt(d ln(e^epsilon/delta)): what any DP learner achieves, up to its constant.

    Sekhari et al. 2021, Lemma 1 [S]; a lower bound, tight for DP learners (Huang and Canonne 2023
    [R]). No certificate.

    >>> round(dp_capacity_order(num_examples=1000, dimension=16, epsilon=1.0, delta=0.5), 3)
    192.129
    """
    _expect_orders(num_examples, dimension, epsilon, delta)
    return constant * num_examples * epsilon / math.sqrt(dimension * (epsilon - math.log(delta)))


def capacity_ceiling(*, num_examples: int, constant: float) -> float:
    """c n, c < 1: an upper bound on the capacity of any method, even one that keeps all the data.

    Sekhari et al. 2021, Theorem 1 [S]; c depends on the limit and is not named in the paper.

    >>> capacity_ceiling(num_examples=1000, constant=0.5)
    500.0
    """
    expect_count("num_examples", num_examples)
    if not 0 < constant < 1:
        raise ValueError(f"Expected constant={constant} strictly between 0 and 1.")
    return constant * num_examples


@functools.lru_cache(maxsize=64)
def _mu(epsilon, delta):
    """`gaussian_mu`, once for each budget."""
    return gaussian_mu(epsilon=epsilon, delta=delta)


def _expect_orders(num_examples, dimension, epsilon, delta):
    """Raises on sizes or privacy parameters out of range."""
    expect_count("num_examples", num_examples)
    expect_count("dimension", dimension)
    expect("epsilon", epsilon, above_=0.0)
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta} strictly between 0 and 1.")
