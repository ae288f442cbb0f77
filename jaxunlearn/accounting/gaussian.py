"""The Gaussian mechanism, exactly: epsilon, delta and noise, each rounded to its safe side.

With mu = sensitivity / noise_stddev, the Gaussian mechanism is (epsilon, delta)-indistinguishable
if and only if (Balle & Wang 2018, Theorem 8)

    delta >= Q(a) - exp(epsilon) Q(b),    a = epsilon/mu - mu/2,    b = epsilon/mu + mu/2,

where Q is the upper tail of the standard normal. As written, it cancels. With Mills' ratio
M(x) = Q(x)/phi(x), and because b^2 - a^2 = 2 epsilon, it equals

    delta = phi(a) (M(a) - M(b)) = phi(a) * integral from a to b of (1 - x M(x)) dx,

of which every factor is positive and accurate.
"""

import functools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np

from jaxunlearn.accounting._checks import expect, expect_delta
from jaxunlearn.accounting.rounding import above, below

_TINY = float(np.finfo(np.float64).tiny)


def gaussian_delta(*, epsilon: float, noise_stddev: float, sensitivity: float) -> float:
    """Least delta at which the Gaussian mechanism is (epsilon, delta): an upper bound.

    Balle & Wang 2018, Theorem 8, evaluated with Mills' ratio and rounded up: never below the
    exact value, and above it by less than 1e-9 of it (wherever it exceeds 1e-300 and
    epsilon <= 1000; the library's bound on its own rounding error is added, not estimated).

    Args:
      epsilon: >= 0.
      noise_stddev: standard deviation of the noise in each coordinate, > 0.
      sensitivity: L2 distance between the two means, >= 0.

    Returns:
      delta in [0, 1].

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> round(gaussian_delta(epsilon=0.0, noise_stddev=1.0, sensitivity=1.0), 9)
    0.382924923
    >>> gaussian_delta(epsilon=1.0, noise_stddev=1.0, sensitivity=0.0)
    0.0

    References:
      Balle and Wang, "Improving the Gaussian mechanism for differential privacy: analytical
      calibration and optimal denoising", ICML 2018, Theorem 8.
    """
    expect("epsilon", epsilon, at_least=0.0)
    return _delta_upper(float(epsilon), _mu_upper(sensitivity, noise_stddev))


def gaussian_epsilon(*, delta: float, noise_stddev: float, sensitivity: float) -> float:
    """Least epsilon at which the Gaussian mechanism is (epsilon, delta): an upper bound.

    Inverts Balle & Wang 2018, Theorem 8, by bisection, keeping the side on which the rounded-up
    delta fits: never below the exact value, and above it by less than 1e-9 of it (plus 1e-12).

    Args:
      delta: in [1e-300, 1).
      noise_stddev: > 0.
      sensitivity: L2, >= 0.

    Returns:
      epsilon >= 0; 0.0 where delta alone covers the release; inf where none is representable.

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> round(gaussian_epsilon(delta=1e-5, noise_stddev=2.0, sensitivity=1.0), 9)
    1.993091404
    """
    expect_delta(delta)
    mu = _mu_upper(sensitivity, noise_stddev)
    if _delta_upper(0.0, mu) <= delta:
        return 0.0
    good = 1.0
    fits = lambda epsilon: _delta_upper(epsilon, mu) <= delta
    while not fits(good):
        good *= 2.0
        if not math.isfinite(good):
            return math.inf
    bad = good / 2.0
    while fits(bad) and bad > _TINY:
        good, bad = bad, bad / 2.0
    return _bisect(fits, good, bad)


def gaussian_mu(*, epsilon: float, delta: float) -> float:
    """Largest sensitivity / noise_stddev that is (epsilon, delta): a lower bound.

    The inverse of Balle & Wang 2018, Theorem 8, in mu: never above the exact value, and below it
    by less than 1e-9 of it. Independent releases with mu_1, mu_2, ... spend sqrt(sum mu_i^2).

    Args:
      epsilon: > 0.
      delta: in [1e-300, 1).

    Returns:
      mu > 0, no unit.

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> round(gaussian_mu(epsilon=1.0, delta=1e-5), 6)
    0.268051
    """
    expect("epsilon", epsilon, above_=0.0)
    expect_delta(delta)
    fits = lambda mu: _delta_upper(float(epsilon), mu) <= delta
    good = 1.0
    while not fits(good):
        good /= 2.0
    bad = good * 2.0
    while fits(bad):
        good, bad = bad, bad * 2.0
    return _bisect(fits, good, bad)


def gaussian_noise_stddev(*, epsilon: float, delta: float, sensitivity: float) -> float:
    """Least noise with which the Gaussian mechanism is (epsilon, delta): an upper bound.

    Balle & Wang 2018, Theorem 8, inverted: never below the exact value, and above it by less than
    1e-9 of it, at every epsilon > 0. For continuous noise; what a certificate rests on is
    `certified_noise`, which pays for the grid as well.

    Args:
      epsilon: > 0.
      delta: in [1e-300, 1).
      sensitivity: L2, > 0.

    Returns:
      Standard deviation per coordinate, in the unit of `sensitivity`;
      `gaussian_delta` at this noise is at most `delta`.

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> round(gaussian_noise_stddev(epsilon=1.0, delta=1e-5, sensitivity=1.0), 6)
    3.730632
    """
    expect("sensitivity", sensitivity, above_=0.0)
    mu = gaussian_mu(epsilon=epsilon, delta=delta)
    stddev = above(sensitivity / mu)
    if not 0 < stddev < math.inf:
        raise ValueError(f"Expected a noise that float64 can hold, got {sensitivity}/{mu}.")
    while gaussian_delta(epsilon=epsilon, noise_stddev=stddev, sensitivity=sensitivity) > delta:
        stddev = above(stddev)
    return stddev


def compose_gaussian(mus: Iterable[float]) -> float:
    """mu of several Gaussian releases together, sqrt(sum mu_i^2): the least float64 not below it.

    Dong, Roth & Su 2022, Corollary 3.3, exact for independent noises; adaptive choice of what is
    released is allowed, and of the mu_i as well while their total stays within a limit set in
    advance (Smith & Thakurta 2022).

    Args:
      mus: each sensitivity / noise_stddev, >= 0 and finite. Empty: 0.0.

    Raises:
      ValueError: an entry is negative or not finite.

    >>> compose_gaussian([3.0, 4.0]), compose_gaussian([])
    (5.0, 0.0)
    """
    entries = [float(mu) for mu in mus]
    for mu in entries:
        expect("mu", mu, at_least=0.0)
    square = sum((Fraction(mu) ** 2 for mu in entries), start=Fraction(0))
    root = math.hypot(*entries)
    if not math.isfinite(root):
        raise ValueError(f"Expected mus whose total float64 can hold, got {len(entries)} of them.")
    while root > 0 and Fraction(below(root)) ** 2 >= square:
        root = below(root)
    while Fraction(root) ** 2 < square:
        root = above(root)
    return root


def _delta_upper(epsilon: float, mu: float) -> float:
    """delta(epsilon) of the Gaussian mechanism with shift `mu`, plus its own rounding error."""
    from scipy import special

    if mu == 0.0:
        return 0.0
    ratio = epsilon / mu
    near, far = ratio - mu / 2, ratio + mu / 2
    if near > 38.0:
        return _TINY  # Q(38) < 1e-315
    if mu == math.inf or near < -38.0:
        return 1.0
    mills = lambda x: math.sqrt(math.pi / 2) * special.erfcx(x / math.sqrt(2.0))
    density = math.exp(-near * near / 2) / math.sqrt(2 * math.pi)
    if mu <= 1.0:
        nodes, weights = _quadrature()
        x = ratio + nodes * (mu / 2)
        delta = density * mu * float(np.sum(weights * (1.0 - x * mills(x)))) / 2
    elif near < 0.0:
        delta = float(special.ndtr(-near)) - density * float(mills(far))
    else:
        delta = density * float(mills(near) - mills(far))
    # Rounding: a and b carry 2 ulp of `far` each, exp(-a^2/2) multiplies that by |a|, and
    # 1 - x M(x) ~ 1/x^2 loses a factor x^2. 64 ulp of each cover all three.
    slack = 2.0**-46 * (1.0 + far * (abs(near) + 1.0))
    return min(1.0, max(delta * (1.0 + slack), _TINY))


@functools.lru_cache(maxsize=1)
def _quadrature():
    """Gauss-Legendre nodes and weights on [-1, 1]; 20 integrate 1 - x M(x) over length 1."""
    return np.polynomial.legendre.leggauss(20)


def _bisect(fits: Callable[[float], bool], good: float, bad: float) -> float:
    """The last float found to fit between `good` (which fits) and `bad` (which need not)."""
    while True:
        middle = good + (bad - good) / 2
        if middle in (good, bad):
            return good
        good, bad = (middle, bad) if fits(middle) else (good, middle)


def _mu_upper(sensitivity, noise_stddev):
    """sensitivity / noise_stddev, rounded up; both validated."""
    expect("sensitivity", sensitivity, at_least=0.0)
    expect("noise_stddev", noise_stddev, above_=0.0)
    return above(float(sensitivity) / float(noise_stddev)) if sensitivity else 0.0
