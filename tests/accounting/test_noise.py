"""Host noise: the exact law, the grid, and what a release on it costs.

Statistical tests run at alpha = 1e-6 on fixed entropy; each says what it detects and rejects it.
"""

import ast
import hashlib
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

import jaxunlearn.accounting
from jaxunlearn.accounting import (
    add_grid_noise,
    certified_mu,
    certified_noise,
    compose_gaussian,
    discrete_gaussian,
    discretisation_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise_stddev,
    grid_of,
    grid_sensitivity,
    release_epsilon,
    release_mu,
    round_down,
    round_up,
    sampler,
)
from jaxunlearn.accounting import release as release_module
from jaxunlearn.errors import NonFiniteError

ALPHA = 1e-6
Z = float(-special.ndtri(ALPHA / 2))  # 4.89
WIDE = 2**24 + 5_000_001


def stream(seed):
    """A reproducible entropy source: SHAKE-256 of a seed and a counter."""
    calls = iter(range(10**9))
    return lambda n: hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(n)


def answers(words):
    """An entropy source that gives one word after another, whatever the length asked for."""
    words = iter(words)
    return lambda n: next(words)


def pmf(k, s):
    weights = np.exp(-(np.arange(-60 * s, 60 * s + 1) ** 2) / (2.0 * s * s))
    return np.exp(-(np.asarray(k) ** 2) / (2.0 * s * s)) / weights.sum()


def chi_square_p(samples, s):
    """p-value of the samples against the exact pmf, over all k with at least 20 expected."""
    k = np.arange(-8 * s, 8 * s + 1)
    expected = samples.size * pmf(k, s)
    kept = expected >= 20
    observed = np.array([np.sum(samples == value) for value in k[kept]])
    observed = np.append(observed, samples.size - observed.sum())
    expected = np.append(expected[kept], samples.size - expected[kept].sum())
    return special.chdtrc(kept.sum(), np.sum((observed - expected) ** 2 / expected))


def variance_fits(samples, s):
    """Two-sided test of the variance at ALPHA: n = 1e5 passes within 2.2 percent."""
    return abs(np.mean((samples / s) ** 2) - 1) < Z * math.sqrt(2 / samples.size)


def shape_fits(samples, s):
    """Chi-square over 64 bins of equal probability under N(0, s^2)."""
    counts = np.bincount((special.ndtr(samples / s) * 64).astype(int).clip(0, 63), minlength=64)
    expected = samples.size / 64
    return special.chdtrc(63, np.sum((counts - expected) ** 2) / expected) > ALPHA


@pytest.mark.parametrize("s", [1, 3, 10])
def test_samples_follow_the_exact_law_of_the_discrete_gaussian(s):
    """n = 1e5. Detects a scale off by 2/3 or 3/2 with p < 1e-100, checked on scale 3."""
    samples = discrete_gaussian(100_000, s, entropy=stream(f"law/{s}"))
    assert samples.dtype == np.int64
    assert chi_square_p(samples, s) > ALPHA
    if s == 3:
        assert chi_square_p(discrete_gaussian(100_000, 2, entropy=stream("2/3")), s) < ALPHA
    if s == 10:
        assert chi_square_p(discrete_gaussian(100_000, 15, entropy=stream("3/2")), s) < ALPHA


def test_a_rounded_continuous_gaussian_is_told_from_the_discrete_one():
    """Power of the chi-square test at scale 1: rounding adds 1/12 to the variance."""
    rounded = np.rint(special.ndtri((np.arange(100_000) + 0.5) / 100_000)).astype(np.int64)
    assert chi_square_p(rounded, 1) < ALPHA


@pytest.mark.parametrize("s", [2**24, WIDE, 2**25 - 1])
def test_wide_noise_has_the_right_scale_shape_and_no_memory(s):
    """n = 1e5: power above 0.9999 against 0.98 s, 1 against 2/3 s and 3/2 s."""
    samples = discrete_gaussian(100_000, s, entropy=stream(f"wide/{s}"))
    assert variance_fits(samples, s)
    assert shape_fits(samples, s)
    bound = Z / math.sqrt(samples.size)
    assert abs(np.mean(samples / s)) < bound
    assert abs(np.mean(samples[1:] / s * (samples[:-1] / s))) < bound
    beyond_three, sizes = np.sum(np.abs(samples) > 3 * s), 2 * special.ndtr(-3.0) * samples.size
    assert abs(beyond_three - sizes) < Z * math.sqrt(sizes)
    assert sizes > Z * math.sqrt(sizes)  # so that a law truncated at 3 would fail


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2, 0.98, 1.03])
def test_a_wrong_scale_is_detected(factor):
    samples = discrete_gaussian(100_000, int(2**24 * factor), entropy=stream(f"mutant/{factor}"))
    assert not variance_fits(samples, 2**24)


def test_a_uniform_of_the_right_variance_is_detected():
    words = np.frombuffer(stream("uniform")(800_000), "<u8") / 2.0**64
    samples = (words - 0.5) * math.sqrt(12)
    assert variance_fits(samples, 1.0)
    assert not shape_fits(samples, 1.0)


@pytest.mark.parametrize("ratio", [(0, 7), (1, 7), (1, 3), (5, 7), (1, 1)])
def test_bernoulli_exp_has_probability_exp_of_minus_the_ratio(ratio):
    """n = 2e5: detects an error of 0.0055 in the probability."""
    n, (a, b) = 200_000, ratio
    hits = sampler._bernoulli_exp(np.full(n, a, np.int64), b, stream(f"exp/{ratio}")).sum()
    p = math.exp(-a / b)
    assert abs(hits - n * p) <= Z * math.sqrt(n * p * (1 - p))


def test_the_acceptance_exponent_is_exact_in_integers():
    rng = np.random.default_rng(0)
    for s in [1, 2, 3, 1000, WIDE, 2**25 - 1]:
        magnitude = np.concatenate(
            [np.arange(5), rng.integers(0, 6 * s, 200), rng.integers(0, 10**5 * s, 50)]
        )
        units, rest = sampler._exponent(magnitude, s)
        for y, unit, part in zip(magnitude.tolist(), units.tolist(), rest.tolist()):
            assert 0 <= part < 2 * s * s
            assert unit * 2 * s * s + part == (y - s) ** 2


def test_uniform_integers_reject_the_words_that_would_bias_them():
    for bound, width in [(3, 2), (2**11 - 1, 2), (2**11 + 1, 4), (2**27 - 1, 4), (2**51 - 1, 8)]:
        surplus = 2 ** (8 * width) % bound
        words = [2 ** (8 * width) - 1, 2 ** (8 * width) - surplus, 2 ** (8 * width) - surplus - 1]
        source = sampler.checked(answers(word.to_bytes(width, "little") for word in words))
        assert sampler._uniform_below(bound, 1, source).tolist() == [bound - 1]
    counts = np.bincount(sampler._uniform_below(3, 90_000, stream("three")), minlength=3)
    assert np.all(np.abs(counts - 30_000) < Z * math.sqrt(20_000))


def test_the_same_entropy_gives_the_same_noise_and_other_entropy_other_noise():
    draw = lambda seed: discrete_gaussian(1000, WIDE, entropy=stream(seed))
    np.testing.assert_array_equal(draw("a"), draw("a"))
    assert np.sum(draw("a") == draw("b")) < 5
    assert np.sum(discrete_gaussian(1000, WIDE) == discrete_gaussian(1000, WIDE)) < 5


def test_a_release_is_the_rounded_values_plus_integer_noise_and_says_so():
    values = np.random.default_rng(0).normal(size=500) * 1e3
    release = add_grid_noise(values, noise_stddev=0.37, sensitivity=0.1, entropy=stream("r"))
    noise = discrete_gaussian(500, release.stddev_on_grid, entropy=stream("r"))
    expected = (np.rint(values / release.grid).astype(np.int64) + noise) * release.grid
    np.testing.assert_array_equal(release.values, expected)
    assert release.rng == "injected"
    assert release.noise_stddev == release.grid * release.stddev_on_grid >= 0.37
    assert release.sensitivity_on_grid >= 0.1 + release.grid * math.sqrt(500)
    assert add_grid_noise(values, noise_stddev=0.37).rng == "os-entropy"


@pytest.mark.parametrize("shift", [1, -3, 2**20 + 1])
def test_the_support_of_a_release_does_not_betray_its_centre(shift):
    """Every output of one centre is an output of the other: the attack of Mironov 2012 fails."""
    values = np.linspace(-1, 1, 300)
    release = add_grid_noise(values, noise_stddev=0.1, entropy=stream("s"))
    moved = add_grid_noise(
        np.rint(values / release.grid) * release.grid + shift * release.grid,
        noise_stddev=0.1,
        entropy=stream("s"),
    )
    np.testing.assert_array_equal(moved.values - release.values, shift * release.grid)


def test_values_beyond_float64_precision_are_rounded_after_the_noise():
    release = add_grid_noise(np.array([1e10, -1e10]), noise_stddev=1.0, entropy=stream("big"))
    assert np.all(np.abs(np.abs(release.values) - 1e10) < 10)


@pytest.mark.parametrize(
    ("values", "noise_stddev", "error"),
    [
        (np.array([0.0, np.nan]), 1.0, NonFiniteError),
        (np.array([np.inf]), 1.0, NonFiniteError),
        (np.zeros(3, np.float32), 1.0, ValueError),
        (np.zeros((3, 1)), 1.0, ValueError),
        (np.array([1e12]), 1.0, ValueError),
        (np.array([1e300]), 1e-200, ValueError),
        (np.zeros(3), 0.0, ValueError),
        (np.zeros(3), -1.0, ValueError),
        (np.zeros(3), math.nan, ValueError),
        (np.zeros(3), math.inf, ValueError),
    ],
)
def test_what_cannot_be_released_safely_is_refused(values, noise_stddev, error):
    with pytest.raises(error):
        add_grid_noise(values, noise_stddev=noise_stddev)


@pytest.mark.parametrize("stddev", [0, -1, 2**25, 1.5, True])
def test_the_integer_scale_is_checked(stddev):
    with pytest.raises(ValueError, match="integer stddev"):
        discrete_gaussian(1, stddev)


def test_a_source_that_runs_dry_is_an_error_not_a_shorter_noise():
    with pytest.raises(ValueError, match="from the entropy source"):
        discrete_gaussian(10, 100, entropy=lambda n: b"\0" * (n - 1))


@given(st.floats(2.0**-899, 2.0**899))
@settings(max_examples=300, deadline=None)
def test_the_grid_is_a_power_of_two_and_the_noise_at_least_what_was_asked(noise_stddev):
    grid, stddev = grid_of(noise_stddev)
    assert math.frexp(grid)[0] == 0.5
    assert 2**24 <= stddev < 2**25
    assert noise_stddev <= grid * stddev <= noise_stddev * (1 + 2.0**-24)
    assert grid_of(grid * stddev) == (grid, stddev)
    assert grid_of(round_down(grid * stddev))[0] == grid


def test_rounding_to_the_grid_never_exceeds_the_declared_sensitivity():
    """Exact integers and fractions, zero slack, 2000 pairs of which half are adversarial."""
    rng = np.random.default_rng(3)
    grid, _ = grid_of(1.0)
    for trial in range(2000):
        size = int(rng.integers(1, 6))
        x = np.rint(rng.normal(size=size) / grid) * grid
        step = rng.normal(size=size) * 10.0 ** rng.uniform(-9, 0)
        y = x + step
        if trial % 2:  # just either side of a rounding boundary
            x, y = x + 0.4999999 * grid, x + 0.5000001 * grid + np.abs(np.rint(step / grid)) * grid
        distance = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x.tolist(), y.tolist()))
        on_grid = sum((int(k) * Fraction(grid)) ** 2 for k in np.rint(x / grid) - np.rint(y / grid))
        sensitivity = math.nextafter(math.sqrt(float(distance)), math.inf)
        assert Fraction(sensitivity) ** 2 >= distance
        declared = grid_sensitivity(sensitivity, noise_stddev=1.0, dimension=size)
        assert Fraction(declared) ** 2 >= on_grid


def log_rounded(k, s):
    """log P(round(N(0, s^2)) = k), from the tail that does not cancel."""
    k = np.abs(np.asarray(k, float))
    return np.log(special.ndtr((0.5 - k) / s) - special.ndtr((-0.5 - k) / s))


@pytest.mark.parametrize("s", [5, 8, 16])
@pytest.mark.parametrize("dimension", [1, 2, 20])
def test_the_discrete_and_the_rounded_law_differ_by_no_more_than_stated(s, dimension):
    """On random points of the ball that the derivation uses, its edge included."""
    tail = 1e-9
    root = math.sqrt(
        dimension + 2 * math.sqrt(dimension * -math.log(tail)) - 2 * math.log(tail)
    ) + math.sqrt(dimension) / (2 * s)
    kappa_0, kappa_1 = release_module._kappas(dimension, -math.log(tail), s)
    assert discretisation_epsilon(dimension, delta=tail, stddev_on_grid=s) >= kappa_0 + kappa_1
    rng, largest = np.random.default_rng(s), -math.inf
    for _ in range(1000):
        direction = rng.normal(size=dimension) * rng.choice([0.0, 1.0], dimension)
        k = np.trunc(direction / max(np.linalg.norm(direction), 1e-9) * root * s * rng.uniform())
        assert np.sum(k**2) <= root**2 * s**2
        gap = np.sum(log_rounded(k, s) - np.log(pmf(k.astype(int), s)))
        assert -kappa_0 <= gap <= kappa_1
        largest = max(largest, gap, -gap)
    assert largest > 0.02 * min(kappa_0, kappa_1)  # the bound is not vacuous


def hockey_stick(epsilon, s, shift):
    """Exact delta(epsilon) of the one-dimensional discrete Gaussian against itself shifted."""
    k = np.arange(-40 * s, 40 * s + 1)
    return float(np.sum(np.maximum(pmf(k, s) - math.exp(epsilon) * pmf(k - shift, s), 0)))


@pytest.mark.parametrize(("s", "shift"), [(3, 2), (4, 1), (10, 3), (10, 10), (40, 9)])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0])
def test_one_coordinate_of_discrete_noise_keeps_the_stated_epsilon_and_delta(s, shift, epsilon):
    delta = gaussian_delta(epsilon=epsilon, noise_stddev=s, sensitivity=shift)
    extra = discretisation_epsilon(1, delta=1e-4 * delta, stddev_on_grid=s)
    stated = math.exp(extra) * (delta + math.exp(epsilon) * 1e-4 * delta)
    assert hockey_stick(epsilon + extra, s, shift) <= stated


def test_what_the_grid_costs_is_negligible_up_to_a_billion_parameters():
    assert discretisation_epsilon(10**6, delta=1e-17) < 2e-10
    assert discretisation_epsilon(10**9, delta=1e-17) < 2e-7


def cases(num):
    rng = np.random.default_rng(7)
    for _ in range(num):
        yield {
            "epsilon": float(10 ** rng.uniform(-2, 1.6)),
            "delta": float(10 ** rng.uniform(-12, -1)),
            "sensitivity": float(10 ** rng.uniform(-6, 6)),
            "dimension": int(10 ** rng.uniform(0, 7)),
        }


def test_certified_noise_certifies_and_one_grid_step_less_does_not():
    for case in cases(150):
        budget = {name: case[name] for name in ("delta", "sensitivity", "dimension")}
        noise = certified_noise(**case)
        grid, steps = grid_of(noise)
        assert grid * steps == noise
        assert release_epsilon(noise_stddev=noise, **budget) <= case["epsilon"]
        continuous = gaussian_noise_stddev(
            epsilon=case["epsilon"], delta=case["delta"], sensitivity=case["sensitivity"]
        )
        assert noise >= continuous
        if steps > 2**24:
            assert release_epsilon(noise_stddev=noise - 2 * grid, **budget) > case["epsilon"]


def test_release_epsilon_is_the_same_from_the_twelve_digits_of_a_certificate():
    for case in cases(50):
        noise = certified_noise(**case)
        from_run = release_epsilon(
            delta=case["delta"],
            sensitivity=case["sensitivity"],
            noise_stddev=noise,
            dimension=case["dimension"],
        )
        from_paper = release_epsilon(
            delta=case["delta"],
            sensitivity=round_up(case["sensitivity"]),
            noise_stddev=round_down(noise),
            dimension=case["dimension"],
        )
        assert from_run == from_paper
        assert from_run > gaussian_epsilon(
            delta=case["delta"], noise_stddev=noise, sensitivity=case["sensitivity"]
        )


def test_releases_that_spend_all_of_the_certified_mu_spend_all_of_epsilon_and_no_more():
    for case in cases(50):
        epsilon, delta, dimension = case["epsilon"], case["delta"], case["dimension"]
        total = certified_mu(epsilon=epsilon, delta=delta, dimension=dimension, num_releases=4)
        mu_of = lambda s, d=dimension: release_mu(sensitivity=s, noise_stddev=1.0, dimension=d)
        low, high = 0.0, total
        if compose_gaussian([mu_of(low)] * 4) > total:
            continue  # rounding to the grid alone is too much at this epsilon
        for _ in range(60):
            middle = (low + high) / 2
            fits = compose_gaussian([mu_of(middle)] * 4) <= total
            low, high = (middle, high) if fits else (low, middle)
        together = release_epsilon(
            delta=delta,
            sensitivity=low,
            noise_stddev=1.0,
            dimension=dimension,
            prior_mu=compose_gaussian([mu_of(low)] * 3),
            num_releases=4,
        )
        assert (1 - 1e-6) * epsilon < together <= epsilon


@pytest.mark.parametrize(
    "nonsense",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"delta": None},
        {"sensitivity": -1.0},
        {"sensitivity": math.nan},
        {"sensitivity": math.inf},
        {"noise_stddev": 0.0},
        {"noise_stddev": math.nan},
        {"noise_stddev": math.inf},
        {"dimension": 0},
        {"dimension": math.nan},
        {"dimension": 2**60},
        {"prior_mu": -1.0, "num_releases": 2},
        {"prior_mu": math.nan, "num_releases": 2},
        {"prior_mu": 0.1, "num_releases": 1},
        {"num_releases": 0},
        {"sensitivity": "1"},
    ],
)
def test_epsilon_is_infinite_when_an_argument_makes_no_sense(nonsense):
    sane = {"delta": 1e-5, "sensitivity": 1.0, "noise_stddev": 2.0, "dimension": 3}
    assert release_epsilon(**sane) < 2
    assert release_epsilon(**(sane | nonsense)) == math.inf


def test_noise_that_rounding_lifts_over_a_power_of_two_sits_on_the_next_grid():
    budget = {"delta": 1e-5, "dimension": 10**6}
    sensitivity = certified_mu(epsilon=1.0, **budget) * (1 - 1e-6)
    assert grid_of(sensitivity / certified_mu(epsilon=1.0, **budget))[0] == 2.0**-25
    noise = certified_noise(epsilon=1.0, sensitivity=sensitivity, **budget)
    assert grid_of(noise)[0] == 2.0**-24
    assert release_epsilon(noise_stddev=noise, sensitivity=sensitivity, **budget) <= 1.0


@pytest.mark.parametrize(
    "nonsense",
    [
        {"epsilon": 0.0}, {"epsilon": math.nan}, {"epsilon": math.inf}, {"delta": 0.0},
        {"delta": 1.0}, {"delta": math.nan}, {"dimension": 0}, {"num_releases": 0},
    ],
)  # fmt: skip
def test_no_mu_is_certified_for_a_budget_that_makes_no_sense(nonsense):
    with pytest.raises(ValueError, match="Expected"):
        certified_mu(**({"epsilon": 1.0, "delta": 1e-5, "dimension": 3} | nonsense))


@pytest.mark.parametrize(
    ("nonsense", "name"),
    [({"delta": 0.0}, "delta"), ({"delta": math.nan}, "delta"), ({"dimension": 2**51}, "dimension"),
     ({"stddev_on_grid": 0.5}, "stddev_on_grid"), ({"stddev_on_grid": math.nan}, "stddev_on_grid")],
)  # fmt: skip
def test_the_cost_of_the_grid_is_refused_or_infinite_where_the_derivation_ends(nonsense, name):
    sane = {"dimension": 10, "delta": 1e-9, "stddev_on_grid": 2**24}
    with pytest.raises(ValueError, match=name):
        discretisation_epsilon(**(sane | nonsense))
    assert discretisation_epsilon(10**9, delta=1e-9, stddev_on_grid=1) == math.inf


def test_a_budget_that_the_grid_alone_exceeds_is_refused():
    with pytest.raises(ValueError, match="release fewer coordinates"):
        certified_mu(epsilon=1e-6, delta=1e-5, dimension=10**12)
    with pytest.raises(ValueError, match="Release fewer coordinates"):
        certified_noise(epsilon=1e-2, delta=1e-5, sensitivity=1.0, dimension=10**10)


def test_the_accounting_package_draws_from_neither_jax_nor_numpy_random():
    folder = pathlib.Path(jaxunlearn.accounting.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            roots = {name.split(".")[0] for name in [*names, getattr(node, "module", None) or ""]}
            assert not roots & {"jax", "random", "pickle"}, path
            # An accountant for training, asked for by name; it draws nothing.
            assert "dp_accounting" not in roots or path.name == "dp_training.py", path
            assert getattr(node, "attr", "") != "random", path
