"""Gates that standardised noise must pass, each a test at alpha = 1e-6 of stated power.

At n = 1e6 a sample of the right law passes all ten with probability above 1 - 1e-5, and

    ks            rejects a scale off by 1.4 percent with power 0.99 (D < 0.0026932)
    variance      rejects a scale off by 0.51 percent with power 0.99 (0.99310 .. 1.00693)
    mean          rejects a shift of 0.0072 with power 0.99 (0.00489)
    correlation   lag one, 0.0072 with power 0.99
    period        every other lag up to n / 2, together at alpha: 0.0095 with power 0.99
    halves        the first half against the second, 0.0102 with power 0.99
    tails         counts beyond 3, 4, 4.5 and 5: rejects a law that ends at 4 (at n = 1e7, at 4.5)
    shape         64 bins of equal probability
    symmetry      signs, and signs against magnitudes
    collisions    equal pairs among draws on a grid; only where the grid is given

(at other n the critical values scale with 1 / sqrt(n)).
"""

import math

import numpy as np
from scipy import special

ALPHA = 1e-6
Z = float(-special.ndtri(ALPHA / 2))  # 4.8916
KS = math.sqrt(-math.log(ALPHA / 2) / 2)  # 2.6934, of Kolmogorov's limiting law


def philox(seed):
    """A reproducible entropy source, fast enough for 1e7 samples."""
    return np.random.Generator(np.random.Philox(seed)).bytes


def ks_distance(z):
    """Largest gap between the empirical law and N(0, 1)."""
    cdf = special.ndtr(np.sort(z))
    steps = np.arange(len(z) + 1) / len(z)
    return max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))


def ks_limit(n):
    """Critical value of `ks_distance` at ALPHA; the second term is the first correction in 1/n."""
    return KS / math.sqrt(n) - 1 / (6 * n)


def tail_p(z, bound):
    """Two-sided binomial p-value of the number of entries beyond `bound`."""
    count, p = int(np.sum(np.abs(z) > bound)), 2 * special.ndtr(-bound)
    above = special.bdtrc(count - 1, len(z), p) if count else 1.0
    return 2 * min(special.bdtr(count, len(z), p), above)


def bins_p(z, bins=64):
    """p-value of the chi-square over bins of equal probability."""
    counts = np.bincount((special.ndtr(z) * bins).astype(int).clip(0, bins - 1), minlength=bins)
    expected = len(z) / bins
    return special.chdtrc(bins - 1, np.sum((counts - expected) ** 2) / expected)


def autocorrelations(z):
    """Circular autocorrelation at lags 1 .. n/2."""
    n = len(z)
    spectrum = np.abs(np.fft.rfft(z)) ** 2
    return np.fft.irfft(spectrum, n)[1 : n // 2] / n


def collision_gap(z, stddev_on_grid):
    """Standard deviations between the number of equal pairs and what the grid promises."""
    n, s = len(z), float(stddev_on_grid)
    counts = np.unique(z, return_counts=True)[1].astype(float)
    pairs = np.sum(counts * (counts - 1)) / 2
    square, cube = 1 / (2 * s * math.sqrt(math.pi)), 1 / (2 * math.pi * math.sqrt(3) * s * s)
    expected = n * (n - 1) / 2 * square
    return (pairs - expected) / math.sqrt(expected + n**3 * (cube - square**2))


def failures(z, stddev_on_grid=None):
    """Names of the gates that `z`, supposed to be independent N(0, 1), does not pass."""
    z, n = np.asarray(z, np.float64), len(z)
    limit, half = Z / math.sqrt(n), n // 2
    every_lag = -special.ndtri(ALPHA / n) / math.sqrt(n)
    signs = np.sign(z)
    passed = {
        "ks": ks_distance(z) < ks_limit(n),
        "variance": abs(np.mean(z**2) - 1) < Z * math.sqrt(2 / n),
        "mean": abs(np.mean(z)) < limit,
        "correlation": abs(np.mean(z[1:] * z[:-1])) < limit,
        "period": np.max(np.abs(autocorrelations(z))) < every_lag,
        "halves": abs(np.mean(z[:half] * z[half : 2 * half])) < Z / math.sqrt(half),
        "tails": min(tail_p(z, bound) for bound in (3, 4, 4.5, 5)) > ALPHA / 4,
        "shape": bins_p(z) > ALPHA,
        "symmetry": max(abs(np.mean(signs)), abs(np.mean(signs * (z**2 - 1))) / math.sqrt(2))
        < limit,
    }
    if stddev_on_grid is not None:
        passed["collisions"] = abs(collision_gap(z, stddev_on_grid)) < 6
    return {name for name, well in passed.items() if not well}


def related(a, b):
    """Whether two samples that ought to be independent are seen to be correlated."""
    n = min(len(a), len(b))
    return abs(np.mean(a[:n] * b[:n])) > Z / math.sqrt(n)
