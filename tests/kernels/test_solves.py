"""Solvers, against dense solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn.kernels import cg, cholesky
from tests import oracles

SIZE = 8
seeds = st.integers(0, 2**32 - 1)
LOOSE = cg(tol=1e-8, max_iterations=50)
STEPS = {n: cg(tol=0.0, max_iterations=n) for n in range(1, 7)}


def system(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    matrix = oracles.spd_matrix(rng, SIZE)
    return matrix.astype(dtype), rng.normal(size=SIZE).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, rhs):
    """`solver` on a dense matrix, compiled once a solver."""
    return solver(times(matrix), rhs)


def times(matrix):
    """The product with a dense matrix, at full precision."""
    return lambda x: jnp.matmul(jnp.asarray(matrix), x, precision=jax.lax.Precision.HIGHEST)


@given(seed=seeds)
@pytest.mark.parametrize("solver", [cg(tol=1e-13, max_iterations=50), cholesky()])
def test_equals_the_dense_solve(solver, seed, x64):
    matrix, rhs = system(seed)
    solution = solve(solver, matrix, rhs)
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs)) < 1e-10
    assert not bool(solution.negative_curvature)


@given(seed=seeds)
def test_cg_needs_no_more_steps_than_there_are_unknowns(seed, x64):
    matrix, rhs = system(seed)
    solution = solve(LOOSE, matrix, rhs)
    assert int(solution.num_iterations) <= SIZE
    assert float(solution.residual_norm) <= 1.01e-8 * np.linalg.norm(rhs)


@given(seed=seeds, iterations=st.integers(1, 6))
def test_cg_is_the_textbook_recurrence(seed, iterations, x64):
    matrix, rhs = system(seed)
    solution = solve(STEPS[iterations], matrix, rhs)
    want = oracles.conjugate_gradients(matrix, rhs, iterations)
    assert int(solution.num_iterations) == iterations
    assert oracles.relative_gap(solution.x, want) < 1e-9


def test_cg_takes_one_step_for_each_distinct_eigenvalue(x64):
    matrix = np.diag([2.0, 2.0, 2.0, 5.0, 5.0, 9.0])
    solution = cg(tol=1e-10, max_iterations=50)(times(matrix), np.arange(1.0, 7.0))
    assert int(solution.num_iterations) == 3


@given(seed=seeds, iterations=st.integers(1, 6))
def test_the_residual_reported_is_the_true_one(seed, iterations):
    matrix, rhs = system(seed, np.float32)
    solution = solve(STEPS[iterations], matrix, rhs)
    x = np.asarray(solution.x, np.float64)
    true = np.linalg.norm(matrix.astype(np.float64) @ x - rhs)
    rounding = 1e-6 * np.linalg.norm(matrix) * np.linalg.norm(x)
    assert abs(float(solution.residual_norm) - true) <= 1e-4 * true + rounding


@given(seed=seeds, scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
def test_the_tolerance_is_relative_to_the_right_hand_side(seed, scale, x64):
    matrix, rhs = system(seed)
    unit, scaled = solve(LOOSE, matrix, rhs), solve(LOOSE, matrix, scale * rhs)
    assert int(unit.num_iterations) == int(scaled.num_iterations)
    assert float(scaled.residual_norm) <= 1.01e-8 * scale * np.linalg.norm(rhs)


@pytest.mark.parametrize("solver", [cg(), cg(tol=0.0), cholesky()])
def test_a_zero_right_hand_side_has_the_zero_solution(solver):
    matrix, _ = system(0, np.float32)
    solution = solver(times(matrix), jnp.zeros(SIZE))
    assert np.array_equal(solution.x, np.zeros(SIZE))
    assert float(solution.residual_norm) == 0.0
    assert not bool(solution.negative_curvature)


@pytest.mark.parametrize("solver", [cg(), cholesky()])
@pytest.mark.parametrize("eigenvalue", [-1.0, 0.0])
def test_curvature_that_is_not_positive_is_flagged_and_gives_no_nan(solver, eigenvalue):
    matrix = np.diag([1.0, eigenvalue, 2.0]).astype(np.float32)
    solution = solver(times(matrix), jnp.array([0.0, 1.0, 0.0]))
    assert bool(solution.negative_curvature)
    assert np.all(np.isfinite(solution.x))
    assert float(solution.residual_norm) == 1.0


def test_negative_curvature_keeps_the_last_good_iterate(x64):
    matrix = np.diag([4.0, 3.0, -0.1])
    rhs = np.array([1.0, 1.0, 0.2])
    solution = cg(tol=1e-12, max_iterations=50)(times(matrix), rhs)
    assert bool(solution.negative_curvature)
    good = int(solution.num_iterations) - 1
    assert good >= 1
    want = oracles.conjugate_gradients(matrix, rhs, good)
    assert oracles.relative_gap(solution.x, want) < 1e-12
    true = np.linalg.norm(matrix @ want - rhs)
    assert abs(float(solution.residual_norm) - true) < 1e-12


@pytest.mark.parametrize("solver", [cg(), cholesky()])
@pytest.mark.parametrize("where", ["matrix", "rhs"])
def test_nan_never_looks_like_success(solver, where):
    matrix, rhs = system(1, np.float32)
    (matrix if where == "matrix" else rhs)[0] = np.nan
    solution = solver(times(matrix), rhs)
    assert not float(solution.residual_norm) <= 1e30


def test_max_iterations_is_a_limit():
    matrix, rhs = system(2, np.float32)
    solution = cg(tol=0.0, max_iterations=3)(times(matrix), rhs)
    assert int(solution.num_iterations) == 3
    assert float(solution.residual_norm) > 1e-3 * np.linalg.norm(rhs)


@pytest.mark.parametrize("solver", [cg(tol=1e-12, max_iterations=60), cholesky()])
def test_right_hand_sides_may_be_pytrees(solver, x64):
    matrix, rhs = system(3)
    split = lambda v: {"b": v[0], "w": (v[1:3], v[3:].reshape(1, -1))}
    join = lambda t: jnp.concatenate([t["b"][None], t["w"][0], t["w"][1].ravel()])
    solution = solver(lambda t: split(jnp.asarray(matrix) @ join(t)), split(jnp.asarray(rhs)))
    assert jax.tree.structure(solution.x) == jax.tree.structure(split(rhs))
    assert oracles.relative_gap(join(solution.x), np.linalg.solve(matrix, rhs)) < 1e-10


@pytest.mark.parametrize("solver", [cg(tol=1e-12, max_iterations=60), cholesky()])
def test_it_jits_and_vmaps_over_systems_that_converge_at_different_times(solver, x64):
    matrices, sides = map(np.stack, zip(*(system(seed) for seed in range(4))))
    matrices[1] = np.eye(SIZE)
    solutions = jax.jit(jax.vmap(lambda matrix, rhs: solver(times(matrix), rhs)))(matrices, sides)
    want = np.linalg.solve(matrices, sides[..., None])[..., 0]
    assert oracles.relative_gap(solutions.x, want) < 1e-10
    one = solve(solver, matrices[2], sides[2])
    assert abs(int(solutions.num_iterations[2]) - int(one.num_iterations)) <= 1
    assert np.all(np.isfinite(oracles.flat(solutions.x)))


def test_half_precision_sides_are_summed_in_float32():
    rhs = jnp.full((4096,), 1.0, jnp.bfloat16)  # a bf16 sum of ones stops at 256
    solution = cg(tol=1e-2)(lambda x: 2 * x, rhs)
    assert solution.x.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(solution.x, np.float32), np.full(4096, 0.5))
    assert solution.residual_norm.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (cg, {"tol": -1.0}),
        (cg, {"tol": float("nan")}),
        (cg, {"max_iterations": 0}),
        (cholesky, {"max_dimension": 0}),
    ],
)
def test_a_bad_configuration_is_refused_at_once(make, options):
    with pytest.raises(ValueError, match="Expected"):
        make(**options)


def test_cholesky_refuses_a_system_too_large_for_memory():
    with pytest.raises(ValueError, match="at most max_dimension=4 unknowns, got 5"):
        cholesky(max_dimension=4)(lambda x: x, jnp.ones(5))


def test_jax_scipy_cg_says_nothing_about_convergence():
    """The reason for our own: JAX's returns None where SciPy returns `info`."""
    matrix, rhs = system(4, np.float32)
    x, info = jax.scipy.sparse.linalg.cg(times(matrix), jnp.asarray(rhs), maxiter=1)
    assert info is None
    assert np.linalg.norm(matrix @ np.asarray(x) - rhs) > 1e-2
