"""Deletion-efficient k-means: equality with retraining, and what published deletions do instead."""

import fractions
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import errors, unlearners
from tests.conformance.cases import differing

seeds = st.integers(0, 2**31 - 1)
NUM_ROWS, CLUSTERS = 64, 4


def blobs(seed, num_rows=NUM_ROWS, dimension=3, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLUSTERS, dimension)) * 5
    rows = centres[rng.integers(0, CLUSTERS, num_rows)]
    return {"x": (rows + spread * rng.normal(size=rows.shape)).astype(np.float32)}


def quantised(lattice=0.25, num_examples=NUM_ROWS, **options):
    return unlearners.quantised_kmeans(
        CLUSTERS, num_examples=num_examples, lattice=lattice, **options
    )


def divided(num_examples=NUM_ROWS, **options):
    return unlearners.divided_kmeans(
        CLUSTERS, num_examples=num_examples, **({"width": 4} | options)
    )


def same_as_refit(learner, data, state, params, gone, key):
    """Every leaf of parameters and record but the bits of who took part."""
    kept = np.setdiff1d(np.arange(NUM_ROWS), gone)
    oracle, oracle_state = learner.fit(data, kept, key=key)
    record = lambda s: s.record._replace(fitted=s.record.fitted.fitted_digest)
    return differing((params, record(state)), (oracle, record(oracle_state))) == []


@settings(deadline=None, max_examples=10)
@given(seed=seeds, coarse=st.booleans())
def test_quantised_deletions_equal_a_fit_on_the_retained_rows_in_every_leaf(seed, coarse):
    rng, data, key = np.random.default_rng(seed), blobs(seed), jax.random.key(seed)
    learner = quantised(lattice=1.0 if coarse else 2.0**-6)
    params, state = learner.fit(data, key=key)
    gone = rng.permutation(NUM_ROWS)[:10]
    for block in np.split(gone, [1, 2, 3, 6]):
        params, state, _ = learner.forget(params, state, block, data=data)
    assert same_as_refit(learner, data, state, params, gone, key)


@settings(deadline=None, max_examples=6)
@given(seed=seeds, height=st.sampled_from([1, 2]))
def test_divided_deletions_equal_a_fit_on_the_retained_rows_in_every_leaf(seed, height):
    rng, data, key = np.random.default_rng(seed), blobs(seed), jax.random.key(seed)
    learner = divided(height=height)
    params, state = learner.fit(data, key=key)
    gone = rng.permutation(NUM_ROWS)[:10]
    for block in np.split(gone, [1, 2, 3, 6]):
        params, state, _ = learner.forget(params, state, block, data=data)
    assert same_as_refit(learner, data, state, params, gone, key)


def deletions(learner, data, key, count=NUM_ROWS):
    """Each row deleted from the same fit: its measurements."""
    params, state = learner.fit(data, key=key)
    results = [learner.forget(params, state, [i], data=data) for i in range(count)]
    return state, [result.info.measurements for result in results]


def test_both_outcomes_of_a_quantised_deletion_occur_and_seeds_always_retrain():
    state, found = deletions(quantised(lattice=2.0), blobs(0, spread=0.5), jax.random.key(2))
    planted = np.asarray(state.record.qk_seeds).tolist()
    assert all(found[i]["resumed_at"] == 0 for i in planted)
    others = [found[i]["retrained"] for i in range(NUM_ROWS) if i not in planted]
    assert 0 < sum(others) < len(others)


def test_a_coarser_lattice_retrains_less_often():
    rates = []
    for lattice in (2.0**-6, 1.0, 8.0):
        _, found = deletions(quantised(lattice=lattice), blobs(1), jax.random.key(0))
        rates.append(np.mean([measured["retrained"] for measured in found]))
    assert rates[0] > 0.9
    assert rates[0] > rates[1] > rates[2]


def test_a_deletion_that_changes_nothing_reads_only_its_row():
    data, asked = blobs(0, spread=0.5), []

    class Spy:
        def __getitem__(self, ids):
            asked.append(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], data)

    learner = quantised(lattice=2.0)
    params, state = learner.fit(data, key=jax.random.key(2))
    for i in range(NUM_ROWS):
        asked.clear()
        result = learner.forget(params, state, [i], data=Spy())
        if not result.info.measurements["retrained"]:
            assert asked == [[i]]
            assert differing(result.params, params) == []
        else:
            assert [i] in asked
            assert len(asked) == 2


def test_a_divided_deletion_reads_one_leaf_and_not_the_row():
    data, asked = blobs(3), []

    class Spy:
        def __getitem__(self, ids):
            asked.extend(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], data)

    learner = divided(width=8)
    params, state = learner.fit(data, key=jax.random.key(0))
    for i in range(10):
        asked.clear()
        result = learner.forget(params, state, [i], data=Spy())
        assert i not in asked
        assert len(asked) == result.info.measurements["rows_read"] < NUM_ROWS / 3
        assert result.info.measurements["nodes_solved"] <= 2


def test_the_stop_by_the_loss_may_come_earlier_or_later_after_a_deletion():
    changes = set()
    for seed in range(15):
        data, key = blobs(seed, spread=3.0), jax.random.key(seed)
        learner = quantised(lattice=1.0, max_iterations=6)
        params, state = learner.fit(data, key=key)
        for i in range(0, NUM_ROWS, 8):
            result = learner.forget(params, state, [i], data=data)
            steps = int(result.opt_state.record.qk_steps), int(state.record.qk_steps)
            changes.add(np.sign(steps[0] - steps[1]))
            assert same_as_refit(learner, data, result.opt_state, result.params, [i], key)
    assert changes == {-1, 0, 1}


def test_small_clusters_follow_the_balance_correction():
    """One centroid by hand: n_c = 1, n = 10, k = 2, gamma = 1: w = 1/5."""
    x = np.array([[0.0]] * 9 + [[40.0]])
    learner = unlearners.quantised_kmeans(
        2, num_examples=10, lattice=2.0**-12, balance=1.0, max_iterations=1
    )
    for seed in range(20):
        params, state = learner.fit({"x": x}, key=jax.random.key(seed))
        start = np.sort(np.asarray(state.record.qk_seeds))
        if start[1] == 9 and int(state.record.qk_best) == 1:
            assert np.sort(np.ravel(params["centroids"])).tolist() == [0.0, 40.0]
    spread = np.array([[0.0]] * 9 + [[41.0], [43.0]])
    learner = unlearners.quantised_kmeans(
        2, num_examples=11, lattice=2.0**-12, balance=1.0, max_iterations=1
    )
    met = False
    for seed in range(20):
        params, state = learner.fit({"x": spread}, key=jax.random.key(seed))
        ids = np.asarray(state.record.qk_seeds)
        if int(state.record.qk_best) == 1 and set(ids.tolist()) & {9}:
            share = 2 * 2 / 11
            assert np.isclose(np.max(params["centroids"]), share * 42 + (1 - share) * 41)
            met = True
    assert met


# --- what published deletions do instead -------------------------------------------------------


def test_starting_anew_where_a_seed_was_deleted_is_not_retraining_in_distribution():
    """Exact laws of two seeds of four points, one of them deleted."""
    points = [0, 1, 3, 7]
    square = lambda i, j: fractions.Fraction((points[i] - points[j]) ** 2)

    def law(ids):
        pairs = itertools.permutations(ids, 2)
        return {(i, j): square(i, j) / sum(square(i, m) for m in ids) / len(ids) for i, j in pairs}

    before, target, gone = law(range(4)), law(range(3)), 3
    chosen = sum(p for pair, p in before.items() if gone in pair)
    anew = {pair: before[pair] + chosen * target[pair] for pair in target}
    assert sum(anew.values()) == 1
    assert max(abs(anew[pair] - target[pair]) for pair in target) > fractions.Fraction(1, 100)
    # Ours draws again from the deleted seed on, earlier seeds kept.
    ours = dict.fromkeys(target, fractions.Fraction(0))
    first = {i: fractions.Fraction(1, 4) for i in range(4)}
    for i, j in target:
        starts = first[i] + first[gone] / 3
        second = square(i, j) / sum(square(i, m) for m in range(4))
        again = square(i, gone) / sum(square(i, m) for m in range(4))
        redrawn = square(i, j) / sum(square(i, m) for m in range(3))
        ours[i, j] = first[i] * (second + again * redrawn) + (starts - first[i]) * redrawn
    assert ours == target


def test_fresh_phases_after_a_failed_check_are_not_retraining_in_distribution():
    """One cluster, one coordinate: 8 phases, all counted."""
    lattice, before, after = 8, 10, 13
    rounded = lambda v, p: lattice * np.floor((v - p) / lattice + 0.5) + p
    target = {rounded(after, p): 1 / 8 for p in range(8)}
    kept = [p for p in range(8) if rounded(before, p) == rounded(after, p)]
    anew = {v: (8 - len(kept)) / 8 / 8 for v in target}
    for p in kept:
        anew[rounded(after, p)] += 1 / 8
    assert len(target) == 8
    assert np.isclose(sum(anew.values()), 1.0)
    assert max(abs(anew[v] - 1 / 8) for v in target) > 0.04


def test_the_published_check_divides_by_the_wrong_count_and_passes_what_moves():
    """c - x/s as released, (s c - x)/(s - 1) in truth: a mean of 2 rows, 10 and 0."""
    mean, size, row = 5.0, 2, 0.0
    published = mean - row / size
    truth = (size * mean - row) / (size - 1)
    assert published == mean
    assert truth == 10.0
    data = {"x": np.array([[0.0], [10.0], [100.0], [100.0]])}
    learner = unlearners.quantised_kmeans(2, num_examples=4, lattice=1.0, balance=0.25)
    met = 0
    for seed in range(12):
        key = jax.random.key(seed)
        params, state = learner.fit(data, key=key)
        if 0 in np.asarray(state.record.qk_seeds):
            continue
        result = learner.forget(params, state, [0], data=data)
        met += 1
        assert result.info.measurements["retrained"]
        oracle, _ = learner.fit(data, [1, 2, 3], key=key)
        assert differing(oracle, result.params) == []
        assert abs(np.min(result.params["centroids"]) - 10.0) <= 1.0
    assert met


def test_deleting_the_first_seed_is_noticed():
    """The released code keeps no note of the first seed."""
    learner, data = quantised(lattice=16.0), blobs(4)
    params, state = learner.fit(data, key=jax.random.key(0))
    first = int(state.record.qk_seeds[0])
    result = learner.forget(params, state, [first], data=data)
    assert result.info.measurements["retrained"]
    assert first not in np.asarray(result.opt_state.record.qk_seeds)


# --- quality, quotes, refusals -----------------------------------------------------------------


@pytest.mark.parametrize("make", [quantised, divided])
def test_the_loss_is_near_that_of_lloyds_algorithm(make):
    sklearn = pytest.importorskip("sklearn.cluster")
    data = blobs(5, num_rows=600, spread=0.5)
    ratios = []
    for seed in range(4):
        params, _ = make(num_examples=600).fit(data, key=jax.random.key(seed))
        squares = ((data["x"][:, None] - np.asarray(params["centroids"])) ** 2).sum(-1)
        ratios.append(squares.min(1).sum())
    theirs = sklearn.KMeans(CLUSTERS, n_init=8, random_state=0).fit(data["x"]).inertia_
    assert min(ratios) < 1.1 * theirs


def test_more_deletions_than_a_cluster_has_rows_and_duplicates_are_fine():
    data, key = {"x": np.repeat(blobs(6, 8)["x"], 8, axis=0)}, jax.random.key(0)
    for learner in (quantised(), divided()):
        params, state = learner.fit(data, key=key)
        gone = np.arange(2, NUM_ROWS)
        result = learner.forget(params, state, gone, data=data)
        assert same_as_refit(learner, data, result.opt_state, result.params, gone, key)
        assert np.isfinite(np.asarray(result.params["centroids"])).all()


def test_a_quote_says_whether_a_seed_is_deleted():
    learner, data = quantised(lattice=2.0), blobs(0, spread=0.5)
    params, state = learner.fit(data, key=jax.random.key(2))
    planted = np.asarray(state.record.qk_seeds)
    other = next(i for i in range(NUM_ROWS) if i not in planted)
    assert "retrains" in learner.quote(params, state, [int(planted[0])]).reason
    quote = learner.quote(params, state, [other])
    assert "unless" in quote.reason
    assert quote.num_gradients < quote.retrain_gradients / 10
    tree = divided(width=8)
    params, state = tree.fit(data, key=jax.random.key(0))
    result = tree.forget(params, state, [5], data=data)
    quote = tree.quote(params, state, [5])
    assert quote.num_gradients == 10 * result.info.measurements["rows_read"]
    assert result.info.measurements["nodes_solved"] <= quote.num_steps == 2


def test_a_changed_row_is_refused_where_it_is_read():
    learner, data = quantised(), blobs(7)
    params, state = learner.fit(data, key=jax.random.key(0))
    other = {"x": data["x"].copy()}
    other["x"][3] += 0.01
    with pytest.raises(errors.MissingDataError, match="other values for 3"):
        learner.forget(params, state, [2, 3], data=other)


@pytest.mark.parametrize("make", [quantised, divided])
def test_rows_too_far_for_the_grid_are_a_typed_error(make):
    with pytest.raises(errors.SumOverflowError, match="coarser grid"):
        make().fit({"x": np.full((NUM_ROWS, 3), 1e6)}, key=jax.random.key(0))


@pytest.mark.parametrize("make", [quantised, divided])
def test_rows_without_a_second_axis_are_refused(make):
    with pytest.raises(errors.MissingDataError, match=r"features \(b, d\)"):
        make().fit({"x": np.zeros(NUM_ROWS)}, key=jax.random.key(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantised(lattice=0.1),
        lambda: quantised(lattice=-1.0),
        lambda: quantised(lattice=1e9),
        lambda: quantised(balance=0.0),
        lambda: quantised(grid=0.3),
        lambda: quantised(max_iterations=0),
        lambda: quantised(num_examples=0),
        lambda: unlearners.quantised_kmeans(0, num_examples=4, lattice=1.0),
        lambda: divided(width=1),
        lambda: divided(height=0),
        lambda: divided(width=64, height=9),
        lambda: divided(max_iterations=True),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match="Expected"):
        make()
