"""Expected retraining of sharded and sliced ensembles, against simulations."""

import numpy as np
import pytest

from jaxunlearn import accounting


def test_golden_values():
    assert accounting.sharded_retraining(1000, 10, 20) == pytest.approx(1961.0, abs=0.05)
    assert accounting.sharded_retraining(1000, 10, 20, together=True) == pytest.approx(
        858.42, abs=0.005
    )
    assert accounting.sliced_retraining(10**9) == pytest.approx(2 / 3)
    assert accounting.slice_epochs(20, 1) == 20


def simulated(num_examples, num_shards, num_requests, together, runs=4000):
    """Rows retrained; 4000 runs bring the standard error below 0.4% of the mean."""
    rng, size = np.random.default_rng(0), num_examples // num_shards
    totals = np.zeros(runs)
    for run in range(runs):
        shards = rng.permutation(num_examples)[:num_requests] // size
        counts = np.bincount(shards, minlength=num_shards)
        if together:
            totals[run] = np.sum((counts > 0) * size) - num_requests
        else:
            totals[run] = sum(size * c - c * (c + 1) // 2 for c in counts)
    return totals.mean(), totals.std() / np.sqrt(runs)


@pytest.mark.parametrize("together", [False, True])
def test_sharding_agrees_with_a_simulation(together):
    """The formulas draw with replacement: 20 of 2000 rows differ by less than 1%."""
    mean, error = simulated(2000, 10, 20, together)
    formula = accounting.sharded_retraining(2000, 10, 20, together=together)
    assert abs(mean - formula) < 6 * error + 0.01 * formula
    assert abs(mean - 1.1 * formula) > 6 * error + 0.01 * formula


def test_slicing_is_the_mean_over_slices():
    for slices in (1, 2, 5, 16):
        costs = [sum(range(j, slices + 1)) / slices for j in range(1, slices + 1)]
        whole = sum(range(1, slices + 1)) / slices
        assert np.mean(costs) / whole == pytest.approx(accounting.sliced_retraining(slices))
        epochs = accounting.slice_epochs(12, slices)
        assert epochs * whole == pytest.approx(12)


def test_one_shard_retrains_everything():
    assert accounting.sharded_retraining(100, 1, 1) == 99
    assert accounting.sharded_retraining(100, 1, 3, together=True) == 97


@pytest.mark.parametrize(
    "call",
    [
        lambda: accounting.sharded_retraining(10, 0, 1),
        lambda: accounting.sharded_retraining(10, 2, 11),
        lambda: accounting.sharded_retraining(10, 20, 1),
        lambda: accounting.sharded_retraining(10, 2, True),
        lambda: accounting.slice_epochs(0, 3),
        lambda: accounting.sliced_retraining(1.5),
    ],
)
def test_bad_counts_are_refused(call):
    with pytest.raises(ValueError, match="Expected"):
        call()
