"""Noisy fine-tuning with clipped gradients: no smoothness, no convexity, only clips and L2.

    x_0 = Pi_(C_0)(trained),    x_(t+1) = (1 - rate l2) x_t - rate clip_(C_1)(g_t) + N(0, sigma^2 I)

with g_t from retained data alone, then any noiseless fine-tuning (post-processing). The model of
reference runs the same from Pi_(C_0) of anything that never saw the forget set, so only x_0, by
2 C_0, and the clipped gradients, by 2 rate C_1 a step, can differ: `iteration_mu` with
c = 1 - rate l2, and one straight string, whence [D; Koloskova et al. 2025, gradient clipping]

    mu = (2 C_0 c^T + 2 rate C_1 (1 + c + ... + c^(T-1)))
         / (sigma sqrt(1 + c^2 + ... + c^(2 (T-1)))).

Published code divides the variance by 4 epsilon_Renyi T where l2 = 0 (half of what is needed), and
converts with a Renyi epsilon that does not grow with the order: what it logs as epsilon = 1.004 is
6.57. The noise here is calibrated by the exact Gaussian curve at mu.
"""

import math
from typing import NamedTuple

from jaxunlearn.accounting._checks import expect, expect_all, expect_count
from jaxunlearn.accounting.gaussian import gaussian_mu
from jaxunlearn.accounting.rounding import raised


class ClippedSteps(NamedTuple):
    """Constants of clipped noisy fine-tuning; none of them may depend on data.

    start_radius: C_0 >= 0, to which the trained parameters are clipped.
    gradient_clip: C_1 >= 0, of the batch gradient (per-example clipping is not needed here).
    learning_rate: > 0.  l2: >= 0, with learning_rate * l2 <= 1.
    """

    start_radius: float
    gradient_clip: float
    learning_rate: float
    l2: float = 0.0

    @property
    def contraction(self) -> float:
        """1 - learning_rate * l2."""
        expect_all(
            at_least=0.0,
            start_radius=self.start_radius,
            gradient_clip=self.gradient_clip,
            l2=self.l2,
        )
        expect("learning_rate", self.learning_rate, above_=0.0)
        if self.learning_rate * self.l2 > 1:
            raise ValueError(f"Expected learning_rate * l2 <= 1 in {self}.")
        return 1 - self.learning_rate * self.l2

    def mu_of_unit_noise(self, num_steps: int) -> float:
        """sigma mu after `num_steps`: an upper bound."""
        c, steps = self.contraction, expect_count("num_steps", num_steps)
        decay = 1 - c if c < 1 else 0.0
        if c in (0.0, 1.0):
            shrunk, total, squares = c, (1.0 if c == 0.0 else float(steps)), None
            squares = total
        else:
            log_c = math.log(c)
            shrunk = math.exp(steps * log_c)
            total = -math.expm1(steps * log_c) / decay
            squares = total * (1 + shrunk) / (1 + c)
        kept = 2 * self.start_radius * shrunk
        return raised((kept + 2 * self.learning_rate * self.gradient_clip * total) / squares**0.5)


def clipped_finetuning_mu(steps: ClippedSteps, *, num_steps: int, noise_stddev: float) -> float:
    """mu between fine-tuning the trained model and fine-tuning the other one: an upper bound [D].

    >>> steps = ClippedSteps(start_radius=1.0, gradient_clip=1.0, learning_rate=0.01)
    >>> round(clipped_finetuning_mu(steps, num_steps=100, noise_stddev=0.1) ** 2 / 2, 6)
    8.0
    """
    expect("noise_stddev", noise_stddev, above_=0.0)
    return raised(steps.mu_of_unit_noise(num_steps) / noise_stddev)


def clipped_finetuning_noise(
    steps: ClippedSteps, *, epsilon: float, delta: float, num_steps: int
) -> float:
    """Least noise per step with which `num_steps` of fine-tuning are (epsilon, delta): upper bound.

    [D: exact Gaussian calibration at the mu of this module.]

    >>> steps = ClippedSteps(start_radius=1.0, gradient_clip=1.0, learning_rate=0.01)
    >>> noise = clipped_finetuning_noise(steps, epsilon=1.0, delta=1e-5, num_steps=100)
    >>> 1.49 < noise < 1.493
    True
    """
    mu = gaussian_mu(epsilon=epsilon, delta=delta)
    # Twice: `clipped_finetuning_mu` rounds up once itself.
    return raised(raised(steps.mu_of_unit_noise(num_steps) / mu))


def best_num_steps(steps: ClippedSteps, *, max_steps: int) -> int:
    """The number of steps in 1..max_steps that needs the least noise.

    Near C_0 / (rate C_1) without L2 [C: `pabi_steps`]. The noise of T steps falls, then rises:
    found by bisection on its slope, and then by looking at the neighbours.

    >>> best_num_steps(ClippedSteps(1.0, 1.0, 0.01), max_steps=1000)
    100
    """
    low, high = 1, expect_count("max_steps", max_steps)
    cost = steps.mu_of_unit_noise
    while high - low > 8:
        middle = (low + high) // 2
        # A step of a hundredth keeps the slope above rounding.
        ahead = min(high, middle + max(1, middle // 100))
        low, high = (low, ahead) if cost(ahead) > cost(middle) else (middle, high)
        if ahead == high and cost(ahead) > cost(middle) and high - low <= middle // 100 + 8:
            break
    return min(range(low, high + 1), key=cost)
