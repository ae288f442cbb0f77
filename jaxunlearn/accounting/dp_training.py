"""Training with differential privacy as deletion for free: what it promises for m rows.

A model that is (epsilon, delta)-private for m rows needs no work to forget any m of them. Training
clips per-example gradients to C, sums them over a Poisson sample of rate q, adds N(0, (z C)^2 I)
and divides by a constant; adjacency is add-or-remove.

Without a sample (q = 1) the group's own curve is exact: mu = m sqrt(T)/z. With one, the group is
bounded by `group_privacy` at the best split of delta, and by `renyi_group`, whichever is smaller;
`accountant="pld"` lets dp-accounting compose the privacy loss distribution of the group itself,
numerically and rounded up, which is far smaller.
"""

import math

from jaxunlearn import errors
from jaxunlearn.accounting._checks import expect, expect_count, expect_delta
from jaxunlearn.accounting.composition import group_privacy
from jaxunlearn.accounting.gaussian import gaussian_epsilon
from jaxunlearn.accounting.renyi import renyi_group
from jaxunlearn.accounting.rounding import raised
from jaxunlearn.accounting.subsampled import subsampled_curve


def dp_training_epsilon(
    *,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    sampling_rate: float = 1.0,
    num_rows: int = 1,
    accountant: str = "renyi",
) -> float:
    """epsilon at `delta` of private training for `num_rows` rows: an upper bound.

    Args:
      noise_multiplier: z, noise over clip norm, > 0.
      num_steps: T >= 1.  sampling_rate: q in (0, 1]; 1 is full batch.
      num_rows: m, how many rows a deletion may take with no work.
      accountant: "renyi", or "pld" with the extra `jaxunlearn[privacy]`.

    Returns:
      epsilon; inf where nothing finite can be shown.

    Raises:
      MissingExtraError: "pld" without dp-accounting.

    >>> round(dp_training_epsilon(
    ...     noise_multiplier=1.0, num_steps=1000, delta=1e-5, sampling_rate=0.01), 4)
    2.1014
    >>> round(dp_training_epsilon(noise_multiplier=20.0, num_steps=25, delta=1e-5, num_rows=4), 6)
    4.377178

    References:
      Mironov, Talwar and Zhang 2019; Vadhan 2017, Lemma 2.2 (groups).
    """
    expect("noise_multiplier", noise_multiplier, above_=0.0)
    expect_delta(delta)
    steps, rows = expect_count("num_steps", num_steps), expect_count("num_rows", num_rows)
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected sampling_rate={sampling_rate} in (0, 1].")
    if sampling_rate == 1.0:
        mu = raised(rows * math.sqrt(steps) / noise_multiplier)
        return gaussian_epsilon(delta=delta, noise_stddev=1.0, sensitivity=mu)
    if accountant == "pld":
        return _pld_epsilon(noise_multiplier, steps, delta, sampling_rate, rows)
    if accountant != "renyi":
        raise ValueError(f"Expected accountant 'renyi' or 'pld', got {accountant!r}.")
    curve = subsampled_curve(
        sampling_rate=sampling_rate, mu=raised(1 / noise_multiplier), num_steps=steps
    )
    if rows == 1:
        return curve.epsilon(delta=delta)
    doublings = math.ceil(math.log2(rows))
    by_curve = renyi_group(curve, doublings=doublings).epsilon(delta=delta)
    return min(by_curve, _group_epsilon(curve, delta, rows))


def dp_training_noise(
    *,
    epsilon: float,
    delta: float,
    num_steps: int,
    sampling_rate: float = 1.0,
    num_rows: int = 1,
    accountant: str = "renyi",
) -> float:
    """Least noise multiplier with which training is (epsilon, delta) for `num_rows`: upper bound.

    The inverse of `dp_training_epsilon`, by bisection to 1e-4 on the safe side.

    >>> z = dp_training_noise(epsilon=4.3771781, delta=1e-5, num_steps=25)
    >>> 5.0 <= z < 5.001
    True
    """
    expect("epsilon", epsilon, above_=0.0)

    def fits(noise):
        found = dp_training_epsilon(
            noise_multiplier=noise,
            num_steps=num_steps,
            delta=delta,
            sampling_rate=sampling_rate,
            num_rows=num_rows,
            accountant=accountant,
        )
        return found <= epsilon

    good = 1.0
    while not fits(good):
        good *= 2
        if good > 1e12:
            raise ValueError(f"Expected an epsilon={epsilon} that some noise reaches.")
    bad = good / 2
    while fits(bad) and bad > 1e-6:
        good, bad = bad, bad / 2
    while good - bad > 1e-4 * good:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _group_epsilon(curve, delta, rows):
    """The least m epsilon_1 with delta_1 (e^(m epsilon_1) - 1)/(e^epsilon_1 - 1) <= delta."""
    low, high = math.log(1e-290), math.log(delta / rows)
    best = math.inf
    # delta of the group falls with delta_1 at first and may rise again: every point is valid.
    for _ in range(60):
        middle = (low + high) / 2
        one = curve.epsilon(delta=math.exp(middle))
        group = group_privacy(epsilon=one, delta=math.exp(middle), size=rows)
        if group.delta <= delta:
            best, low = min(best, group.epsilon), middle
        else:
            high = middle
        if high - low < 1e-3:
            break
    return best


def _pld_epsilon(noise_multiplier, steps, delta, rate, rows):
    """By dp-accounting's privacy loss distributions: pessimistic, discretised at 1e-4."""
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as missing:
        raise errors.MissingExtraError(
            "Expected dp-accounting for accountant='pld'. Install jaxunlearn[privacy], or use "
            "accountant='renyi'."
        ) from missing
    if rows == 1:
        event = dp_accounting.PoissonSampledDpEvent(
            rate, dp_accounting.GaussianDpEvent(noise_multiplier)
        )
    else:
        shares = [
            math.exp(
                math.lgamma(rows + 1)
                - math.lgamma(k + 1)
                - math.lgamma(rows - k + 1)
                + k * math.log(rate)
                + (rows - k) * math.log1p(-rate)
            )
            for k in range(rows + 1)
        ]
        total = math.fsum(shares)
        event = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
            noise_multiplier, list(range(rows + 1)), [share / total for share in shares]
        )
    found = pld.PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return float(found.get_epsilon(delta))
