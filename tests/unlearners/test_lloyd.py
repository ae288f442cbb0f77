"""The parts of k-means in integers: laws, exactness, and independence of other rows."""

import math

import jax
import numpy as np
import pytest

from jaxunlearn import records
from jaxunlearn.unlearners.kmeans import _lloyd


def test_distances_at_the_largest_units_are_exact_integers():
    for dimension in (1, 2, 7, 784):
        most = _lloyd.max_units(dimension)
        rng = np.random.default_rng(dimension)
        rows = rng.choice([-most, most, most - 1], (20, dimension)).astype(np.float64)
        centroids = rng.choice([-2 * most, 2 * most, 0], (5, dimension)).astype(np.float64)
        labels, distances = _lloyd.nearest(rows, centroids)
        exact = [
            [sum((int(a) - int(b)) ** 2 for a, b in zip(row, c, strict=True)) for c in centroids]
            for row in rows
        ]
        assert labels.tolist() == [row.index(min(row)) for row in exact]
        assert [int(d) for d in distances] == [min(row) for row in exact]
        assert _lloyd.exact_total(distances) == sum(min(row) for row in exact)


def test_the_total_of_the_largest_distances_does_not_overflow():
    distances = np.full((5000,), 2.0**52)
    assert _lloyd.exact_total(distances) == 5000 * 2**52


def test_a_rows_draws_depend_on_its_id_and_the_key_alone():
    key = jax.random.key(3)
    together = records.row_draws(key, np.arange(200), 4)
    some = np.array([199, 7, 30])
    assert np.array_equal(records.row_draws(key, some, 4), together[some])
    assert len(np.unique(together)) == together.size
    assert np.all((together > 0) & (together < 1))
    assert not np.array_equal(records.row_draws(jax.random.key(4), some, 4), together[some])


def kpp_law(rows):
    """P(first, second) of k-means++ with two seeds."""
    squares = np.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
    return squares / squares.sum(axis=1, keepdims=True) / len(rows)


def chi_square(counts, law):
    seen = law > 0
    expected = counts.sum() * law[seen]
    return float(np.sum((counts[seen] - expected) ** 2 / expected)), int(seen.sum()) - 1


def test_the_race_draws_seeds_by_the_law_of_kmeans_plus_plus():
    """12 pairs, 8000 draws: the law passes at 1e-4, seeds by plain distance fail by far."""
    rows = np.array([[0.0], [1.0], [4.0], [9.0]])
    draws = np.random.default_rng(0).random((8000, 4, 2))
    counts = np.zeros((4, 4))
    for u in draws:
        counts[tuple(_lloyd.plant(rows, u))] += 1
    limit = lambda df: df + 6 * math.sqrt(2 * df)  # beyond the 1e-4 quantile
    law = kpp_law(rows)
    statistic, df = chi_square(counts, law)
    assert statistic < limit(df)
    mutant = np.sqrt(law * 4 * np.sum((rows[:, None] - rows[None]) ** 2, axis=-1).sum(1)[:, None])
    mutant = mutant / mutant.sum(axis=1, keepdims=True) / 4
    statistic, df = chi_square(counts, mutant)
    assert statistic > 10 * limit(df)


def test_a_loser_of_the_race_changes_nothing_when_it_is_taken_out():
    rng = np.random.default_rng(1)
    for _ in range(50):
        rows, draws = rng.integers(-50, 50, (12, 2)).astype(float), rng.random((12, 4))
        seeds = _lloyd.plant(rows, draws)
        for loser in set(range(12)) - set(seeds.tolist()):
            kept = np.delete(np.arange(12), loser)
            assert np.array_equal(kept[_lloyd.plant(rows[kept], draws[kept])], seeds)


def test_deleting_a_seed_keeps_those_before_it():
    rng = np.random.default_rng(2)
    rows, draws = rng.integers(-50, 50, (12, 2)).astype(float), rng.random((12, 4))
    seeds = _lloyd.plant(rows, draws)
    kept = np.delete(np.arange(12), seeds[2])
    start = tuple(np.searchsorted(kept, seeds[:2]))
    resumed = _lloyd.plant(rows[kept], draws[kept], start)
    assert np.array_equal(resumed, _lloyd.plant(rows[kept], draws[kept]))
    assert np.array_equal(kept[resumed[:2]], seeds[:2])


def test_fewer_distinct_rows_than_seeds_repeat_the_first():
    rows = np.zeros((3, 2))
    seeds = _lloyd.plant(rows, np.random.default_rng(0).random((3, 3)))
    assert seeds[1:].tolist() == [0, 0]


@pytest.mark.parametrize("key", [None, 3, np.zeros(2, np.uint32)])
def test_what_is_no_typed_key_is_refused(key):
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        records.key_words(key)


def test_several_keys_or_another_kind_are_refused():
    for key in (jax.random.split(jax.random.key(0)), jax.random.key(0, impl="rbg")):
        with pytest.raises(ValueError, match="one key"):
            records.key_words(key)
