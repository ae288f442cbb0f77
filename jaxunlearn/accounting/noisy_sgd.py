"""Unlearning with noisy SGD on a strongly convex loss (Chien et al. 2024 b), tracked in W-infinity.

    x <- Pi_R(x - eta g + N(0, 2 eta sigma^2 I))

with g the mean of per-example gradients clipped to M over cyclic batches of b rows, plus the L2
term, eta <= 1 / smoothness, and c = 1 - eta m. A row replaced moves one step of each epoch by at
most 2 eta M / b, so learning stays within

    Z_B = (2 eta M / b) / (1 - c^(n/b))

of learning without it, epoch after epoch, coupled by their noise; K epochs of unlearning on the
edited data leave mu = (Z / s) sqrt((1 - c^2)/(c^(-2 K n/b) - 1)), s^2 = 2 eta sigma^2
(`contracted_mu`); and after them the next request starts from Z' = Z c^(K n/b) + Z_B.

c is the contraction of a step of *unclipped* gradients of a convex loss, and of clipped ones where
the loss depends on the parameters through one number x'w: clipping l'(x'w) x bounds l', which stays
monotone. Elsewhere the clip can turn gradients so that steps expand: of x_0^2/2 + 5 x_1, clipped to
1, with m = 1e-3, a step is 1.0143-Lipschitz where c is 0.999. So the results here hold where the
clip never binds, or the loss is of x'w.

The published bound on D_alpha is exactly twice alpha mu^2 / 2, and its epsilon comes by Mironov's
conversion: `paper_constants=True`. The reference is the same noisy SGD run on for as long; the
published term for a training that has not converged, `unconverged_curve`, is needed where the
reference stops before.
"""

import dataclasses
import math

from jaxunlearn.accounting._checks import expect, expect_all, expect_count, least_count
from jaxunlearn.accounting.gaussian import gaussian_epsilon
from jaxunlearn.accounting.iteration import contracted_mu
from jaxunlearn.accounting.renyi import RenyiCurve
from jaxunlearn.accounting.rounding import raised
from jaxunlearn.accounting.zcdp import zcdp_epsilon


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisySGD:
    """Constants of the training, known before any data.

    strong_convexity: m.  smoothness: L, of the loss with its L2 term, m <= L.
    gradient_clip: M, of per-example gradients without the L2 term. Either every gradient is within
      it anyway, or each row's loss is a convex function of one number x'w.
    noise_stddev: sigma; each step adds sqrt(2 eta) sigma per coordinate.
    num_examples: n.  batch_size: b, dividing n; None is full batch.
    learning_rate: eta; None is 1 / L.  radius: R of the projection, inf for none.

    >>> setting = NoisySGD(strong_convexity=0.5, smoothness=1.0, gradient_clip=1.0,
    ...     noise_stddev=1.0, num_examples=100)
    >>> setting.contraction, round(setting.drift(1), 9)
    (0.5, 0.04)
    """

    strong_convexity: float
    smoothness: float
    gradient_clip: float
    noise_stddev: float
    num_examples: int
    batch_size: int | None = None
    learning_rate: float | None = None
    radius: float = math.inf

    def __post_init__(self):
        expect_all(
            above_=0.0,
            strong_convexity=self.strong_convexity,
            smoothness=self.smoothness,
            gradient_clip=self.gradient_clip,
            noise_stddev=self.noise_stddev,
        )
        expect_count("num_examples", self.num_examples)
        if self.num_examples % expect_count("batch_size", self.batch):
            raise ValueError(f"Expected batch_size={self.batch} to divide {self.num_examples}.")
        if not self.strong_convexity <= self.smoothness:
            raise ValueError(f"Expected strong_convexity <= smoothness in {self}.")
        if not 0 < self.rate <= 1 / self.smoothness * (1 + 1e-12):
            raise ValueError(f"Expected 0 < learning_rate={self.rate} <= 1/{self.smoothness}.")
        if not self.radius > 0:
            raise ValueError(f"Expected radius={self.radius} > 0; inf states no projection.")

    @property
    def batch(self) -> int:
        """b."""
        return self.num_examples if self.batch_size is None else self.batch_size

    @property
    def rate(self) -> float:
        """eta."""
        return 1 / self.smoothness if self.learning_rate is None else self.learning_rate

    @property
    def contraction(self) -> float:
        """c = 1 - eta m of one step: an upper bound, where the clip is as the module says."""
        return min(1.0, max(0.0, 1 - self.rate * self.strong_convexity))

    @property
    def step_noise(self) -> float:
        """s = sqrt(2 eta) sigma of one step, per coordinate."""
        return math.sqrt(2 * self.rate) * self.noise_stddev

    @property
    def steps_per_epoch(self) -> int:
        """n / b."""
        return self.num_examples // self.batch

    def shrink(self, num_epochs: int) -> float:
        """c^(K n/b): what `num_epochs` leave of a distance, an upper bound."""
        return min(1.0, raised(self.contraction ** (num_epochs * self.steps_per_epoch)))

    def drift(self, num_replaced: int) -> float:
        """Z_B: how far learning with and without `num_replaced` rows get apart, an upper bound."""
        rows = expect_count("num_replaced", num_replaced, at_least=0)
        step = 2 * self.rate * self.gradient_clip * rows / self.batch
        epoch = self.contraction**self.steps_per_epoch
        return min(raised(step / (1 - epoch)) if epoch < 1 else math.inf, 2 * self.radius)

    def mu(self, distance: float, num_epochs: int) -> float:
        """mu after `num_epochs` of unlearning from `distance` apart: an upper bound."""
        return contracted_mu(
            distance=distance,
            contraction=self.contraction,
            noise_stddev=self.step_noise,
            num_steps=num_epochs * self.steps_per_epoch,
        )

    def epsilon(
        self,
        distance: float,
        num_epochs: int,
        *,
        delta: float,
        conversion: str = "gaussian",
        paper_constants: bool = False,
    ) -> float:
        """epsilon after `num_epochs` of unlearning from `distance` apart: an upper bound.

        Args:
          conversion: "gaussian", exact at mu; "renyi", tight from alpha mu^2/2; "mironov", simple.
          paper_constants: twice the divergence, by Mironov's conversion, as published.
        """
        mu = self.mu(distance, num_epochs)
        if mu == math.inf:
            return math.inf
        if paper_constants:
            return zcdp_epsilon(raised(mu * mu), delta=delta, paper_constants=True)
        return _CONVERSIONS[conversion](mu, delta)

    def unconverged_curve(
        self, *, num_epochs: int, trained_epochs: int, num_replaced: int = 1, split: float = 2.0
    ) -> RenyiCurve:
        """D_alpha from retraining for `trained_epochs`, learning having had as many: upper bound.

            (alpha - 1/p)/(alpha - 1) [e_1(q alpha) + e_2(p alpha)],    1/p + 1/q = 1,
            e_1 = alpha (2 R)^2 c^(2 T n/b) / s^2,
            e_2 = alpha (Z_B + 2 R c^(T n/b))^2 c^(2 K n/b) / s^2

        Chien et al. 2024 b, as published [C]. Needs a radius: without one the distance to
        stationarity has no bound, and published code run with `--projection 0` takes R = 0, which
        drops both terms.
        """
        if self.radius == math.inf:
            raise ValueError("Expected a finite radius: without a projection nothing bounds this.")
        variance = self.step_noise**2
        left = 2 * self.radius * self.shrink(trained_epochs)
        distance = (self.drift(num_replaced) + left) * self.shrink(num_epochs)
        first, second = left**2 / variance, distance**2 / variance

        def divergence(order):
            conjugate = split / (split - 1)
            outer = (order - 1 / split) / (order - 1)
            return raised(outer * order * (conjugate * first + split * second))

        return RenyiCurve(divergence)


def noisy_sgd_epochs(
    setting: NoisySGD,
    *,
    epsilon: float,
    delta: float,
    request_sizes: list[int],
    conversion: str = "gaussian",
    paper_constants: bool = False,
) -> list[int]:
    """Epochs of unlearning that each request in turn needs: enough, an upper bound.

    The distance is carried from request to request in W-infinity, which adds up linearly; every
    state after a request is (epsilon, delta)-close to learning without all rows requested so far.

    Args:
      request_sizes: rows of each request, in order.
      conversion, paper_constants: see `NoisySGD.epsilon`.

    Raises:
      ValueError: a request that no number of epochs below 2^40 would satisfy.

    >>> setting = NoisySGD(strong_convexity=0.5, smoothness=1.0, gradient_clip=1.0,
    ...     noise_stddev=0.01, num_examples=100)
    >>> noisy_sgd_epochs(setting, epsilon=1.0, delta=1e-5, request_sizes=[1, 1, 1])
    [4, 4, 4]
    """
    expect("epsilon", epsilon, above_=0.0)
    epochs, distance = [], 0.0
    for size in request_sizes:
        distance = min(raised(distance + setting.drift(size)), 2 * setting.radius)

        def fits(count, distance=distance):
            cost = setting.epsilon(
                distance, count, delta=delta, conversion=conversion, paper_constants=paper_constants
            )
            return cost <= epsilon

        count = least_count(fits)
        if count is None:
            raise ValueError(f"Expected requests that some number of epochs satisfies, got {size}.")
        epochs.append(count)
        distance = raised(distance * setting.shrink(count))
    return epochs


_CONVERSIONS = {
    "gaussian": lambda mu, delta: gaussian_epsilon(delta=delta, noise_stddev=1.0, sensitivity=mu),
    "renyi": lambda mu, delta: zcdp_epsilon(raised(mu * mu / 2), delta=delta),
    "mironov": lambda mu, delta: zcdp_epsilon(
        raised(mu * mu / 2), delta=delta, paper_constants=True
    ),
}
