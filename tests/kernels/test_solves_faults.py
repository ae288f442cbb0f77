"""What solvers promise where rounding, padding or spoilt rows are against them; one signature."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.kernels import empirical_fisher_vp, hessian_operator, lbfgs, per_example
from jaxunlearn.kernels.solves import (
    Solution,
    block_cg,
    cg,
    cholesky,
    lissa,
    minres,
    neumann,
    nystrom,
    refined,
    woodbury,
)
from tests.kernels.test_devices import output_of, start

KEY = jax.random.key(0)
HIGHEST = jax.lax.Precision.HIGHEST


def spectrum(values, seed=0):
    """A float32 matrix with these eigenvalues, and four right-hand sides."""
    rng, size = np.random.default_rng(seed), len(values)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return ((q * values) @ q.T).astype(np.float32), rng.normal(size=(4, size)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, rhs):
    return solver(lambda v: jnp.matmul(v, matrix, precision=HIGHEST), rhs)


def linear(w, x):
    return jnp.mean(x @ w)


# Woodbury is the matrix of empirical_fisher_vp


@pytest.mark.parametrize("spoilt", [False, True])
def test_woodbury_inverts_the_empirical_fisher_matrix_of_the_rows_that_count(spoilt):
    rows = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    if spoilt:
        rows[1] = np.nan
    weights = np.array([1.0, 2.0, 0.0, 0.5, 9.0, 9.0], np.float32)
    padding = np.arange(6) >= 4
    w, rhs = jnp.zeros(2), jnp.array([1.0, 2.0])
    gradients = per_example(linear)(w, rows, is_padding_example=padding)
    for given in (None, weights):
        solution = woodbury(damping=0.5)(gradients, rhs, weights=given)
        kept = None if given is None else given[:4]
        product = empirical_fisher_vp(linear, damping=0.5)(w, rows[:4], solution.x, weights=kept)
        np.testing.assert_allclose(product, rhs, rtol=2e-5)
        assert float(solution.residual_norm) < 1e-5


def test_woodbury_refuses_weights_out_of_range():
    gradients = per_example(linear)(jnp.zeros(2), jnp.eye(2))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="Expected finite weights >= 0"):
            woodbury(damping=1.0)(gradients, jnp.ones(2), weights=jnp.array([1.0, bad]))


# Rounding


@pytest.mark.parametrize("condition", [1e3, 1e4, 1e5])
def test_the_block_takes_fewer_iterations_than_single_vectors_in_float32_too(condition):
    options = {"tol": 1e-6, "max_iterations": 1000}
    single, block = cg(many=True, **options), block_cg(**options)
    for seed in range(3):
        matrix, rhs = spectrum(np.geomspace(1 / condition, 1.0, 30), seed)
        norms = np.linalg.norm(rhs, axis=1)
        one, many = solve(single, matrix, rhs), solve(block, matrix, rhs)
        assert np.max(many.num_iterations) < 0.4 * np.max(one.num_iterations)
        assert np.max(many.residual_norm / norms) <= 2 * np.max(one.residual_norm / norms)
        assert not np.any(many.negative_curvature)


@pytest.mark.parametrize("smallest", [1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_minres_never_ends_worse_than_it_began_and_says_how_far_it_came(smallest, signs):
    solver = minres(tol=1e-6, max_iterations=300)
    values = np.geomspace(smallest, 1.0, 30) * np.tile(signs, 15)
    for seed in range(3):
        matrix, (rhs, *_) = spectrum(values, seed)
        solution, norm = solve(solver, matrix, rhs), np.linalg.norm(rhs)
        true = np.linalg.norm(matrix.astype(float) @ np.asarray(solution.x, float) - rhs)
        assert true <= norm * (1 + 1e-6)
        room = 1e-6 * np.linalg.norm(solution.x)
        assert abs(true - float(solution.residual_norm)) <= 1e-5 * norm + room
        if smallest == 1e-2:
            assert true <= (3e-6 if signs[1] > 0 else 1e-4) * norm


def test_minres_gains_a_hundredfold_by_starting_again():
    """Condition 1e5 in float32: by the recurrence alone, 0.06 to 0.3 of the right-hand side."""
    matrix, (rhs, *_) = spectrum(np.geomspace(1e-5, 1.0, 30))
    solution = solve(minres(tol=1e-6, max_iterations=300), matrix, rhs)
    assert float(solution.residual_norm) < 0.02 * np.linalg.norm(rhs)


# One signature


def test_refinement_starts_its_corrections_at_zero_and_draws_anew():
    seen = []

    def spy(matvec, rhs, *, x0=None, key=None):
        seen.append((x0, key))
        return Solution(rhs / 2, jnp.abs(matvec(rhs / 2) - rhs), jnp.array(1), jnp.array(False))

    refined(spy, num_rounds=2)(lambda x: x, jnp.array(1.0), x0=jnp.array(0.25), key=KEY)
    assert [x0 is None for x0, _ in seen] == [False, True, True]
    assert len({tuple(jax.random.key_data(key).tolist()) for _, key in seen}) == 3


def test_every_solver_takes_a_first_guess_a_key_and_an_operator():
    operator = hessian_operator(lambda w, x: 0.5 * jnp.mean((x @ w) ** 2))(
        jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]])
    )
    rhs, guess = jnp.array([2.0, 3.0]), jnp.array([0.9, 5.0])
    sketch = nystrom(operator, rhs, rank=2, key=KEY)
    found = sketch.solver(0.5)(operator.damped(0.5), rhs, x0=guess, key=KEY)
    np.testing.assert_allclose(found.x, [0.8, 3.0], rtol=1e-4)
    for solver in (cg(), minres(), cholesky(), neumann(max_iterations=200)):
        found = solver(operator, rhs, x0=guess, key=KEY)
        np.testing.assert_allclose(found.x, [1.0, 6.0], rtol=1e-4)
    sampled = lambda v, key: operator @ v
    found = lissa(num_steps=200, key=KEY)(operator, rhs, sampled=sampled, x0=guess)
    np.testing.assert_allclose(found.x, [1.0, 6.0], rtol=1e-4)
    stack = jnp.stack([rhs, 2 * rhs])
    for solver in (block_cg(), cholesky(many=True), lissa(num_steps=200, key=KEY, many=True)):
        options = {"sampled": sampled} if "lissa" in solver.__qualname__ else {}
        found = solver(operator, stack, x0=0 * stack, **options)
        np.testing.assert_allclose(found.x, [[1.0, 6.0], [2.0, 12.0]], rtol=1e-4)
        assert found.residual_norm.shape == (2,)
    with pytest.raises(TypeError, match="Expected matvec to be a function"):
        cg()(np.eye(2), rhs)


def test_a_key_is_asked_for_where_something_is_drawn():
    for solver, options in ((neumann(), {}), (lissa(num_steps=1), {"sampled": None})):
        with pytest.raises(ValueError, match=r"Expected .*key="):
            solver(lambda v: v, jnp.ones(2), **options)


# Numbers of any kind


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, np.array])
def test_numbers_out_of_range_are_refused_whatever_their_kind(kind):
    memory, v = lbfgs.init(jnp.zeros(3), 2), jnp.ones(3)
    sketch = nystrom(lambda v: v, v, rank=1, key=KEY)
    for call in (
        lambda bad: lbfgs.inverse_product(memory, v, damping=bad),
        lambda bad: lbfgs.product_many(memory, v[None], damping=bad),
        lambda bad: lbfgs.product(memory, v, scale=bad),
        lambda bad: lbfgs.operator_distance(memory, memory, other_scale=bad),
        lambda bad: lbfgs.eigenvalue_range(memory, scale=bad),
        lambda bad: woodbury(damping=bad),
        lambda bad: sketch.inverse(bad),
        lambda bad: cg(tol=bad),
        lambda bad: neumann(step=bad),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call(kind(-1.0))
    with pytest.raises(ValueError, match=r"Expected max_iterations=1\.5 to be an integer"):
        cg(max_iterations=1.5)


# Devices


@pytest.mark.slow
def test_solvers_run_on_explicit_axes_eagerly_and_jitted():
    figures = json.loads(output_of(start("_explicit_solves.py", devices=2)))
    assert {name: gap for name, gap in figures.items() if not gap < 1e-5} == {}
    assert len(figures) == 16
