"""Objective perturbation's budget: how large a gradient residual the noise of training covers.

Guo et al. 2020 train with b'w added to the summed loss, b ~ N(0, sigma^2 I), once. A removal leaves
the gradient of the retained objective at a residual u instead of zero, that is at the exact
minimiser for b - u. While |u| <= beta, the noise covers it.

Their proof, and the exact calibration here, treat the residual as a shift bounded for every output;
a bound that is measured on the realised (w, b), and a decision to retrain that depends on it, go
beyond the proof, in the paper as here: certificates must call such a bound data-dependent.
"""

import math
from fractions import Fraction

from jaxunlearn.accounting._checks import expect, expect_all, expect_count, expect_delta
from jaxunlearn.accounting.composition import round_sum
from jaxunlearn.accounting.gaussian import gaussian_mu
from jaxunlearn.accounting.rounding import lowered, raised


def removal_budget(
    *, noise_stddev: float, epsilon: float, delta: float, paper_constants: bool = False
) -> float:
    """beta: the largest gradient residual (sum form) that is (epsilon, delta): a lower bound.

    Default [D]: sigma mu*(epsilon, delta), exact for a residual that is a fixed shift of b.
    `paper_constants=True`: sigma epsilon / c, c = sqrt(2 ln(1.5/delta)) (Guo et al. 2020, Theorem
    3).

    Args:
      noise_stddev: sigma of b, in the sum form of the loss.

    >>> round(removal_budget(noise_stddev=10, epsilon=1, delta=1e-4, paper_constants=True), 5)
    2.2803
    >>> round(removal_budget(noise_stddev=10, epsilon=1, delta=1e-4), 5)
    3.13902
    """
    expect("noise_stddev", noise_stddev, above_=0.0)
    expect("epsilon", epsilon, above_=0.0)
    if not paper_constants:
        return lowered(noise_stddev * gaussian_mu(epsilon=epsilon, delta=delta))
    expect_delta(delta)
    return lowered(noise_stddev * epsilon / math.sqrt(2 * math.log(1.5 / delta)))


def worst_case_residual(
    *,
    num_removed: int,
    num_retained: int,
    l2: float,
    gradient_bound: float,
    curvature_lipschitz: float,
    paper_constants: bool = False,
) -> float:
    """Residual of one Newton step for `num_removed` rows together, in sum form: an upper bound.

        2 gamma C^2 T^2 / (l2^2 (n - T)),    for rows with ||x_i|| <= 1              [D]

    `paper_constants=True`: 4 in place of 2 (Guo et al. 2020, Theorem 1 at T = 1 [S]). With Delta
    the T rows' gradients and their share of the L2 term, |Delta| <= 2 T C and
    |H^-1| <= 1/(l2 (n - T)), and the integral remainder is at most (gamma/2) (n - T)
    |H^-1 Delta|^2. So a batch costs T^2; T in its place, as sometimes written, is the bound for T
    removals one after another.

    Args:
      l2: lambda, the loss being sum_i loss_i + (lambda n / 2) |w|^2.
      gradient_bound: C >= |loss'|.  curvature_lipschitz: gamma, of loss''.

    >>> round(worst_case_residual(num_removed=2, num_retained=100, l2=0.1, gradient_bound=1.0,
    ...     curvature_lipschitz=0.25), 9)
    2.0
    """
    removed = expect_count("num_removed", num_removed)
    retained = expect_count("num_retained", num_retained)
    expect("l2", l2, above_=0.0)
    expect_all(at_least=0.0, gradient_bound=gradient_bound, curvature_lipschitz=curvature_lipschitz)
    scale = (4 if paper_constants else 2) * curvature_lipschitz * gradient_bound**2 / l2**2
    return raised(scale * removed**2 / retained)


def removals_within(residual_per_removal: list[float], budget: float) -> int:
    """How many removals, in order, fit the budget: their residuals add up, in exact arithmetic.

    >>> removals_within([0.1] * 11, 1.0)
    9

    (0.1 in binary is more than a tenth.)
    """
    total, limit = Fraction(0), Fraction(budget)
    for count, residual in enumerate(residual_per_removal):
        expect("residual", residual, at_least=0.0)
        total += Fraction(residual)
        if total > limit:
            return count
    return len(residual_per_removal)


def total_residual(residuals: list[float]) -> float:
    """The sum of several removals' residuals, rounded up: what the last model's gradient may be.

    For one-vs-rest, the residual of a step is the norm over its classes' residuals or, as the
    authors' code has it, their sum, which is larger.

    >>> total_residual([0.5, 0.25])
    0.75
    """
    return round_sum(Fraction(residual) for residual in residuals)
