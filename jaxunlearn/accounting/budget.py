"""One budget over many releases, spent in integers rounded up, never in a drifting float."""

import math
from typing import NamedTuple

from jaxunlearn import errors
from jaxunlearn.accounting.gaussian import gaussian_epsilon
from jaxunlearn.accounting.odometer import Odometer, Option, Request, Spent
from jaxunlearn.accounting.release import certified_mu, certified_noise, release_mu
from jaxunlearn.accounting.removal import WorstCase
from jaxunlearn.accounting.rounding import round_up
from jaxunlearn.types import Budget

BUDGET_UNITS = 2**30
"""The whole budget: total mu squared is spent in whole units of this many."""


class Charge(NamedTuple):
    """The budget after one more release.

    spent_units: of `BUDGET_UNITS`, this release included.
    prior_mu: total mu of the releases before it, an upper bound.
    """

    spent_units: int
    prior_mu: float


def check_capacity(budget: Budget, num_examples: int) -> None:
    """Refuse a budget that could forget everybody: no retained row, no minimiser."""
    if budget.max_forget >= num_examples:
        raise ValueError(
            f"Expected budget.max_forget={budget.max_forget} < num_examples={num_examples}."
        )


def worst_case_noise(
    worst_case: WorstCase, *, l2: float, budget: Budget, num_examples: int, dimension: int
) -> float:
    """Noise for one release of `max_forget` ids at twice the bound, to leave room for residuals.

    >>> model = WorstCase(lipschitz=1.0, hessian_lipschitz=1.0)
    >>> budget = Budget(epsilon=1.0, delta=1e-5, max_forget=1)
    >>> worst_case_noise(model, l2=1.0, budget=budget, num_examples=10, dimension=1) >= 0
    True
    """
    check_capacity(budget, num_examples)
    distance = worst_case.distance(l2, budget.max_forget, num_examples - budget.max_forget)
    return certified_noise(
        epsilon=budget.epsilon, delta=budget.delta, sensitivity=2 * distance, dimension=dimension
    )


def check_request(budget: Budget, total_forgotten: int, spent_units: int) -> None:
    """Refuse a request that no residual, however small, would fit.

    Raises:
      BudgetExhaustedError: too many ids over all requests, or nothing left to spend.
    """
    if total_forgotten > budget.max_forget:
        raise errors.BudgetExhaustedError(
            f"Expected at most max_forget={budget.max_forget} ids over all requests, got "
            f"{total_forgotten}. Retrain on the retain set."
        )
    if spent_units >= BUDGET_UNITS:
        raise errors.BudgetExhaustedError(
            "Expected some budget to be left, all of it is spent. Retrain on the retain set."
        )


def odometer_of(budget: Budget, *, dimension: int, **limits) -> Odometer:
    """The odometer of a `Budget` for releases on the grid: "mu_squared" and "deletions".

    Args:
      dimension: coordinates of each release; at most `budget.max_forget` releases share the budget.
      limits: `quotas`, `caps` and `thresholds` of `Odometer`.

    >>> odometer_of(Budget(epsilon=1.0, delta=1e-5, max_forget=10), dimension=2).totals["deletions"]
    10
    """
    total_mu = certified_mu(
        epsilon=budget.epsilon,
        delta=budget.delta,
        dimension=dimension,
        num_releases=budget.max_forget,
    )
    # What the grid adds at the full budget, the most it adds at any part of it.
    continuous = gaussian_epsilon(delta=budget.delta, noise_stddev=1.0, sensitivity=total_mu)
    return Odometer.for_gaussian(
        extra_epsilon=max(0.0, budget.epsilon - continuous),
        epsilon=budget.epsilon,
        delta=budget.delta,
        total_mu=total_mu,
        totals={"deletions": budget.max_forget},
        **limits,
    )


_UNITS = Odometer(totals={"units": BUDGET_UNITS})


def charge_release(
    spent_units: int, *, budget: Budget, distance: float, noise_stddev: float, dimension: int
) -> Charge:
    """Add one Gaussian release to what is spent, or refuse.

    Releases compose as mu_total = sqrt(sum mu_i^2) (Dong, Roth, Su 2022, Corollary 3.3); the budget
    is the largest total that `certified_mu` allows, whatever the number of releases up to
    `budget.max_forget`.

    Args:
      spent_units: what earlier releases took, in 0..BUDGET_UNITS.
      distance: L2 sensitivity of this release, >= 0.
      noise_stddev: its noise per coordinate.
      dimension: number of coordinates.

    Raises:
      BudgetExhaustedError: it does not fit; nothing was spent.

    >>> budget = Budget(epsilon=1.0, delta=1e-5, max_forget=10)
    >>> charge_release(0, budget=budget, distance=0.1, noise_stddev=1.0, dimension=2).prior_mu
    0.0
    """
    total = certified_mu(
        epsilon=budget.epsilon,
        delta=budget.delta,
        dimension=dimension,
        num_releases=budget.max_forget,
    )
    mu = release_mu(sensitivity=distance, noise_stddev=noise_stddev, dimension=dimension)
    share = (mu / total) ** 2 * (1 + 1e-12)
    cost = math.ceil(min(share, 2.0) * BUDGET_UNITS)
    request = Request(Option(name="release", costs={"units": cost}))
    try:
        _UNITS.spend(Spent.of(units=int(spent_units)), request)
    except errors.BudgetExhaustedError as refusal:
        left = (BUDGET_UNITS - spent_units) / BUDGET_UNITS
        raise errors.BudgetExhaustedError(
            f"Expected the distance to the target to fit what is left of the budget ({left:.1%} of "
            f"epsilon={budget.epsilon:g}, delta={budget.delta:g} at noise {noise_stddev:.3g}), got "
            f"a bound of {distance:.3g}, which takes {share:.1%}. Nothing was released: retrain on "
            "the retain set, or train to a smaller gradient first."
        ) from refusal
    prior_mu = round_up(total * math.sqrt(spent_units / BUDGET_UNITS)) if spent_units else 0.0
    return Charge(int(spent_units) + cost, prior_mu)
