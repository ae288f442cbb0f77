"""`audits.residue`: whether states tell which of two rows was deleted; what it could have found.

Power of the tests below. Of 200 null experiments at level 0.05 between 3 and 20 may reject: a sound
test is outside with probability 0.002, and one of level 0.15 inside with probability 0.02.
"""

import jax
import numpy as np
import optax
import pytest
import scipy.stats

from jaxunlearn.audits import residue as residue_of
from jaxunlearn.audits.residue import Residue, residue

FEW = {"num_permutations": 99}


def states(rng, n=12, size=30, shift=0.0, toward=slice(None)):
    """Two groups of runs with unit noise, the second shifted in some coordinates."""
    first, second = rng.normal(size=(2, n, size))
    second[:, toward] += shift
    pack = lambda rows: {
        "mu": rows[:, :10],
        "nu": rows[:, 10:].reshape(n, 4, -1),
        "count": counts(n),
    }
    return pack(first), pack(second)


def counts(n):
    return np.arange(n, dtype=np.int32)


def rejections(measure, trials=200):
    return sum(measure(np.random.default_rng(seed), seed).found for seed in range(trials))


def null_is_kept(measure) -> bool:
    return 3 <= rejections(measure) <= 20


def test_the_bounds_on_the_null_accept_the_right_level_and_reject_three_times_it():
    within = lambda level: np.diff(scipy.stats.binom.cdf([2, 20], 200, level))[0]
    assert within(0.05) > 0.99
    assert within(0.15) < 0.05


@pytest.mark.parametrize("paired", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_under_the_null_it_rejects_as_often_as_its_level_says(paired):
    def measure(rng, seed):
        first, second = states(rng)
        return residue(first, second, seed=seed, paired=paired, num_folds=3, **FEW)

    assert null_is_kept(measure)


@pytest.mark.slow
def test_a_probe_that_saw_the_runs_it_is_asked_about_would_be_found_out(monkeypatch):
    """The mutant: scores of training runs against a null of held-out ones."""
    module = __import__("jaxunlearn.audits.residue", fromlist=["residue"])
    honest = module._probe

    def leaking(features, folds, ridge):
        matrix = honest(features, folds, ridge)
        return matrix + 0.2 * leaking.peek

    def measure(rng, seed):
        first, second = states(rng)
        labels = np.repeat([1.0, -1.0], 12)
        leaking.peek = np.outer(labels, labels) / 24  # knows the true labels, not the permuted
        return residue(first, second, seed=seed, num_folds=3, **FEW)

    monkeypatch.setattr(module, "_probe", leaking)
    assert not null_is_kept(measure)


@pytest.mark.slow
def test_pairs_that_share_their_noise_are_told_apart_only_if_their_states_differ():
    """Runs of a pair are nearly one run: unpaired folds would compare a run with its own twin."""

    def measure(rng, seed, shift=0.0):
        noise = rng.normal(size=(12, 30))
        first, second = noise + 0.1 * rng.normal(size=(2, 12, 30))
        return residue(first, second + shift, seed=seed, paired=True, num_folds=3, **FEW)

    assert null_is_kept(measure)
    assert measure(np.random.default_rng(0), 0, shift=0.5).found


def test_an_effect_that_it_says_it_can_detect_is_detected_with_the_power_that_it_states():
    """The optimal probe of a shift d has accuracy Phi(d / 2); ridge on few features is nearly it.

    40 trials at power 0.8 find fewer than 25 with probability 0.008."""
    n, size, found = 30, 2, 0
    reference = residue(*states(np.random.default_rng(0), n=n), seed=0, **FEW)
    assert 0.5 < reference.detectable_accuracy < 0.8
    shift = 2 * scipy.stats.norm.ppf(reference.detectable_accuracy + 0.05)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=(2, n, size))
        second[:, 0] += shift
        found += residue(first, second, seed=seed, **FEW).found
    assert found >= 25


def test_the_detectable_accuracy_is_that_of_the_binomial():
    result = residue(*states(np.random.default_rng(1), n=20), seed=0, **FEW)
    p = result.detectable_accuracy
    tail = lambda needed, q: scipy.stats.binom.sf(needed - 1, 40, q)
    needed = next(k for k in range(41) if tail(k, p) <= result.power + 1e-9)
    assert np.isclose(tail(needed, p), 0.8, atol=1e-6)


def test_the_p_value_comes_first_and_the_interval_says_what_it_assumes():
    result = residue(*states(np.random.default_rng(1), n=12), seed=0, **FEW)
    text = str(result)
    assert text.startswith(f"p = {result.p_value:.3g} by permutation")
    assert "if held-out runs were independent" in text


def test_few_runs_say_that_they_can_find_nothing():
    result = residue(*states(np.random.default_rng(1), n=2), seed=0, num_folds=2, **FEW)
    assert result.detectable_accuracy > 1
    assert "more runs are needed" in str(result)


def test_the_probe_is_ridge_regression_fitted_on_the_other_folds():
    rng = np.random.default_rng(3)
    features, folds = rng.normal(size=(12, 5)), np.repeat([0, 1, 2], 4)
    labels = rng.choice([-1.0, 1.0], size=12)
    module = __import__("jaxunlearn.audits.residue", fromlist=["residue"])
    scores = module._probe(features, folds, 0.3) @ labels
    for fold in range(3):
        train, test = features[folds != fold], features[folds == fold]
        scale = lambda x, t=train: (x - t.mean(0)) / t.std(0)
        x = scale(train)
        shift = 0.3 * np.sum(x**2) / 8
        slope = np.linalg.solve(x.T @ x + shift * np.eye(5), x.T @ labels[folds != fold])
        np.testing.assert_allclose(scores[folds == fold], scale(test) @ slope, rtol=1e-9)


def test_a_deleted_row_in_momentum_is_found_and_in_a_clean_state_it_is_not():
    """The game itself: D and a, or D and b, trained with momentum, then the row's parameters are
    put right and the momentum is not; or both are (the run on D)."""
    rng = np.random.default_rng(0)
    n, size = 16, 20
    row_a, row_b = rng.normal(size=(2, size))

    def run(seed, row, clean):
        noise = np.random.default_rng(seed).normal(size=(8, size))
        tx = optax.trace(0.9)
        state = tx.init(np.zeros(size))
        for t in range(8):
            _, state = tx.update(noise[t] + (0 if clean else row * (t == 4)), state)
        return state

    stack = lambda row, first, clean: jax.tree.map(
        lambda *leaves: np.stack(leaves), *(run(first + i, row, clean) for i in range(n))
    )
    for clean in (False, True):
        groups = stack(row_a, 0, clean), stack(row_b, n, clean)
        assert residue(*groups, seed=0, **FEW).found is not clean


def test_integers_and_what_never_varies_are_no_features():
    first, second = states(np.random.default_rng(0))
    first["mu"][:, 0] = second["mu"][:, 0] = 2.5
    result = residue(first, second, seed=0, **FEW)
    assert (result.num_runs, result.num_features) == (24, 29)
    assert isinstance(result, Residue)
    assert residue_of is not None


def test_the_seed_decides_and_nothing_else_does():
    groups = states(np.random.default_rng(0))
    assert residue(*groups, seed=4, **FEW) == residue(*groups, seed=4, **FEW)
    assert 1 / 100 <= residue(*groups, seed=4, **FEW).p_value <= 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_folds": 13}, "num_folds=13"),
        ({"num_folds": 1}, "num_folds=1"),
        ({"ridge": 0.0}, "ridge"),
        ({"num_permutations": 10}, "num_permutations=10"),
        ({"power": 1.0}, "power"),
        ({"second": {"mu": np.zeros((12, 3))}}, "structure"),
        ({"second": "short"}, "as many runs"),
        ({"second": "infinite"}, "finite"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(change, match):
    first, second = states(np.random.default_rng(0))
    if change.get("second") == "short":
        change = {"second": jax.tree.map(lambda leaf: leaf[:5], second)}
    if change.get("second") == "infinite":
        change = {
            "second": jax.tree.map(lambda leaf: leaf + np.inf if leaf.ndim == 3 else leaf, second)
        }
    with pytest.raises(ValueError, match=match):
        residue(**({"first": first, "second": second, "seed": 0} | change))
