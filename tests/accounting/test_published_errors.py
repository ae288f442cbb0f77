"""Formulas of published code that are wrong, written out, and on which side of them we stand."""

import math

import numpy as np
import pytest
from scipy import integrate, special

from jaxunlearn import accounting
from jaxunlearn.accounting import ClippedSteps, NoisySGD, RenyiCurve

DELTA = 1e-5


def renyi_epsilon_with_one_divergence_for_all_orders(divergence, delta):
    """The conversion with a divergence that does not grow with the order, at the best of them."""
    orders = np.geomspace(1.01, 1e6, 4000)
    return np.min(
        divergence - (np.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    )


@pytest.mark.parametrize(
    ("logged", "claimed", "true"),
    [(0.1, 0.104, 1.76), (1.0, 1.004, 6.57), (10.0, 10.004, 28.4), (100.0, 100.004, 159.0)],
)
def test_a_renyi_epsilon_must_be_taken_at_its_own_order(logged, claimed, true):
    wrong = renyi_epsilon_with_one_divergence_for_all_orders(logged, DELTA)
    assert wrong <= claimed
    # That code adds the noise of D_alpha <= alpha * logged.
    exact = accounting.gaussian_epsilon(
        delta=DELTA, noise_stddev=1.0, sensitivity=math.sqrt(2 * logged)
    )
    assert wrong < exact <= accounting.zcdp_epsilon(logged, delta=DELTA)
    assert exact == pytest.approx(true, rel=3e-3)


@pytest.mark.parametrize(
    ("logged", "true"), [(0.1, 2.6), (1.0, 10.0), (10.0, 46.0), (100.0, 284.0)]
)
def test_the_branch_without_l2_adds_half_the_variance(logged, true):
    steps = ClippedSteps(1.0, 1.0, 0.01)
    reach = 2 * 1.0 + 2 * 0.01 * 1.0 * 100
    printed = reach / math.sqrt(4 * logged * 100)
    mu = accounting.clipped_finetuning_mu(steps, num_steps=100, noise_stddev=printed)
    assert mu**2 / 2 == pytest.approx(2 * logged, rel=1e-9)
    exact = accounting.gaussian_epsilon(delta=DELTA, noise_stddev=1.0, sensitivity=mu)
    assert exact > renyi_epsilon_with_one_divergence_for_all_orders(logged, DELTA)
    assert exact == pytest.approx(true, rel=5e-3)
    needed = math.sqrt(2) * printed
    assert accounting.clipped_finetuning_mu(steps, num_steps=100, noise_stddev=needed) ** 2 / 2 == (
        pytest.approx(logged, rel=1e-9)
    )


def test_group_privacy_by_the_last_term_alone_counts_too_little():
    epsilon, delta, size = 0.1, 1e-8, 10
    printed = delta * math.exp((size - 1) * epsilon)
    right = accounting.group_privacy(epsilon=epsilon, delta=delta, size=size).delta
    assert right > 6 * printed
    # It is wrong for a mechanism that exists: size * mu apart at the same noise.
    mu = accounting.gaussian_mu(epsilon=epsilon, delta=delta)
    group = accounting.gaussian_delta(
        epsilon=size * epsilon, noise_stddev=1.0, sensitivity=size * mu
    )
    assert group <= right


def test_the_classic_gaussian_formula_is_unsafe_above_epsilon_one_and_wasteful_below():
    classic = lambda epsilon: math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon
    ours = lambda epsilon: accounting.gaussian_noise_stddev(
        epsilon=epsilon, delta=DELTA, sensitivity=1.0
    )
    assert classic(10.0) < ours(10.0)
    assert (
        accounting.gaussian_delta(epsilon=10.0, noise_stddev=classic(10.0), sensitivity=1) > DELTA
    )
    assert classic(1.0) > 1.29 * ours(1.0)


def test_lambda_enters_the_newton_bound_cubed():
    # Scaling the loss by s scales l2, L and M by s and moves no minimiser.
    bound = lambda s: accounting.newton_distance(
        num_forgotten=3, num_retained=97, l2=0.1 * s, lipschitz=1.0 * s, hessian_lipschitz=0.5 * s
    )
    squared = lambda s: 0.5 * s * (3 * 1.0 * s) ** 2 / (2 * (0.1 * s) ** 2 * 97**2)
    assert bound(8.0) == pytest.approx(bound(1.0), rel=1e-12)
    assert squared(8.0) == pytest.approx(8 * squared(1.0), rel=1e-12)
    # With l2 < 1 the square in its place gives less than the bound, and too little noise.
    assert squared(1.0) < bound(1.0)


def test_a_batch_of_removals_costs_its_square():
    sizes = {"l2": 1e-3, "gradient_bound": 1.0, "curvature_lipschitz": 0.25}
    for paper in (False, True):
        batch = accounting.worst_case_residual(
            num_removed=20, num_retained=980, paper_constants=paper, **sizes
        )
        one = accounting.worst_case_residual(
            num_removed=1, num_retained=980, paper_constants=paper, **sizes
        )
        assert batch == pytest.approx(400 * one, rel=1e-9)
        assert batch > 19 * (20 * one)


def test_a_quarter_bounds_the_second_derivative_and_not_its_slope():
    t = np.linspace(-12, 12, 400_001)
    s = special.expit(t)
    slope = np.abs(s * (1 - s) * (1 - 2 * s))
    assert slope.max() <= 1 / (6 * math.sqrt(3)) < slope.max() * (1 + 1e-9)
    assert round(1 / (6 * math.sqrt(3)), 7) == 0.0962250


def test_power_iteration_bounds_the_spectral_norm_from_below():
    rng = np.random.default_rng(0)
    under = 0
    for _ in range(50):
        x = rng.normal(size=(200, 20))
        vector = rng.normal(size=20)
        for _ in range(20):
            vector = x.T @ (x @ vector)
            vector /= np.linalg.norm(vector)
        exact = np.linalg.norm(x, 2)
        under += np.linalg.norm(x @ vector) < exact
        assert accounting.spectral_norm_bound(x.T @ x, num_rows=200) >= exact
    assert under > 40


def noisy_setting(radius=100.0):
    m = 1e-6 * 11264
    return NoisySGD(
        strong_convexity=m, smoothness=0.25 + m, gradient_clip=1.0, noise_stddev=0.03,
        num_examples=11264, radius=radius,
    )  # fmt: skip


def test_the_published_bound_of_noisy_sgd_is_twice_the_one_by_iteration():
    run = noisy_setting()
    distance = run.drift(1)
    rate, sigma, c, steps = run.rate, run.noise_stddev, run.contraction, 5
    printed = distance**2 / (2 * rate * sigma**2) * (1 - c**2) / (c ** (-2 * steps) - 1)
    assert printed == pytest.approx(run.mu(distance, steps) ** 2, rel=1e-9)
    assert printed == pytest.approx(2 * (run.mu(distance, steps) ** 2 / 2), rel=1e-9)


def test_no_projection_is_not_a_projection_to_the_origin():
    # Taking R = 0 where there is no projection drops the terms of a training cut short.
    dropped = noisy_setting(1e-30).unconverged_curve(num_epochs=5, trained_epochs=10)
    with_radius = noisy_setting(100.0).unconverged_curve(num_epochs=5, trained_epochs=10)
    assert with_radius(8.0) > 1e3 * max(dropped(8.0), 1e-9)
    with pytest.raises(ValueError, match="Expected a finite radius"):
        noisy_setting(math.inf).unconverged_curve(num_epochs=5, trained_epochs=10)
    with pytest.raises(ValueError, match="Expected radius=0"):
        noisy_setting(0.0)


def test_a_training_cut_short_costs_the_square_of_its_distance_over_the_variance():
    # Published code adds the plain distance 2 R c^(2 T) to a divergence, and fixes T at 3000.
    run = noisy_setting(100.0)
    order, split, trained, steps = 8.0, 2.0, 40, 5
    c, variance = run.contraction, run.step_noise**2
    drift = run.drift(1)
    own = drift**2 / variance * (1 - c * c) / (c ** (-2 * steps) - 1)
    far = (200.0) ** 2 / variance * (1 - c * c) / (c ** (-2 * 3000) - 1)
    wrong = split * (order - 0.5) * far
    wrong += (order - 0.5) / (order - 1) * (split * order * own + 200.0 * c ** (2 * 3000))
    right = run.unconverged_curve(num_epochs=steps, trained_epochs=trained)
    assert right(order) > 10 * wrong


def test_the_first_step_has_the_largest_holder_order():
    # Two steps, alpha 8, p 3: the row moves the first state by 1, and the second step by 0.4 only
    # where the first came out above 8. Then the divergence is known.
    alpha, p = 8.0, 3.0
    exact = alpha / 2 + math.log(0.5 + 0.5 * math.exp(alpha * (alpha - 1) * 0.16 / 2)) / (alpha - 1)
    assert round(exact, 4) == 4.5426
    orders = accounting.holder_orders(alpha, num_steps=2, exponent=p)
    weights = accounting.holder_weights(alpha, num_steps=2, exponent=p)
    rare = special.ndtr(-7.0)  # above 8, of a state with mean 1
    log_moment = lambda order, r: order * (order - 1) * r * r / 2

    def bound(order_of_first, weight_of_first, order_of_second, weight_of_second):
        second = math.log1p(rare * math.expm1(p * log_moment(order_of_second, 0.4)))
        first = p * log_moment(order_of_first, 1.0)
        return weight_of_first * first + weight_of_second * second

    forward = bound(orders[0], weights[0], orders[1], weights[1])
    reverse = bound(orders[1], weights[1], orders[0], weights[0])
    assert round(forward, 4) == 4.0565
    assert forward < exact < reverse
    assert round(reverse, 2) == 5.75
    density = lambda x: np.exp(-0.5 * (x - 8.0) ** 2) / math.sqrt(2 * math.pi)
    above = integrate.quad(density, 8.0, 30.0)[0]
    assert above == pytest.approx(0.5, abs=1e-9)


def test_orders_by_one_over_p_are_larger_than_they_need_be():
    alpha, p = 2.0, 12.0
    printed = [alpha]
    for _ in range(3):
        printed.append(printed[-1] * p / (p - 1) - 1 / p)
    ours = accounting.holder_orders(alpha, num_steps=4, exponent=p)
    assert np.all(np.array(printed[1:]) > ours[1:])


def test_factorials_overflow_where_logarithms_do_not():
    with pytest.raises(OverflowError):
        float(math.factorial(200))
    table = accounting.subsampled_log_moments(300, sampling_rate=0.01, mu=0.5)
    assert np.all(np.isfinite(table))
    exact = accounting.subsampled_log_moment(300.0, sampling_rate=0.01, mu=0.5)
    assert table[300] == pytest.approx(exact, rel=1e-9)


def test_norms_rounded_to_the_nearest_are_no_bound():
    norms = np.full(100, 0.14)
    loss = lambda r: accounting.per_instance_loss(r, order=2.0, sampling_rate=0.1, clip=1.0).value
    assert loss(np.round(norms, 1)) < loss(norms) < loss(np.ceil(norms * 10) / 10)


def test_a_mean_over_runs_is_biased_low_and_says_so():
    rng = np.random.default_rng(0)
    norms = np.minimum(rng.lognormal(-2, 1, (8, 6)), 1.0)
    scheme = {"order": 2.0, "sampling_rate": 0.2, "clip": 1.0}
    estimate = accounting.per_instance_loss(norms, **scheme)
    certified = accounting.per_instance_loss(norms, **scheme, failure_probability=0.01)
    assert estimate.kind == "estimate"
    assert certified.kind == "certified"
    assert estimate.value < certified.value <= certified.data_independent
    zero = accounting.per_instance_loss(np.zeros((2, 6)), **scheme)
    assert zero.value == 0.0


def test_a_float_sum_of_costs_drifts_and_the_odometer_does_not():
    total = 0.0
    for _ in range(10):
        total += 0.1
    assert total < 1.0  # a float sum would sell an eleventh share of 1e-16
    odometer = accounting.Odometer(totals={"epsilon": 1.0})
    request = accounting.Request(accounting.Option(name="a", costs={"epsilon": 0.1}))
    spent = odometer.start()
    for _ in range(10):
        spent = odometer.spend(spent, request)
    assert spent.totals["epsilon"] == accounting.units_up(1.0)
    tiny = accounting.Request(accounting.Option(name="a", costs={"epsilon": 1e-16}))
    assert not odometer.preview(spent, tiny).fits


def test_the_deep_newton_bound_is_no_better_than_clipping():
    for damping in (1.0, 100.0):
        bound = accounting.deep_newton_distance(
            radius=20.0, damping=damping, least_curvature=0.0, hessian_lipschitz=0.1
        )
        assert bound >= 2 * 20.0


def test_the_curve_of_a_gaussian_is_not_flat():
    assert RenyiCurve.gaussian(1.0)(20.0) == pytest.approx(10.0)


# --- clipping and contraction ------------------------------------------------------------------


def lipschitz_of_clipped_steps(gradients, setting, points):
    """The largest ||step(x + h v) - step(x)|| / h over points x and 400 directions v."""

    def step(x):
        g = gradients(x)
        g = g * np.minimum(1, setting.gradient_clip / np.linalg.norm(g, axis=-1, keepdims=True))
        return x - setting.rate * (g + setting.strong_convexity * x)

    angles = np.linspace(0, np.pi, 400)
    v = 1e-5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    moved = step(points[:, None] + v) - step(points[:, None])
    return np.linalg.norm(moved, axis=-1).max() / 1e-5


def test_clipping_keeps_the_contraction_of_a_loss_of_one_number_and_breaks_that_of_others():
    setting = NoisySGD(
        strong_convexity=1e-3, smoothness=1 + 1e-3, gradient_clip=1.0, noise_stddev=1.0,
        num_examples=1,
    )  # fmt: skip
    points = np.random.default_rng(0).normal(size=(200, 2)) * 5
    points[0] = [5.0, 0.0]
    of_one_number = lambda x: (x @ np.array([0.6, 0.8]) - 1)[..., None] * np.array([0.6, 0.8])
    other = lambda x: np.stack([x[..., 0], np.full(x.shape[:-1], 5.0)], -1)
    assert lipschitz_of_clipped_steps(of_one_number, setting, points) <= setting.contraction + 1e-9
    assert lipschitz_of_clipped_steps(other, setting, points) > 1.014
