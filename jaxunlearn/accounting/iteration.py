"""Amplification by iteration: what a chain of noisy contractions forgets of where it differed.

Two chains start at most z_0 apart and run

    X_t = phi_t(X_(t-1)) + N(0, sigma_t^2 I),    X'_t = phi'_t(X'_(t-1)) + N(0, sigma_t^2 I),

with phi_t, phi'_t c_t-Lipschitz and at most s_t apart everywhere. (A projection after the noise is
1-Lipschitz and belongs to the next map.) Only the last state is released. For every choice of
a_t >= 0 with z_t = c_t z_(t-1) + s_t - a_t >= 0 and z_T = 0, the two laws are no easier to tell
apart than N(0, 1) and N(mu, 1) with mu^2 = sum_t (a_t / sigma_t)^2: at every epsilon the Gaussian
delta, and at every order D_alpha <= alpha mu^2 / 2 (Feldman et al. 2018, Theorem 22).

Proof [D; Bok, Su and Altschuler 2024]. Run a third chain with the noise of the first, Y_0 = X'_0
and Y_t = phi'_t(Y_(t-1)) + A_t + N_t, where A_t moves towards phi_t(X_(t-1)) by a_t. Then
|X_t - Y_t| <= z_t by induction, so Y_T = X_T. Given Y_(t-1), the law of Y_t is a mixture, over
X_(t-1), of Gaussians within a_t of phi'_t(Y_(t-1)); X'_t given X'_(t-1) = Y_(t-1) is the Gaussian
there. A mixture whose label is revealed in both is no harder to tell apart, and each part is at
most mu_t = a_t / sigma_t; adaptive composition (Dong, Roth and Su 2022, Theorem 3.2) adds squares.

The best choice. With C_t = c_(t+1) ... c_T, b_t = a_t C_t, S_t = z_0 C_0 + sum_(r<=t) s_r C_r and
W_t = sum_(r<=t) (sigma_r C_r)^2, minimise sum b_t^2 / (W_t - W_(t-1)) where the partial sums of b
stay below S_t and end at S_T: the taut string below the points (W_t, S_t) from (0, 0), that is
their lower convex hull, and mu^2 is the sum over its edges of (rise)^2 / run. Where it is one
straight line, mu = S_T / sqrt(W_T), which is exact for linear maps.
"""

import math

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting._checks import expect, expect_count
from jaxunlearn.accounting.rounding import raised

_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)


def iteration_mu(
    *,
    contractions: float | np.ndarray,
    noise_stddevs: float | np.ndarray,
    shifts: float | np.ndarray = 0.0,
    start: float = 0.0,
    diameter: float = math.inf,
    num_steps: int | None = None,
) -> float:
    """mu between the last states of two noisy chains: an upper bound, the best that this proof has.

    The theorem above [D]. With a `diameter`, both states lie within it of one another at every
    step (a projection), so the chain may as well start anew there: the least over where it does.

    Args:
      contractions: c_t >= 0 of each step, first to last; a number stands for all. Above 1 for maps
        that expand.
      noise_stddevs: sigma_t >= 0 of each coordinate, per step.
      shifts: s_t >= 0, sup_x |phi_t(x) - phi'_t(x)|.
      start: z_0, the distance of the first states (W-infinity).
      diameter: of the set that the states are projected to.
      num_steps: T; needed where all of the above are numbers.

    Returns:
      mu; inf where the last difference meets no noise. `gaussian_epsilon(noise_stddev=1.0,
      sensitivity=mu, delta=...)` and `RenyiCurve.gaussian(mu)` turn it into what they say.

    Cost: T host operations, times at most 128 with a diameter.

    >>> round(iteration_mu(contractions=0.5, noise_stddevs=1.0, start=4.0, num_steps=2), 9)
    0.894427191
    """
    steps = _steps(num_steps, contractions, noise_stddevs, shifts)
    expect("start", start, at_least=0.0)
    if not diameter > 0:
        raise ValueError(f"Expected diameter={diameter} > 0.")
    c, sigma, s = (
        _per_step(name, value, steps)
        for name, value in (
            ("contractions", contractions),
            ("noise_stddevs", noise_stddevs),
            ("shifts", shifts),
        )
    )
    # Steps at the end that neither differ nor add noise are post-processing.
    ends = np.flatnonzero((sigma > 0) | (s > 0))
    steps = int(ends[-1]) + 1 if len(ends) else 1
    c, sigma, s = c[:steps], sigma[:steps], s[:steps]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        after = np.ones(steps + 1)  # after[t] = C_t
        after[:-1] = np.cumprod(c[::-1])[::-1]
        spread = (sigma * after[1:]) ** 2
        moved = s * after[1:]
        least = math.inf
        for first in _restarts(steps, diameter):
            distance = min(start, diameter) if first == 0 else diameter
            rises = np.cumsum(moved[first:]) + distance * after[first]
            runs = np.cumsum(spread[first:])
            differs = distance > 0 or bool(np.any(s[first:] > 0))
            least = min(least, float(_taut_string(runs, rises, differs)))
    return least


def contracted_mu(
    *, distance: float, contraction: float, noise_stddev: float, num_steps: int
) -> float:
    """mu after `num_steps` equal noisy steps from states `distance` apart: an upper bound.

        mu = distance c^T / (sigma sqrt(1 + c^2 + ... + c^(2 (T-1))))
           = (distance / sigma) sqrt((1 - c^2) / (c^(-2 T) - 1))

    [D: `iteration_mu` without shifts, where the string is one straight line.] For gradient steps of
    rate at most 1 / smoothness, c = 1 - rate * strong convexity; for convex ones c = 1, and
    `distance` may be the diameter of a projection.

    Args:
      distance: >= 0.  contraction: c >= 0.  noise_stddev: > 0.  num_steps: T >= 0; inf for T = 0
        unless the distance is 0.

    >>> round(contracted_mu(distance=2.0, contraction=1.0, noise_stddev=1.0, num_steps=16), 9)
    0.5
    """
    expect("distance", distance, at_least=0.0)
    expect("contraction", contraction, at_least=0.0)
    expect("noise_stddev", noise_stddev, above_=0.0)
    steps = expect_count("num_steps", num_steps, at_least=0)
    if distance == 0.0:
        return 0.0
    if steps == 0:
        return math.inf
    if contraction == 0.0:
        return _TINY
    log_c = math.log(contraction)
    if log_c == 0.0:
        square = 1.0 / steps
    else:
        with np.errstate(over="ignore"):
            square = float(np.expm1(2 * log_c) / -np.expm1(-2 * steps * log_c))
    return max(_TINY, raised(distance / noise_stddev * math.sqrt(square)))


def _steps(num_steps, *values):
    """The common length of per-step values."""
    lengths = {len(v) for v in map(np.asarray, values) if v.ndim == 1}
    if num_steps is not None:
        lengths.add(expect_count("num_steps", num_steps))
    if len(lengths) != 1 or min(lengths) < 1:
        raise ValueError(f"Expected one number of steps >= 1 from all arguments, got {lengths}.")
    return lengths.pop()


def _per_step(name, value, steps) -> Float64[np.ndarray, " t"]:
    """`value` for each step, checked."""
    array = np.broadcast_to(np.asarray(value, np.float64), (steps,))
    if not (np.all(array >= 0) and np.all(np.isfinite(array))):
        raise ValueError(f"Expected finite {name} >= 0.")
    return array


def _restarts(steps, diameter):
    """Steps before which the chain may be taken to start anew: each is valid."""
    if diameter == math.inf:
        return [0]
    if steps <= 128:
        return range(steps)
    return sorted({0, *(steps - np.unique(np.geomspace(1, steps, 127).astype(int))).tolist()})


def _taut_string(runs, rises, differs):
    """sqrt(sum rise^2 / run) over the lower hull of (0, 0) and the points; inf if it must jump."""
    if not differs:
        return 0.0
    if not (np.all(np.isfinite(runs)) and np.all(np.isfinite(rises))):
        return math.inf
    # Products and sums of T factors carry about T ulp: the end moves up, what limits it down.
    slack = (4 * len(runs) + 16) * _EPS
    rises = rises * (1 - slack)
    end = rises[-1] * (1 + 3 * slack)
    rises[-1] = end
    if runs[-1] == 0.0:
        return math.inf
    chord = end / runs[-1]
    if np.all(rises[:-1] >= chord * runs[:-1]):
        return max(_TINY, raised(end / math.sqrt(runs[-1]) * (1 + slack)))
    hull = [(0.0, 0.0)]
    for run, rise in zip(runs.tolist(), rises.tolist(), strict=True):
        if run == hull[-1][0]:
            if rise >= hull[-1][1]:
                continue
            hull.pop()
        while len(hull) > 1 and _above(hull[-2], hull[-1], (run, rise)):
            hull.pop()
        hull.append((run, rise))
    if hull[-1][1] < end:
        return math.inf  # the last moves come without noise
    edges = np.diff(np.array(hull), axis=0)
    return max(
        _TINY, raised(math.sqrt(float(np.sum(edges[:, 1] ** 2 / edges[:, 0]))) * (1 + slack))
    )


def _above(left, middle, right):
    """Whether `middle` lies on or above the line from `left` to `right`."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise
