"""Many right-hand sides at once: conjugate gradients and block conjugate gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn.kernels import hvp, hvp_many
from jaxunlearn.kernels.solves import block_cg, cg, cholesky, jacobi, minres, neumann
from tests import oracles

SIZE, SIDES = 8, 4
HIGHEST = jax.lax.Precision.HIGHEST
seeds = st.integers(0, 2**32 - 1)
SOLVERS = {
    "cg": cg(tol=1e-12, max_iterations=60, many=True),
    "block_cg": block_cg(tol=1e-12, max_iterations=60),
    "minres": minres(tol=1e-12, max_iterations=60, many=True),
    "cholesky": cholesky(many=True),
    "neumann": neumann(step=1 / 60, tol=1e-12, max_iterations=4000, many=True),
}
ITERATIVE = {
    "cg": functools.partial(cg, many=True),
    "block_cg": block_cg,
    "minres": functools.partial(minres, many=True),
    "neumann": functools.partial(neumann, step=0.02, many=True),
}


def later(*values):
    """Parameters for `make test-all`: these compile for a second each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


by_solver = pytest.mark.parametrize("name", SOLVERS)
by_iterative = pytest.mark.parametrize("name", ITERATIVE)


def times(matrix):
    """The product with a dense matrix, for a stack of vectors."""
    return lambda x: jnp.matmul(x, jnp.asarray(matrix).T, precision=HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, rhs):
    """`solver` on a dense matrix, compiled once a solver."""
    return solver(times(matrix), rhs)


def system(seed, condition=50.0):
    rng = np.random.default_rng(seed)
    return oracles.spd_matrix(rng, SIZE, condition), rng.normal(size=(SIDES, SIZE))


def true_residuals(matrix, x, rhs):
    return np.linalg.norm(np.asarray(x, np.float64) @ matrix.T - rhs, axis=1)


@given(seed=seeds)
@by_solver
def test_equals_the_dense_solve_and_reports_each_residual(name, seed, x64):
    matrix, rhs = system(seed)
    rhs *= np.array([1.0, 1e-9, 1e7, 3.0])[:, None]
    solution = solve(SOLVERS[name], matrix, rhs)
    want = np.linalg.solve(matrix, rhs.T).T
    for got, wanted in zip(solution.x, want):
        assert oracles.relative_gap(got, wanted) < 1e-9
    norms = np.linalg.norm(rhs, axis=1)
    assert np.all(solution.residual_norm <= 1.1e-12 * norms)
    true = true_residuals(matrix, solution.x, rhs)
    assert np.all(np.abs(solution.residual_norm - true) <= 1e-13 * norms)
    assert not np.any(solution.negative_curvature)
    assert {len(field) for field in solution} == {SIDES}


@given(seed=seeds)
def test_cg_on_a_stack_is_cg_on_each(seed, x64):
    matrix, rhs = system(seed)
    many = solve(SOLVERS["cg"], matrix, rhs)
    for i in range(SIDES):
        want = oracles.conjugate_gradients(matrix, rhs[i], int(many.num_iterations[i]))
        assert oracles.relative_gap(many.x[i], want) < 1e-9


@by_iterative
def test_each_system_stops_on_its_own(name, x64):
    matrix = np.diag(np.linspace(1.0, 60.0, SIZE))
    rhs = np.stack([np.zeros(SIZE), np.eye(SIZE)[3], np.eye(SIZE)[5] * 1e-8, np.ones(SIZE)])
    solution = ITERATIVE[name](tol=1e-10, max_iterations=3000)(times(matrix), rhs)
    iterations = np.asarray(solution.num_iterations)
    assert iterations[0] == 0
    if name != "neumann":
        assert iterations[1] == iterations[2] == 1
        assert 1 < iterations[3] <= SIZE
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs.T).T) < 1e-9
    assert np.array_equal(solution.x[0], np.zeros(SIZE))


@by_iterative
def test_the_limit_holds_for_each_system(name, x64):
    matrix, rhs = system(5)
    rhs[2] = 0.0
    solution = ITERATIVE[name](tol=1e-13, max_iterations=1)(times(matrix), rhs)
    assert list(solution.num_iterations) == [1, 1, 0, 1]
    true = true_residuals(matrix, solution.x, rhs)
    assert np.allclose(solution.residual_norm, true, rtol=1e-12)
    assert np.all((true > 1e-13 * np.linalg.norm(rhs, axis=1)) == [True, True, False, True])


@by_solver
def test_a_side_that_is_not_a_number_leaves_the_others_alone(name, x64):
    matrix, rhs = system(6)
    rhs[1, 2] = np.nan
    solution = solve(SOLVERS[name], matrix, rhs)
    others = [0, 2, 3]
    want = np.linalg.solve(matrix, rhs[others].T).T
    assert oracles.relative_gap(np.asarray(solution.x)[others], want) < 1e-9
    assert not float(solution.residual_norm[1]) <= 1e300


def test_curvature_is_flagged_for_the_system_that_met_it(x64):
    matrix = np.diag([1.0, -1.0, 2.0, 0.0])
    solution = cg(many=True)(times(matrix), np.eye(4))
    assert list(solution.negative_curvature) == [False, True, False, True]
    assert np.allclose(solution.residual_norm, [0, 1, 0, 1], atol=1e-12)
    assert np.array_equal(solution.x[1], np.zeros(4))


@pytest.mark.parametrize("eigenvalue", [-1.0, 0.0, np.nan])
def test_curvature_in_the_block_ends_it_at_the_last_good_iterate(eigenvalue, x64):
    matrix = np.diag([1.0, 2.0, eigenvalue, 3.0])
    solution = block_cg()(times(matrix), np.array([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]))
    assert list(solution.negative_curvature) == [True, True, False]
    assert np.all(np.isfinite(solution.x))
    if eigenvalue == eigenvalue:
        assert np.allclose(solution.residual_norm, np.array([2**0.5, 1, 0]))


@given(seed=seeds)
def test_sides_that_depend_on_one_another_are_no_danger(seed, x64):
    matrix, rhs = system(seed)
    rhs[1] = rhs[0]
    rhs[2] = 2 * rhs[0] - 1e-9 * rhs[3]
    solution = solve(SOLVERS["block_cg"], matrix, rhs)
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs.T).T) < 1e-9
    assert np.all(solution.residual_norm <= 1.1e-12 * np.linalg.norm(rhs, axis=1))


def test_there_may_be_more_sides_than_unknowns(x64):
    matrix = np.diag([1.0, 5.0, 9.0])
    rhs = np.random.default_rng(0).normal(size=(7, 3))
    solution = block_cg(tol=1e-12)(times(matrix), rhs)
    assert oracles.relative_gap(solution.x, rhs / np.diag(matrix)) < 1e-11
    assert np.max(solution.num_iterations) <= 3


@given(seed=seeds)
def test_the_block_needs_one_step_for_each_block_of_unknowns(seed, x64):
    matrix, rhs = system(seed)
    solution = solve(SOLVERS["block_cg"], matrix, rhs)
    assert np.max(solution.num_iterations) <= SIZE // SIDES + 1  # one for rounding


@pytest.mark.slow
def test_the_block_saves_iterations_where_single_vectors_search_long(x64):
    rng = np.random.default_rng(0)
    values = np.concatenate([np.geomspace(1e-4, 1e-2, 6), np.linspace(0.5, 1.0, 42)])
    q, _ = np.linalg.qr(rng.normal(size=(48, 48)))
    matrix, rhs = (q * values) @ q.T, rng.normal(size=(8, 48))
    options = {"tol": 1e-8, "max_iterations": 300}
    block = block_cg(**options)(times(matrix), rhs)
    single = cg(many=True, **options)(times(matrix), rhs)
    assert np.max(block.num_iterations) < 0.5 * np.min(single.num_iterations)
    assert np.all(block.residual_norm <= 1.1e-8 * np.linalg.norm(rhs, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [SOLVERS["cg"], SOLVERS["block_cg"], SOLVERS["minres"]])
def test_single_precision_reaches_its_tolerance(solver):
    matrix, rhs = system(7)
    matrix, rhs = matrix.astype(np.float32), rhs.astype(np.float32)
    rhs[3] = rhs[0] + 1e-4 * rhs[1]
    relaxed = {
        SOLVERS["cg"]: cg(tol=1e-5, many=True),
        SOLVERS["block_cg"]: block_cg(tol=1e-5),
        SOLVERS["minres"]: minres(tol=1e-5, many=True),
    }[solver]
    solution = solve(relaxed, matrix, rhs)
    assert np.all(solution.residual_norm <= 2e-5 * np.linalg.norm(rhs, axis=1))
    assert np.max(solution.num_iterations) <= 40


@pytest.mark.parametrize("scale", [1e-30, *later(1e30)])
@pytest.mark.parametrize("name", ["cg", *later("block_cg", "minres", "neumann")])
def test_squares_out_of_range_do_no_harm(name, scale):
    matrix = np.diag([1.0, 2.0, 4.0]).astype(np.float32)
    rhs = (scale * np.ones((2, 3))).astype(np.float32)
    solution = ITERATIVE[name](tol=1e-6, max_iterations=2000)(times(matrix), rhs)
    assert oracles.relative_gap(np.asarray(solution.x) / scale, np.ones((2, 3)) / [1, 2, 4]) < 1e-5
    assert np.all(solution.residual_norm <= 1e-5 * scale)
    assert np.all(np.asarray(solution.num_iterations) > 0)


@pytest.mark.parametrize("name", ["cg", "block_cg", *later("minres", "cholesky", "neumann")])
def test_stacks_may_be_pytrees(name, x64):
    matrix, rhs = system(8)
    split = lambda v: {"b": v[:, 0], "w": (v[:, 1:3], v[:, 3:].reshape(len(v), 1, -1))}
    join = lambda t: jnp.concatenate(
        [t["b"][:, None], t["w"][0], t["w"][1].reshape(len(t["b"]), -1)], axis=1
    )
    solution = SOLVERS[name](lambda t: split(times(matrix)(join(t))), split(jnp.asarray(rhs)))
    assert jax.tree.structure(solution.x) == jax.tree.structure(split(rhs))
    assert oracles.relative_gap(join(solution.x), np.linalg.solve(matrix, rhs.T).T) < 1e-9


@pytest.mark.parametrize("name", ["block_cg", *later("cg", "minres", "cholesky")])
def test_it_vmaps_over_stacks(name, x64):
    matrices, sides = map(np.stack, zip(*(system(seed) for seed in range(3))))
    matrices[1] = np.eye(SIZE)
    solver = SOLVERS[name]
    solutions = jax.jit(jax.vmap(lambda m, b: solver(times(m), b)))(matrices, sides)
    want = np.linalg.solve(matrices, sides.transpose(0, 2, 1)).transpose(0, 2, 1)
    assert oracles.relative_gap(solutions.x, want) < 1e-9
    if name != "cholesky":
        assert np.all(solutions.num_iterations[1] == 1)


@pytest.mark.parametrize("make", [functools.partial(cg, many=True), block_cg])
def test_a_first_guess_is_used_and_a_solved_system_takes_no_iteration(make, x64):
    matrix, rhs = system(9)
    solved = np.linalg.solve(matrix, rhs.T).T
    guess = solved.copy()
    guess[2] += 1.0
    solution = make(tol=1e-10)(times(matrix), rhs, x0=guess)
    assert list(np.asarray(solution.num_iterations) > 0) == [False, False, True, False]
    assert oracles.relative_gap(solution.x, solved) < 1e-9


@pytest.mark.parametrize("make", [block_cg, *later(functools.partial(cg, many=True))])
def test_a_preconditioner_saves_iterations(make, x64):
    rng = np.random.default_rng(0)
    scales = np.geomspace(1.0, 1e3, SIZE)
    matrix = scales[:, None] * oracles.spd_matrix(rng, SIZE, 2.0) * scales
    rhs = rng.normal(size=(2, SIZE))
    inverse = jacobi(jnp.diag(jnp.asarray(matrix)))
    plain = make(tol=1e-8, max_iterations=200)(times(matrix), rhs)
    helped = make(tol=1e-8, max_iterations=200, preconditioner=inverse)(times(matrix), rhs)
    assert np.all(helped.residual_norm <= 1e-7 * np.linalg.norm(rhs, axis=1))
    assert np.max(helped.num_iterations) < np.max(plain.num_iterations)


def test_the_products_of_hvp_many_serve_as_they_are(x64):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)
    params = {"w": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(0.3)}

    def loss(params, batch):
        z = batch[0] @ params["w"] + params["b"]
        return jnp.mean(jnp.logaddexp(0.0, z) - batch[1] * z)

    rhs = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=5)}
    products, product = hvp_many(loss, damping=0.1), hvp(loss, damping=0.1)

    @jax.jit
    def both(rhs):
        row = jax.tree.map(lambda leaf: leaf[2], rhs)
        return (
            cg(tol=1e-12, many=True)(lambda v: products(params, (x, y), v), rhs),
            cg(tol=1e-12)(lambda v: product(params, (x, y), v), row),
        )

    many, one = both(rhs)
    hessian = oracles.logistic_hessian(params, x, np.ones(12), 12) + 0.1 * np.eye(4)
    for i in range(5):
        row = np.concatenate([[rhs["b"][i]], rhs["w"][i]])
        got = np.concatenate([[many.x["b"][i]], many.x["w"][i]])
        assert oracles.relative_gap(got, np.linalg.solve(hessian, row)) < 1e-10
    assert int(one.num_iterations) == int(many.num_iterations[2])


@by_iterative
def test_leaves_that_disagree_on_the_stack_are_refused(name):
    with pytest.raises(ValueError, match="Expected a stack of right-hand sides"):
        ITERATIVE[name]()(lambda x: x, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)})


def test_half_precision_stacks_are_summed_in_float32():
    rhs = jnp.full((2, 4096), 1.0, jnp.bfloat16)
    solution = block_cg(tol=1e-2)(lambda x: 2 * x, rhs)
    assert solution.x.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(solution.x, np.float32), np.full((2, 4096), 0.5))
    assert solution.residual_norm.dtype == jnp.float32
