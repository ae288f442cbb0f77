"""MINRES, against SciPy's and dense least squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn.kernels.solves import jacobi, minres
from tests import oracles

SIZE = 8
seeds = st.integers(0, 2**32 - 1)
TIGHT = minres(tol=1e-12, max_iterations=60)
ROUGH = minres(tol=1e-6, max_iterations=60)
STEPS = {n: minres(tol=0.0, max_iterations=n) for n in (1, 2, 5)}


def times(matrix):
    return lambda x: jnp.matmul(jnp.asarray(matrix), x, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, rhs):
    return solver(times(matrix), rhs)


@jax.jit
def solve_scaled(matrix, rhs, diagonal):
    solver = minres(tol=1e-13, max_iterations=100, preconditioner=jacobi(diagonal))
    return solver(times(matrix), rhs)


def system(seed, values=None):
    """A symmetric matrix with eigenvalues of both signs, and a right-hand side."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    if values is None:
        values = rng.choice([-1, 1], SIZE) * np.geomspace(0.1, 10.0, SIZE)
    return (q * values) @ q.T, rng.normal(size=SIZE), values


@given(seed=seeds)
def test_equals_the_dense_solve_of_an_indefinite_system(seed, x64):
    matrix, rhs, values = system(seed)
    solution = solve(TIGHT, matrix, rhs)
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs)) < 1e-9
    assert float(solution.residual_norm) <= 2e-12 * np.linalg.norm(rhs)
    assert bool(solution.negative_curvature) == bool(np.any(values < 0))


@given(seed=seeds, steps=st.sampled_from(sorted(STEPS)))
def test_minimises_the_residual_over_the_krylov_space(seed, steps, x64):
    matrix, rhs, _ = system(seed)
    solution = solve(STEPS[steps], matrix, rhs)
    krylov = [rhs]
    for _ in range(steps - 1):
        krylov.append(matrix @ krylov[-1] / np.linalg.norm(matrix @ krylov[-1]))
    basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
    least = np.linalg.lstsq(matrix @ basis, rhs, rcond=None)[0]
    want = np.linalg.norm(matrix @ basis @ least - rhs)
    assert int(solution.num_iterations) == steps
    assert abs(float(solution.residual_norm) - want) <= 1e-9 * np.linalg.norm(rhs)
    scipys, _ = scipy.sparse.linalg.minres(matrix, rhs, rtol=0.0, maxiter=steps)
    assert oracles.relative_gap(solution.x, scipys) < 1e-8


@given(seed=seeds)
def test_curvature_is_seen_as_soon_as_the_lanczos_matrix_is_not_definite(seed, x64):
    matrix, rhs, _ = system(seed)
    for steps, solver in STEPS.items():
        krylov = [rhs]
        for _ in range(steps - 1):
            krylov.append(matrix @ krylov[-1] / np.linalg.norm(matrix @ krylov[-1]))
        basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
        lowest = np.linalg.eigvalsh(basis.T @ matrix @ basis)[0]
        if abs(lowest) > 1e-9:
            assert bool(solve(solver, matrix, rhs).negative_curvature) == (lowest < 0)


@given(seed=seeds)
def test_an_inconsistent_system_ends_at_a_least_squares_solution(seed, x64):
    matrix, rhs, _ = system(seed, np.array([0.0, 0.0, -3.0, -1.0, 1.0, 2.0, 4.0, 5.0]))
    solution = solve(TIGHT, matrix, rhs)
    least = np.linalg.lstsq(matrix, rhs, rcond=1e-10)[0]
    want = np.linalg.norm(matrix @ least - rhs)
    assert int(solution.num_iterations) < 20
    assert abs(float(solution.residual_norm) - want) <= 1e-9 * np.linalg.norm(rhs)
    assert want > 1e-6 * np.linalg.norm(rhs)
    gap = np.linalg.norm(matrix @ np.asarray(solution.x) - matrix @ least)
    assert gap <= 1e-6 * np.linalg.norm(rhs)


@given(seed=seeds)
def test_a_consistent_singular_system_is_solved(seed, x64):
    matrix, rhs, _ = system(seed, np.array([0.0, 0.0, 0.0, -1.0, 1.0, 2.0, 4.0, 5.0]))
    rhs = matrix @ rhs
    solution = solve(TIGHT, matrix, rhs)
    assert float(solution.residual_norm) <= 2e-12 * np.linalg.norm(rhs)
    assert oracles.relative_gap(solution.x, np.linalg.pinv(matrix, rcond=1e-10) @ rhs) < 1e-9


def test_an_inconsistent_system_of_slow_convergence_ends_before_rounding_takes_over():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    values = np.concatenate([np.zeros(20), rng.uniform(0.1, 5.0, 180)])
    matrix, rhs = ((q * values) @ q.T).astype(np.float32), rng.normal(size=200).astype(np.float32)
    solution = solve(minres(tol=1e-6, max_iterations=400), matrix, rhs)
    want = np.linalg.norm(q[:, :20].T @ rhs)
    assert int(solution.num_iterations) < 100
    assert abs(float(solution.residual_norm) - want) <= 1e-3 * want


def test_a_step_without_progress_is_no_end(x64):
    """A spectrum symmetric about zero: every other step of MINRES stands still."""
    matrix = np.diag([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    solution = solve(TIGHT, matrix, np.ones(6))
    assert oracles.relative_gap(solution.x, 1 / np.diag(matrix)) < 1e-10


@given(seed=seeds)
def test_ill_conditioned_systems_are_not_mistaken_for_inconsistent_ones(seed):
    matrix, rhs, _ = system(seed, np.geomspace(1e-3, 1.0, SIZE) * np.tile([1, -1], SIZE // 2))
    matrix, rhs = matrix.astype(np.float32), rhs.astype(np.float32)
    solution = solve(ROUGH, matrix, rhs)
    assert float(solution.residual_norm) <= 1e-3 * np.linalg.norm(rhs)


def test_inconsistency_shows_in_single_precision_too():
    matrix = np.diag([0.0, 1.0, -2.0, 3.0, 5.0]).astype(np.float32)
    rhs = np.ones(5, np.float32)
    solution = solve(minres(tol=1e-6, max_iterations=50), matrix, rhs)
    assert abs(float(solution.residual_norm) - 1.0) < 1e-5
    assert int(solution.num_iterations) < 50
    assert np.linalg.norm(solution.x) < 2.0


@given(seed=seeds)
def test_a_preconditioner_changes_the_path_and_not_the_solution(seed, x64):
    rng = np.random.default_rng(seed)
    matrix, rhs, _ = system(seed)
    scales = np.geomspace(0.3, 3.0, SIZE)
    matrix = scales[:, None] * matrix * scales
    diagonal = scales**2 * rng.uniform(0.5, 2.0, SIZE)

    solution = solve_scaled(matrix, rhs, diagonal)
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs)) < 1e-7


@pytest.mark.parametrize("where", ["matrix", "rhs", "preconditioner"])
def test_nan_stops_it_and_never_looks_like_success(where):
    matrix, rhs, _ = system(1)
    diagonal = np.ones(SIZE)
    {"matrix": matrix, "rhs": rhs, "preconditioner": diagonal}[where][0] = np.nan
    inverse = (lambda v: v / diagonal) if where == "preconditioner" else None
    solution = minres(preconditioner=inverse)(times(matrix), jnp.asarray(rhs))
    assert not float(solution.residual_norm) <= 1e-6 * np.linalg.norm(np.nan_to_num(rhs))
    assert int(solution.num_iterations) <= 1


def test_a_preconditioner_that_is_not_definite_is_flagged(x64):
    matrix, rhs, _ = system(2)
    solution = minres(preconditioner=lambda v: -v)(times(matrix), rhs)
    assert bool(solution.negative_curvature)
    assert np.array_equal(solution.x, np.zeros(SIZE))
    assert np.allclose(solution.residual_norm, np.linalg.norm(rhs))


def test_zero_and_solved_systems_take_no_iteration(x64):
    matrix, rhs, _ = system(3)
    zero = TIGHT(times(matrix), np.zeros(SIZE))
    assert int(zero.num_iterations) == 0
    assert float(zero.residual_norm) == 0.0
    solved = np.linalg.solve(matrix, rhs)
    solution = minres(tol=1e-10)(times(matrix), rhs, x0=solved)
    assert int(solution.num_iterations) == 0
    assert np.array_equal(solution.x, solved)


def test_half_precision_sides_give_half_precision_solutions():
    values = jnp.where(jnp.arange(64) % 2 == 0, 2.0, -4.0).astype(jnp.bfloat16)
    solution = minres(tol=1e-2)(lambda x: values * x, jnp.ones(64, jnp.bfloat16))
    assert solution.x.dtype == jnp.bfloat16
    assert oracles.relative_gap(solution.x, 1 / np.asarray(values, np.float64)) < 1e-2
    assert solution.residual_norm.dtype == jnp.float32
