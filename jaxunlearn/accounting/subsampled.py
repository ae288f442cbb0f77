"""The Gaussian mechanism on a Poisson sample: Renyi divergence at integer orders, then between.

One step releases N(sum of the sampled rows' contributions, I), each row sampled on its own with
probability q and contributing a vector of norm at most mu. With and without one row this is

    P = (1 - q) N(0, 1) + q N(mu, 1)   against   Q = N(0, 1)

in one dimension (Mironov, Talwar and Zhang 2019), and at integer orders

    A(alpha) = E_Q (P/Q)^alpha = sum_k C(alpha, k) (1-q)^(alpha-k) q^k e^(mu^2 k (k-1) / 2),

a sum of positive terms; at other orders it is an integral (`subsampled_log_moment`). The released
sum may be divided by a constant, never by the size of the drawn batch.
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
    _expect_rate(sampling_rate)
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


def subsampled_log_moment(order: float, *, sampling_rate: float, mu: float) -> float:
    """ln A at any real order > 1: an upper bound, above the exact value by less than 1e-9 of it.

        A - 1 = E_Q[z^alpha - 1 - alpha (z - 1)],    z = P/Q, as E_Q z = 1,

    an integral of something positive, by the trapezoidal rule. The integrand is analytic where
    |Im x| < pi/mu and there at most e^(Im x^2/2) times larger, so that with step h the rule errs by
    at most 2 e^(a^2/2) (A + 1 + 2 alpha)/(e^(2 pi a/h) - 1), a < pi/mu (Trefethen and Weideman
    2014, Theorem 5.1) [D]: here under e^-74 (A + 2 + 2 alpha), tails included, which is added.

    >>> log_moment = subsampled_log_moment(2.0, sampling_rate=0.01, mu=1.0)
    >>> round(log_moment, 13)
    0.0001718134221
    """
    expect("order - 1", order - 1, above_=0.0)
    expect("mu", mu, at_least=0.0)
    _expect_rate(sampling_rate)
    if sampling_rate == 0.0 or mu == 0.0:
        return 0.0
    if sampling_rate == 1.0:
        return raised(order * (order - 1) * mu * mu / 2)
    half_width = min(3.0, 3.0 / mu)
    step = half_width * 2 * math.pi / 80
    end = order * mu + math.sqrt(2 * (order * -math.log(sampling_rate) + 100))
    if end > 2**20 * step:
        return raised(order * (order - 1) * mu * mu / 2)  # without sampling, which costs more
    x = np.arange(-14.0, end + step, step)
    shift = mu * x - mu * mu / 2
    # ln z = ln(1 - q + q e^v), without overflow
    log_z = np.where(
        shift < 0,
        np.log1p(sampling_rate * np.expm1(np.minimum(shift, 0.0))),
        np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + shift),
    )
    small = np.abs(shift) < 1
    log_z[small] = np.log1p(sampling_rate * np.expm1(shift[small]))
    log_terms = _log_gap(log_z, order) - x * x / 2
    log_excess = float(np.logaddexp.reduce(log_terms)) + math.log(step / math.sqrt(2 * math.pi))
    left_out = float(np.logaddexp(log_excess, math.log(2 + 2 * order))) - 74.0
    log_excess = float(np.logaddexp(log_excess, left_out))
    return float(np.logaddexp(0.0, log_excess)) * (1 + 2.0**-34)


def subsampled_curve(*, sampling_rate: float, mu: float, num_steps: int = 1) -> RenyiCurve:
    """D_alpha of `num_steps` Poisson-sampled Gaussian steps, for one row more or less: upper bound.

    Both directions: at every order the divergence of P from Q is the larger (Mironov, Talwar and
    Zhang 2019, Theorem 5), and it is this one. Adjacency is add-or-remove, not replace.

    Args:
      sampling_rate: q in [0, 1].
      mu: clip norm over the noise added to the sum, >= 0 (1 / noise multiplier).
      num_steps: >= 0.

    Cost: a few hundred host operations for each order asked for.

    >>> curve = subsampled_curve(sampling_rate=0.01, mu=1.0, num_steps=1000)
    >>> round(curve.epsilon(delta=1e-5), 4)
    2.1014
    """
    steps = expect_count("num_steps", num_steps, at_least=0)
    expect("mu", mu, at_least=0.0)
    _expect_rate(sampling_rate)

    @functools.cache
    def divergence(order):
        moment = subsampled_log_moment(order, sampling_rate=sampling_rate, mu=mu)
        return raised(steps * moment / (order - 1))

    return RenyiCurve(divergence, SUBSAMPLED_ORDERS)


def subsampled_group_divergence(order: int, *, sampling_rate: float, mu: float, size: int) -> float:
    """D_order of one step *with* `size` rows from the step without them: an upper bound, directed.

    The number K of sampled rows is Binomial(size, q). Over independent copies of the sample with
    sums u_1, ..., u_alpha, E_Q (P/Q)^alpha = E exp(sum_(i<j) u_i'u_j), and u_i'u_j is at most
    mu^2 K_i K_j, whatever the directions of the rows; so it is at most

        sum_s e^(mu^2 s^2 / 2) (v * v * ... * v)(s),   v(k) = Pr(K = k) e^(-mu^2 k^2 / 2),

    an alpha-fold convolution of positive numbers [D], here summed by how many copies are not zero,
    so that nothing cancels. It is the direction that unlearning asks for; a two-sided guarantee
    needs the other too, which this does not bound: use `renyi_group`.

    Args:
      order: an integer >= 2.  size: number of rows, >= 1.

    Cost: order^2 size^2 / 2.

    >>> one = subsampled_group_divergence(8, sampling_rate=0.1, mu=0.5, size=1)
    >>> round(one, 10)
    0.0137254301
    """
    order, size = expect_count("order", order, at_least=2), expect_count("size", size)
    expect("mu", mu, at_least=0.0)
    _expect_rate(sampling_rate)
    if sampling_rate == 0.0 or mu == 0.0:
        return 0.0
    log_excess = _log_excess(order, size, float(sampling_rate), mu)
    return raised(float(np.logaddexp(0.0, log_excess)) / (order - 1))


def _log_excess(order, size, rate, mu):
    """ln(E exp(mu^2 sum_(i<j) K_i K_j) - 1), by how many copies are not zero: an upper bound."""
    weights = _log_binomials(size, rate)[size]
    counts = np.arange(1, size + 1, dtype=np.float64)
    log_v = weights[1:] - 0.5 * (mu * counts) ** 2
    log_none, log_some = weights[0], float(np.logaddexp.reduce(weights[1:]))
    choose = _log_binomials(order, 0.5)[order] + order * math.log(2)
    size_of_logs = 2 + float(np.max(np.abs(log_v[np.isfinite(log_v)])))
    log_sum, total = log_v, -math.inf
    for copies in range(2, order + 1):
        grown = np.full((size, len(log_sum) + size - 1), -np.inf)
        for k in range(size):
            grown[k, k : k + len(log_sum)] = log_v[k] + log_sum
        log_sum = np.logaddexp.reduce(grown, axis=0)
        sums = copies + np.arange(len(log_sum), dtype=np.float64)
        log_all = float(np.logaddexp.reduce(log_sum + 0.5 * (mu * sums) ** 2))
        # Each convolution adds an ulp of logarithms that grow with their number.
        gain = max(log_all - copies * log_some, 0.0) + copies**2 * size_of_logs * 2.0**-51
        rest = (order - copies) * log_none if copies < order else 0.0
        log_term = choose[copies] + rest + copies * log_some
        log_term += gain if gain > 30.0 else math.log(math.expm1(gain))
        total = float(np.logaddexp(total, log_term))
    return total + (1 + abs(total)) * 2.0**-46


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


def _log_gap(log_z, order):
    """ln(z^order - 1 - order (z - 1)) >= -inf from ln z: by its series near z = 1."""
    scaled = order * log_z
    near, far = np.abs(scaled) < 0.5, scaled > 1.0
    direct = np.expm1(np.minimum(scaled, 1.0)) - order * np.expm1(np.minimum(log_z, 1.0))
    series = np.zeros_like(log_z)
    for k in range(16, 1, -1):
        # sum_k (order^k - order) u^k / k!, by Horner in u
        series = series * log_z + (order**k - order) / math.factorial(k)
    series = series * log_z**2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # e^s - 1 - order (z - 1) = e^s (1 - e^-s (1 + order (z - 1)))
        rest = np.exp(-scaled) + order * (np.exp(log_z - scaled) - np.exp(-scaled))
        large = scaled + np.log1p(-rest)
        middle = np.log(np.maximum(np.where(near, series, direct), 0.0))
    return np.where(far, large, middle)


def _expect_rate(rate):
    """Raises unless 0 <= rate <= 1."""
    if not 0 <= rate <= 1:
        raise ValueError(f"Expected sampling_rate={rate} in [0, 1].")
