"""Figures that others have computed, to the digits they give; none rests on a published error."""

import math

import numpy as np
import pytest

from jaxunlearn import accounting
from jaxunlearn.accounting import (
    ClippedSteps,
    Descent,
    NoisySGD,
    NoisySteps,
    RenyiCurve,
    Stationarity,
)


def digits(value, expected: str):
    """Whether `value`, rounded outward by up to 1e-11 of it, is the decimal `expected`."""
    mantissa = expected.lower().split("e")[0].lstrip("-")
    places = len(mantissa.split(".")[1]) if "." in mantissa else 0
    exponent = int(expected.lower().split("e")[1]) if "e" in expected.lower() else 0
    return abs(value - float(expected)) <= 0.501 * 10.0 ** (exponent - places) + 1e-11 * value


@pytest.mark.parametrize(
    ("epsilon", "delta", "mu", "noise", "classic", "rho"),
    [
        (1.0, 1e-5, "0.268051", "3.73063", "4.84481", "0.035926"),
        (0.1, 1e-5, "0.032521", "30.74957", "48.44805", "0.000529"),
        (1.0, 1e-4, "0.313902", "3.18570", "4.34361", "0.049267"),
        (10.0, 1e-5, "2.000446", "0.49989", "0.48448", "2.000891"),
    ],
)
def test_the_exact_gaussian_table(epsilon, delta, mu, noise, classic, rho):
    found = accounting.gaussian_mu(epsilon=epsilon, delta=delta)
    assert digits(found, mu)
    assert digits(found**2 / 2, rho)
    stddev = accounting.gaussian_noise_stddev(epsilon=epsilon, delta=delta, sensitivity=1.0)
    assert digits(stddev, noise)
    assert digits(math.sqrt(2 * math.log(1.25 / delta)) / epsilon, classic)


def test_conversions_at_noise_one():
    assert digits(accounting.gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=1.0),
                  "4.377178095681")  # fmt: skip
    orders = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512, 1024]
    curve = RenyiCurve(lambda order: order / 2, orders)
    assert digits(curve.epsilon(delta=1e-5), "4.728507067")
    assert digits(accounting.zcdp_epsilon(0.5, delta=1e-5, paper_constants=True), "5.298525912")
    one = accounting.renyi_epsilon(order=8.0, divergence=1.0, delta=1e-5)
    assert digits(one, "2.2141091678")
    back = accounting.renyi_delta(order=8.0, divergence=1.0, epsilon=2.0)
    assert digits(back, "4.476153907529e-5")


@pytest.mark.parametrize(
    ("order", "rate", "mu", "expected"),
    [
        (2, 0.01, 1.0, "1.7181342207e-4"),
        (8, 0.01, 1.0, "8.9364390761e-4"),
        (32, 0.01, 1.0, "1.1246275937e+1"),
        (8, 0.01, 0.1, "4.0224744306e-6"),
        (8, 128 / 60000, 1.0, "3.2437095372e-5"),
        (8, 0.1, 0.5, "1.3725430103e-2"),
    ],
)
def test_renyi_moments_of_the_subsampled_gaussian(order, rate, mu, expected):
    moments = accounting.subsampled_log_moments(order, sampling_rate=rate, mu=mu)
    assert digits(moments[order] / (order - 1), expected)
    alone = accounting.subsampled_group_divergence(order, sampling_rate=rate, mu=mu, size=1)
    assert digits(alone, expected)


def test_noisy_training_by_renyi_accounting():
    curve = accounting.subsampled_curve(sampling_rate=0.01, mu=1.0, num_steps=1000)
    assert digits(curve.epsilon(delta=1e-5), "2.1014")


def test_groups():
    epsilon, delta = accounting.group_privacy(epsilon=0.1, delta=1e-8, size=10)
    assert digits(epsilon, "1.0")
    assert digits(delta, "1.63380e-7")


def test_newton_removal_in_the_published_constants():
    sizes = {"num_forgotten": 10, "num_retained": 9990, "l2": 0.1}
    printed = accounting.newton_distance(
        **sizes, lipschitz=1.0, hessian_lipschitz=0.5, as_printed=True
    )
    assert digits(printed, "1.0e-3")
    assert digits(printed * math.sqrt(2 * math.log(1.25 / 1e-5)), "4.844805e-3")


def test_budgets_of_objective_perturbation():
    assert digits(math.sqrt(2 * math.log(1.5 / 1e-4)), "4.385386")
    assert digits(math.sqrt(2 * math.log(1.5 / 1e-5)), "4.882293")
    budget = lambda noise: accounting.removal_budget(
        noise_stddev=noise, epsilon=1.0, delta=1e-4, paper_constants=True
    )
    assert digits(budget(10.0), "2.28030")
    assert digits(budget(1.0), ".2280300946")
    # Theorem 1, 200 removals one after another from 5000 rows at l2 = 1e-3.
    worst = [
        accounting.worst_case_residual(
            num_removed=1, num_retained=5000 - t, l2=1e-3, gradient_bound=1.0,
            curvature_lipschitz=0.25, paper_constants=True,
        )
        for t in range(1, 201)
    ]  # fmt: skip
    assert digits(accounting.total_residual(worst), "4.08e4")


def descent_on_mnist():
    num_examples = 11982
    m = 1e-6 * num_examples
    return Descent(m, 0.25 + m, 1.0, num_examples)


def test_descent_to_delete_on_mnist():
    descent = descent_on_mnist()
    delta = 1 / descent.num_examples
    assert digits(descent.rate, ".9125287")
    for steps, expected in [(1, "2.58471"), (2, "1.23325"), (5, "0.42688")]:
        noise = accounting.output_only_noise(
            descent, epsilon=1.0, delta=delta, num_steps=steps, paper_constants=True
        )
        assert digits(noise, expected)
        ours = accounting.output_only_noise(descent, epsilon=1.0, delta=delta, num_steps=steps)
        assert ours < noise / 2
    plan = accounting.full_state_schedule(
        descent, epsilon=1.0, delta=delta, dimension=784, num_updates=100
    )
    assert plan.base_steps == 91
    assert plan.steps[0] == 123
    assert sum(plan.steps) == 12476


def setting(num_examples, noise_stddev=0.03, batch_size=None):
    m = 1e-6 * num_examples
    return NoisySGD(
        strong_convexity=m, smoothness=0.25 + m, gradient_clip=1.0, noise_stddev=noise_stddev,
        num_examples=num_examples, batch_size=batch_size,
    )  # fmt: skip


def epochs(num_examples, num_requests=100, batch_size=None, **constants):
    return accounting.noisy_sgd_epochs(
        setting(num_examples, batch_size=batch_size), epsilon=1.0, delta=1 / num_examples,
        request_sizes=[1] * num_requests, **constants,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_examples", "constants", "first", "total"),
    [
        (11264, {"paper_constants": True}, [2, 5, 7, 8, 9, 9], 886),
        (9728, {"paper_constants": True}, [3, 7, 10, 11, 12, 12], 1183),
        (11264, {"conversion": "mironov"}, [1, 3, 5, 6, 7, 7], 687),
        (9728, {"conversion": "mironov"}, [2, 4, 7, 9], 933),
    ],
    ids=["mnist", "cifar10", "mnist-exact", "cifar10-exact"],
)
def test_epochs_of_noisy_sgd_over_a_hundred_requests(num_examples, constants, first, total):
    found = epochs(num_examples, **constants)
    assert found[: len(first)] == first
    assert sum(found) == total


def test_exact_conversions_need_fewer_epochs_still():
    published, amplified = 886, 687
    tight = sum(epochs(11264, conversion="renyi"))
    assert sum(epochs(11264)) <= tight < amplified < published


def test_mini_batches_need_one_epoch_a_request():
    for size in (128, 256, 512):
        assert epochs(11264, 100, size, paper_constants=True) == [1] * 100


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(0.1872, ".0500"), (0.094, ".0997"), (0.019, ".4980"), (0.0096, ".9976"), (0.0049, "1.9998"),
     (0.0021, "4.9537")],
)  # fmt: skip
def test_one_step_of_langevin_unlearning(noise, expected):
    curve = accounting.langevin_curve(
        setting(11982, noise), num_replaced=1, num_steps=[1], paper_constants=True
    )
    assert digits(curve.epsilon(delta=1 / 11982, paper_constants=True), expected)


@pytest.mark.parametrize(
    ("num_replaced", "expected"),
    [
        (20, [1163, 1386, 1405, 1418, 1434]),
        (10, [778, 1044, 1085, 1116, 1151, 1193, 1246, 1309, 1379, 1455]),
    ],
)
def test_steps_of_langevin_unlearning_request_by_request(num_replaced, expected):
    found = accounting.langevin_steps(
        setting(11982), epsilon=1.0, delta=1 / 11982, num_replaced=num_replaced,
        num_requests=len(expected), paper_constants=True,
    )  # fmt: skip
    assert found == expected


@pytest.mark.slow
def test_steps_of_langevin_unlearning_over_twenty_requests():
    found = accounting.langevin_steps(
        setting(11982), epsilon=1.0, delta=1 / 11982, num_replaced=5, num_requests=20,
        paper_constants=True,
    )  # fmt: skip
    assert found[:3] == [354, 715, 789]
    assert sum(found) == 26529


def test_clipped_finetuning():
    strong = ClippedSteps(0.01, 10.0, 1e-4, 750.0)
    mu = accounting.clipped_finetuning_mu(strong, num_steps=100, noise_stddev=0.01)
    assert digits(mu**2 / 2, "0.5132279")
    free = ClippedSteps(1.0, 1.0, 0.01)
    mu = accounting.clipped_finetuning_mu(free, num_steps=100, noise_stddev=0.1)
    assert digits(mu**2 / 2, "8.000000")


def test_model_clipping():
    one = accounting.hockey_stick_recursion(epsilon=1.0, mus=[0.2])
    assert digits(one, "1.75e-8")
    six = accounting.hockey_stick_recursion(epsilon=1.0, mus=[2.0] * 6)
    assert digits(six, "2.65e-8")
    steps = lambda radius: accounting.model_clipping_steps(
        epsilon=1.0, delta=1e-5, radius=radius, noise_stddev=1.0
    )
    assert [steps(0.1), steps(1.0), steps(10.0)] == [1, 6, None]


def test_rewinding():
    sizes = {"num_forgotten": 10, "num_examples": 1000, "gradient_bound": 1.0}
    sizes |= {"learning_rate": 0.01, "num_steps": 200, "smoothness": 1.0}
    expected = {20: ".121917", 100: ".092224", 180: ".026404"}
    for rewound, value in expected.items():
        assert digits(accounting.rewind_distance(**sizes, num_rewound=rewound), value)
    assert accounting.rewind_distance(**sizes, num_rewound=200) == 0.0


def test_steps_to_unlearn():
    rate = accounting.contraction_rate(lipschitz=1 - 0.1 * 0.5)
    assert digits(rate, ".10258658878")
    assert accounting.steps_to_unlearn(divergence=1.0, target=0.01, order=4.0, rate=rate) == 180
    rest = Stationarity(learned=0.0, reference=0.0)
    found = [
        accounting.steps_to_stationary_target(
            divergence=divergence, target=0.1, order=2.0, rate=0.01, stationarity=rest
        )
        for divergence in (0.1, 1.0, 10.0, 100.0)
    ]
    assert found == [224, 1145, 2066, 2987]
    assert set(np.diff(found)) == {921}


def test_contraction_of_an_autoregression():
    lipschitz, noise = 0.9, math.sqrt(2 * 0.1) * 0.5
    constant = accounting.stationary_lsi(lipschitz=lipschitz, noise_stddev=noise)
    steps = NoisySteps(lipschitz, noise, constant)
    exact = ["6.156", "2.64996", ".92398", ".11233", ".00166"]
    bound = ["7.20999", "5.84009", "4.48772", "2.64996", ".92398"]
    for k, true, above in zip((1, 5, 10, 20, 40), exact, bound, strict=True):
        # Same covariance on both sides: D_alpha is proportional to the squared shift.
        assert digits(7.6 * lipschitz ** (2 * k), true)
        assert digits(7.6 * accounting.renyi_decay(steps, order=4.0, num_steps=k), above)


def test_holder_schedule():
    orders = accounting.holder_orders(2.0, num_steps=4, exponent=12.0)
    np.testing.assert_allclose(orders, [2, 2.09090909, 2.19008264, 2.29827198], atol=5e-9)
    weights = accounting.holder_weights(2.0, num_steps=4, exponent=12.0)
    expected = [0.08333333, 0.07638889, 0.07002315, 0.06418789]
    np.testing.assert_allclose(weights, expected, atol=5e-9)


def test_per_instance_bound_of_two_runs():
    norms = np.array([[0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    scheme = {"order": 2.0, "sampling_rate": 0.1}
    found = accounting.per_instance_loss(norms, **scheme, clip=0.5, exponents=(12.0,))
    assert found.kind == "estimate"
    np.testing.assert_allclose(found.value, 5.204543037e-3, rtol=1e-6)
    np.testing.assert_allclose(found.data_independent, 1.1344913065e-2, rtol=1e-6)
    logs = accounting.step_losses(norms, **scheme, exponent=12.0)
    weights = accounting.holder_weights(2.0, num_steps=4, exponent=12.0)[::-1]
    terms = weights * np.log(np.mean(np.exp(logs), axis=0))
    expected = [1.073450537e-3, 1.021800477e-3, 1.253374531e-3, 1.855917492e-3]
    np.testing.assert_allclose(terms[::-1], expected, rtol=1e-6)
    for run, plug_in in zip(norms, (5.919157578e-3, 3.183425933e-3), strict=True):
        alone = accounting.per_instance_loss(run, **scheme, clip=0.5)
        assert alone.kind == "ranking"
        np.testing.assert_allclose(alone.value, plug_in, rtol=1e-6)
