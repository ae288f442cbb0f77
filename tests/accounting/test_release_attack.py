"""The support attack of Mironov 2012: it wins against noise from JAX and not against a release.

20,000 trials each; a coin stays below 0.5173 but once in a million. Entropy and keys are fixed.
"""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxunlearn import transforms
from jaxunlearn.accounting import (
    add_grid_noise,
    certified_noise,
    gaussian_delta,
    gaussian_epsilon,
)
from tests import noise_gates as gates

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
NUM_TRIALS, NOISE_STDDEV = 20_000, 3.0


@pytest.fixture(scope="module")
def support():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_support")


@pytest.fixture(scope="module")
def game():
    """Two centres 0.005 sigma apart in three coordinates, and who was noised in each trial."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=3)
    centres = (first, first + 0.005 * NOISE_STDDEV / np.sqrt(3))
    truth = rng.integers(0, 2, NUM_TRIALS)
    return centres, truth, np.stack(centres)[truth]


@pytest.fixture(scope="module")
def release(game):
    values = game[2].ravel()
    return add_grid_noise(values, noise_stddev=NOISE_STDDEV, entropy=gates.philox(0))


def wins(support, reachable, game, outputs):
    centres, truth, values = game
    outputs = np.reshape(outputs, values.shape)
    return support.success(reachable, centres, outputs, truth, rng=np.random.default_rng(1))


def noised_by_the_transform(x, key):
    tx = transforms.gaussian_noise(NOISE_STDDEV, key=key)
    return tx.update(x, tx.init(x))[0]


@pytest.mark.parametrize("path", ["x + sigma * normal", "transforms.gaussian_noise"])
def test_three_coordinates_of_jax_noise_give_the_game_away(path, support, game):
    """One would do in 19 of 20 trials: a wrong centre reaches about an eighth of the outputs."""
    noised = {
        "x + sigma * normal": functools.partial(support.jax_noised, noise_stddev=NOISE_STDDEV),
        "transforms.gaussian_noise": jax.jit(noised_by_the_transform),
    }[path]
    own = support.own_outputs(noised, key=jax.random.key(1))
    reachable = support.float32_support(NOISE_STDDEV, own)
    outputs = np.asarray(noised(jnp.asarray(game[2].ravel(), jnp.float32), jax.random.key(2)))
    assert wins(support, reachable, game, outputs) > 0.99
    assert 0.05 < reachable(own[1], 1.005).mean() < 0.3
    assert reachable(own[1], 1.0).all()


def test_a_release_is_a_coin_to_the_attacker_on_the_grid_and_in_every_narrower_type(
    support, game, release
):
    coin = support.coin(NUM_TRIALS)
    grid = support.grid_support(release.grid)
    noised = functools.partial(support.jax_noised, noise_stddev=NOISE_STDDEV)
    own = support.own_outputs(noised, key=jax.random.key(1))
    narrow = support.float32_support(NOISE_STDDEV, own)
    assert wins(support, grid, game, release.values) < coin
    for dtype in ("float32", "bfloat16", "float16"):
        outputs = release.cast(jnp.dtype(dtype)).astype(np.float64)
        assert wins(support, grid, game, outputs) < coin
        assert wins(support, narrow, game, outputs) < coin


def test_the_same_noise_on_values_that_were_not_rounded_is_seen_through(support, game, release):
    """So the attack on the grid is one: it is the rounding that defeats it."""
    outputs = support.unrounded(release, game[2].ravel())
    assert np.allclose(outputs, release.values, rtol=0, atol=release.grid)
    assert wins(support, support.grid_support(release.grid), game, outputs) > 0.999


def test_the_attacker_knows_every_float32_normal(support):
    every = support.float32_erfinv()
    assert len(every) <= 2**23
    normals = np.float32(np.sqrt(2)) * every
    drawn = np.asarray(jax.random.normal(jax.random.key(3), (200_000,)))
    found = np.searchsorted(normals, drawn).clip(0, len(normals) - 1)
    np.testing.assert_array_equal(normals[found], drawn)
    assert 5.2 < normals[-1] < -normals[0] < 5.43  # the tails end there


# The threshold attack, which looks at the density and is the best there is.


def audited_mu(low, high):
    """Lower bound on mu from 1e5 outputs of either side: Clopper-Pearson at alpha together."""
    threshold = (np.median(low[:1000]) + np.median(high[:1000])) / 2
    low, high = low[1000:], high[1000:]
    above = lambda hits, n: special.betaincinv(hits + 1, n - hits, 1 - gates.ALPHA / 2)
    false_positives = above(np.sum(low > threshold), len(low))
    false_negatives = above(np.sum(high <= threshold), len(high))
    return -special.ndtri(false_positives) - special.ndtri(false_negatives)


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_the_best_attack_finds_no_more_than_was_certified_and_nearly_all_of_it(epsilon):
    """n = 1e5 a side: noise a third too small, or twice the sensitivity, is more than certified."""
    size, delta, sensitivity = 101_000, 1e-5, 0.37
    stddev = certified_noise(epsilon=epsilon, delta=delta, sensitivity=sensitivity, dimension=1)

    def found(shift, noise_stddev, seed):
        release = lambda centre, s: (
            add_grid_noise(
                np.full(size, centre), noise_stddev=noise_stddev, entropy=gates.philox([seed, s])
            ).values
        )
        mu = audited_mu(release(0.7, 0), release(0.7 + shift, 1))
        bound = gaussian_epsilon(delta=delta, noise_stddev=1.0, sensitivity=float(mu))
        assert gaussian_delta(epsilon=bound, noise_stddev=1.0, sensitivity=float(mu)) <= delta
        return bound

    assert 0.8 * epsilon < found(sensitivity, stddev, 1) <= epsilon
    assert found(sensitivity, stddev / 1.5, 2) > epsilon
    assert found(2 * sensitivity, stddev, 3) > epsilon
