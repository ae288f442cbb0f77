"""Every bound against the true divergence where that has a closed form, 1000 random problems each.

Each test says how loose the bound is as well: the median of bound over truth.
"""

import math

import numpy as np
import pytest
from scipy import special

from jaxunlearn import accounting
from jaxunlearn.accounting import ClippedSteps, NoisySGD, NoisySteps, RenyiCurve

NUM = 1000


def loose(bounds, truths):
    """Median of bound over truth, after checking that no bound is below its truth."""
    bounds, truths = np.asarray(bounds, float), np.asarray(truths, float)
    assert bounds.shape == truths.shape == (len(bounds),)
    assert len(bounds) >= NUM
    assert np.all(np.isfinite(truths))
    assert np.all(truths > 0)
    # The closed forms themselves are right to 1e-11.
    assert np.all(bounds >= truths * (1 - 1e-11)), np.min(bounds / truths)
    return float(np.median(bounds / truths))


def uniform(rng, low, high, num=NUM):
    """Log-uniform draws."""
    return np.exp(rng.uniform(math.log(low), math.log(high), num))


def exact_delta(epsilon, mu):
    """Balle and Wang 2018, plainly; good where delta is not tiny."""
    second = np.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    return special.ndtr(mu / 2 - epsilon / mu) - second


def test_epsilon_from_a_renyi_curve_is_never_below_the_gaussian_epsilon():
    rng = np.random.default_rng(0)
    mus, deltas = uniform(rng, 0.01, 5.0), uniform(rng, 1e-12, 1e-2)
    curve = [RenyiCurve.gaussian(m).epsilon(delta=d) for m, d in zip(mus, deltas, strict=True)]
    true = [
        accounting.gaussian_epsilon(delta=d, noise_stddev=1.0, sensitivity=m)
        for m, d in zip(mus, deltas, strict=True)
    ]
    keep = np.array(true) > 1e-6
    padding = np.flatnonzero(~keep)
    assert all(curve[i] >= true[i] for i in padding)
    filled = [(c, t) if t > 1e-6 else (1.0, 1.0) for c, t in zip(curve, true, strict=True)]
    assert loose(*zip(*filled, strict=True)) < 1.12


def test_delta_from_a_renyi_curve_is_never_below_the_gaussian_delta():
    rng = np.random.default_rng(1)
    mus = uniform(rng, 0.1, 3.0)
    epsilons = mus * rng.uniform(0.5, 4.0, NUM)
    curve = [RenyiCurve.gaussian(m).delta(epsilon=e) for m, e in zip(mus, epsilons, strict=True)]
    assert loose(curve, exact_delta(epsilons, mus)) < 6.0


def test_every_single_order_gives_a_valid_pair():
    rng = np.random.default_rng(2)
    for _ in range(NUM):
        mu, order = rng.uniform(0.1, 3), 1 + math.exp(rng.uniform(-4, 5))
        delta = math.exp(rng.uniform(-25, -1))
        divergence = order * mu * mu / 2
        epsilon = accounting.renyi_epsilon(order=order, divergence=divergence, delta=delta)
        simple = accounting.renyi_epsilon(
            order=order, divergence=divergence, delta=delta, paper_constants=True
        )
        assert epsilon <= simple
        assert exact_delta(epsilon, mu) <= delta * (1 + 1e-9)
        back = accounting.renyi_delta(order=order, divergence=divergence, epsilon=epsilon)
        if epsilon > 0:
            assert back <= delta * (1 + 1e-9)


def test_the_weak_triangle_holds_between_gaussians():
    rng = np.random.default_rng(3)
    bounds, truths = [], []
    for _ in range(NUM):
        there, back = rng.normal(size=2)
        order, split = 1 + math.exp(rng.uniform(-2, 3)), 1 + math.exp(rng.uniform(-2, 2))
        first, second = RenyiCurve.gaussian(abs(there)), RenyiCurve.gaussian(abs(back))
        bounds.append(accounting.renyi_triangle(first, second, split=split)(order))
        truths.append(order * (there + back) ** 2 / 2)
    assert loose(bounds, truths) < 40.0


def test_groups_under_renyi_and_zcdp_hold_for_the_gaussian():
    rng = np.random.default_rng(4)
    mus, orders = uniform(rng, 0.01, 2.0), 2 + uniform(rng, 0.1, 50.0)
    doublings = rng.integers(0, 4, NUM)
    bounds = [
        accounting.renyi_group(RenyiCurve.gaussian(m), doublings=int(c))(a)
        for m, c, a in zip(mus, doublings, orders, strict=True)
    ]
    truths = orders * (2.0**doublings * mus) ** 2 / 2
    assert loose(bounds, truths) < 2.5
    rhos = [
        accounting.group_zcdp(m * m / 2, int(2**c)) for m, c in zip(mus, doublings, strict=True)
    ]
    assert loose(rhos, truths / orders) < 1 + 1e-9


def test_iteration_is_never_below_a_linear_chain_and_equal_where_the_string_is_straight():
    rng = np.random.default_rng(5)
    bounds, truths = [], []
    for _ in range(NUM):
        steps = int(rng.integers(1, 40))
        c = rng.uniform(0.3, 1.4, steps)
        sigma, shift = rng.uniform(0.05, 2.0, steps), rng.uniform(0, 1, steps)
        start = rng.uniform(0, 3)
        moved, variance = start, 0.0
        for t in range(steps):
            moved, variance = c[t] * moved + shift[t], c[t] ** 2 * variance + sigma[t] ** 2
        truths.append(moved / math.sqrt(variance))
        bounds.append(
            accounting.iteration_mu(contractions=c, noise_stddevs=sigma, shifts=shift, start=start)
        )
    assert loose(bounds, truths) < 1.15


def test_contraction_alone_is_exact_for_linear_chains():
    rng = np.random.default_rng(6)
    bounds, truths = [], []
    for _ in range(NUM):
        c, steps = rng.uniform(0.2, 1.1), int(rng.integers(1, 200))
        distance, sigma = rng.uniform(0.1, 9), rng.uniform(0.1, 3)
        truths.append(
            distance * c**steps / sigma / math.sqrt(sum(c ** (2 * j) for j in range(steps)))
        )
        bounds.append(
            accounting.contracted_mu(
                distance=distance, contraction=c, noise_stddev=sigma, num_steps=steps
            )
        )
    assert loose(bounds, truths) < 1 + 1e-9


def test_clipped_finetuning_is_exact_for_gradients_that_always_push_apart():
    rng = np.random.default_rng(7)
    bounds, truths = [], []
    for _ in range(NUM):
        scheme = ClippedSteps(*rng.uniform(0.01, 3, 2), rng.uniform(0.001, 0.2), rng.uniform(0, 4))
        steps, sigma = int(rng.integers(1, 60)), rng.uniform(0.01, 1)
        apart, variance = 2 * scheme.start_radius, 0.0
        for _ in range(steps):
            apart = scheme.contraction * apart + 2 * scheme.learning_rate * scheme.gradient_clip
            variance = scheme.contraction**2 * variance + sigma**2
        truths.append(apart / math.sqrt(variance))
        bounds.append(accounting.clipped_finetuning_mu(scheme, num_steps=steps, noise_stddev=sigma))
    assert loose(bounds, truths) < 1 + 1e-9


def test_log_sobolev_decay_is_never_below_that_of_gaussians():
    rng = np.random.default_rng(8)
    bounds, truths = [], []
    for _ in range(NUM):
        lipschitz, noise, variance = rng.uniform(0.3, 1.2), rng.uniform(0.2, 2), rng.uniform(0.1, 5)
        order, steps = 1 + math.exp(rng.uniform(-1, 3)), int(rng.integers(1, 30))
        moved, spread = 1.0, variance
        for _ in range(steps):
            moved, spread = lipschitz * moved, lipschitz**2 * spread + noise**2
        truths.append((moved**2 / spread) / (1 / variance))
        scheme = NoisySteps(lipschitz, noise, variance)
        bounds.append(accounting.renyi_decay(scheme, order=order, num_steps=steps))
        assert scheme.after(steps).lsi_constant == pytest.approx(spread, rel=1e-9)
    loose(bounds, truths)
    # Exact as the order goes to 1, and alpha-th roots above: the price of a general reference.
    near_one = accounting.renyi_decay(NoisySteps(0.9, 0.5, 1.0), order=1 + 1e-9, num_steps=7)
    spread = 1.0
    for _ in range(7):
        spread = 0.81 * spread + 0.25
    assert near_one == pytest.approx(0.81**7 / spread, rel=1e-6)


def test_the_model_clipping_recursion_is_never_below_the_chain_that_keeps_only_its_sign():
    # x -> Pi(slope x) with a steep slope goes to one of two ends of the ball, so that the chain is
    # one of two states, its last law a mixture of two Gaussians, and the divergence known.
    rng = np.random.default_rng(9)
    mu, epsilon = rng.uniform(0.3, 4.0, 4 * NUM), rng.uniform(0.01, 2.0, 4 * NUM)
    steps = rng.integers(1, 6, 4 * NUM)
    same = 0.5 + 0.5 * (2 * special.ndtr(mu / 2) - 1) ** (steps - 1)
    ratio = np.exp(epsilon)
    alive = same > ratio * (1 - same) * (1 + 1e-3)
    mu, epsilon, steps, same, ratio = (v[alive] for v in (mu, epsilon, steps, same, ratio))
    # Means at +-mu/2 of noise one; the likelihood ratio is `ratio` at x.
    with np.errstate(divide="ignore"):
        x = np.log((ratio * same - (1 - same)) / (same - ratio * (1 - same))) / mu
    high, low = special.ndtr(mu / 2 - x), special.ndtr(-mu / 2 - x)
    truths = same * high + (1 - same) * low - ratio * ((1 - same) * high + same * low)
    keep = truths > 1e-6
    bounds = [
        accounting.hockey_stick_recursion(epsilon=float(e), mus=[float(m)] * int(t))
        for e, m, t in zip(epsilon[keep], mu[keep], steps[keep], strict=True)
    ]
    assert loose(bounds, truths[keep]) < 1.5
    first = steps[keep] == 1
    np.testing.assert_allclose(np.array(bounds)[first], truths[keep][first], rtol=1e-8)


def test_subsampled_moments_are_never_below_the_exact_delta_of_one_step():
    rng = np.random.default_rng(10)
    bounds, truths = [], []
    for rate in uniform(rng, 0.005, 0.5, 10):
        mus = uniform(rng, 0.2, 3.0, 100)
        tables = accounting.subsampled_log_moments(48, sampling_rate=rate, mu=mus)
        for mu, table in zip(mus, tables, strict=True):
            epsilon = rng.uniform(0.05, 0.9) * math.log1p(rate * math.expm1(mu * 2.5))
            # z > e^epsilon where e^(mu x - mu^2/2) > 1 + (e^epsilon - 1)/q
            edge = (math.log1p(math.expm1(epsilon) / rate) + mu * mu / 2) / mu
            one, other = special.ndtr(-edge), special.ndtr(mu - edge)
            truths.append((1 - rate) * one + rate * other - math.exp(epsilon) * one)
            bounds.append(
                min(
                    accounting.renyi_delta(order=a, divergence=table[a] / (a - 1), epsilon=epsilon)
                    for a in range(2, 49)
                )
            )
    assert loose(bounds, truths) < 40.0


def test_optimal_composition_is_never_below_composed_gaussians_nor_above_basic_composition():
    rng = np.random.default_rng(11)
    bounds, truths, basics = [], [], []
    while len(bounds) < NUM:
        mu, count = rng.uniform(0.02, 0.4), int(rng.integers(2, 60))
        epsilon, total = rng.uniform(0.5, 3.0) * mu, 10 ** rng.uniform(-6, -3)
        each = accounting.gaussian_delta(epsilon=epsilon, noise_stddev=1.0, sensitivity=mu)
        total = max(total, 4 * each * count)
        if total > 0.1:
            continue
        bound = accounting.optimal_composition(
            epsilon=epsilon, delta=each, num_releases=count, total_delta=total
        )
        true = accounting.gaussian_epsilon(
            delta=total, noise_stddev=1.0, sensitivity=mu * math.sqrt(count)
        )
        if true > 1e-6:
            bounds.append(bound)
            truths.append(true)
            basics.append(count * epsilon)
    assert 1.0 < loose(bounds, truths) < 8.0
    assert np.all(np.array(bounds) <= np.array(basics) * (1 + 1e-9))


def ridge_chains(rng, num):
    """Noisy descent on ridge problems that differ in one label: means, covariance, settings."""
    rows, dim = 12, 3
    x = rng.normal(size=(num, rows, dim))
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    l2 = rng.uniform(0.05, 0.5, num)
    hessian = np.einsum("bni,bnj->bij", x, x) / rows + l2[:, None, None] * np.eye(dim)
    values = np.linalg.eigvalsh(hessian)
    rate, sigma = 1 / values[:, -1], rng.uniform(0.05, 1.0, num)
    step = np.eye(dim) - rate[:, None, None] * hessian
    push = rate[:, None] * x[:, 0] * (2 / rows)  # the label moves by 2, the gradient by 2 M, M = 1
    settings = [
        NoisySGD(
            strong_convexity=float(v[0]), smoothness=float(v[-1]), gradient_clip=1.0,
            noise_stddev=float(s), num_examples=rows,
        )
        for v, s in zip(values, sigma, strict=True)
    ]  # fmt: skip
    return step, push, 2 * rate * sigma**2, settings


def mahalanobis(shift, covariance):
    """mu^2 between Gaussians of one covariance."""
    return np.einsum("bi,bi->b", shift, np.linalg.solve(covariance, shift[..., None])[..., 0])


def test_noisy_sgd_and_langevin_are_never_below_gaussian_posteriors_on_ridge():
    rng = np.random.default_rng(12)
    step, push, variance, settings = ridge_chains(rng, NUM)
    shift = np.zeros_like(push)
    covariance = np.zeros_like(step)
    evolve = lambda cov: step @ cov @ step + variance[:, None, None] * np.eye(3)
    for _ in range(400):
        shift = np.einsum("bij,bj->bi", step, shift) + push
        covariance = evolve(covariance)
    learning = mahalanobis(shift, covariance)
    curves = [accounting.langevin_learning_curve(s, num_replaced=1) for s in settings]
    paper = [
        accounting.langevin_learning_curve(s, num_replaced=1, paper_constants=True)
        for s in settings
    ]
    order = 3.0
    tight = loose([c(order) for c in curves], order * learning / 2)
    published = loose([c(order) for c in paper], order * learning / 2)
    assert tight < 8.0
    assert published > 2 * tight * (1 - 1e-9)
    steps = 4
    for _ in range(steps):
        shift = np.einsum("bij,bj->bi", step, shift)
        covariance = evolve(covariance)
    left = mahalanobis(shift, covariance)
    mus = [s.mu(s.drift(1), steps) for s in settings]
    assert loose(np.square(mus), left) < 60.0
    decayed = [
        accounting.langevin_curve(s, num_replaced=1, num_steps=[steps])(order) for s in settings
    ]
    loose(decayed, order * left / 2)
    deltas = [s.epsilon(s.drift(1), steps, delta=1e-5) for s in settings]
    exact = [
        accounting.gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=math.sqrt(m))
        for m in left
    ]
    assert np.all(np.array(deltas) >= np.array(exact))


def test_two_requests_in_a_row_are_never_below_gaussian_posteriors_on_ridge():
    rng = np.random.default_rng(13)
    step, push, variance, settings = ridge_chains(rng, NUM)
    other = rng.permutation(push, axis=1)
    scale = np.linalg.norm(push, axis=1) / np.linalg.norm(other, axis=1)
    other = other * scale[:, None]
    shift, covariance = np.zeros_like(push), np.zeros_like(step)
    evolve = lambda cov: step @ cov @ step + variance[:, None, None] * np.eye(3)
    for _ in range(400):
        shift = np.einsum("bij,bj->bi", step, shift) + push
        covariance = evolve(covariance)
    drift = np.linalg.solve(np.eye(3) - step, other[..., None])[..., 0]
    for k in range(6):
        if k == 3:
            shift = shift + drift  # the second row goes: the target moves
        shift = np.einsum("bij,bj->bi", step, shift)
        covariance = evolve(covariance)
    left = mahalanobis(shift, covariance)
    bounds = []
    for s in settings:
        distance = s.drift(1) * s.shrink(3) + s.drift(1)
        bounds.append(s.mu(distance, 3) ** 2)
    loose(bounds, left)
    chained = [
        accounting.langevin_curve(s, num_replaced=1, num_steps=[3, 3])(2.0) for s in settings
    ]
    loose(chained, 2.0 * left / 2)


def test_full_state_descent_is_never_below_its_linear_chain():
    rng = np.random.default_rng(14)
    bounds, truths = [], []
    for _ in range(NUM):
        m, n = rng.uniform(0.1, 1), int(rng.integers(50, 500))
        descent = accounting.Descent(m, m + rng.uniform(0.1, 2), 1.0, n, n - 1)
        curvature, noise = rng.uniform(descent.strong_convexity, descent.smoothness), 0.01
        before, after = list(rng.integers(1, 20, 3)), list(rng.integers(1, 6, 2))
        rate = 2 / (descent.smoothness + descent.strong_convexity)
        c, moved, variance = 1 - rate * curvature, 0.0, 0.0
        for place, count in enumerate([*before, *after]):
            kept = c ** int(count)
            push = (1 - kept) * (2 / n) / curvature if place < len(before) else 0.0
            moved, variance = kept * moved + push, kept**2 * variance + noise**2
        truths.append(max(abs(moved) / math.sqrt(variance), 1e-12))
        bounds.append(
            accounting.full_state_mu(
                descent, noise_stddev=noise, steps_before=[int(b) for b in before],
                steps_after=[int(a) for a in after],
            )
        )  # fmt: skip
    loose(bounds, truths)


def test_the_budget_of_objective_perturbation_is_exact_for_a_fixed_residual():
    rng = np.random.default_rng(15)
    for _ in range(NUM):
        sigma, epsilon = math.exp(rng.uniform(-3, 3)), math.exp(rng.uniform(-4, 1.5))
        delta = 10 ** rng.uniform(-8, -2)
        scheme = {"noise_stddev": sigma, "epsilon": epsilon, "delta": delta}
        ours = accounting.removal_budget(**scheme)
        paper = accounting.removal_budget(**scheme, paper_constants=True)
        spent = lambda beta, s=sigma, e=epsilon: accounting.gaussian_delta(
            epsilon=e, noise_stddev=s, sensitivity=beta
        )
        assert spent(ours) <= delta < spent(ours * (1 + 1e-6))
        if epsilon <= 1:
            assert paper < ours
