"""Renyi curves, samples and compositions against dp_accounting, mpmath and each other."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jaxunlearn import accounting, errors
from jaxunlearn.accounting import RenyiCurve


def accountant(*events, orders):
    dp = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    found = rdp.RdpAccountant(orders)
    for event in events:
        found.compose(event(dp))
    return found


def sampled(rate, mu, count=1):
    """A Poisson-sampled Gaussian event."""
    return lambda dp: dp.SelfComposedDpEvent(
        dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(1 / mu)), count
    )


@pytest.mark.parametrize("mu", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("rate", [1e-3, 0.02, 0.3])
def test_sampled_gaussians_equal_those_of_dp_accounting_at_integer_orders(rate, mu):
    orders = [2, 3, 8, 24]
    theirs = accountant(sampled(rate, mu, 7), orders=orders).rdp
    curve = accounting.subsampled_curve(sampling_rate=rate, mu=mu, num_steps=7)
    np.testing.assert_allclose([curve(a) for a in orders], theirs, rtol=1e-9)
    table = accounting.subsampled_log_moments(24, sampling_rate=rate, mu=np.array([mu, mu]))
    assert table.shape == (2, 25)
    np.testing.assert_allclose(7 * table[1, orders] / (np.array(orders) - 1), theirs, rtol=1e-9)
    assert np.all(np.diff(table[0]) >= 0)


def test_conversions_equal_those_of_dp_accounting_at_the_same_orders():
    orders = [1.5, 2.0, 4.0, 9.0, 33.0]
    found = accountant(lambda dp: dp.GaussianDpEvent(1.3), orders=orders)
    curve = RenyiCurve(RenyiCurve.gaussian(1 / 1.3), orders)
    for delta in (1e-12, 1e-5, 1e-2):
        assert curve.epsilon(delta=delta) == pytest.approx(found.get_epsilon(delta), rel=1e-9)
    for epsilon in (0.1, 1.0, 5.0):
        assert curve.delta(epsilon=epsilon) == pytest.approx(found.get_delta(epsilon), rel=1e-9)


def test_noisy_training_is_not_below_the_numerical_composition():
    dp = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld")
    exact = pld.PLDAccountant().compose(sampled(0.01, 1.0, 1000)(dp)).get_epsilon(1e-5)
    assert round(exact, 4) == 1.8282
    bound = accounting.subsampled_curve(sampling_rate=0.01, mu=1.0, num_steps=1000)
    assert exact < bound.epsilon(delta=1e-5) < 1.2 * exact


def test_a_real_order_equals_the_integral_by_mpmath():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(25):
        for rate, mu in [(0.01, 1.0), (1e-4, 0.05), (0.5, 3.0)]:
            for order in (1.01, 5.3):
                q, r, a = mpmath.mpf(rate), mpmath.mpf(mu), mpmath.mpf(order)
                ends = [-14 + k * (order * mu + 28) / 20 for k in range(21)]
                moment = mpmath.quad(
                    lambda x, q=q, r=r, a=a: (
                        mpmath.npdf(x) * (1 - q + q * mpmath.exp(r * x - r * r / 2)) ** a
                    ),
                    ends,
                )
                ours = accounting.subsampled_log_moment(order, sampling_rate=rate, mu=mu)
                assert 0 <= float(ours / mpmath.log(moment) - 1) < 1e-9


def test_the_other_direction_of_a_sampled_gaussian_is_never_the_larger():
    rng = np.random.default_rng(0)
    x = np.linspace(-40, 40, 1601)
    density = np.exp(-0.5 * x * x) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    for _ in range(1000):
        rate, mu = math.exp(rng.uniform(-5, -0.1)), rng.uniform(0.1, 1.5)
        order = 1 + math.exp(rng.uniform(-1, 2))
        log_z = np.log1p(rate * np.expm1(mu * x - mu * mu / 2))
        reverse = np.sum(density * np.exp((1 - order) * log_z))
        ours = accounting.subsampled_log_moment(order, sampling_rate=rate, mu=mu)
        assert math.log(reverse) <= ours * (1 + 1e-9) + 1e-13


def test_private_training_for_one_row_and_for_several():
    pytest.importorskip("dp_accounting")
    scheme = {"noise_multiplier": 1.0, "sampling_rate": 0.01, "delta": 1e-5}
    exact = accounting.dp_training_epsilon(num_steps=100, accountant="pld", **scheme)
    assert round(exact, 6) == 0.718037
    assert exact < accounting.dp_training_epsilon(num_steps=100, **scheme)
    scheme = {"noise_multiplier": 4.0, "sampling_rate": 0.01, "delta": 1e-5, "num_steps": 200}
    for rows in (2, 3):
        exact = accounting.dp_training_epsilon(num_rows=rows, accountant="pld", **scheme)
        bound = accounting.dp_training_epsilon(num_rows=rows, **scheme)
        assert exact < bound < 2 * exact


def test_groups_of_private_training_split_delta_as_well_as_a_search_does():
    rows, delta = 3, 1e-5
    curve = accounting.subsampled_curve(sampling_rate=0.01, mu=0.25, num_steps=200)
    best = math.inf
    for one in np.geomspace(1e-12, delta / rows, 300):
        group = accounting.group_privacy(epsilon=curve.epsilon(delta=one), delta=one, size=rows)
        if group.delta <= delta:
            best = min(best, group.epsilon)
    best = min(best, accounting.renyi_group(curve, doublings=2).epsilon(delta=delta))
    found = accounting.dp_training_epsilon(
        noise_multiplier=4.0, num_steps=200, delta=delta, sampling_rate=0.01, num_rows=rows
    )
    assert best * (1 - 5e-3) <= found <= best * (1 + 1e-9)


def test_full_batch_training_is_one_gaussian_for_any_group():
    for rows in (1, 5):
        found = accounting.dp_training_epsilon(
            noise_multiplier=30.0, num_steps=64, delta=1e-6, num_rows=rows
        )
        exact = accounting.gaussian_epsilon(delta=1e-6, noise_stddev=30.0, sensitivity=rows * 8.0)
        assert exact <= found < exact * (1 + 1e-9)


def test_noise_of_private_training_is_enough_and_hardly_more():
    scheme = {"delta": 1e-6, "num_steps": 300, "sampling_rate": 0.02, "num_rows": 2}
    noise = accounting.dp_training_noise(epsilon=2.0, **scheme)
    cost = lambda z: accounting.dp_training_epsilon(noise_multiplier=z, **scheme)
    assert cost(noise) <= 2.0 < cost(noise * (1 - 2e-4))


def test_private_training_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(errors.MissingExtraError, match=r"jaxunlearn\[privacy\]"):
        accounting.dp_training_epsilon(
            noise_multiplier=1.0, num_steps=2, delta=1e-5, sampling_rate=0.5, accountant="pld"
        )


def test_sampling_everybody_or_nobody():
    every = accounting.subsampled_curve(sampling_rate=1.0, mu=0.7)
    nobody = accounting.subsampled_curve(sampling_rate=0.0, mu=0.7, num_steps=99)
    for order in (1.5, 2.0, 30.0):
        assert every(order) == pytest.approx(RenyiCurve.gaussian(0.7)(order), rel=1e-9)
        assert nobody(order) == 0.0
    assert nobody.epsilon(delta=1e-9) == 0.0


@given(st.floats(0.001, 0.5), st.floats(0.05, 2.0), st.floats(1.1, 40.0))
@settings(max_examples=60, deadline=None)
def test_more_sampling_larger_rows_and_higher_orders_cost_more(rate, mu, order):
    cost = lambda q, m, a: accounting.subsampled_log_moment(a, sampling_rate=q, mu=m) / (a - 1)
    here = cost(rate, mu, order)
    assert here <= cost(rate * 1.1, mu, order) * (1 + 1e-9)
    assert here <= cost(rate, mu * 1.1, order) * (1 + 1e-9)
    assert here <= cost(rate, mu, order * 1.1) * (1 + 1e-9)
    assert here <= order * mu * mu / 2 * (1 + 1e-9)


@pytest.mark.parametrize(("size", "rate", "mu"), [(1, 0.2, 0.8), (3, 0.1, 0.5), (12, 0.05, 0.2)])
def test_a_group_in_a_sample_equals_the_mixture_by_quadrature(size, rate, mu):
    x = np.linspace(-12, 60, 40_001)
    k = np.arange(size + 1)
    weights = special.binom(size, k) * rate**k * (1 - rate) ** (size - k)
    log_p = special.logsumexp(np.log(weights)[:, None] - 0.5 * (x - mu * k[:, None]) ** 2, axis=0)
    log_q = -0.5 * x**2
    for order in (2, 3, 6):
        log_terms = order * log_p + (1 - order) * log_q
        exact = special.logsumexp(log_terms) + math.log((x[1] - x[0]) / math.sqrt(2 * math.pi))
        bound = accounting.subsampled_group_divergence(order, sampling_rate=rate, mu=mu, size=size)
        assert 0 <= bound * (order - 1) / exact - 1 < 1e-6


def test_a_group_costs_less_than_by_doubling():
    alone = accounting.subsampled_curve(sampling_rate=0.05, mu=0.3)
    doubled = accounting.renyi_group(alone, doublings=2)(4.0)
    direct = accounting.subsampled_group_divergence(4, sampling_rate=0.05, mu=0.3, size=4)
    assert direct < doubled / 2


def test_curves_add_and_multiply():
    one, two = RenyiCurve.gaussian(0.3), RenyiCurve.gaussian(0.4)
    both = one + two
    assert both(3.0) == pytest.approx(RenyiCurve.gaussian(0.5)(3.0), rel=1e-9)
    assert sum([one, two])(3.0) == both(3.0)
    assert (4 * one)(3.0) == pytest.approx((one * 4)(3.0))
    assert (0 * one)(3.0) == 0.0
    assert both.epsilon(delta=1e-5) >= accounting.gaussian_epsilon(
        delta=1e-5, noise_stddev=1.0, sensitivity=0.5
    )
    few = RenyiCurve(one, [2.0, 3.0, 4.0])
    assert (few + RenyiCurve(two, [3.0, 4.0, 5.0])).orders == (3.0, 4.0)
    assert (few + two).orders == (2.0, 3.0, 4.0)


def test_what_cannot_be_bounded_fails_closed():
    unknown = RenyiCurve(lambda order: math.nan)
    assert unknown(2.0) == math.inf
    assert unknown.epsilon(delta=1e-5) == math.inf
    assert unknown.delta(epsilon=1.0) == 1.0
    assert accounting.renyi_epsilon(order=2.0, divergence=math.inf, delta=0.1) == math.inf
    assert accounting.renyi_group(RenyiCurve.gaussian(1.0), doublings=1)(1.5) == math.inf


def test_delta_that_covers_the_total_variation_needs_no_epsilon():
    assert accounting.renyi_epsilon(order=2.0, divergence=1e-8, delta=1e-3) == 0.0
    variation = math.sqrt(-math.expm1(-0.5))
    assert accounting.renyi_delta(order=2.0, divergence=0.5, epsilon=0.0) <= variation * (1 + 1e-9)


@given(st.floats(1e-6, 20.0), st.floats(1e-14, 0.1))
@settings(max_examples=40, deadline=None)
def test_zcdp_budget_inverts_zcdp_epsilon_on_the_safe_side(epsilon, delta):
    for paper in (True, False):
        rho = accounting.zcdp_budget(epsilon=epsilon, delta=delta, paper_constants=paper)
        back = accounting.zcdp_epsilon(rho, delta=delta, paper_constants=paper)
        assert back <= epsilon * (1 + 1e-11)
        if paper:
            assert back > epsilon * (1 - 1e-9)
            assert rho <= accounting.zcdp_budget(epsilon=epsilon, delta=delta)
    mu = accounting.gaussian_mu(epsilon=epsilon, delta=delta)
    assert accounting.zcdp_budget(epsilon=epsilon, delta=delta) <= mu * mu / 2 * (1 + 1e-9)


def test_zcdp_composes_exactly_and_rounds_up():
    rhos = [0.1] * 10
    total = accounting.compose_zcdp(rhos)
    assert Fraction(total) >= 10 * Fraction(0.1)
    assert Fraction(math.nextafter(total, 0)) < 10 * Fraction(0.1)
    assert accounting.zcdp_rho(sensitivity=2.0, noise_stddev=4.0) == pytest.approx(0.125)
    delta = accounting.zcdp_delta(0.125, epsilon=1.0)
    exact = accounting.gaussian_delta(epsilon=1.0, noise_stddev=2.0, sensitivity=1.0)
    assert exact <= delta < 6 * exact


def test_basic_composition_rounds_up_and_optimal_composition_is_exact_for_randomised_response():
    epsilon, delta = accounting.basic_composition([(0.1, 1e-6)] * 3)
    assert Fraction(epsilon) >= 3 * Fraction(0.1)
    assert Fraction(delta) >= 3 * Fraction(1e-6)
    # Two responses at e: the larger loss is 2 e with probability p^2.
    e, total = 0.7, 0.05
    p = math.exp(e) / (1 + math.exp(e))
    found = accounting.optimal_composition(epsilon=e, delta=0.0, num_releases=2, total_delta=total)
    assert p * p * -math.expm1(found - 2 * e) == pytest.approx(total, rel=1e-9)
    assert accounting.optimal_composition(
        epsilon=e, delta=0.1, num_releases=2, total_delta=0.1
    ) == math.inf  # fmt: skip
    assert accounting.optimal_composition(
        epsilon=0.01, delta=0.0, num_releases=2, total_delta=0.5
    ) == 0.0  # fmt: skip


def test_groups_at_the_ends_of_their_range():
    assert accounting.group_privacy(epsilon=0.0, delta=1e-6, size=4) == (0.0, 4e-6)
    assert accounting.group_privacy(epsilon=1.0, delta=0.0, size=10**4) == (10**4, 0.0)
    assert accounting.group_privacy(epsilon=1.0, delta=1e-300, size=10**4) == (10**4, 1.0)
    one = accounting.group_privacy(epsilon=0.3, delta=1e-7, size=1)
    assert one.epsilon == 0.3
    assert one.delta == pytest.approx(1e-7)


def test_noise_of_model_clipping_and_finetuning_is_enough_and_hardly_more():
    for epsilon, delta, steps in [(0.5, 1e-5, 3), (2.0, 1e-8, 20), (8.0, 1e-12, 1)]:
        noise = accounting.model_clipping_noise(
            epsilon=epsilon, delta=delta, radius=2.0, num_steps=steps
        )
        reached = lambda s, e=epsilon, t=steps: accounting.hockey_stick_recursion(
            epsilon=e, mus=[4.0 / s] * t
        )
        assert reached(noise) <= delta < reached(noise * (1 - 1e-6))
        assert accounting.model_clipping_steps(
            epsilon=epsilon, delta=delta, radius=2.0, noise_stddev=noise
        ) == steps  # fmt: skip
        scheme = accounting.ClippedSteps(1.0, 0.5, 0.05, 0.3)
        noise = accounting.clipped_finetuning_noise(
            scheme, epsilon=epsilon, delta=delta, num_steps=steps
        )
        cost = lambda s, d=delta, t=steps, c=scheme: accounting.gaussian_epsilon(
            delta=d, noise_stddev=1.0,
            sensitivity=accounting.clipped_finetuning_mu(c, num_steps=t, noise_stddev=s),
        )  # fmt: skip
        assert cost(noise) <= epsilon < cost(noise * (1 - 1e-8))


def test_the_hockey_stick_at_extreme_arguments():
    assert accounting.hockey_stick_recursion(epsilon=1.0, mus=[], start=0.3) == 0.3
    assert accounting.hockey_stick_recursion(epsilon=1.0, mus=[1.0], start=0.0) == 0.0
    assert accounting.hockey_stick_recursion(epsilon=0.0, mus=[1.0]) == pytest.approx(
        special.erf(0.5 / math.sqrt(2))
    )
    deep = accounting.hockey_stick_recursion(epsilon=900.0, mus=[1.0] * 3)
    assert 0 < deep < 1e-300
    with_noise = accounting.gaussian_delta(epsilon=1.0, noise_stddev=1.0, sensitivity=2.0)
    assert accounting.hockey_stick_recursion(epsilon=1.0, mus=[2.0]) == pytest.approx(with_noise)


@pytest.mark.parametrize(
    "scheme",
    [
        accounting.ClippedSteps(1.0, 1.0, 0.01),
        accounting.ClippedSteps(0.01, 10.0, 1e-4, 750.0),
        accounting.ClippedSteps(5.0, 0.1, 0.05, 1.0),
        accounting.ClippedSteps(0.0, 1.0, 0.1),
    ],
)
def test_the_best_number_of_steps_is_the_best(scheme):
    costs = [scheme.mu_of_unit_noise(t) for t in range(1, 801)]
    found = accounting.best_num_steps(scheme, max_steps=800)
    assert scheme.mu_of_unit_noise(found) == pytest.approx(min(costs), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RenyiCurve.gaussian(1.0)(1.0), "order=1.0 > 1"),
        (lambda: accounting.renyi_epsilon(order=2, divergence=-1.0, delta=0.1), "divergence=-1.0"),
        (lambda: accounting.renyi_triangle(
            RenyiCurve.gaussian(1.0), RenyiCurve.gaussian(1.0), split=1.0), "split"),
        (lambda: accounting.dp_training_epsilon(
            noise_multiplier=1.0, num_steps=1, delta=0.1, sampling_rate=0.0), "sampling_rate=0.0"),
        (lambda: accounting.dp_training_epsilon(
            noise_multiplier=1.0, num_steps=1, delta=0.1, sampling_rate=0.1, accountant="x"), "'x"),
        (lambda: accounting.subsampled_curve(sampling_rate=1.5, mu=1.0), "sampling_rate=1.5"),
        (lambda: accounting.subsampled_log_moments(2, sampling_rate=0.5, mu=-1.0), "mu >= 0"),
        (lambda: accounting.group_privacy(epsilon=1.0, delta=0.1, size=0), "size=0"),
        (lambda: accounting.stationary_lsi(lipschitz=1.0, noise_stddev=1.0), "lipschitz=1.0 < 1"),
        (lambda: accounting.ClippedSteps(1.0, 1.0, 1.0, 2.0).contraction, "learning_rate"),
        (lambda: accounting.per_instance_loss(
            np.ones((2, 3)), order=2.0, sampling_rate=0.1, clip=0.5), r"norms in \[0, clip=0.5\]"),
        (lambda: accounting.per_instance_loss(
            np.ones((2, 3)), order=2.0, sampling_rate=0.1, clip=1.0, exponents=(4.0, 5.0),
            failure_probability=0.1), "one exponent"),
        (lambda: accounting.NoisySGD(
            strong_convexity=1.0, smoothness=2.0, gradient_clip=1.0, noise_stddev=1.0,
            num_examples=10, batch_size=3), "batch_size=3 to divide 10"),
        (lambda: accounting.NoisySGD(
            strong_convexity=1.0, smoothness=2.0, gradient_clip=1.0, noise_stddev=1.0,
            num_examples=10, learning_rate=0.6), "learning_rate=0.6"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
