"""The support attack: which of two vectors was noised, from which outputs either could have given.

Mironov 2012. A float32 normal of `jax.random` is one of at most 2^23 values, so from any centre
only some of the float32 numbers can be reached. The attacker knows both centres, the scale and the
arithmetic, as (epsilon, delta) grants, and looks at the support alone: he names the centre that
could have given the output where only one could, and tosses a coin elsewhere. The centres are so
close that the density tells next to nothing.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.accounting import Release

Reachable = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(outputs, centre) -> which outputs the centre could have given."""


@functools.cache
def float32_erfinv() -> np.ndarray:
    """All that `jax.random.normal` computes in float32 before it multiplies by sqrt(2), sorted."""

    @jax.jit
    def values(mantissa):
        low = np.nextafter(np.float32(-1), np.float32(0))
        unit = jax.lax.bitcast_convert_type(mantissa | 0x3F800000, jnp.float32) - 1.0
        uniform = jnp.maximum(low, unit * (np.float32(1) - low) + low)
        return jax.lax.erf_inv(uniform)

    return np.unique(np.asarray(values(jnp.arange(2**23, dtype=jnp.uint32))))


def float32_support(noise_stddev: float, own: np.ndarray) -> Reachable:
    """Of `x + noise_stddev * jax.random.normal(key, x.shape)` in float32.

    Compilers may multiply the two constants first: the attacker takes the order in which all his
    own outputs could have been given. They may also fuse the sum with a product, in one lane of a
    vector and not in the next: he allows for both.

    Args:
      own: (2, n), outputs of the same program for the centres 0 and 1.
    """
    root, scale = np.float32(math.sqrt(2)), np.float32(noise_stddev)
    erfinv = float32_erfinv()
    orders = [_float32_reachable(root * erfinv, scale), _float32_reachable(erfinv, root * scale)]
    return max(orders, key=lambda order: order(own[0], 0.0).mean() + order(own[1], 1.0).mean())


def _float32_reachable(terms, factor):
    """Which outputs are `centre + factor * term` for one of the sorted `terms`."""

    def reachable(outputs, centre):
        outputs, centre = outputs.astype(np.float32), np.float32(centre)
        wanted = (outputs.astype(np.float64) - np.float64(centre)) / np.float64(factor)
        near = np.searchsorted(terms, wanted.astype(np.float32))
        found = np.zeros(outputs.shape, bool)
        for step in range(-3, 4):
            term = terms[np.clip(near + step, 0, len(terms) - 1)]
            fused = np.float64(centre) + np.float64(factor) * term.astype(np.float64)
            found |= (centre + factor * term == outputs) | (fused.astype(np.float32) == outputs)
        return found

    return reachable


def grid_support(grid: float) -> Reachable:
    """Of what adds multiples of `grid` to the centre as it is, or to the centre once rounded."""

    def reachable(outputs, centre):
        again = lambda start: start + grid * np.rint((outputs - start) / grid)
        return (again(centre) == outputs) | (again(grid * np.rint(centre / grid)) == outputs)

    return reachable


def success(
    reachable: Reachable,
    centres: tuple[np.ndarray, np.ndarray],
    outputs: np.ndarray,
    truth: np.ndarray,
    *,
    rng: np.random.Generator,
) -> float:
    """The share of rows in which the attacker names the right centre.

    Args:
      centres: each (d,).  outputs: (n, d), row i from centres[truth[i]].  truth: (n,) of 0 and 1.
    """
    outputs = np.asarray(outputs)
    could = [
        np.all([reachable(*pair) for pair in zip(outputs.T, centre, strict=True)], axis=0)
        for centre in centres
    ]
    guess = np.where(could[0] == could[1], rng.integers(0, 2, len(truth)), could[1])
    return float(np.mean(guess == truth))


def coin(num_trials: int) -> float:
    """What guessing stays below but once in a million: 1/2 + 4.9 * 1/2 / sqrt(n)."""
    return 0.5 + 4.9 * 0.5 / math.sqrt(num_trials)


@functools.partial(jax.jit, static_argnames="noise_stddev")
def jax_noised(x, key, *, noise_stddev: float):
    """The release that is none: x + sigma N(0, I) from `jax.random`, in float32."""
    return x + noise_stddev * jax.random.normal(key, x.shape, jnp.float32)


def own_outputs(noised: Callable[..., jax.Array], *, key, num: int = 2000) -> np.ndarray:
    """(2, num): what `noised(x, key)` gives the attacker for the centres 0 and 1."""
    keys = jax.random.split(key)
    return np.stack([noised(jnp.full(num, float(x)), k) for x, k in enumerate(keys)])


def unrounded(release: Release, values: np.ndarray) -> np.ndarray:
    """The same noise on values that were not rounded to the grid first."""
    return values + (release.values - np.rint(values / release.grid) * release.grid)
