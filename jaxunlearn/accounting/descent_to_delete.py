"""Descent-to-Delete (Neel, Roth and Sharifi-Malvajerdi 2021): gradient descent, then noise.

f is m-strongly convex, L-smooth and M-Lipschitz, the rate 2/(L + m), and each step of descent
contracts by gamma = (L - m)/(L + m). Every update runs I steps on the new data from the last state
and publishes it with N(0, sigma^2 I).

Output-only: the un-noised state is kept, and stays secret. With s_n the furthest that one update
moves the minimiser, descent stays within gamma^I s_n / (1 - gamma^I) of it, learning or unlearning,
and the two are at most twice that apart. [D] s_n = M / (m n_min) for a row deleted or added, n_min
being the fewest rows that remain; published s_n = 4 M / (m n), which holds for replacements too,
down to n/2 rows.

Full-state: the noisy state is the state.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxunlearn.accounting._checks import expect, expect_all, expect_count, expect_delta
from jaxunlearn.accounting.gaussian import gaussian_mu
from jaxunlearn.accounting.iteration import iteration_mu
from jaxunlearn.accounting.rounding import raised


class Descent(NamedTuple):
    """Constants of the loss with its L2 term, and how many rows there are.

    strong_convexity: m > 0.  smoothness: L >= m.  lipschitz: M, of each row's loss.
    num_examples: n, at the start.  fewest_examples: n_min after all deletions; None is n/2.
    """

    strong_convexity: float
    smoothness: float
    lipschitz: float
    num_examples: int
    fewest_examples: int | None = None

    @property
    def rate(self) -> float:
        """gamma = (L - m)/(L + m), what one step of descent leaves of a distance.

        >>> Descent(1.0, 3.0, 1.0, 10).rate
        0.5
        """
        expect_all(
            above_=0.0,
            strong_convexity=self.strong_convexity,
            smoothness=self.smoothness,
            lipschitz=self.lipschitz,
        )
        if self.strong_convexity > self.smoothness:
            raise ValueError(f"Expected strong_convexity <= smoothness in {self}.")
        total = self.smoothness + self.strong_convexity
        return (self.smoothness - self.strong_convexity) / total

    def drift(self, *, paper_constants: bool = False) -> float:
        """s_n: how far one update moves the minimiser, an upper bound."""
        if paper_constants:
            return 4 * self.lipschitz / (self.strong_convexity * self.num_examples)
        fewest = self.num_examples / 2 if self.fewest_examples is None else self.fewest_examples
        return raised(self.lipschitz / (self.strong_convexity * fewest))

    def distance(self, num_steps: int, *, paper_constants: bool = False) -> float:
        """Between unlearning and retraining, both with I steps an update: an upper bound.

        2 gamma^I s_n / (1 - gamma^I); assumes that the first training ended within half of it,
        for which `first_steps` is enough.
        """
        left = self.rate ** expect_count("num_steps", num_steps)
        return raised(2 * self.drift(paper_constants=paper_constants) * left / (1 - left))

    def first_steps(self, num_steps: int, *, diameter: float) -> int:
        """Steps of the first training from a start within `diameter` of the minimiser: enough.

        [D]: diameter gamma^T <= gamma^I s_n / (1 - gamma^I).
        """
        if self.rate == 0.0:
            return 1
        wanted = self.distance(num_steps) / 2
        if diameter <= wanted:
            return 0
        return math.ceil(raised(math.log(diameter / wanted) / -math.log(self.rate)))


def output_only_noise(
    descent: Descent,
    *,
    epsilon: float,
    delta: float,
    num_steps: int,
    paper_constants: bool = False,
) -> float:
    """Noise of each published model, the state kept secret and un-noised: an upper bound.

    Default [D]: the distance above, by exact Gaussian calibration. `paper_constants=True`
    [C: `calculate_baseline_sigma`], with t = ln(1/delta):

        sigma = 4 sqrt(2) M gamma^I / (m n (1 - gamma^I) (sqrt(t + epsilon) - sqrt(t)))

    Each published model is (epsilon, delta) on its own; several of them compose.

    >>> descent = Descent(strong_convexity=1.0, smoothness=3.0, lipschitz=1.0, num_examples=1000)
    >>> ours = output_only_noise(descent, epsilon=1.0, delta=1e-4, num_steps=5)
    >>> paper = output_only_noise(
    ...     descent, epsilon=1.0, delta=1e-4, num_steps=5, paper_constants=True
    ... )
    >>> ours < paper
    True
    """
    distance = descent.distance(num_steps, paper_constants=paper_constants)
    if not paper_constants:
        return raised(distance / gaussian_mu(epsilon=epsilon, delta=delta))
    expect("epsilon", epsilon, above_=0.0)
    expect_delta(delta)
    tail = -math.log(delta)
    root = epsilon / (math.sqrt(tail + epsilon) + math.sqrt(tail))
    return raised(distance / (math.sqrt(2) * root))


class Schedule(NamedTuple):
    """The published full-state scheme.

    base_steps: I.  noise_stddev: sigma.  steps: of update 1, 2, ...
    """

    base_steps: int
    noise_stddev: float
    steps: list[int]


def full_state_schedule(
    descent: Descent,
    *,
    epsilon: float,
    delta: float,
    dimension: int,
    num_updates: int,
) -> Schedule:
    """The published full-state scheme, the noisy state being all that is kept [C].

        I >= ln(sqrt(2 d) / ((1 - gamma) (sqrt(t + epsilon) - sqrt(t)))) / ln(1/gamma)
        sigma = 8 M gamma^I / (m n (1 - gamma^I) (sqrt(t + 3 epsilon) - sqrt(t + 2 epsilon)))
        update i: I + ceil(ln(ln(4 d i/delta)) / ln(1/gamma)),          t = 2 ln(2/delta)

    [C: `calculate_baseline_sigma2`, `get_baseline_min_I`]; the theorem was not re-derived. For a
    derived bound on the same chain see `full_state_mu`.

    >>> descent = Descent(strong_convexity=1.0, smoothness=3.0, lipschitz=1.0, num_examples=1000)
    >>> plan = full_state_schedule(
    ...     descent, epsilon=1.0, delta=1e-3, dimension=10, num_updates=2
    ... )
    >>> plan.base_steps, plan.steps
    (7, [11, 11])
    """
    expect("epsilon", epsilon, above_=0.0)
    expect_delta(delta)
    dimension = expect_count("dimension", dimension)
    if descent.rate == 0.0:
        raise ValueError(f"Expected strong_convexity < smoothness in {descent}: one step is exact.")
    log_gamma = -math.log(descent.rate)
    tail = 2 * math.log(2 / delta)
    gap = lambda high, low: (high - low) / (math.sqrt(tail + high) + math.sqrt(tail + low))
    need = math.sqrt(2 * dimension) / ((1 - descent.rate) * gap(epsilon, 0.0))
    base = max(1, math.ceil(raised(math.log(need) / log_gamma)))
    noise = descent.distance(base, paper_constants=True) / gap(3 * epsilon, 2 * epsilon)
    extra = lambda i: math.ceil(raised(math.log(math.log(4 * dimension * i / delta)) / log_gamma))
    steps = [base + extra(i) for i in range(1, expect_count("num_updates", num_updates) + 1)]
    return Schedule(base, raised(noise), steps)


def full_state_mu(
    descent: Descent,
    *,
    noise_stddev: float,
    steps_before: list[int],
    steps_after: list[int],
    num_deleted: int = 1,
) -> float:
    """mu between the chain that saw `num_deleted` rows and one that never did: an upper bound [D].

    Each update is one map, contracting by gamma^I, then N(0, sigma^2 I) (`iteration_mu`). Before
    the deletion the two chains descend on data that differ in `num_deleted` rows and part by at
    most (1 - gamma^I) 2 num_deleted M / (m n_min) per update (the means differ by the rows and by
    their divisor), from a common start; after it they run the same. Only the last state is
    released.

    Args:
      steps_before: I of each update up to the deletion, training first.
      steps_after: I of each update from the deletion on; at least one.

    >>> descent = Descent(strong_convexity=1.0, smoothness=3.0, lipschitz=1.0, num_examples=200)
    >>> round(full_state_mu(descent, noise_stddev=0.01, steps_before=[9], steps_after=[1]), 6)
    0.89268
    """
    rows = expect_count("num_deleted", num_deleted)
    if not steps_after:
        raise ValueError("Expected at least one update in steps_after.")
    left = np.array([descent.rate ** expect_count("steps", i) for i in steps_before + steps_after])
    moves = raised(2 * rows * descent.drift()) * (1 - left)
    moves[len(steps_before) :] = 0.0
    return iteration_mu(contractions=left, noise_stddevs=noise_stddev, shifts=moves)
