"""What a release on the grid costs: the Gaussian mechanism plus everything that rounding adds.

The mechanism compared. Let c be the values rounded to the grid, in grid steps, s the integer noise
scale and k the integer noise. `round(c + N(0, s^2 I)) = c + round(N(0, s^2 I))` is post-processing
of the Gaussian mechanism, hence (epsilon, delta) with mu = |c - c'| / s. Its noise has the pmf

    q(k) = exp(-k^2/2s^2) / (s sqrt(2 pi)) * J(k),
    J(k) = integral over |t| <= 1/2 of exp(-k t/s^2 - t^2/2s^2) dt,

the discrete Gaussian has p(k) = exp(-k^2/2s^2) / Z, and by Poisson summation
Z = s sqrt(2 pi) (1 + 2 sum_m exp(-2 pi^2 s^2 m^2)) = s sqrt(2 pi) e^theta, theta >= 0. Then

    p/q = e^-theta / J <= 1 / (1 - 1/(24 s^2))   everywhere (cosh >= 1, e^-y >= 1 - y)
    q/p = e^theta J,  J <= 1 + u/12 + u^2/80,  u = (k^2/s^2 - 1)/(2 s^2)
                                   (cosh y <= e^(y^2/2) and, for y <= 1, e^y <= 1 + y + y^2)

Over d coordinates the first costs kappa_0 = d x/(1-x), x = 1/(24 s^2). The second is wanted only
where |k|^2 <= R s^2. There, as sum u_i <= (R - d)/(2 s^2) and sum u_i^2 <= (R + d)^2/(4 s^4),
it costs kappa_1 = (R - d)/(24 s^2) + (R + d)^2/(320 s^4) + d theta. Laurent & Massart 2000 give
|N|^2/s^2 <= d + 2 sqrt(d L) + 2 L with probability 1 - e^-L, and rounding moves |N| by sqrt(d)/2 at
most, so sqrt(R) = sqrt(d + 2 sqrt(d L) + 2 L) + sqrt(d)/(2 s). For every event S,

    P(S) <= e^kappa_0 Q(S) <= e^kappa_0 (e^eps Q'(S) + delta)
         <= e^(eps + kappa_0 + kappa_1) P'(S) + e^kappa_0 (delta + e^eps e^-L).

Several releases: the same argument over all their coordinates together.
"""

import math

from jaxunlearn.accounting.gaussian import compose_gaussian, gaussian_epsilon, gaussian_mu
from jaxunlearn.accounting.noise import MIN_STDDEV_ON_GRID, grid_of, grid_sensitivity
from jaxunlearn.accounting.rounding import above, below, round_down, round_up

_TAIL = 2.0**-40
"""Share of delta set aside for the tail of the comparison above."""

_PRINTING = 2.0**-34
"""Relative room for a certificate's 12 digits: sensitivity and noise each move by under 1e-11."""


def discretisation_epsilon(
    dimension: int, *, delta: float, stddev_on_grid: int = MIN_STDDEV_ON_GRID
) -> float:
    """What the discrete Gaussian costs beyond the rounded continuous one: an upper bound.

    If the Gaussian mechanism is (eps, delta_1) for a shift between grid points, the discrete one
    with the same scale is (eps + e, exp(e) (delta_1 + exp(eps) delta)), e being what is returned
    (kappa_0 + kappa_1 of this module's derivation, rounded up).

    Args:
      dimension: coordinates of all releases together, in [1, 2^50].
      delta: probability of the tail left out, in (0, 1).
      stddev_on_grid: noise in grid steps, >= 1.

    Raises:
      ValueError: an argument is out of range.

    >>> discretisation_epsilon(10**6, delta=1e-12) < 1e-9
    True
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta} strictly between 0 and 1.")
    if not 1 <= dimension <= 2**50:
        raise ValueError(f"Expected dimension={dimension} in [1, 2^50].")
    if not stddev_on_grid >= 1:
        raise ValueError(f"Expected stddev_on_grid={stddev_on_grid} >= 1.")
    return sum(_kappas(dimension, above(-math.log(delta)), stddev_on_grid))


def release_mu(*, sensitivity: float, noise_stddev: float, dimension: int) -> float:
    """mu that one `add_grid_noise` spends, rounding to the grid included: an upper bound.

    `grid_sensitivity / noise_stddev` after taking the sensitivity up and the noise down to the 12
    digits that a certificate prints, so a certificate's reader computes the same number.
    `compose_gaussian` of these is what several releases spend, and their `prior_mu`.

    Args:
      sensitivity: L2, of the values before rounding to the grid, >= 0.
      noise_stddev: `Release.noise_stddev`.
      dimension: coordinates of this release.

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> 0.25 <= release_mu(sensitivity=0.5, noise_stddev=2.0, dimension=1) < 0.2500001
    True
    """
    stddev = round_down(noise_stddev)
    on_grid = grid_sensitivity(round_up(sensitivity), noise_stddev=stddev, dimension=dimension)
    return above(on_grid / stddev)


def release_epsilon(
    *,
    delta: float,
    sensitivity: float,
    noise_stddev: float,
    dimension: int,
    prior_mu: float = 0.0,
    num_releases: int = 1,
) -> float:
    """Certified epsilon at `delta` of a release by `add_grid_noise`: an upper bound.

    Balle & Wang 2018, Theorem 8, at the total mu, plus rounding to the grid, plus the discrete
    noise (this module's derivation). Fails closed: `inf` where an argument makes no sense.

    Args:
      delta: total, in [1e-280, 1).
      sensitivity: L2, of the values before rounding to the grid, >= 0.
      noise_stddev: `Release.noise_stddev`.
      dimension: coordinates of this release (and at most of each earlier one), >= 1.
      prior_mu: `compose_gaussian` of the `release_mu` of all earlier releases that this epsilon
        covers too.
      num_releases: this release and the earlier ones, >= 1.

    Returns:
      epsilon of all `num_releases` together; `inf` on NaN, negative or contradictory arguments.

    >>> e = release_epsilon(delta=1e-5, sensitivity=1.0, noise_stddev=2.0, dimension=1)
    >>> 1.993091404 < e < 1.9930918
    True
    >>> release_epsilon(delta=1e-5, sensitivity=float("nan"), noise_stddev=2.0, dimension=1)
    inf
    """
    try:
        if not (1e-280 <= delta < 1 and 0 <= prior_mu < math.inf and num_releases >= 1):
            return math.inf
        if prior_mu > 0 and num_releases < 2:
            return math.inf
        this_mu = release_mu(
            sensitivity=sensitivity, noise_stddev=noise_stddev, dimension=dimension
        )
        mu = compose_gaussian([round_up(prior_mu), this_mu])
        coordinates = dimension * num_releases
        inner_delta = _inner_delta(delta, coordinates)
        epsilon = gaussian_epsilon(delta=inner_delta, noise_stddev=1.0, sensitivity=mu)
        total = above(epsilon + sum(_tail_kappas(epsilon, delta, coordinates)))
    except (ValueError, TypeError, ArithmeticError):
        return math.inf
    return total if total >= 0 else math.inf


def certified_mu(*, epsilon: float, delta: float, dimension: int, num_releases: int = 1) -> float:
    """Largest total mu that certifies (epsilon, delta) on the grid: a lower bound.

    Any releases whose `release_mu` compose to at most this have `release_epsilon <= epsilon`,
    whatever their sensitivity and noise; 6e-11 of it is left for the 12 digits of a certificate.

    Args:
      epsilon: > 0.  delta: in [1e-280, 1).
      dimension: coordinates of each release, >= 1.
      num_releases: how many releases will share the budget.

    Returns:
      mu > 0.

    Raises:
      ValueError: an argument is out of range, or the grid alone costs more than `epsilon`.

    >>> round(certified_mu(epsilon=1.0, delta=1e-5, dimension=10**6), 6)
    0.268051
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"Expected epsilon={epsilon} > 0 and finite.")
    if not 1e-280 <= delta < 1:
        raise ValueError(f"Expected delta={delta} in [1e-280, 1).")
    if not (dimension >= 1 and num_releases >= 1):
        raise ValueError(f"Expected dimension={dimension}, num_releases={num_releases} >= 1.")
    coordinates = dimension * num_releases
    left = below(epsilon - sum(_tail_kappas(epsilon, delta, coordinates)))
    if not left > 0:
        raise ValueError(
            f"Expected epsilon={epsilon} above what {coordinates} coordinates on the grid cost, "
            f"{epsilon - left:.3g}. Spend more epsilon or release fewer coordinates."
        )
    mu = gaussian_mu(epsilon=left, delta=_inner_delta(delta, coordinates))
    return mu * (1 - _PRINTING)


def certified_noise(*, epsilon: float, delta: float, sensitivity: float, dimension: int) -> float:
    """Least noise with which one `add_grid_noise` is (epsilon, delta): an upper bound.

    The least multiple of its own grid at which `release_epsilon <= epsilon`. (More noise than this
    may sit on a grid twice as coarse and needs `release_epsilon` to be computed anew.)

    Args:
      epsilon: > 0.  delta: in [1e-280, 1).
      sensitivity: L2, of the values before rounding to the grid, > 0.
      dimension: coordinates released, >= 1.

    Returns:
      Standard deviation per coordinate, in the unit of `sensitivity`.

    Raises:
      ValueError: an argument is out of range, or the grid alone costs more than the budget.

    >>> s = certified_noise(epsilon=1.0, delta=1e-5, sensitivity=1.0, dimension=100)
    >>> 3.730632 < s < 3.73064
    True
    """
    if not 0 < sensitivity < math.inf:
        raise ValueError(
            f"Expected sensitivity={sensitivity} > 0 and finite. At zero there is nothing to hide: "
            "the values equal the oracle's, and are released as exact."
        )
    mu = certified_mu(epsilon=epsilon, delta=delta, dimension=dimension)
    grid, _ = grid_of(sensitivity / mu)
    root = math.sqrt(dimension)
    if root / MIN_STDDEV_ON_GRID >= mu / 2:
        raise ValueError(
            f"Expected mu={mu:.3g} above {2 * root / MIN_STDDEV_ON_GRID:.3g}, what rounding "
            f"{dimension} coordinates to the grid costs. Release fewer coordinates."
        )
    while (steps := math.ceil((sensitivity / grid + root) / mu)) >= 2 * MIN_STDDEV_ON_GRID:
        grid *= 2.0
    steps = max(steps, MIN_STDDEV_ON_GRID)
    cost = lambda stddev: release_epsilon(
        delta=delta, sensitivity=sensitivity, noise_stddev=stddev, dimension=dimension
    )
    while not cost(grid * steps) <= epsilon:
        steps += 1
    return grid * steps


def _tail_kappas(epsilon, delta, coordinates):
    """kappa_0, kappa_1 with e^-L = 2^-40 delta e^-epsilon."""
    log_inverse_tail = above(epsilon - math.log(delta) - math.log(_TAIL))
    return _kappas(coordinates, log_inverse_tail, MIN_STDDEV_ON_GRID)


def _inner_delta(delta, coordinates):
    """delta_1 with e^kappa_0 (delta_1 + 2^-40 delta) <= delta."""
    kappa_0, _ = _kappas(coordinates, 1.0, MIN_STDDEV_ON_GRID)
    return delta * (math.exp(-kappa_0) - _TAIL) * (1 - 2.0**-50)


def _kappas(dimension, log_inverse_tail, stddev_on_grid):
    """(kappa_0, kappa_1) of the derivation above, rounded up; inf where it does not apply."""
    d, tail, s = float(dimension), float(log_inverse_tail), float(stddev_on_grid)
    x = 1.0 / (24.0 * s * s)
    root = math.sqrt(d + 2.0 * math.sqrt(d * tail) + 2.0 * tail)
    excess = 2.0 * math.sqrt(d * tail) + 2.0 * tail + math.sqrt(d) / s * root + d / (4.0 * s * s)
    if (d + excess) / (8.0 * s * s) > 1.0:
        return math.inf, math.inf
    alias = math.exp(-2.0 * (math.pi * s) ** 2)
    theta = 2.0 * alias / (1.0 - alias)
    kappa_1 = excess * x + (2.0 * d + excess) ** 2 / (320.0 * s**4) + d * theta
    slack = 1.0 + 2.0**-40
    return d * x / (1.0 - x) * slack, kappa_1 * slack
