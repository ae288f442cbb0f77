"""Amplification by iteration: the taut string against a quadratic program and chains on a grid."""

import math

import numpy as np
import pytest
from scipy import optimize

from jaxunlearn import accounting
from jaxunlearn.accounting import contracted_mu, iteration_mu


def program(c, sigma, shift, start):
    """min sum (a_t / sigma_t)^2 with z_t = c_t z_(t-1) + s_t - a_t >= 0 and z_T = 0, by SLSQP."""
    steps = len(c)

    def left(a):
        z, out = start, []
        for t in range(steps):
            z = c[t] * z + shift[t] - a[t]
            out.append(z)
        return np.array(out)

    guess, z = [], start
    for t in range(steps):
        z = c[t] * z + shift[t]
        guess.append(z if t == steps - 1 else z / 2)
        z -= guess[-1]
    found = optimize.minimize(
        lambda a: np.sum((a / sigma) ** 2), guess, method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda a: left(a)[:-1]},
            {"type": "eq", "fun": lambda a: left(a)[-1]},
        ],
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    assert found.success
    return math.sqrt(found.fun)


@pytest.mark.parametrize("seed", range(12))
def test_the_taut_string_is_the_best_choice_of_the_theorem(seed):
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(2, 7))
    c, sigma = rng.uniform(0.3, 1.6, steps), rng.uniform(0.2, 2, steps)
    shift, start = rng.uniform(0, 1, steps) * rng.integers(0, 2, steps), rng.uniform(0, 1)
    mu = iteration_mu(contractions=c, noise_stddevs=sigma, shifts=shift, start=start)
    assert mu == pytest.approx(program(c, sigma, shift, start), rel=1e-5)


def test_noise_before_a_shift_does_not_cover_it():
    # phi = 0 and phi' = s forget the first noise altogether: the truth is s / sigma_2.
    scheme = {"contractions": [1.0, 1.0], "shifts": [0.0, 0.5]}
    mu = iteration_mu(noise_stddevs=[10.0, 0.1], **scheme)
    assert mu == pytest.approx(0.5 / 0.1, rel=1e-9)
    chord = 0.5 / math.hypot(10.0, 0.1)
    assert chord < mu / 50
    assert iteration_mu(noise_stddevs=[1.0, 0.0], **scheme) == math.inf


def test_steps_without_noise_or_shift_at_the_end_are_post_processing():
    scheme = {"contractions": [0.5, 3.0, 0.0], "shifts": [0.3, 0.0, 0.0], "start": 1.0}
    mu = iteration_mu(noise_stddevs=[0.7, 0.0, 0.0], **scheme)
    assert mu == pytest.approx(0.8 / 0.7, rel=1e-9)


def test_nothing_that_differs_gives_zero_and_nothing_that_covers_gives_infinity():
    assert iteration_mu(contractions=0.5, noise_stddevs=1.0, num_steps=3) == 0.0
    assert iteration_mu(contractions=0.5, noise_stddevs=0.0, start=1.0, num_steps=3) == math.inf
    assert contracted_mu(distance=1.0, contraction=0.5, noise_stddev=1.0, num_steps=0) == math.inf
    assert contracted_mu(distance=0.0, contraction=0.5, noise_stddev=1.0, num_steps=0) == 0.0
    tiny = contracted_mu(distance=1.0, contraction=0.5, noise_stddev=1.0, num_steps=10**6)
    assert 0 < tiny < 1e-300
    assert iteration_mu(contractions=1e-5, noise_stddevs=1.0, start=1.0, num_steps=99) > 0
    assert iteration_mu(contractions=1e9, noise_stddevs=1.0, start=1.0, num_steps=99) == math.inf


def test_a_projection_stops_the_growth_of_the_convex_bound():
    # Altschuler and Talwar 2022: beyond D / shift steps, a longer training gives nothing more away.
    mus = [
        iteration_mu(
            contractions=1.0, noise_stddevs=1.0, shifts=0.01, diameter=0.5, num_steps=steps
        )
        for steps in (25, 100, 1000, 10_000)
    ]
    without = [0.01 * math.sqrt(steps) for steps in (25, 100, 1000, 10_000)]
    assert mus[0] == pytest.approx(without[0], rel=1e-9)
    assert mus[-1] < without[-1] / 3
    assert mus[-1] <= mus[-2] * (1 + 1e-9) <= mus[1] * 2
    # From D apart, t steps of shift s: (D + t s) / sqrt(t) is least at t = D / s.
    assert mus[-1] == pytest.approx(2 * math.sqrt(0.5 * 0.01), rel=1e-3)


def test_convex_steps_from_the_ends_of_a_ball():
    direct = contracted_mu(distance=2.0, contraction=1.0, noise_stddev=0.5, num_steps=64)
    assert direct == pytest.approx(2.0 / (0.5 * 8), rel=1e-9)
    string = iteration_mu(
        contractions=1.0, noise_stddevs=0.5, start=99.0, diameter=2.0, num_steps=64
    )
    assert string == pytest.approx(direct, rel=1e-9)


MAPS = {
    "linear": lambda x, c: c * x,
    "clip": lambda x, c: c * np.clip(x, -0.7, 0.7),
    "fold": lambda x, c: c * np.abs(x),
    "sine": lambda x, c: c * np.sin(x),
}


def test_chains_of_nonlinear_maps_are_never_easier_to_tell_apart():
    rng = np.random.default_rng(0)
    grid = np.linspace(-7, 7, 561)
    ratios, problems = [], 0
    while problems < 250:
        steps = int(rng.integers(1, 4))
        c, sigma = rng.uniform(0.2, 1.2, steps), rng.uniform(0.3, 1.0, steps)
        shift, start = rng.uniform(0, 0.6, steps) * rng.integers(0, 2, steps), rng.uniform(0, 1)
        names = rng.choice(list(MAPS), steps)
        laws = []
        for side in (-0.5, 0.5):
            centre = MAPS[names[0]](np.array([side * start]), c[0]) + side * shift[0]
            law = np.exp(-((grid - centre) ** 2) / (2 * sigma[0] ** 2))
            for t in range(1, steps):
                centre = MAPS[names[t]](grid, c[t]) + side * shift[t]
                kernel = np.exp(-((grid[:, None] - centre[None]) ** 2) / (2 * sigma[t] ** 2))
                law = kernel @ (law / law.sum())
            laws.append(law / law.sum())
        mu = iteration_mu(contractions=c, noise_stddevs=sigma, shifts=shift, start=start)
        if mu == 0.0:
            continue
        for epsilon in (0.0, 0.3 * mu, mu):
            bound = accounting.gaussian_delta(epsilon=epsilon, noise_stddev=1.0, sensitivity=mu)
            for p, q in (laws, laws[::-1]):
                true = np.maximum(p - math.exp(epsilon) * q, 0).sum()
                # The grid, 0.025 wide for a noise of 0.3 and more, is right to 1e-3 at kinks.
                assert true <= bound * (1 + 1e-3) + 1e-9
                ratios.append(bound / max(true, 1e-9))
                problems += 1
    assert len(ratios) >= 250
    assert 1.0 < np.median(ratios) < 20.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contractions": -1.0, "noise_stddevs": 1.0, "num_steps": 2}, "contractions >= 0"),
        ({"contractions": 1.0, "noise_stddevs": math.nan, "num_steps": 2}, "noise_stddevs >= 0"),
        ({"contractions": 1.0, "noise_stddevs": 1.0}, "one number of steps"),
        ({"contractions": [1.0] * 3, "noise_stddevs": [1.0] * 2}, "one number of steps"),
        ({"contractions": 1.0, "noise_stddevs": 1.0, "num_steps": 2, "start": -1}, "start=-1"),
        ({"contractions": 1.0, "noise_stddevs": 1.0, "num_steps": 2, "diameter": 0}, "diameter=0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        iteration_mu(**arguments)
