"""The host's noise at the gates, and what the gates are for: mutants that each must stop.

All entropy is fixed, so a gate that is passed once is passed always.
"""

import functools
import inspect
import math
import types

import jax
import numpy as np
import pytest
from scipy import special

from jaxunlearn.accounting import add_grid_noise, discrete_gaussian, sampler
from tests import noise_gates as gates

WIDE = 2**24 + 5_000_001


@functools.cache
def sample(size, stddev=WIDE, seed=1):
    return discrete_gaussian(size, stddev, entropy=gates.philox(seed)) / stddev


@pytest.mark.parametrize("stddev", [2**24, WIDE, 2**25 - 1])
def test_a_million_samples_pass_every_gate(stddev):
    assert gates.failures(sample(1_000_000, stddev), stddev) == set()


def test_a_release_passes_every_gate_in_the_unit_it_was_asked_for():
    """ "sigma times sensitivity" left out, or the grid taken for a half, fails here."""
    values = np.linspace(-3, 3, 200_000)
    release = add_grid_noise(values, noise_stddev=3.7, entropy=gates.philox(2))
    noise = release.values - values
    assert gates.failures(noise / 3.7) == set()
    assert "variance" in gates.failures(noise)
    assert "variance" in gates.failures(noise / 3.7 / 2)


def test_the_critical_values_are_those_of_the_reference():
    assert f"{gates.ks_limit(10**6):.7f}" == "0.0026932"
    assert f"{gates.Z / 1e3:.5f}" == "0.00489"
    assert f"{1 - gates.Z * math.sqrt(2e-6):.4f}" == "0.9931"
    assert f"{gates.Z * math.sqrt(2e-6) + 1:.5f}" == "1.00692"  # printed 1.00693, rounded up


def truncated(z, bound):
    return np.where(np.abs(z) > bound, np.resize(z[np.abs(z) <= bound], len(z)), z)


def uniform(z):
    return (special.ndtr(z) - 0.5) * math.sqrt(12)


def laplace(z):
    p = special.ndtr(-np.abs(z))
    return np.sign(z) * -np.log(2 * p) / math.sqrt(2)


MUTANTS = {
    "scale 0.99": (lambda z: 0.99 * z, {"variance"}),
    "scale 1.01": (lambda z: 1.01 * z, {"variance"}),
    "scale 0.9949": (lambda z: 0.9949 * z, {"variance"}),
    "scale 1.014": (lambda z: 1.014 * z, {"ks", "variance"}),
    "scale 2/3": (lambda z: z * 2 / 3, {"ks", "variance", "tails", "shape"}),
    "scale 3/2": (lambda z: z * 3 / 2, {"ks", "variance", "tails", "shape"}),
    "shift 0.0072": (lambda z: z + 0.0072, {"mean"}),
    "uniform": (uniform, {"ks", "shape", "tails"}),
    "laplace": (laplace, {"ks", "shape", "tails"}),
    "ends at 3": (lambda z: truncated(z, 3.0), {"tails", "variance"}),
    "ends at 4": (lambda z: truncated(z, 4.0), {"tails"}),
    "magnitudes": (np.abs, {"mean", "symmetry", "ks"}),
    "skewed": (lambda z: np.where(z > 0, 1.02 * z, 0.98 * z), {"symmetry"}),
    "correlated neighbours": (lambda z: z + 0.0085 * np.roll(z, 1), {"correlation"}),
    "correlated at lag 777": (lambda z: z + 0.012 * np.roll(z, 777), {"period"}),
    "pairs of opposite sign": (
        lambda z: np.stack([z[::2], -z[::2]], axis=1).ravel(), {"correlation"}
    ),
    "a chunk repeated": (lambda z: np.resize(z[: 2**16], len(z)), {"period"}),
    "second half is the first": (lambda z: np.resize(z[: len(z) // 2], len(z)), {"halves"}),
    "second half undoes the first": (
        lambda z: np.concatenate([z[: len(z) // 2], -z[: len(z) // 2]]), {"halves"}
    ),
    "every tenth is the first's": (
        lambda z: np.where(np.arange(len(z)) % 10, z, z[0]), {"ks", "shape", "collisions"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_stopped_by_the_gates_that_are_for_it(name):
    mutate, stopped_by = MUTANTS[name]
    assert stopped_by <= gates.failures(mutate(sample(1_000_000)), WIDE)


@pytest.mark.parametrize("scale", [0.98, 1.025])
def test_a_hundred_thousand_samples_stop_a_scale_off_by_two_percent(scale):
    z = sample(100_000, seed=3)
    assert gates.failures(z, WIDE) == set()
    assert "variance" in gates.failures(scale * z)


@pytest.mark.parametrize(
    ("dtype", "also"), [("float32", set()), ("bfloat16", {"ks", "tails"}), ("float16", {"tails"})]
)
def test_noise_of_a_narrow_type_collides_more_often_than_the_grid_does(dtype, also):
    """float32 normals are 2^23 values: 57,000 equal pairs among 1e6, where the grid has 8,400."""
    draw = jax.jit(lambda key: jax.random.normal(key, (1_000_000,), dtype))
    z = np.asarray(draw(jax.random.key(0)), np.float64)
    assert gates.failures(z, 2**24) >= {"collisions"} | also
    assert also or gates.failures(z) == set()


def test_two_releases_and_two_parts_of_one_are_unrelated_and_a_repeated_stream_is_not():
    first, second = sample(1_000_000, seed=4), sample(1_000_000, seed=5)
    assert not gates.related(first, second)
    assert gates.related(first, sample(1_000_000, seed=4))
    assert gates.related(first, 0.0085 * first + second)
    part = 2**16  # one chunk of the sampler against the next
    assert not gates.related(first[:part], first[part:])


# Mutants of the source. The law at small scales is exact there, so nothing hides behind the grid.

EDITS = {
    "accepts on a tie": ("< numerator[trying]", "<= numerator[trying]"),
    "trials not divided": ("denominator * k, trying", "denominator, trying"),
    "whole units ignored": ("accepted & (units > 0)", "accepted & (units > 9)"),
    "one unit too few": ("more = passed & (left > 1)", "more = passed & (left > 2)"),
    "one unit too many": ("more = passed & (left > 1)", "more = passed & (left > 0)"),
    "nothing rejected": ("accepted[trying[~passed]] = False", "pass"),
    "two zeros": ("~(negative & (magnitude == 0))", "(magnitude >= 0)"),
    "no zero": ("~(negative & (magnitude == 0))", "magnitude != 0"),
    "no signs": ("np.where(negative, -magnitude, magnitude)", "magnitude"),
    "geometric from one": ("v = np.zeros(u.size", "v = np.ones(u.size"),
    "geometric cut at zero": ("v[trying] += 1", "v[trying] += 0"),
    "proposal not thinned": ("u = u[_bernoulli_exp(u, scale, entropy)]", "pass"),
    "proposal one too narrow": ("_uniform_below(scale, cand", "_uniform_below(scale - 1, cand"),
    "centre missing": ("np.divmod(np.abs(magnitude - scale)", "np.divmod(np.abs(magnitude)"),
    "variance halved": ("denominator = 2 * scale", "denominator = 1 * scale"),
    "words not spread": ("words % dtype.type(bound)", "words % dtype.type(bound) // 2 * 2"),
}  # fmt: skip


def edited(old, new):
    """The sampler with one edit of its source."""
    source = inspect.getsource(sampler)
    assert source.count(old) == 1, old
    module = types.ModuleType("edited_sampler")
    exec(compile(source.replace(old, new), "edited_sampler", "exec"), module.__dict__)
    return module


def law_p(samples, s):
    """p-value of the samples against the exact pmf, all k with at least 20 expected, and a rest."""
    k = np.arange(-12 * s, 12 * s + 1)
    weights = np.exp(-(k**2) / (2.0 * s * s))
    expected = samples.size * weights / weights.sum()
    kept = expected >= 20
    counts = np.bincount((samples + 12 * s).clip(0, len(k) - 1), minlength=len(k))
    observed = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(expected[kept], expected[~kept].sum())
    return special.chdtrc(kept.sum(), np.sum((observed - expected) ** 2 / expected))


@pytest.mark.parametrize("s", [1, 2, 5])
def test_the_unedited_sampler_has_the_exact_law(s):
    module = edited("words % dtype.type(bound)", "words % dtype.type(bound)")
    samples = module.discrete_gaussian(100_000, s, entropy=gates.philox(s))
    np.testing.assert_array_equal(samples, discrete_gaussian(100_000, s, entropy=gates.philox(s)))
    assert law_p(samples, s) > gates.ALPHA


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_sampler_is_told_from_the_right_one(name):
    """n = 1e5 at scales 2 and 5: at one of them at least, p < 1e-6; one never ends."""
    module = edited(*EDITS[name])
    draw = lambda s: module.discrete_gaussian(100_000, s, entropy=gates.philox(7))
    if name == "trials not divided":
        with pytest.raises(ValueError, match="entropy source"):
            draw(2)
        return
    assert min(law_p(draw(s), s) for s in (2, 5)) < gates.ALPHA


def test_words_that_are_not_rejected_would_show():
    """2^16 is 32 times 2047 and 32 over: without rejection 32 values come 3 percent too often."""
    bound, surplus, n = 2047, 2**16 % 2047, 4_000_000
    expected, spread = n * surplus / bound, math.sqrt(n * surplus / bound)
    lowest = lambda module: np.sum(module._uniform_below(bound, n, gates.philox(8)) < surplus)
    assert abs(lowest(sampler) - expected) < gates.Z * spread
    biased = edited("surplus = 2**bits % bound", "surplus = 0")
    assert abs(lowest(biased) - expected) > gates.Z * spread


@pytest.mark.slow
def test_ten_million_samples_pass_the_gates_of_a_release():
    """Variance within [0.99781, 1.00219]: rejects 0.9984 and 1.0016; tails: an end below 5."""
    z = sample.__wrapped__(10_000_000, 2**24, seed=9)
    assert gates.failures(z, 2**24) == set()
    assert {"variance"} <= gates.failures(0.9984 * z) & gates.failures(1.0016 * z)
    assert "tails" in gates.failures(truncated(z, 4.5))


@pytest.mark.slow
def test_the_power_of_the_gates_is_what_they_state():
    """60 samples of n = 1e6 each: none of the right ones is stopped, all the others are."""
    stopped, limit = np.zeros(4, int), gates.ks_limit(10**6)
    for seed in range(60):
        z = np.random.default_rng(seed).normal(size=1_000_000)
        distance = lambda scale, z=z: gates.ks_distance(scale * z)
        narrow = abs(np.mean((0.9949 * z) ** 2) - 1) > gates.Z * math.sqrt(2e-6)
        stopped += [*(distance(scale) >= limit for scale in (1.0, 1.014, 1.005)), narrow]
    assert stopped.tolist() == [0, 60, 0, 60]


@pytest.mark.slow
def test_the_operating_systems_entropy_passes_too():
    assert gates.failures(discrete_gaussian(1_000_000, WIDE) / WIDE, WIDE) == set()
