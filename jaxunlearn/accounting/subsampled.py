"""The Gaussian mechanism on a Poisson sample: Renyi divergence at integer orders, then between.

One step releases N(sum of the sampled rows' contributions, I), each row sampled on its own with
probability q and contributing a vector of norm at most mu. With and without one row this is

    P = (1 - q) N(0, 1) + q N(mu, 1)   against   Q = N(0, 1)

in one dimension (Mironov, Talwar and Zhang 2019), and at integer orders

    A(alpha) = E_Q (P/Q)^alpha = sum_k C(alpha, k) (1-q)^(alpha-k) q^k e^(mu^2 k (k-1) / 2),

a sum of positive terms. ln A is convex in alpha, so that the chord between two integers bounds it
in between [D]. The sum must be divided by a constant, never by the size of the drawn batch.
"""

import functools
import math

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting._checks import expect, expect_count
from jaxunlearn.accounting.renyi import RenyiCurve
from jaxunlearn.accounting.rounding import raised

SUBSAMPLED_ORDERS = (
    *(1 + x / 10 for x in range(1, 100)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024,
)  # fmt: skip
"""Orders at which `subsampled_curve` is searched."""


def subsampled_log_moments(
    max_order: int, *, sampling_rate: float, mu: float | np.ndarray
) -> Float64[np.ndarray, "*mu orders"]:
    """ln A(alpha) at alpha = 0, 1, ..., max_order: upper bounds, exact but for rounding up.

    Args:
      max_order: >= 1.
      sampling_rate: q in [0, 1].
      mu: norm of the row's contribution over the noise, >= 0; an array gives one row of moments
        for each entry.

    Returns:
      Shape (*mu.shape, max_order + 1). D_alpha is entry alpha over (alpha - 1).

    Cost: max_order^2 terms for each entry of `mu`.

    >>> log_moments = subsampled_log_moments(2, sampling_rate=0.01, mu=1.0)
    >>> round(float(log_moments[2]), 14)
    0.00017181342207

    References:
      Mironov, Talwar and Zhang, "Renyi differential privacy of the sampled Gaussian mechanism",
      2019, section 3.3 [C: dp_accounting, `_compute_log_a_int`].
    """
    order = expect_count("max_order", max_order)
    if not 0 <= sampling_rate <= 1:
        raise ValueError(f"Expected sampling_rate={sampling_rate} in [0, 1].")
    mu = np.asarray(mu, np.float64)
    if not (np.all(mu >= 0) and np.all(np.isfinite(mu))):
        raise ValueError("Expected mu >= 0 and finite.")
    log_weights = _log_binomials(order, float(sampling_rate))
    k = np.arange(order + 1, dtype=np.float64)
    growth = 0.5 * k * (k - 1) * mu[..., None] ** 2
    # ln A(alpha) = ln(1 + sum_k w_k (e^growth_k - 1)): the weights sum to one.
    out = np.zeros((*mu.shape, order + 1))
    for alpha in range(2, order + 1):
        weights = log_weights[alpha, 2 : alpha + 1]
        exact = _log_one_plus(weights, growth[..., 2 : alpha + 1])
        # Every term carries a few ulp of its exponent, relative to itself.
        least = np.min(weights, initial=0.0, where=weights > -np.inf)
        out[..., alpha] = exact * (1 + 2.0**-48 * (4 + alpha - least + growth[..., alpha]))
    return out


def subsampled_curve(
    *, sampling_rate: float, mu: float, num_steps: int = 1, max_order: int = 1024
) -> RenyiCurve:
    """D_alpha of `num_steps` Poisson-sampled Gaussian steps, for one row more or less: upper bound.

    Both directions: at every order the divergence of P from Q is the larger (Mironov, Talwar and
    Zhang 2019, Theorem 5), and it is this one. Adjacency is add-or-remove, not replace.

    Args:
      sampling_rate: q in [0, 1].
      mu: clip norm over the noise added to the sum, >= 0 (1 / noise multiplier).
      num_steps: >= 0.
      max_order: the largest order kept; above it the curve is inf.

    >>> curve = subsampled_curve(sampling_rate=0.01, mu=1.0, num_steps=1000, max_order=64)
    >>> 2.1 < curve.epsilon(delta=1e-5) < 2.11
    True
    """
    steps = expect_count("num_steps", num_steps, at_least=0)
    expect("mu", mu, at_least=0.0)
    table = functools.cache(
        lambda order: subsampled_log_moments(order, sampling_rate=sampling_rate, mu=mu)
    )

    def divergence(order):
        if order > max_order:
            return math.inf
        size = 2 ** math.ceil(math.log2(max(order, 2)))
        return raised(steps * interpolated_moment(table(size), order) / (order - 1))

    orders = [order for order in SUBSAMPLED_ORDERS if order <= max_order]
    return RenyiCurve(divergence, orders)


def interpolated_moment(log_moments: Float64[np.ndarray, " orders"], order: float) -> float:
    """ln A at a real order, by the chord between integers: an upper bound, as ln A is convex [D].

    >>> round(interpolated_moment(np.array([0.0, 0.0, 1.0, 3.0]), 2.25), 9)
    1.5
    """
    floor = min(math.floor(order), len(log_moments) - 2)
    share = order - floor
    return raised((1 - share) * float(log_moments[floor]) + share * float(log_moments[floor + 1]))


def subsampled_group_divergence(order: int, *, sampling_rate: float, mu: float, size: int) -> float:
    """D_order of one step *with* `size` rows from the step without them: an upper bound, directed.

    The number K of sampled rows is Binomial(size, q), and contributions of norm at most mu each
    are worst when they agree (Choquette-Choo et al. 2024, Lemma 4.5 [R]). Over independent copies
    K_1, ..., K_alpha, E_Q (P/Q)^alpha = E exp(mu^2 sum_(i<j) K_i K_j), which is

        sum_s e^(mu^2 s^2 / 2) (v * v * ... * v)(s),   v(k) = Pr(K = k) e^(-mu^2 k^2 / 2),

    an alpha-fold convolution of positive numbers [D]. It is the direction that unlearning asks
    for; a two-sided guarantee needs the other, which this does not bound: use `renyi_group`.

    Args:
      order: an integer >= 2.  size: number of rows, >= 1.

    Cost: order^2 size^2 / 2.

    >>> one = subsampled_group_divergence(8, sampling_rate=0.1, mu=0.5, size=1)
    >>> round(one, 10)
    0.0137254301
    """
    order, size = expect_count("order", order, at_least=2), expect_count("size", size)
    expect("mu", mu, at_least=0.0)
    if not 0 <= sampling_rate <= 1:
        raise ValueError(f"Expected sampling_rate={sampling_rate} in [0, 1].")
    if sampling_rate == 0.0 or mu == 0.0:
        return 0.0
    counts = np.arange(size + 1, dtype=np.float64)
    log_v = _log_binomials(size, float(sampling_rate))[size] - 0.5 * (mu * counts) ** 2
    log_sum = log_v
    for _ in range(order - 1):
        grown = np.full((size + 1, len(log_sum) + size), -np.inf)
        for k in range(size + 1):
            grown[k, k : k + len(log_sum)] = log_v[k] + log_sum
        log_sum = np.logaddexp.reduce(grown, axis=0)
    exponent = 0.5 * (mu * np.arange(len(log_sum), dtype=np.float64)) ** 2
    total = float(np.logaddexp.reduce(log_sum + exponent))
    slack = 2.0**-44 * (float(exponent[-1]) + order)
    return raised((max(total, 0.0) + slack) / (order - 1))


@functools.lru_cache(maxsize=4)
def _log_binomials(order, rate):
    """ln of C(n, k) (1 - q)^(n - k) q^k for n, k = 0..order; -inf where there is no such term."""
    from scipy import special

    n = np.arange(order + 1, dtype=np.float64)[:, None]
    k = np.arange(order + 1, dtype=np.float64)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        choose = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
        weights = choose + special.xlog1py(n - k, -rate) + special.xlogy(k, rate)
    return np.where(k <= n, weights, -np.inf)


def _log_one_plus(log_weights, growth):
    """ln(1 + sum_k w_k (e^g_k - 1)) over the last axis, g >= 0, with nothing cancelled."""
    with np.errstate(divide="ignore"):
        # ln(e^g - 1) = g + ln(1 - e^-g)
        log_terms = log_weights + growth + np.log(-np.expm1(-growth))
    return np.logaddexp(0.0, np.logaddexp.reduce(log_terms, axis=-1))
