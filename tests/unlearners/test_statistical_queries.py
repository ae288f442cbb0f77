"""Summation-form learners: closed forms, other libraries, and deletion to the last bit."""

import fractions
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import errors, unlearners
from jaxunlearn.unlearners.statistical_queries import _ridge

seeds = st.integers(0, 2**32 - 1)
NUM_ROWS, DIMENSION = 40, 6


def regression(seed, num_rows=NUM_ROWS, dimension=DIMENSION):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, dimension)).astype(np.float32)
    y = (x @ rng.normal(size=dimension) + rng.normal(size=num_rows)).astype(np.float32)
    return {"x": x, "y": y}


def labelled(seed, num_rows=60):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, num_rows).astype(np.int32)
    return {"x": (rng.normal(size=(num_rows, 4)) + y[:, None]).astype(np.float32), "y": y}


def on_grid(values, grid=2.0**-16):
    """Values rounded to the grid, as fractions."""
    return [[fractions.Fraction(round(float(v) / grid)) * fractions.Fraction(grid) for v in row]
            for row in np.atleast_2d(values)]  # fmt: skip


def exact_ridge(data, ids, l2):
    """The ridge solution of the rounded rows in rational arithmetic, by elimination."""
    x = on_grid(data["x"][ids])
    y = on_grid(data["y"][ids])[0]
    d = len(x[0])
    grid2 = fractions.Fraction(2) ** -32
    l2 = round(fractions.Fraction(l2) / grid2) * grid2
    rows = [
        [sum(r[i] * r[j] for r in x) + (l2 if i == j else 0) for j in range(d)]
        + [sum(r[i] * t for r, t in zip(x, y, strict=True))]
        for i in range(d)
    ]
    for i in range(d):
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(d):
            if k != i:
                rows[k] = [a - rows[k][i] * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def coefficients(result):
    return np.asarray(result.params["coefficients"])


# --- ridge -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(seed=seeds, log_l2=st.integers(-32, 6))
def test_ridge_is_the_exact_solution_of_the_rounded_rows_rounded_once(seed, log_l2):
    data, l2 = regression(seed, 12, 4), 2.0**log_l2
    data["x"][:, 3] = data["x"][:, 2] + 2.0**-15 * data["x"][:, 3]  # condition up to 2^34
    learner = unlearners.statistical_queries(unlearners.ridge(l2=l2), num_examples=12)
    result = learner.forget(*learner.fit(data), [2, 9], data=data)
    exact = exact_ridge(data, np.delete(np.arange(12), [2, 9]), l2)
    steps = [round(value * 2**24) for value in exact]
    expected = np.ldexp(np.array(steps, np.float64), -24).astype(np.float32)
    assert np.array_equal(coefficients(result), expected)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_refined_iterate_is_as_near_to_the_exact_solution_as_it_says(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**16), 2**16, (9, 4))
    x[:, 3] = x[:, 2] + rng.integers(-3, 4, 9)
    gram, cross = x.T @ x + 5 * np.eye(4, dtype=np.int64), rng.integers(-(2**40), 2**40, (4, 1))
    inverse = np.linalg.inv(gram.astype(np.float64))
    iterate, steps = _ridge._refine(_ridge._limbs(gram), cross, inverse, 5, 120)
    product = gram.astype(object) @ iterate - cross.astype(object) * 2**120
    assert steps >= 2
    assert sum(int(r) ** 2 for r in product[:, 0]) <= (5 * 2**56) ** 2


@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_ridge_after_deletions_in_any_order_is_bitwise_that_of_the_retained_rows(seed):
    rng, data = np.random.default_rng(seed), regression(seed)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1e-3), num_examples=NUM_ROWS)
    gone = rng.permutation(NUM_ROWS)[:12]
    params, state = learner.fit(data)
    for block in np.split(gone, [1, 3, 4, 9]):
        params, state, _ = learner.forget(params, state, block, data=data)
    kept = np.setdiff1d(np.arange(NUM_ROWS), gone)
    oracle, oracle_state = learner.fit(data, kept)
    assert np.array_equal(oracle["coefficients"], params["coefficients"])
    sums = lambda s: jax.tree.leaves((s.record.query_sums, s.record.query_fingerprints))
    assert all(np.array_equal(a, b) for a, b in zip(sums(state), sums(oracle_state), strict=True))


def test_woodbury_and_a_fresh_factorisation_give_the_same_bits():
    data = regression(1)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=0.1), num_examples=NUM_ROWS)
    params, state = learner.fit(data)
    quick = learner.forget(params, state, [3, 4], data=data)
    slow = learner.forget(params, state, [3, 4, 5], data=data)
    two_steps = learner.forget(quick.params, quick.opt_state, [5], data=data)
    assert quick.info.measurements["route"] == "woodbury"
    assert slow.info.measurements["route"] == "factorised"
    assert np.array_equal(coefficients(slow), coefficients(two_steps))


def test_the_guard_refuses_a_downdate_that_would_lose_the_digits():
    data = regression(2)
    data["x"][7] = 0
    data["x"][7, 3] = 200.0  # the only row that says much about the fourth feature
    data["x"][np.arange(NUM_ROWS) != 7, 3] *= 1e-3
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1e-4), num_examples=NUM_ROWS)
    params, state = learner.fit(data)
    result = learner.forget(params, state, [7], data=data)
    assert result.info.measurements["least_pivot"] < _ridge.GUARD
    assert result.info.measurements["route"] == "factorised"
    oracle, _ = learner.fit(data, np.delete(np.arange(NUM_ROWS), 7))
    assert np.array_equal(oracle["coefficients"], coefficients(result))


def test_an_inverse_that_is_no_help_is_replaced_and_the_answer_is_the_same():
    data = regression(3)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=0.1), num_examples=NUM_ROWS)
    params, state = learner.fit(data)
    right = learner.forget(params, state, [1], data=data)
    spoilt = state._replace(
        record=state.record._replace(query_aid=jnp.zeros_like(state.record.query_aid))
    )
    result = learner.forget(params, spoilt, [1], data=data)
    assert result.info.measurements["route"] == "factorised"
    assert np.array_equal(coefficients(result), coefficients(right))


def test_plain_woodbury_is_not_bitwise_retraining():
    """What the refinement is for: the formula alone leaves rounding that a test can see."""
    different = 0
    for seed in range(20):
        x = regression(seed)["x"].astype(np.float64)
        inverse = np.linalg.inv(x.T @ x + 1e-3 * np.eye(DIMENSION))
        quick, _ = _ridge.downdate(inverse, x[:1])
        oracle = np.linalg.inv(x[1:].T @ x[1:] + 1e-3 * np.eye(DIMENSION))
        assert np.allclose(quick, oracle, rtol=1e-9)
        different += not np.array_equal(quick, oracle)
    assert different == 20


def test_the_hat_matrix_form_of_the_deletion_agrees():
    data = regression(4)
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    inverse = np.linalg.inv(x.T @ x + np.eye(DIMENSION))
    theta, u = inverse @ x.T @ y, [2, 30]
    hat = x[u] @ inverse @ x[u].T
    moved = theta - inverse @ x[u].T @ np.linalg.solve(np.eye(2) - hat, y[u] - x[u] @ theta)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    result = learner.forget(*learner.fit(data), u, data=data)
    assert np.max(np.abs(coefficients(result) - moved)) < 2e-5  # the grid of the rows


def test_several_targets_columns_of_zeros_and_repeated_rows_are_fine():
    data = regression(5)
    data["x"][:, 2] = 0
    data["x"][20:] = data["x"][:20]
    data["y"] = np.stack([data["y"], -2 * data["y"], 0 * data["y"]], axis=1)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    result = learner.forget(*learner.fit(data), [0, 1], data=data)
    oracle, _ = learner.fit(data, range(2, NUM_ROWS))
    assert np.array_equal(oracle["coefficients"], coefficients(result))
    assert not coefficients(result)[2].any()
    assert not coefficients(result)[:, 2].any()


def test_a_system_that_float64_cannot_factorise_is_a_typed_error():
    rows = np.full((30, 4), 200.0, np.float32) + np.arange(4, dtype=np.float32) * 2.0**-15
    data = {"x": rows, "y": np.ones(30, np.float32)}
    query = unlearners.ridge(l2=2.0**-32)
    learner = unlearners.statistical_queries(query, num_examples=30)
    with pytest.raises(errors.SolverError, match="Raise l2"):
        learner.fit(data)


@pytest.mark.parametrize(
    "options",
    [{"l2": 0.0}, {"l2": -1.0}, {"l2": 1e-12}, {"l2": float("nan")}, {"l2": 1.0, "grid": 0.1},
     {"l2": 1.0, "solution_grid": 0.3}, {"l2": 1.0, "target_grid": 2.0**-300}],
)  # fmt: skip
def test_bad_options_of_ridge_are_refused(options):
    with pytest.raises(ValueError, match="Expected"):
        unlearners.ridge(**options)


# --- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["changed", "swapped", "target"])
def test_a_row_that_reads_otherwise_than_in_fit_is_refused(spoil):
    data = regression(6)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    params, state = learner.fit(data)
    other = {name: array.copy() for name, array in data.items()}
    if spoil == "changed":
        other["x"][3, 2] += 2.0**-15
    elif spoil == "target":
        other["y"][3] += 2.0**-15
    else:
        other["x"][[3, 4]] = other["x"][[4, 3]]
    with pytest.raises(errors.MissingDataError, match="got other values for 3"):
        learner.forget(params, state, [2, 3], data=other)


def test_values_too_large_for_the_grid_are_a_typed_error_and_a_coarser_grid_takes_them():
    data = regression(7)
    data["x"] *= 1e4
    fit = lambda **options: unlearners.statistical_queries(
        unlearners.ridge(l2=1.0, **options), num_examples=NUM_ROWS
    ).fit(data)
    with pytest.raises(errors.SumOverflowError, match="coarser grid"):
        fit()
    assert bool(jnp.all(jnp.isfinite(fit(grid=2.0**-8)[0]["coefficients"])))


def test_the_record_forgets_the_fingerprints_of_forgotten_rows():
    data = regression(8)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    result = learner.forget(*learner.fit(data), [3], data=data)
    prints = np.asarray(result.opt_state.record.query_fingerprints)
    assert not prints[3].any()
    assert prints.any(axis=1).sum() == NUM_ROWS - 1


def test_only_the_rows_to_forget_are_read():
    data, asked = regression(9), []

    class Spy:
        def __getitem__(self, ids):
            asked.extend(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], data)

    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    params, state = learner.fit(data)
    learner.forget(params, state, [8, 2], data=Spy())
    assert asked == [2, 8]


_PROGRAM = """
import json, sys
import numpy as np
from jaxunlearn import unlearners
rng = np.random.default_rng(0)
data = {"x": rng.normal(size=(300, 5)).astype(np.float32), "y": rng.integers(0, 3, 300)}
order = rng.permutation(300)[:40]
out = []
for query in (unlearners.ridge(l2=0.01), unlearners.gaussian_naive_bayes(num_classes=3)):
    learner = unlearners.statistical_queries(query, num_examples=300)
    params, state = learner.fit(data)
    for block in np.split(order, 4) if sys.argv[1] == "in four" else [order]:
        params, state, _ = learner.forget(params, state, block, data=data)
    out += [np.asarray(leaf).tobytes().hex() for leaf in params.values()]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_another_number_of_devices_or_threads_and_another_order_give_the_same_bits():
    def run(order, **environment):
        result = subprocess.run(
            [sys.executable, "-c", _PROGRAM, order], capture_output=True, text=True, check=True,
            env=os.environ | environment,
        )  # fmt: skip
        return json.loads(result.stdout.strip().splitlines()[-1])

    one = run("in four", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    assert one == run("at once", XLA_FLAGS="--xla_force_host_platform_device_count=4")


# --- naive Bayes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_gaussian_naive_bayes_is_its_closed_form_on_the_retained_rows(seed):
    data, gone = labelled(seed), [1, 5, 20]
    learner = unlearners.statistical_queries(
        unlearners.gaussian_naive_bayes(num_classes=3), num_examples=60
    )
    result = learner.forget(*learner.fit(data), gone, data=data)
    kept = np.delete(np.arange(60), gone)
    x, y = data["x"][kept].astype(np.float64), data["y"][kept]
    for c in range(3):
        assert np.allclose(result.params["mean"][c], x[y == c].mean(0), atol=1e-5)
        assert np.allclose(result.params["variance"][c], x[y == c].var(0), rtol=1e-4, atol=1e-6)
        assert np.isclose(result.params["log_prior"][c], np.log(np.mean(y == c)))
    oracle, _ = learner.fit(data, kept)
    assert all(np.array_equal(oracle[name], result.params[name]) for name in oracle)


def test_naive_bayes_predicts_like_scikit_learn():
    bayes = pytest.importorskip("sklearn.naive_bayes")
    data = labelled(0)
    learner = unlearners.statistical_queries(
        unlearners.gaussian_naive_bayes(num_classes=3), num_examples=60
    )
    theirs = bayes.GaussianNB().fit(data["x"], data["y"])
    ours = learner.predict(learner.fit(data)[0], data)
    assert np.allclose(ours, theirs.predict_log_proba(data["x"]), atol=2e-3)
    counts = {"x": np.random.default_rng(0).integers(0, 9, (60, 4)), "y": data["y"]}
    learner = unlearners.statistical_queries(
        unlearners.multinomial_naive_bayes(num_classes=3, smoothing=0.5), num_examples=60
    )
    theirs = bayes.MultinomialNB(alpha=0.5).fit(counts["x"], counts["y"])
    ours = learner.predict(learner.fit(counts)[0], counts)
    assert np.allclose(ours, theirs.predict_log_proba(counts["x"]), atol=1e-4)


def test_the_variance_of_a_far_cluster_does_not_cancel():
    rng = np.random.default_rng(0)
    x = (200.0 + 1e-3 * rng.normal(size=(60, 1))).astype(np.float32)
    data = {"x": x, "y": np.arange(60, dtype=np.int32) % 2}
    query = unlearners.gaussian_naive_bayes(num_classes=2, var_smoothing=0.0)
    learner = unlearners.statistical_queries(query, num_examples=60)
    result = learner.forget(*learner.fit(data), [0, 2], data=data)
    kept = np.round(x.astype(np.float64) * 2**16)[4::2] / 2**16
    assert np.isclose(result.params["variance"][0, 0], kept.var() + 2.0**-32 / 12, rtol=1e-6)
    naive = np.mean(np.square(x[4::2]), dtype=np.float32) - np.mean(x[4::2], dtype=np.float32) ** 2
    assert abs(naive / kept.var() - 1) > 0.5  # float32 differences of squares are noise here


@pytest.mark.parametrize("query", ["gaussian", "multinomial"])
def test_a_class_may_lose_its_last_row(query):
    make = {
        "gaussian": unlearners.gaussian_naive_bayes,
        "multinomial": unlearners.multinomial_naive_bayes,
    }[query]
    data = {"x": np.arange(8.0).reshape(4, 2), "y": np.array([0, 0, 1, 1])}
    learner = unlearners.statistical_queries(make(num_classes=2), num_examples=4)
    result = learner.forget(*learner.fit(data), [2, 3], data=data)
    posterior = learner.predict(result.params, data)
    assert np.array_equal(np.argmax(posterior, axis=1), np.zeros(4))
    assert np.array_equal(posterior[:, 0], np.zeros(4))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, 2, 0])}, "labels in 0..1"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, -1, 1, 0])}, "labels in 0..1"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "integer labels"),
        ({"x": np.zeros(4), "y": np.zeros(4, int)}, "features"),
        ({"x": -np.ones((4, 2)), "y": np.zeros(4, int)}, "counts >= 0"),
    ],
)
def test_bad_rows_of_naive_bayes_are_refused(data, error):
    query = unlearners.multinomial_naive_bayes(num_classes=2)
    with pytest.raises(errors.MissingDataError, match=error):
        unlearners.statistical_queries(query, num_examples=4).fit(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: unlearners.gaussian_naive_bayes(num_classes=1),
        lambda: unlearners.gaussian_naive_bayes(num_classes=2, var_smoothing=-1.0),
        lambda: unlearners.multinomial_naive_bayes(num_classes=2, smoothing=0.0),
        lambda: unlearners.multinomial_naive_bayes(num_classes=True),
        lambda: unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=0),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match="Expected"):
        make()


def test_something_else_than_a_query_is_refused():
    with pytest.raises(TypeError, match="ridge"):
        unlearners.statistical_queries(lambda rows: rows, num_examples=3)


# --- a learner of one's own --------------------------------------------------------------------


def test_a_rows_statistics_do_not_depend_on_its_neighbours():
    """Transcendental functions of whole batches may round by position; one loop does not."""
    row = lambda row: {"a": jnp.exp(row["x"]) @ jnp.sin(row["x"]), "b": jnp.tanh(row["x"])}
    query = unlearners.summation(row, lambda s, n: s, lambda p, b: p, grid=2.0**-40)
    x = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    together = query.integers({"x": x})
    for i in (0, 1, 255, 256, 299):
        alone = query.integers({"x": x[i : i + 1]})
        assert int(alone["a"][0]) == int(together["a"][i])
        assert np.array_equal(alone["b"][0], together["b"][i])


def test_a_certificate_says_the_grid_and_what_it_proves():
    data = regression(10)
    learner = unlearners.statistical_queries(unlearners.ridge(l2=1.0), num_examples=NUM_ROWS)
    certificate = learner.forget(*learner.fit(data), [3], data=data).info.certificate
    named = {assumption.name: assumption for assumption in certificate.assumptions}
    assert named["grid"].status == "proven"
    assert "1.52587890625e-05" in named["grid"].text
    assert certificate.target == "minimiser"
    assert certificate.requests == "adaptive"
    assert "statistical_queries, ridge" in certificate.summary()
