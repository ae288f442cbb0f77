"""Model clipping: the hockey-stick divergence along projected noisy steps, with no convexity.

Both chains run the same step x -> Pi(f(x)) + N(0, sigma^2 I) on retained data, Pi a projection to a
ball of radius r, from anywhere. Let delta_t be their hockey-stick divergence at e^epsilon. With
delta = delta_t, P = (1 - delta) P_0 + delta P_1 and Q = ((1 - delta)/e^epsilon) P_0 +
(1 - (1 - delta)/e^epsilon) Q_1, so that for the step K

    P K - e^epsilon Q K = delta (P_1 K - e^eps~ Q_1 K),    e^eps~ = 1 + (e^epsilon - 1)/delta,

and as any two inputs leave the projection at most 2 r apart, [D; Balle et al. 2019, Theorem 1;
Koloskova et al. 2025, model clipping; C: their `dp_accountant`]

    delta_(t+1) = delta_t theta(eps~_t, 2 r / sigma),

theta being the Gaussian delta of Balle and Wang. The right side grows with delta_t, so upper bounds
may be put in.
"""

import math
from collections.abc import Iterable

from jaxunlearn.accounting._checks import expect, expect_count
from jaxunlearn.accounting.gaussian import gaussian_delta
from jaxunlearn.accounting.rounding import above, below, raised


def hockey_stick_recursion(*, epsilon: float, mus: Iterable[float], start: float = 1.0) -> float:
    """delta at `epsilon` after projected noisy steps: an upper bound.

    The recursion above [D]; one value of epsilon goes through all steps.

    Args:
      epsilon: >= 0.
      mus: of each step, the diameter of what the projection leaves over the noise: 2 r / sigma;
        2 (r + rate * clip) / sigma where a clipped gradient is added after the projection.
      start: delta of the states before, 1 for arbitrary ones; Gaussian noise of s on states 2 r_0
        apart has `gaussian_delta(epsilon=..., noise_stddev=s, sensitivity=2 * r_0)`.

    >>> f"{hockey_stick_recursion(epsilon=1.0, mus=[0.2]):.3g}"
    '1.75e-08'
    """
    expect("epsilon", epsilon, at_least=0.0)
    if not 0 <= start <= 1:
        raise ValueError(f"Expected start={start} in [0, 1].")
    delta = start
    for mu in mus:
        if delta == 0.0:
            return 0.0
        inner = _inner_epsilon(epsilon, delta)
        theta = gaussian_delta(epsilon=inner, noise_stddev=1.0, sensitivity=mu)
        delta = min(delta, above(delta * theta))
    return delta


def model_clipping_steps(
    *,
    epsilon: float,
    delta: float,
    radius: float,
    noise_stddev: float,
    start: float = 1.0,
    max_steps: int = 10_000,
) -> int | None:
    """Steps after which clipped noisy fine-tuning is (epsilon, delta): enough, an upper bound.

    Args:
      radius: C_2 of the projection before the noise.  noise_stddev: sigma per coordinate.
      start: see `hockey_stick_recursion`.

    Returns:
      The number of steps, or None where `max_steps` do not suffice.

    >>> model_clipping_steps(epsilon=1.0, delta=1e-5, radius=1.0, noise_stddev=1.0)
    6
    """
    expect("radius", radius, above_=0.0)
    expect("noise_stddev", noise_stddev, above_=0.0)
    reached = start
    mu = raised(2 * radius / noise_stddev)
    for step in range(max_steps + 1):
        if reached <= delta:
            return step
        following = hockey_stick_recursion(epsilon=epsilon, mus=[mu], start=reached)
        if following == reached and step > 0:
            return None
        reached = following
    return None


def model_clipping_noise(
    *, epsilon: float, delta: float, radius: float, num_steps: int, start: float = 1.0
) -> float:
    """Least noise with which `num_steps` clipped steps are (epsilon, delta): an upper bound.

    The recursion's delta falls with the noise; found by bisection to 1e-9, on the safe side.

    >>> 0.99 < model_clipping_noise(epsilon=1.0, delta=2.65e-8, radius=1.0, num_steps=6) < 1.01
    True
    """
    expect("radius", radius, above_=0.0)
    expect("delta", delta, above_=0.0)
    steps = expect_count("num_steps", num_steps)

    def fits(mu):
        return hockey_stick_recursion(epsilon=epsilon, mus=[mu] * steps, start=start) <= delta

    good = 1.0
    while not fits(good):
        good /= 2
    bad = 2 * good
    while fits(bad):
        good, bad = bad, 2 * bad
        if good > 1e6:
            return 0.0  # delta covers the start
    while bad - good > 1e-9 * good:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    # Twice: `model_clipping_steps` rounds up once itself.
    return raised(raised(2 * radius / good))


def _inner_epsilon(epsilon, delta):
    """ln(1 + (e^epsilon - 1)/delta), rounded down; a smaller one makes theta larger."""
    if epsilon < 600.0 and delta > 1e-40:
        value = math.log1p(math.expm1(epsilon) / delta)
    else:
        value = max(0.0, epsilon + math.log(-math.expm1(-max(epsilon, 1e-300))) - math.log(delta))
    return max(0.0, below(value * (1 - 2.0**-44)))
