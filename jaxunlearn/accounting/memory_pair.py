"""Regret, deletion capacity and the odometer of the Memory Pair, solved self-consistently.

Stewart 2025 (arXiv 2508.10193) bounds the regret of online L-BFGS with m noisy deletions and reads
off how many it can bear. Three things differ here from the published formulas:

* Noise N(0, sigma^2 I_d) has a norm near sigma sqrt(d), not sigma sqrt(2 ln(1/delta_B)).
* sigma grows with the number of deletions that it is shared out to: as sqrt(m) under zCDP and
  Gaussian composition, as m under basic composition. The capacity is the m that solves
  regret(m, sigma(m)) <= gamma T, not a quotient that holds sigma fixed.
* The adaptive bound is D sqrt(c C S_T); the printed G D sqrt(c C S_T) has a gradient norm too many.

What stays as in the paper: noise is charged in the round of its deletion only, though it persists
in the parameters, and the bounds need a smallest curvature that a squared loss on one row does not
have. These figures plan a stream. They certify nothing: the noise says nothing of how far the
deleted model is from one that never saw the row.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from jaxunlearn import errors
from jaxunlearn.accounting.gaussian import gaussian_mu
from jaxunlearn.accounting.odometer import Odometer, Option, Request, Spent

NoiseScale = Callable[[int], float]
"""`scale(m)`: noise per unit of sensitivity where `m` deletions share the budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegretModel:
    """What the bounds assume of the losses and of the preconditioner; all positive.

    gradient_bound: G >= ||g_t||.
    strong_convexity: lambda, with ||H|| <= 1 / lambda.
    dimension: d, number of parameters.
    diameter: D of the set in which the parameters stay; used by `adaptive`.
    lowest_curvature, highest_curvature: c I <= B_t <= C I.

    >>> model = RegretModel(gradient_bound=2.0, strong_convexity=0.5, dimension=100)
    >>> round(model.logarithmic(1000), 2), model.influence
    (63.26, 4.0)
    """

    gradient_bound: float
    strong_convexity: float
    dimension: int
    diameter: float = 1.0
    lowest_curvature: float = 1.0
    highest_curvature: float = 1.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected a finite {name}={value} > 0.")
        if self.lowest_curvature > self.highest_curvature:
            raise ValueError(
                f"Expected lowest_curvature={self.lowest_curvature} <= highest_curvature="
                f"{self.highest_curvature}."
            )

    @property
    def influence(self) -> float:
        """G / lambda: the longest step H g; times the rate it is the sensitivity of a deletion."""
        return self.gradient_bound / self.strong_convexity

    def logarithmic(self, num_events: int) -> float:
        """G^2 / (lambda c) (1 + ln T), for steps 1/(lambda t)."""
        curved = self.strong_convexity * self.lowest_curvature
        return self.gradient_bound**2 / curved * (1 + math.log(max(num_events, 1)))

    def dynamic(self, num_events: int, path_length: float) -> float:
        """`logarithmic` + G P_T, P_T the length of the comparator's path."""
        return self.logarithmic(num_events) + self.gradient_bound * path_length

    def adaptive(self, square_sum: float) -> float:
        """D sqrt(c C S_T), for steps D / sqrt(S_t); S_T = G^2 T at worst."""
        return self.diameter * math.sqrt(
            self.lowest_curvature * self.highest_curvature * square_sum
        )

    def noise(self, num_deletions: int, noise_stddev: float, failure_probability: float) -> float:
        """G sum_i ||noise_i|| of m deletions, but for a chance of `failure_probability`.

        sigma G (m sqrt(d) + sqrt(2 m ln(1/delta_B))): the noises together are one Gaussian of m d
        coordinates, whose norm exceeds its root mean square by sigma sqrt(2 ln(1/delta_B)) at most,
        and a sum of m norms is sqrt(m) times the norm of all. For m = 1 it is
        sigma G (sqrt(d) + sqrt(2 ln(1/delta_B))).
        """
        m, tail = num_deletions, 2 * math.log(1 / failure_probability)
        reach = m * math.sqrt(self.dimension) + math.sqrt(m * tail)
        return self.gradient_bound * noise_stddev * reach


def zcdp_noise(rho: float) -> NoiseScale:
    """sqrt(m / (2 rho)): m Gaussian releases of together rho zCDP (Bun and Steinke 2016).

    >>> zcdp_noise(0.5)(4)
    2.0
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"Expected a finite rho={rho} > 0.")
    return lambda m: math.sqrt(m / (2 * rho))


def composed_noise(epsilon: float, delta: float) -> NoiseScale:
    """sqrt(m) / mu: m Gaussian releases that are (epsilon, delta) together, composed exactly.

    >>> round(composed_noise(1.0, 1e-5)(4), 4)
    7.4613
    """
    mu = gaussian_mu(epsilon=epsilon, delta=delta)
    return lambda m: math.sqrt(m) / mu


def published_noise(epsilon: float, delta: float, *, share: float = 1.0) -> NoiseScale:
    """sqrt(2 ln(1.25 / delta_s)) / epsilon_s with both budgets split evenly: basic composition.

    epsilon_s = share epsilon / m, delta_s = share delta / m; the first version of the paper keeps
    half (share = 0.5). Dwork and Roth's constant needs epsilon_s < 1.

    >>> round(published_noise(1.0, 1e-5, share=0.5)(20), 3)
    222.171
    """
    if not (epsilon > 0 and 0 < delta < 1 and 0 < share <= 1):
        raise ValueError(
            f"Expected epsilon={epsilon} > 0, delta={delta} in (0, 1) and share={share} in (0, 1]."
        )
    return lambda m: math.sqrt(2 * math.log(1.25 * m / (share * delta))) * m / (share * epsilon)


class Capacity(NamedTuple):
    """How many deletions a stream can bear.

    num_deletions: the largest m; 0 where not even one fits.
    noise_stddev: sigma(m) of each; that of m = 1 where none fits.
    regret: the bound at that m, inserts and noise together.
    """

    num_deletions: int
    noise_stddev: float
    regret: float


def largest_within(cost: Callable[[int], float], limit: float, most: int) -> int:
    """The largest m in 0..most with cost(m) <= limit, for a cost that does not fall; 0 if none.

    >>> largest_within(lambda m: m * m, 50.0, 100)
    7
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
    return low


def deletion_capacity(
    model: RegretModel,
    noise: NoiseScale,
    *,
    num_events: int,
    average_regret: float,
    insert_regret: float | None = None,
    rate: float = 1.0,
    failure_probability: float = 0.05,
    max_deletions: int | None = None,
) -> Capacity:
    """The largest m with insert regret + noise regret(m, sigma(m)) <= gamma T.

    Args:
      model: constants of the bounds.
      noise: `zcdp_noise(rho)`, `composed_noise(epsilon, delta)` or `published_noise(...)`.
      num_events: T, of the whole stream.
      average_regret: gamma, what the regret may be per event.
      insert_regret: of the inserts; None takes `model.adaptive` at S_T = G^2 T.
      rate: step size of a deletion; its sensitivity is rate G / lambda.
      failure_probability: delta_B, that the noise is larger than charged.
      max_deletions: the most to look for; None is T.

    Cost: log2(T) evaluations on the host.

    >>> model = RegretModel(gradient_bound=0.5, strong_convexity=10.0, dimension=20)
    >>> deletion_capacity(model, zcdp_noise(1.0), num_events=1000, average_regret=0.5).num_deletions
    328
    """
    if not num_events >= 1 or not average_regret > 0 or not rate > 0:
        raise ValueError(
            f"Expected num_events={num_events} >= 1, average_regret={average_regret} > 0 and "
            f"rate={rate} > 0."
        )
    if not 0 < failure_probability < 1:
        raise ValueError(f"Expected failure_probability={failure_probability} in (0, 1).")
    if insert_regret is None:
        insert_regret = model.adaptive(model.gradient_bound**2 * num_events)
    sigma = lambda m: rate * model.influence * noise(max(m, 1))

    def total(m):
        if m == 0:
            return insert_regret
        return insert_regret + model.noise(m, sigma(m), failure_probability)

    most = num_events if max_deletions is None else max_deletions
    m = largest_within(total, average_regret * num_events, most)
    return Capacity(m, sigma(m), total(m))


class OdometerQuote(NamedTuple):
    """What a request would take. Nothing is spent by asking.

    fits: whether all of it is left.  left: deletions left before it.
    noise_regret: what the regret bound grows by, but for a chance of delta_B.
    """

    fits: bool
    left: int
    noise_regret: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeletionOdometer:
    """Counts deletions against a capacity that was fixed, with its noise, before the first one.

    An `Odometer` whose one total is "deletions", with what the Memory Pair says of its noise.

    Quoting and spending are apart: `quote` looks, `spend` returns the new count or raises. Every
    deletion takes one whole unit, whatever its own step was: a charge that depends on the deleted
    row would need a filter of its own.

    max_deletions: capacity.
    noise_stddev: sigma of each deletion.
    sensitivity: the longest step that sigma was made for; a longer one is refused.

    >>> odometer = DeletionOdometer(max_deletions=3, noise_stddev=1.0, sensitivity=2.0)
    >>> odometer.quote(1, 2).fits, odometer.spend(1, 2), odometer.quote(3, 1).fits
    (True, 3, False)
    """

    max_deletions: int
    noise_stddev: float
    sensitivity: float
    model: RegretModel | None = None
    failure_probability: float = 0.05

    def __post_init__(self):
        if self.max_deletions < 0 or not self.noise_stddev >= 0 or not self.sensitivity > 0:
            raise ValueError(f"Expected non-negative figures and sensitivity > 0 in {self}.")

    @classmethod
    def solve(
        cls, model: RegretModel, noise: NoiseScale, *, rate: float = 1.0, **stream
    ) -> "DeletionOdometer":
        """The odometer of `deletion_capacity(model, noise, rate=rate, **stream)`."""
        capacity = deletion_capacity(model, noise, rate=rate, **stream)
        return cls(
            max_deletions=capacity.num_deletions,
            noise_stddev=capacity.noise_stddev,
            sensitivity=rate * model.influence,
            model=model,
            failure_probability=stream.get("failure_probability", 0.05),
        )

    @property
    def odometer(self) -> Odometer:
        """The general odometer of this capacity, for quotas, caps and alarms beside it."""
        return Odometer(totals={"deletions": self.max_deletions})

    def quote(self, num_spent: int, num_requested: int) -> OdometerQuote:
        """What `num_requested` more deletions would take after `num_spent`."""
        told = self.odometer.preview(Spent.of(deletions=num_spent), _deletions(num_requested))
        left = max(0, self.max_deletions - num_spent)
        growth = 0.0
        if self.model is not None and num_requested:
            bound = lambda m: self.model.noise(m, self.noise_stddev, self.failure_probability)
            growth = bound(num_spent + num_requested) - (bound(num_spent) if num_spent else 0.0)
        return OdometerQuote(told.fits, left, growth)

    def spend(self, num_spent: int, num_requested: int) -> int:
        """The count after the request.

        Raises:
          BudgetExhaustedError: it is more than what is left; nothing was spent.
        """
        try:
            self.odometer.spend(Spent.of(deletions=num_spent), _deletions(num_requested))
        except errors.BudgetExhaustedError as refusal:
            left = max(0, self.max_deletions - num_spent)
            raise errors.BudgetExhaustedError(
                f"Expected at most {left} more deletions of a capacity of {self.max_deletions}, "
                f"got {num_requested}. Nothing was changed: retrain, or use mode='replay', which "
                "adds no noise."
            ) from refusal
        return num_spent + num_requested

    def check_step(self, step_norm: float) -> None:
        """Refuse a deletion whose step is longer than the noise was made for.

        Raises:
          BudgetExhaustedError: nothing was changed.
        """
        if not step_norm <= self.sensitivity:
            raise errors.BudgetExhaustedError(
                f"Expected a deletion of norm at most {self.sensitivity:.3g}, for which the noise "
                f"was made, got {step_norm:.3g}. Nothing was changed."
            )


def _deletions(count):
    """A request for `count` deletions."""
    return Request(Option(name="memory_pair", costs={"deletions": count}))
