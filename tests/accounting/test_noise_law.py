"""The sampler's law, path by path: every random choice is enumerated with its probability.

No sampling: what the code does on each path, weighted, is the exact mass function up to the paths
whose probability is below 1e-16. Uniform integers are taken as such; their bits are tested apart.
"""

import math

import numpy as np
import pytest

from jaxunlearn.accounting import discrete_gaussian, sampler
from tests import noise_gates as gates

LEAST = 1e-16


class Unlikely(Exception):
    """A path too improbable to follow."""


class Paths:
    """Runs a function once for each sequence of choices that it can make."""

    def __init__(self):
        self.ahead = [()]

    def choose(self, options):
        """One of (value, probability) pairs, another one on each path."""
        place = len(self.taken)
        if place == len(self.prefix):
            alternatives = range(1, len(options))
            self.ahead += [(*self.taken, other) for other in alternatives if options[other][1] > 0]
            self.prefix = (*self.prefix, 0)
        self.taken.append(self.prefix[place])
        value, probability = options[self.prefix[place]]
        self.probability *= probability
        if self.probability < LEAST:
            raise Unlikely
        return value

    def outcomes(self, run):
        """{result: probability} over all paths."""
        found = {}
        while self.ahead:
            self.prefix, self.taken, self.probability = self.ahead.pop(), [], 1.0
            try:
                result = run()
            except Unlikely:
                continue
            found[result] = found.get(result, 0.0) + self.probability
        return found


@pytest.fixture
def patch(monkeypatch):
    """Replaces a function of the sampler where the sampler looks it up."""
    return lambda name, by: monkeypatch.setitem(sampler.fill.__globals__, name, by)


@pytest.mark.parametrize("ratio", [(0, 1), (0, 7), (1, 7), (1, 2), (3, 4), (6, 7), (1, 1), (5, 5)])
def test_a_bernoulli_trial_has_probability_exp_of_minus_the_ratio(patch, ratio):
    numerator, denominator = ratio
    paths = Paths()

    def at_the_edge(bound, size, entropy):
        below = numerator / bound  # of hitting; just either side of the comparison
        return np.array([paths.choose([(numerator, 1 - below), (numerator - 1, below)])])

    patch("_uniform_below", at_the_edge)
    run = lambda: bool(sampler._bernoulli_exp(np.array([numerator]), denominator, None)[0])
    outcomes = paths.outcomes(run)
    assert math.isclose(outcomes.get(True, 0.0), math.exp(-numerator / denominator), rel_tol=1e-12)
    assert math.isclose(sum(outcomes.values()), 1.0, rel_tol=1e-12)


def exact_trials(paths, patch):
    """Bernoulli trials and uniform integers with the probabilities they were shown to have."""

    def bernoulli(numerator, denominator, entropy):
        p = math.exp(-int(numerator[0]) / denominator) if numerator.size else 1.0
        return np.array([paths.choose([(True, p), (False, 1 - p)]) for _ in numerator], bool)

    def uniform(bound, size, entropy):
        options = [(value, 1 / bound) for value in range(bound)]
        return np.array([paths.choose(options) for _ in range(size)], np.int64)

    def bits(entropy, size, dtype):
        return np.array([paths.choose([(6, 0.5), (7, 0.5)]) for _ in range(size)], dtype)

    for name, by in (("_bernoulli_exp", bernoulli), ("_uniform_below", uniform), ("_words", bits)):
        patch(name, by)


@pytest.mark.parametrize("s", [1, 2, 5])
def test_the_proposal_is_the_discrete_laplace(patch, s):
    paths = Paths()
    exact_trials(paths, patch)
    outcomes = paths.outcomes(lambda: tuple(sampler._discrete_laplace(1, s, None).tolist()))
    outcomes.pop(())  # candidates that were dropped
    total = sum(outcomes.values())
    normaliser = 1 + 2 * math.exp(-1 / s) / (1 - math.exp(-1 / s))
    for y in range(-8 * s, 8 * s + 1):
        assert math.isclose(outcomes[y,] / total, math.exp(-abs(y) / s) / normaliser, rel_tol=1e-9)


@pytest.mark.parametrize("s", [1, 2, 5, 7])
def test_a_proposal_is_accepted_as_the_square_of_its_distance_from_the_scale_says(patch, s):
    for y in range(6 * s + 1):
        paths = Paths()
        exact_trials(paths, patch)
        outcomes = paths.outcomes(lambda y=y: bool(sampler._accept(np.array([y]), s, None)[0]))
        wanted = math.exp(-((y - s) ** 2) / (2 * s * s))
        assert math.isclose(outcomes.get(True, 0.0), wanted, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize("s", [1, 2, 5])
def test_a_sample_has_the_mass_function_of_the_discrete_gaussian(patch, s):
    paths = Paths()
    exact_trials(paths, patch)

    def propose():
        drawn = sampler._discrete_laplace(1, s, None)
        return tuple(drawn[sampler._accept(np.abs(drawn), s, None)].tolist())

    outcomes = paths.outcomes(propose)
    outcomes.pop(())
    total = sum(outcomes.values())
    weights = np.exp(-(np.arange(-60 * s, 60 * s + 1) ** 2) / (2.0 * s * s))
    for k in range(-5 * s, 5 * s + 1):
        wanted = math.exp(-(k**2) / (2 * s * s)) / weights.sum()
        assert math.isclose(outcomes[k,] / total, wanted, rel_tol=1e-9)


@pytest.mark.parametrize("s", [300, 2047, 2049, 2**13 - 1, 2**16 + 1, 5_000_011])
def test_scales_between_pass_where_the_words_change_their_width(s):
    """n = 1e5, spread over each step of the grid; entropy is 16, 32 or 64 bits a comparison."""
    rng = np.random.default_rng(s)
    samples = discrete_gaussian(100_000, s, entropy=gates.philox(s))
    z = (samples + rng.uniform(-0.5, 0.5, samples.size)) / math.sqrt(s * s + 1 / 12)
    assert gates.failures(z) == set()
