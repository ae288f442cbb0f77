"""Langevin unlearning (Chien et al. 2024 a): full-batch noisy descent, in Renyi divergence.

Steps as in `noisy_sgd` with b = n, under its condition on the clip: either it never binds, or each
row's loss is a convex function of one number x'w. At stationarity, replacing S of n rows moves each
step by 2 eta M S / n, and the string of `iteration_mu` is straight: with c = 1 - eta m,

    D_alpha <= alpha eta M^2 S^2 (1 + c) / (n^2 sigma^2 (1 - c))
            <= 2 alpha S^2 M^2 / (m sigma^2 n^2)                                   [D]

half of the published 4 alpha S^2 M^2 / (m sigma^2 n^2). K steps of unlearning shrink it by
c^(2 K/alpha) [D: `contraction_rate`], published e^(-K eta m/alpha). Requests in a row chain by the
weak triangle inequality, whose order doubles each time: for more than a few, `noisy_sgd_epochs`
with a full batch needs far fewer steps.
"""

import math

from jaxunlearn.accounting._checks import expect, expect_count, least_count
from jaxunlearn.accounting.contraction import contraction_rate
from jaxunlearn.accounting.noisy_sgd import NoisySGD
from jaxunlearn.accounting.renyi import RenyiCurve, renyi_triangle
from jaxunlearn.accounting.rounding import lowered, raised


def langevin_learning_curve(
    setting: NoisySGD, *, num_replaced: int, paper_constants: bool = False
) -> RenyiCurve:
    """D_alpha between stationary learning with and without `num_replaced` rows: an upper bound.

    alpha eta M^2 S^2 (1 + c) / (n^2 sigma^2 (1 - c)) [D]; `paper_constants=True`:
    4 alpha S^2 M^2 / (m sigma^2 n^2) [C: `epsilon_expression`].

    >>> setting = NoisySGD(strong_convexity=1.0, smoothness=2.0, gradient_clip=1.0,
    ...     noise_stddev=1.0, num_examples=10)
    >>> paper = langevin_learning_curve(setting, num_replaced=1, paper_constants=True)
    >>> round(paper(2.0), 9), round(langevin_learning_curve(setting, num_replaced=1)(2.0), 9)
    (0.08, 0.03)
    """
    _expect_full_batch(setting)
    rows = expect_count("num_replaced", num_replaced, at_least=0)
    share = (setting.gradient_clip * rows / (setting.noise_stddev * setting.num_examples)) ** 2
    if paper_constants:
        return RenyiCurve.linear(raised(4 * share / setting.strong_convexity))
    c = setting.contraction
    return RenyiCurve.linear(raised(share * setting.rate * (1 + c) / (1 - c)))


def langevin_curve(
    setting: NoisySGD,
    *,
    num_replaced: int,
    num_steps: list[int],
    paper_constants: bool = False,
) -> RenyiCurve:
    """D_alpha from stationary retraining after requests of `num_replaced` rows each: upper bound.

        e_1(alpha) = e^(-c K_1/alpha) e_0(alpha),
        e_s(alpha) = e^(-c K_s/alpha)
                     [(alpha - 1/2)/(alpha - 1) e_(s-1)(2 alpha) + e_0(2 alpha - 1)]

    [D]; published: rate eta m in place of c, and (alpha - 1/2)/(alpha - 1) [e_(s-1)(2 alpha) +
    e_0(2 alpha)] [C]. Assumes that training had converged. The direction is that of the unlearned
    law from the retrained one; `noisy_sgd_epochs` bounds both.

    Args:
      num_steps: K of each request so far, in order.

    >>> setting = NoisySGD(strong_convexity=1.0, smoothness=2.0, gradient_clip=1.0,
    ...     noise_stddev=1.0, num_examples=10)
    >>> round(langevin_curve(setting, num_replaced=1, num_steps=[2])(2.0), 6)
    0.0075
    """
    learning = langevin_learning_curve(
        setting, num_replaced=num_replaced, paper_constants=paper_constants
    )
    if paper_constants:
        rate = lowered(setting.rate * setting.strong_convexity)
    else:
        rate = contraction_rate(lipschitz=setting.contraction)
    curve = None
    for steps in num_steps:
        before = learning if curve is None else _following(curve, learning, paper_constants)
        curve = _decayed(before, rate * expect_count("num_steps", steps, at_least=0))
    if curve is None:
        raise ValueError("Expected at least one request in num_steps.")
    return curve


def langevin_steps(
    setting: NoisySGD,
    *,
    epsilon: float,
    delta: float,
    num_replaced: int,
    num_requests: int = 1,
    paper_constants: bool = False,
) -> list[int]:
    """Steps of unlearning that each request in turn needs: enough, an upper bound.

    `paper_constants=True` converts by Mironov's formula, as published.

    >>> setting = NoisySGD(strong_convexity=1.0, smoothness=2.0, gradient_clip=1.0,
    ...     noise_stddev=0.05, num_examples=100)
    >>> langevin_steps(setting, epsilon=1.0, delta=1e-5, num_replaced=1, num_requests=2)
    [8, 15]
    """
    expect("epsilon", epsilon, above_=0.0)
    counts: list[int] = []
    for _ in range(expect_count("num_requests", num_requests)):

        def fits(steps):
            curve = langevin_curve(
                setting,
                num_replaced=num_replaced,
                num_steps=[*counts, steps],
                paper_constants=paper_constants,
            )
            return curve.epsilon(delta=delta, paper_constants=paper_constants) <= epsilon

        found = least_count(fits)
        if found is None:
            raise ValueError("Expected a target that some number of steps reaches.")
        counts.append(found)
    return counts


def _following(curve, learning, paper_constants):
    """The next request's curve before its steps."""
    if not paper_constants:
        return renyi_triangle(curve, learning)
    outer = lambda order: (order - 0.5) / (order - 1)
    return RenyiCurve(lambda order: raised(outer(order) * (learning(2 * order) + curve(2 * order))))


def _decayed(curve, amount):
    """The curve times e^(-amount/alpha)."""
    return RenyiCurve(lambda order: raised(curve(order) * math.exp(-lowered(amount / order))))


def _expect_full_batch(setting):
    """Raises for mini-batches, whose stationary law depends on the place in the cycle."""
    if setting.steps_per_epoch != 1:
        raise ValueError(f"Expected full batches, got batch_size={setting.batch}: see noisy_sgd.")
