"""Bounds for deletion from stored sums, for losses whose constants are known before any data.

F_S is the mean loss over S with (l2 / 2) ||w||^2, lambda-strongly convex; w the start, with
||grad F_S(w)|| <= s; U the m rows to go, R the n - m others. In mean form the L2 terms cancel,

    grad F_R(w) = grad F_S(w) + (m / n) (mean_R grad loss - mean_U grad loss),
    q = ||grad F_R(w)|| <= s + 2 L m / n,      ||w - w*_R|| <= q / lambda.

One Newton step with H_R, solved to a residual r, lands within (M q^2 / (2 lambda^2) + r) / lambda
of w*_R. One with H_S in its place, for 0 <= hess loss_i <= beta, adds beta m q / (lambda^2 n):
H_R - H_S = (m / n) (mean_R hess - mean_U hess) lies between -+ beta m / n. The same holds of
proximal steps, whose error is bounded by the same difference (monotonicity of the subgradient),
with q the least norm of a subgradient at w.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from jaxunlearn import errors
from jaxunlearn.accounting.budget import charge_release
from jaxunlearn.accounting.release import certified_mu, release_mu
from jaxunlearn.accounting.removal import newton_distance, summation_slack
from jaxunlearn.types import Batch, Budget

_ROUNDING = 1 + 2.0**-40
_ROOM = 1.001
"""Share of the noise that covers what training leaves behind."""


class LossConstants(NamedTuple):
    """What is known of every row's loss, without its L2 term, before any data is seen.

    lipschitz: L >= ||grad loss_i||.  hessian_lipschitz: M, of hess loss_i.
    smoothness: beta >= ||hess loss_i||; only the infinitesimal jackknife needs it.
    features, feature_norm: batch -> X of shape (B, d), and R >= ||x_i||, which is then checked on
      the rows that are read.

    >>> constants = LossConstants.logistic(lambda batch: batch["x"], feature_norm=2.0)
    >>> constants.lipschitz, constants.smoothness, round(constants.hessian_lipschitz, 6)
    (2.0, 1.0, 0.7698)
    """

    lipschitz: float
    hessian_lipschitz: float
    smoothness: float = math.inf
    features: Callable[[Batch], Float[Array, "b d"]] | None = None
    feature_norm: float | None = None

    @classmethod
    def logistic(
        cls, features: Callable[[Batch], Float[Array, "b d"]], *, feature_norm: float = 1.0
    ) -> "LossConstants":
        """Of log(1 + exp(-y x'w)), y = +-1: |l'| <= 1, l'' <= 1/4, l'' is 1/(6 sqrt(3))-Lipschitz.

        Published code takes 1/4 for the last, which bounds l'' itself and is 2.6 times larger.
        """
        gamma = 1 / (6 * math.sqrt(3)) * _ROUNDING
        norm = float(feature_norm)
        return cls(norm, gamma * norm**3, norm**2 / 4, features, norm)

    def check(self) -> None:
        """Refuse constants that are negative or not finite."""
        for name in ("lipschitz", "hessian_lipschitz"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"Expected a finite {name}={value} >= 0.")
        if not self.smoothness >= 0:
            raise ValueError(f"Expected smoothness={self.smoothness} >= 0.")

    def check_rows(self, *, largest_gradient: float, largest_feature: float) -> None:
        """Refuse rows that refute the constants: a check at one point, which cannot confirm them.

        Raises:
          AssumptionError: a gradient or a feature row is larger than declared.
        """
        if largest_gradient > self.lipschitz * _ROUNDING:
            raise errors.AssumptionError(
                f"Expected every row's gradient within lipschitz={self.lipschitz:g}, got one of "
                f"norm {largest_gradient:.9g}. Declare the true constant, or clip the rows."
            )
        if self.feature_norm is not None and largest_feature > self.feature_norm * _ROUNDING:
            raise errors.AssumptionError(
                f"Expected every row's features within feature_norm={self.feature_norm:g}, got "
                f"{largest_feature:.9g}. Normalise the rows, or declare a larger norm."
            )

    def gradient_bound(self, *, num_forgotten: int, num_retained: int, start: float = 0.0) -> float:
        """q >= ||grad F_R(w)|| for any m rows: s + 2 L m / n.

        >>> LossConstants(1.0, 1.0).gradient_bound(num_forgotten=1, num_retained=9)
        0.2000000000...
        """
        count = num_forgotten + num_retained
        return (start + 2.0 * self.lipschitz * num_forgotten / count) * _ROUNDING

    def newton_distance(
        self,
        curvature: float,
        *,
        num_forgotten: int,
        num_retained: int,
        gradient: float,
        solver: float = 0.0,
        paper_constants: bool = False,
    ) -> float:
        """||one Newton step with H_R - retain-set minimiser||: an upper bound.

            (M q^2 / (2 lambda^2) + r) / lambda                          derived; the default

        Args:
          curvature: lambda > 0.  gradient: q, of `gradient_bound` or measured.
          solver: r, ||H_R v + grad F_R(w)||.
          paper_constants: never below 2 M m^2 (2 L)^2 / (lambda^3 n^2), of Sekhari et al. 2021
            with their L, of the loss with its L2 term, at its largest.

        >>> sizes = {"num_forgotten": 1, "num_retained": 9}
        >>> LossConstants(1.0, 2.0).newton_distance(1.0, **sizes, gradient=0.5)
        0.2500000000...
        """
        remainder = self.hessian_lipschitz * gradient**2 / (2 * curvature**2)
        bound = (remainder + solver) / curvature * _ROUNDING
        if not paper_constants or not (self.lipschitz > 0 and num_forgotten > 0):
            return bound
        printed = newton_distance(
            num_forgotten=num_forgotten,
            num_retained=num_retained,
            l2=curvature,
            lipschitz=2 * self.lipschitz,
            hessian_lipschitz=self.hessian_lipschitz,
            as_printed=True,
        )
        return max(bound, printed)

    def jackknife_distance(
        self,
        curvature: float,
        *,
        num_forgotten: int,
        num_retained: int,
        gradient: float,
        solver: float = 0.0,
        paper_step: bool = False,
        l2: float = 0.0,
    ) -> float:
        """||one step with H_S - retain-set minimiser||: an upper bound.

            (M q^2 / (2 lambda^2) + beta m q / (lambda n) + r) / lambda

        Args:
          curvature, gradient, solver: as for `newton_distance`.
          paper_step: the step is (n - m) / n of that; beta is then that of the loss with its L2
            term, beta + l2.

        >>> sizes = {"num_forgotten": 1, "num_retained": 9}
        >>> constants = LossConstants(1.0, 0.0, smoothness=4.0)
        >>> constants.jackknife_distance(1.0, **sizes, gradient=0.5)
        0.2000000000...
        """
        count = num_forgotten + num_retained
        beta = self.smoothness + (l2 if paper_step else 0.0)
        remainder = self.hessian_lipschitz * gradient**2 / (2 * curvature**2)
        other = beta * num_forgotten / count * gradient / curvature if num_forgotten else 0.0
        return (remainder + other + solver) / curvature * _ROUNDING


def classic_noise(*, epsilon: float, delta: float, sensitivity: float) -> float:
    """sensitivity sqrt(2 ln(1.25 / delta)) / epsilon: what papers add; valid for epsilon < 1 only.

    Dwork and Roth 2014, Theorem A.1. Of no use but to compare, or as more than what is needed.

    >>> round(classic_noise(epsilon=1.0, delta=1e-5, sensitivity=1e-3), 9)
    0.004844805
    """
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def stored_noise(
    distance: float,
    *,
    budget: Budget,
    dimension: int,
    max_releases: int = 1,
    paper_constants: bool = False,
) -> float:
    """Noise for `max_releases` releases at `distance` each, within the budget: an upper bound.

    A thousandth more than the exact calibration, which is room for what solvers leave;
    `paper_constants` takes `classic_noise` at that distance where it is larger.

    >>> budget = Budget(epsilon=1.0, delta=1e-5, max_forget=1)
    >>> 3.7306 < stored_noise(1.0, budget=budget, dimension=10) < 3.735
    True
    """
    if not distance > 0:
        return 2.0**-40
    total = certified_mu(
        epsilon=budget.epsilon,
        delta=budget.delta,
        dimension=dimension,
        num_releases=budget.max_forget,
    )
    least = total / math.sqrt(max_releases) * (1 - max_releases * 2.0**-29)
    stddev = distance * _ROOM / least
    for _ in range(100):
        mu = release_mu(sensitivity=distance * _ROOM, noise_stddev=stddev, dimension=dimension)
        if mu <= least:
            break
        stddev *= mu / least * _ROUNDING
    else:
        raise ValueError(
            f"Expected a noise at which {dimension} coordinates on the grid fit "
            f"{max_releases} releases in the budget. Release fewer coordinates."
        )
    if paper_constants:
        sigma = classic_noise(epsilon=budget.epsilon, delta=budget.delta, sensitivity=distance)
        stddev = max(stddev, sigma * math.sqrt(max_releases))
    return stddev


def capacity_noise(
    distance_of: Callable[..., float],
    constants: LossConstants,
    *,
    curvature: float,
    budget: Budget,
    num_examples: int,
    dimension: int,
    start: float = 0.0,
    max_releases: int = 1,
    paper_constants: bool = False,
) -> float:
    """`stored_noise` for requests of `budget.max_forget` rows, known before any data.

    Room is left for rounding in the sums, of at most n + m gradients of norm L, and for an estimate
    of what a solver leaves, 4 (p + 1024) eps (1 + p (1 + beta / lambda)) q (L^2 where beta is not
    known): small next to the rest, but all there is of the bound of a quadratic loss.

    Args:
      distance_of: (num_forgotten, num_retained, gradient, solver) -> the distance.
      curvature: lambda.  dimension: p.
      start: s, the gradient norm of the mean objective that training may leave.
    """
    if not 0 <= start < math.inf:
        raise ValueError(f"Expected start={start} >= 0 and finite.")
    retained = num_examples - budget.max_forget
    sizes = {"num_forgotten": budget.max_forget, "num_retained": retained}
    norm_sum = (num_examples + budget.max_forget) * constants.lipschitz
    slack = summation_slack(norm_sum, num_rows=num_examples) / retained
    gradient = constants.gradient_bound(**sizes, start=start + slack)
    beta = constants.smoothness if constants.smoothness < math.inf else constants.lipschitz**2
    rounding = 4 * (dimension + 1024) * 2.0**-52
    solver = rounding * (1 + dimension * (1 + beta / curvature)) * gradient
    return stored_noise(
        distance_of(**sizes, gradient=gradient, solver=solver + slack),
        budget=budget, dimension=dimension, max_releases=max_releases,
        paper_constants=paper_constants,
    )  # fmt: skip


def charge_least(
    spent_units: int,
    distance_of: Callable[..., float],
    constants: LossConstants,
    *,
    num_forgotten: int,
    num_retained: int,
    start: float,
    budget: Budget,
    noise_stddev: float,
    dimension: int,
) -> None:
    """Refuse a request whose charge is beyond the budget before rounding is added to it.

    No data are needed: what solver and sums leave behind would only add to the charge.

    Args:
      num_forgotten: of this request and all before it.  start: as measured, or 0.

    Raises:
      BudgetExhaustedError: it does not fit.
    """
    if num_retained < 1:
        return
    sizes = {"num_forgotten": num_forgotten, "num_retained": num_retained}
    gradient = constants.gradient_bound(**sizes, start=start)
    charge_release(
        spent_units, budget=budget, distance=distance_of(**sizes, gradient=gradient),
        noise_stddev=noise_stddev, dimension=dimension,
    )  # fmt: skip


def balanced_l2(
    constants: LossConstants,
    *,
    num_forgotten: int,
    num_retained: int,
    radius: float,
    budget: Budget,
    dimension: int,
) -> tuple[float, float]:
    """The L2 term for a loss that is convex only, and the excess risk it leaves: derived.

    For a minimiser of the plain loss with ||w|| <= D, noise of A / (mu l2^3) per coordinate on a
    step that is A / l2^3 off, A = 2 M L^2 m^2 / n^2, costs

        F(released) - F* <= (l2 / 2) D^2 + L (1 + sqrt(d) / mu) A / l2^3

    in expectation over the noise, on the retained rows. It is least at l2 = (6 L c A / D^2)^(1/4),
    c = 1 + sqrt(d) / mu, up to the thousandth of room in `stored_noise` and the grid (2^-24 of the
    noise), which are left out: the order of Sekhari et al. 2021, Theorem 2, with named constants.

    Returns:
      (l2, the bound at it).

    >>> constants = LossConstants(lipschitz=1.0, hessian_lipschitz=0.1)
    >>> budget = Budget(epsilon=1.0, delta=1e-5, max_forget=10)
    >>> l2, excess = balanced_l2(
    ...     constants, num_forgotten=10, num_retained=9990, radius=1.0, budget=budget, dimension=50
    ... )
    >>> round(l2, 4), round(excess / l2, 4)  # (1/2 + 1/6) D^2
    (0.0757, 0.6667)
    """
    if not radius > 0:
        raise ValueError(f"Expected radius={radius} > 0.")
    mu = certified_mu(epsilon=budget.epsilon, delta=budget.delta, dimension=dimension)
    share = num_forgotten / (num_forgotten + num_retained)
    scale = 2 * constants.hessian_lipschitz * (constants.lipschitz * share) ** 2
    cost = constants.lipschitz * (1 + math.sqrt(dimension) / mu) * scale
    l2 = (6 * cost / radius**2) ** 0.25
    if not l2 > 0:
        raise ValueError("Expected lipschitz and hessian_lipschitz > 0: any l2 > 0 will do.")
    return l2, l2 / 2 * radius**2 + cost / l2**3
