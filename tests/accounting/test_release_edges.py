"""Releases at the edges: sources that are none, types, scales, sizes, memory."""

import hashlib
import inspect
import math
import os
import random
import secrets
import tracemalloc
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.accounting import (
    add_grid_noise,
    cast_sensitivity,
    certified_noise,
    discrete_gaussian,
    grid_sensitivity,
    release_epsilon,
    release_mu,
    sampler,
)
from jaxunlearn.errors import NonFiniteError
from tests import noise_gates as gates

# The source of randomness.


@pytest.mark.parametrize(
    "seed",
    [
        0, 42, True, np.int64(7), 1.5, "seed", b"seed" * 8, [1, 2], None, np.random.default_rng(0),
        np.random.RandomState(0), jax.random.key(0), jax.random.PRNGKey(0),
    ],
    ids=lambda seed: type(seed).__name__,
)  # fmt: skip
def test_seeds_keys_and_generators_are_refused_where_noise_is_certified(seed):
    with pytest.raises(TypeError, match="n random bytes"):
        add_grid_noise(np.zeros(3), noise_stddev=1.0, entropy=seed)
    with pytest.raises(TypeError, match="n random bytes"):
        discrete_gaussian(3, 100, entropy=seed)


@pytest.mark.parametrize("source", [secrets.token_bytes, os.urandom])
def test_the_operating_systems_sources_are_known_by_name(source):
    assert add_grid_noise(np.zeros(2), noise_stddev=1.0, entropy=source).rng == "os-entropy"


def test_any_other_source_is_stamped_as_injected_a_seeded_one_too():
    for source in (random.Random(0).randbytes, gates.philox(0), lambda n: secrets.token_bytes(n)):
        release = add_grid_noise(np.zeros(2), noise_stddev=1.0, entropy=source)
        assert release.rng == "injected"


def every_byte():
    return [bytes([value]) for value in (0, 1, 2, 3, 127, 128, 254, 255)]


@pytest.mark.parametrize("byte", every_byte())
@pytest.mark.parametrize("size", [1, 1000])
def test_a_source_that_is_stuck_is_an_error_and_not_an_endless_loop(byte, size):
    with pytest.raises(ValueError, match="Nothing was released"):
        add_grid_noise(np.zeros(size), noise_stddev=1.0, entropy=lambda n: byte * n)


@pytest.mark.parametrize("byte", every_byte())
def test_a_source_stuck_in_all_but_what_the_repetition_test_sees_ends_too(byte):
    count = iter(range(10**9))
    beginning = lambda: next(count).to_bytes(32, "little")
    source = lambda n: (beginning() + byte * n)[:n] if n >= 32 else byte * n
    with pytest.raises(ValueError, match="Nothing was released"):
        add_grid_noise(np.zeros(1000), noise_stddev=1.0, entropy=source)


@pytest.mark.parametrize(
    ("part", "byte", "story"),
    [
        (lambda source: sampler._uniform_below(3, 9, source), b"\xff", "rejected again and again"),
        (lambda source: sampler._bernoulli_exp(np.ones(9), 1, source), b"\0", "pass every trial"),
        (lambda source: sampler._discrete_laplace(9, 4, source), b"\2", "never fail a trial"),
    ],
)
def test_each_loop_of_the_sampler_ends(part, byte, story):
    """Behind the repetition test, that is: the loops are given the stuck bytes themselves."""
    with pytest.raises(ValueError, match=story):
        part(lambda n: byte * n)


def test_a_sampler_that_rejects_everything_ends(monkeypatch):
    monkeypatch.setitem(sampler.fill.__globals__, "_accept", lambda y, *rest: y != y)
    with pytest.raises(ValueError, match="reject every sample"):
        discrete_gaussian(5, 100)


@pytest.mark.parametrize("size", [-1, 1.5, True])
def test_a_number_of_samples_is_a_whole_number(size):
    with pytest.raises(ValueError, match="size"):
        discrete_gaussian(size, 100)


def test_a_source_that_says_the_same_twice_is_refused():
    with pytest.raises(ValueError, match="repeat"):
        discrete_gaussian(100, 1000, entropy=lambda n: hashlib.shake_256(b"once").digest(n))


@pytest.mark.parametrize("answer", [b"", b"\1" * 7])
def test_a_source_that_fails_in_the_middle_releases_nothing(answer):
    draw, calls = gates.philox(1), iter(range(10**6))
    source = lambda n: draw(n) if next(calls) < 40 else answer
    values = np.ones(100_000)
    with pytest.raises(ValueError, match="from the entropy source"):
        add_grid_noise(values, noise_stddev=1.0, entropy=source)
    assert np.all(values == 1.0)


# Scales and sizes.


@pytest.mark.parametrize("noise_stddev", [2.0**-900, 3e-271, 1e-30, 1.0, 7e30, 2.0**900])
def test_the_law_is_the_same_at_every_scale(noise_stddev):
    values = np.array([0.0, 5e-324, -0.3, 1.0, 1e4]) * min(noise_stddev, 1e300)
    with np.errstate(under="ignore"):
        values = np.tile(values, 4000)
        release = add_grid_noise(values, noise_stddev=noise_stddev, entropy=gates.philox(3))
        z = (release.values - values) / release.noise_stddev
    assert gates.failures(z) == set()
    assert np.all(np.isfinite(release.values))


def test_values_far_below_the_grid_vanish_and_far_above_it_keep_their_noise():
    tiny = add_grid_noise(np.full(3, 5e-324), noise_stddev=1e100, entropy=gates.philox(4))
    none = add_grid_noise(np.zeros(3), noise_stddev=1e100, entropy=gates.philox(4))
    np.testing.assert_array_equal(tiny.values, none.values)
    steps = 2.0**60
    big = add_grid_noise(np.array([steps, -steps]), noise_stddev=2.0**24, entropy=gates.philox(4))
    assert np.all(np.abs(np.abs(big.values) - steps) < 10 * 2.0**24)


@pytest.mark.parametrize("steps", [2.0**61, 2.0**62, 2.0**63, 2.0**64, 1e300])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_the_grid_cannot_hold_is_refused_whatever_the_noise(steps, sign):
    with pytest.raises(ValueError, match="2\\^61 grid steps"):
        add_grid_noise(np.full(4, 4.0 * sign * steps), noise_stddev=2.0**24)


def test_a_refusal_for_size_looks_at_noisy_values_only():
    """At the bound itself the noise decides: neighbours are refused with nearly equal chance."""

    def share_refused(offset):
        refused = 0
        for seed in range(200):
            value = np.array([2.0**61 + offset * 2.0**24])
            try:
                add_grid_noise(value, noise_stddev=2.0**24, entropy=gates.philox(seed))
            except ValueError:
                refused += 1
        return refused / 200

    assert share_refused(-6) == 0.0
    assert share_refused(6) == 1.0
    assert abs(share_refused(0) - 0.5) < 5 * math.sqrt(0.25 / 200)


def test_nothing_in_gives_nothing_out():
    release = add_grid_noise(np.zeros(0), noise_stddev=1.0, sensitivity=0.1)
    assert release.values.shape == (0,)
    assert release.sensitivity_on_grid is None


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
def test_chunks_meet_without_a_seam(size):
    values = np.arange(size, dtype=np.float64)
    release = add_grid_noise(values, noise_stddev=0.01, entropy=gates.philox(size))
    gap = (release.values - values) / 0.01
    assert np.all(np.abs(gap) < 7)
    assert np.all(np.diff(gap) != 0)


def test_memory_beyond_the_result_does_not_grow_with_the_release():
    def extra_bytes(size):
        values = np.zeros(size)
        tracemalloc.start()
        release = add_grid_noise(values, noise_stddev=1.0, entropy=gates.philox(5))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak - release.values.nbytes

    few, many = extra_bytes(2**16), extra_bytes(2**19)
    assert many < 1.1 * few < 22e6


def test_a_long_release_shows_its_progress_and_a_short_one_does_not(monkeypatch):
    seen = []

    class Shown:
        def __init__(self, label, total, *, show):
            seen.append((label, total, show))

        def __enter__(self):
            return lambda steps: seen.append(steps)

        def __exit__(self, *exception):
            return None

    monkeypatch.setitem(add_grid_noise.__globals__, "show_progress", Shown)
    add_grid_noise(np.zeros(2**16 + 3), noise_stddev=1.0, progress=True)
    assert seen == [("adding noise", 2**16 + 3, True), 2**16, 3]
    assert inspect.signature(add_grid_noise).parameters["progress"].default is False


# What is not a number, and what needs no noise.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 70_000])
def test_values_that_are_not_finite_draw_no_entropy_at_all(bad, at):
    values = np.zeros(70_001)
    values[at] = bad
    with pytest.raises(NonFiniteError):
        add_grid_noise(values, noise_stddev=1.0, entropy=lambda n: pytest.fail("entropy drawn"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int64", "complex128"])
def test_other_types_are_refused_until_they_are_widened(dtype):
    values = np.asarray(jnp.zeros(3)).astype(jnp.dtype(dtype))
    with pytest.raises(ValueError, match="float64 vector"):
        add_grid_noise(values, noise_stddev=1.0)


def test_at_zero_sensitivity_there_is_no_noise_to_ask_for_and_a_release_costs_its_rounding():
    with pytest.raises(ValueError, match="released as exact"):
        certified_noise(epsilon=1.0, delta=1e-5, sensitivity=0.0, dimension=10)
    on_grid = grid_sensitivity(0.0, noise_stddev=1.0, dimension=10)
    assert math.sqrt(10) * 2.0**-24 <= on_grid < 1.0001 * math.sqrt(10) * 2.0**-24
    assert release_mu(sensitivity=0.0, noise_stddev=1.0, dimension=10) < 2e-7
    assert (
        release_epsilon(delta=1e-5, sensitivity=0.0, noise_stddev=1.0, dimension=10)
        < release_epsilon(delta=1e-5, sensitivity=1e-3, noise_stddev=1.0, dimension=10)
        < 0.01
    )


# Narrow parameters.

NARROW = ("float16", "bfloat16", "float32")


def cast(x, dtype):
    """float64 to a narrower type and back; NumPy goes to bfloat16 by way of float32."""
    return np.asarray(x, np.float64).astype(jnp.dtype(dtype)).astype(np.float64)


def exact_norm_square(x):
    return sum(Fraction(entry) ** 2 for entry in np.ravel(x).tolist())


def hard_cases(rng, dtype, size):
    """Values at ties, next to powers of two, subnormal, or anything."""
    digits = int(jnp.finfo(dtype).nmant) + 1
    kind = rng.integers(0, 5, size)
    power = 2.0 ** rng.integers(-12, 12, size)
    beside = rng.choice([0.0, 2.0**-25, -(2.0**-25), 2.0**-45, -(2.0**-45)], size)
    tie = power * (1 + beside + (2 * rng.integers(0, 2 ** (digits - 1), size) + 1) * 2.0**-digits)
    below = power * (1 - 2.0 ** -(digits + 1))
    least = float(jnp.finfo(dtype).smallest_subnormal)
    subnormal = least * rng.uniform(0, 4, size)
    anything = rng.normal(size=size) * power
    return np.choose(kind, [tie, below, subnormal, anything, np.zeros(size)])


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cast_never_exceeds_the_declared_sensitivity(dtype):
    """Exact fractions, zero slack, 500 pairs at ties, powers of two and below the normal range."""
    rng, closest = np.random.default_rng(6), 0.0
    for trial in range(500):
        size = int(rng.integers(1, 6))
        ours = hard_cases(rng, dtype, size)
        step = rng.normal(size=size) * 10.0 ** rng.uniform(-9, 0) * (trial % 3 > 0)
        oracle = ours + step
        distance = math.sqrt(float(exact_norm_square(oracle - ours))) * (1 + 1e-12)
        distance = math.nextafter(distance, math.inf)
        assert Fraction(distance) ** 2 >= sum(
            (Fraction(a) - Fraction(b)) ** 2 for a, b in zip(oracle.tolist(), ours.tolist())
        )
        kept = cast(ours, dtype)
        for other, both in ((cast(oracle, dtype), True), (oracle, False)):
            declared = cast_sensitivity(distance, values=kept, dtype=dtype, oracle_cast=both)
            gap = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(other, kept))
            assert Fraction(declared) ** 2 >= gap
            closest = max(closest, math.sqrt(float(gap)) / declared)
    assert closest > 0.6  # the bound is not vacuous


def test_a_cast_that_was_left_out_of_the_sensitivity_would_exceed_it():
    """In bfloat16 two vectors 4e-6 apart land a whole step apart in every coordinate."""
    ours, oracle = np.full(100, 1 + 2.0**-8 - 2e-7), np.full(100, 1 + 2.0**-8 + 2e-7)
    gap = np.linalg.norm(cast(ours, "bfloat16") - cast(oracle, "bfloat16"))
    assert gap > 1e4 * np.linalg.norm(ours - oracle)
    declared = cast_sensitivity(5e-6, values=cast(ours, "bfloat16"), dtype="bfloat16")
    assert gap <= declared < 1.02 * gap


def test_flushed_subnormals_are_inside_the_declared_sensitivity():
    """XLA may turn what is below the normal range of float32 into zero."""
    least = float(jnp.finfo("float32").smallest_normal)
    for dtype in ("float32", "bfloat16"):
        declared = cast_sensitivity(0.0, values=np.zeros(1), dtype=dtype, oracle_cast=False)
        assert declared >= least
    assert cast_sensitivity(0.0, values=np.zeros(1), dtype="float16", oracle_cast=False) < 3e-8


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sensitivity": -1.0}, ValueError),
        ({"sensitivity": math.nan}, ValueError),
        ({"dtype": "int32"}, ValueError),
        ({"dtype": "float64"}, ValueError),
        ({"values": np.array([math.nan])}, NonFiniteError),
        ({"values": np.array([math.inf])}, NonFiniteError),
        ({"values": np.array([65504.0]), "dtype": "float16"}, NonFiniteError),
    ],
)
def test_casts_without_a_bound_are_refused(arguments, error):
    sane = {"sensitivity": 0.1, "values": np.ones(2), "dtype": "bfloat16"}
    assert cast_sensitivity(**sane) < 0.12
    with pytest.raises(error):
        cast_sensitivity(**(sane | arguments))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cast_after_the_noise_is_of_the_noisy_values_alone(dtype):
    release = add_grid_noise(np.full(500, 3.0), noise_stddev=0.5, entropy=gates.philox(8))
    narrow = release.cast(jnp.dtype(dtype))
    assert narrow.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(narrow.astype(np.float64), cast(release.values, dtype))


def test_a_cast_that_overflows_is_refused():
    release = add_grid_noise(np.full(3, 1e6), noise_stddev=1.0)
    with pytest.raises(NonFiniteError, match="wider type"):
        release.cast(np.float16)
