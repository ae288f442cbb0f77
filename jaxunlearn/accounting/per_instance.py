"""Per-instance accounting of noisy training: what *this* row's gradients gave away, and how sure.

Training adds Gaussian noise to sums of clipped gradients over Poisson samples. At step t the row's
clipped gradient over the noise is r_t, random through the run so far, and one step costs
ln A(alpha, q, r_t) / (alpha - 1) (`subsampled_log_moments`). For T adaptive steps and any p > 1,
with orders a_i = 1 + (alpha - 1) (p/(p-1))^i,

    D_alpha <= sum_(i=0..T-1)  1/(p (a_i - 1)) ln E exp(p ln A(a_i, q, r_(T-1-i)))

over runs *with* the row (Thudi et al. 2024; Hoelder, by induction from the last step [D]): the last
step has order alpha and the first the largest. Published code gives the orders to the steps the
other way round, which is no bound (a two-step counterexample is in the tests), and takes
-1/p for -1/(p-1) and factorials that overflow.

The number depends on the data. It is not a DP guarantee, and is itself sensitive.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting._checks import expect, expect_count
from jaxunlearn.accounting.rounding import raised
from jaxunlearn.accounting.subsampled import subsampled_log_moments


class InstanceLoss(NamedTuple):
    """What one row's gradient norms say of D_alpha with it from without it.

    value: the bound or estimate at `order`.
    kind: "ranking" (one run's plug-in: for comparing rows, no bound), "estimate" (mean over runs,
      biased low) or "certified" (an upper bound but for a chance of `failure_probability`).
    data_independent: the bound for any row, from the clip alone; `value` is never above it.
    """

    value: float
    order: float
    kind: str
    data_independent: float
    failure_probability: float = 0.0


def holder_orders(order: float, *, num_steps: int, exponent: float) -> Float64[np.ndarray, " t"]:
    """a_i = 1 + (order - 1) (p/(p-1))^i: the order at the i-th step from the end [D].

    >>> holder_orders(2.0, num_steps=4, exponent=12.0).round(8).tolist()
    [2.0, 2.09090909, 2.19008264, 2.29827198]
    """
    expect("order - 1", order - 1, above_=0.0)
    expect("exponent - 1", exponent - 1, above_=0.0)
    steps = np.arange(expect_count("num_steps", num_steps))
    return 1 + (order - 1) * (exponent / (exponent - 1)) ** steps


def holder_weights(order: float, *, num_steps: int, exponent: float) -> Float64[np.ndarray, " t"]:
    """1 / (p (a_i - 1)) of the i-th step from the end.

    >>> holder_weights(2.0, num_steps=2, exponent=12.0).round(8).tolist()
    [0.08333333, 0.07638889]
    """
    return 1 / (exponent * (holder_orders(order, num_steps=num_steps, exponent=exponent) - 1))


def step_losses(
    norms: Float64[np.ndarray, "*runs t"], *, order: float, sampling_rate: float, exponent: float
) -> Float64[np.ndarray, "*runs t"]:
    """p ln A(a_i, q, r_t) at each step of each run, t in forward order: upper bounds.

    Args:
      norms: r_t, clipped gradient norms over the noise, each rounded up if at all.

    >>> step_losses(np.array([0.5, 0.0]), order=2.0, sampling_rate=1.0, exponent=3.0).round(9)
    array([1.5, 0. ])
    """
    norms = np.asarray(norms, np.float64)
    num_steps = norms.shape[-1]
    orders = holder_orders(order, num_steps=num_steps, exponent=exponent)[::-1]
    if orders[0] > 4096:
        raise ValueError(f"Expected orders up to 4096, got {orders[0]:.3g}: raise exponent.")
    table = subsampled_log_moments(
        math.ceil(float(orders[0])) + 1, sampling_rate=sampling_rate, mu=norms
    )
    floor = np.floor(orders).astype(int)
    share = orders - floor
    index = np.broadcast_to(floor, norms.shape)[..., None]
    low = np.take_along_axis(table, index, axis=-1)[..., 0]
    high = np.take_along_axis(table, index + 1, axis=-1)[..., 0]
    return exponent * ((1 - share) * low + share * high)


def per_instance_loss(
    norms: Float64[np.ndarray, "runs t"],
    *,
    order: float,
    sampling_rate: float,
    clip: float,
    exponents: tuple[float, ...] | None = None,
    failure_probability: float | None = None,
) -> InstanceLoss:
    """The per-instance Renyi loss of one row from the norms of R independent runs with it.

    The theorem above at the best of several p, and never more than the data-independent bound.
    With a `failure_probability` beta, each step's mean of exp(...) is replaced by an upper
    confidence bound, mean + max sqrt(ln(T/beta) / (2 R)) (Hoeffding), at one p fixed in advance.

    Args:
      norms: r_t of each run, at most `clip`.
      order: alpha > 1; small ones (1.5 to 4) lose least.
      sampling_rate: q.  clip: the largest possible r, clip norm over noise.
      exponents: values of p to try; None is T, 3 T and 10 T (3 T with a failure probability).

    Raises:
      ValueError: a norm above the clip, or several exponents with a failure probability.

    Cost: R T (order)^2 terms for each p.

    >>> norms = np.full((2, 4), 0.1)
    >>> loss = per_instance_loss(norms, order=2.0, sampling_rate=0.1, clip=0.5)
    >>> loss.kind, loss.value < loss.data_independent
    ('estimate', True)

    References:
      Thudi, Jia, Meehan, Shumailov and Papernot, "Gradients look alike: privacy is often
      overestimated in DP-SGD", 2024 [D; C: constants of `renyi_per_instance_sum_compo`].
    """
    norms = np.atleast_2d(np.asarray(norms, np.float64))
    num_runs, num_steps = norms.shape
    if not np.all((norms >= 0) & (norms <= clip)):
        raise ValueError(f"Expected norms in [0, clip={clip}].")
    if exponents is None:
        scales = (3,) if failure_probability is not None else (1, 3, 10)
        exponents = tuple(max(2.0, float(scale * num_steps)) for scale in scales)
    independent = _composed(np.full(num_steps, float(clip)), order, sampling_rate)
    if failure_probability is None and num_runs == 1:
        return InstanceLoss(
            min(independent, _composed(norms[0], order, sampling_rate)),
            order, "ranking", independent,
        )  # fmt: skip
    beta = 0.5 if failure_probability is None else failure_probability
    if (failure_probability is not None and len(exponents) != 1) or not 0 < beta < 1:
        raise ValueError("Expected one exponent, and failure_probability in (0, 1).")
    values = [
        _bound(norms, order, sampling_rate, clip, exponent, failure_probability)
        for exponent in exponents
    ]
    return InstanceLoss(
        min([independent, *values]),
        order,
        "estimate" if failure_probability is None else "certified",
        independent,
        failure_probability or 0.0,
    )


def _bound(norms, order, rate, clip, exponent, beta):
    """The weighted sum over steps, by plain means or by upper confidence bounds."""
    num_runs, num_steps = norms.shape
    logs = step_losses(norms, order=order, sampling_rate=rate, exponent=exponent)
    means = np.logaddexp.reduce(logs, axis=0) - math.log(num_runs)
    if beta is not None:
        worst = step_losses(
            np.full((1, num_steps), float(clip)), order=order, sampling_rate=rate, exponent=exponent
        )[0]
        # exp(logs) lies in [1, exp(worst)].
        width = math.sqrt(math.log(num_steps / beta) / (2 * num_runs))
        with np.errstate(divide="ignore"):
            span = worst + np.log(-np.expm1(-worst)) + math.log(width)
        means = np.minimum(np.logaddexp(means, span), worst)
    weights = holder_weights(order, num_steps=num_steps, exponent=exponent)[::-1]
    return raised(float(np.sum(weights * means)))


def _composed(norms, order, rate):
    """sum_t ln A(order, q, r_t) / (order - 1): additive composition of one run's norms."""
    moments = subsampled_log_moments(max(2, math.ceil(order) + 1), sampling_rate=rate, mu=norms)
    floor = math.floor(order)
    share = order - floor
    return raised(
        float(np.sum((1 - share) * moments[:, floor] + share * moments[:, floor + 1]) / (order - 1))
    )
