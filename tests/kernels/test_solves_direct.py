"""Series, Woodbury, Nystrom, refinement and preconditioners, against dense algebra."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn.kernels import lbfgs, per_example
from jaxunlearn.kernels.solves import (
    Solution,
    cg,
    cholesky,
    jacobi,
    lissa,
    neumann,
    nystrom,
    refined,
    spectral_radius,
    woodbury,
)
from tests import oracles

SIZE, ROWS = 8, 5
KEY = jax.random.key(0)
HIGHEST = jax.lax.Precision.HIGHEST
seeds = st.integers(0, 2**32 - 1)


def times(matrix):
    return lambda x: jnp.matmul(jnp.asarray(matrix), x, precision=HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, rhs):
    return solver(times(matrix), rhs)


def system(seed, values=None):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    values = np.geomspace(0.2, 10.0, SIZE) if values is None else values
    return (q * values) @ q.T, rng.normal(size=SIZE)


# Neumann


@given(seed=seeds)
def test_the_series_is_its_partial_sum(seed, x64):
    matrix, rhs = system(seed)
    solution = solve(PARTIAL, matrix, rhs)
    want, term = np.zeros(SIZE), rhs
    for _ in range(6):
        want, term = want + 0.1 * term, term - 0.1 * matrix @ term
    assert oracles.relative_gap(solution.x, want) < 1e-12
    assert int(solution.num_iterations) == 6
    assert abs(float(solution.residual_norm) - np.linalg.norm(matrix @ want - rhs)) < 1e-12


PARTIAL = neumann(step=0.1, tol=0.0, max_iterations=6)
MEASURED = neumann(key=KEY, tol=1e-10, max_iterations=5000)


@given(seed=seeds, scale=st.sampled_from([1e-6, 1.0, 1e8]))
def test_a_measured_step_converges_whatever_the_scale_of_the_operator(seed, scale, x64):
    matrix, rhs = system(seed)
    solution = solve(MEASURED, scale * matrix, rhs)
    assert oracles.relative_gap(solution.x, np.linalg.solve(scale * matrix, rhs)) < 1e-7
    assert float(solution.residual_norm) <= 1.1e-10 * np.linalg.norm(rhs)
    bound = 20 + np.log(1e11) * 1.2 * 50 * 1.05  # (1 - 1 / (safety cond))^k
    assert int(solution.num_iterations) <= bound


def test_a_step_too_long_stops_early_and_shows_in_the_residual(x64):
    matrix, rhs = system(0)
    solution = neumann(step=0.5, max_iterations=10**6)(times(matrix), rhs)
    assert int(solution.num_iterations) < 50
    assert float(solution.residual_norm) > np.linalg.norm(rhs)
    assert np.all(np.isfinite(solution.x))


@pytest.mark.parametrize("sign", [-1.0, 0.0, np.nan])
def test_an_operator_that_is_not_positive_stops_the_series(sign):
    solution = neumann(key=KEY)(lambda x: sign * x, jnp.array([3.0, 4.0]))
    assert not float(solution.residual_norm) < 5.0
    assert bool(solution.negative_curvature)
    assert int(solution.num_iterations) == 21


def test_nan_and_infinity_in_the_side_never_look_solved():
    for bad in (np.nan, np.inf):
        rhs = jnp.array([bad, 1.0])
        for solver in (neumann(step=0.1), MEASURED):
            assert not float(solver(lambda x: x, rhs).residual_norm) <= 1e30


@given(seed=seeds)
def test_the_spectral_radius_comes_from_below_and_comes_near(seed, x64):
    matrix, rhs = system(seed, np.array([-9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0]))
    radius = float(measure(matrix, rhs))
    assert 8.5 < radius <= 9.0 + 1e-9


@jax.jit
def measure(matrix, vector):
    return spectral_radius(times(matrix), vector, key=KEY, num_iterations=20)


# LiSSA


@pytest.mark.slow
def test_lissa_with_full_samples_is_the_series_and_repeats_reduce_its_noise(x64):
    matrix, rhs = system(1)
    exact = lissa(num_steps=6, step=0.1)(
        times(matrix), rhs, sampled=lambda v, key: times(matrix)(v), key=KEY
    )
    assert oracles.relative_gap(exact.x, solve(PARTIAL, matrix, rhs).x) < 1e-12

    values, vectors = map(jnp.asarray, np.linalg.eigh(matrix))

    def sampled(vector, key):  # unbiased, and positive semidefinite
        picks = jax.random.bernoulli(key, 0.5, (SIZE,))
        return vectors @ (2 * picks * values * (vectors.T @ vector))

    @functools.partial(jax.jit, static_argnums=0)
    def gap(num_repeats, key):
        solver = lissa(num_steps=1500, num_repeats=num_repeats)
        solution = solver(times(matrix), rhs, sampled=sampled, key=key)
        want = jnp.linalg.solve(jnp.asarray(matrix), rhs)
        return jnp.linalg.norm(solution.x - want) / jnp.linalg.norm(want), solution

    (one, _), (many, solution) = gap(1, KEY), gap(64, KEY)
    assert float(many) < 0.25 * float(one)
    assert float(many) < 0.05
    true = np.linalg.norm(matrix @ np.asarray(solution.x) - rhs)
    assert abs(float(solution.residual_norm) - true) < 1e-9


def test_a_recursion_that_diverges_says_so(x64):
    matrix, rhs = system(2)
    for num_steps in (30, 5000):
        solution = lissa(num_steps=num_steps, step=1.0)(
            times(matrix), rhs, sampled=lambda v, key: times(matrix)(v), key=KEY
        )
        assert not float(solution.residual_norm) <= np.linalg.norm(rhs)


# Woodbury


def model(seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
    batch = (rng.normal(size=(ROWS, 3)), rng.normal(size=(ROWS, 2)))
    rhs = {"w": rng.normal(size=(2, 3, 2)), "b": rng.normal(size=(2, 2))}
    return jax.tree.map(jnp.asarray, (params, batch, rhs, rng.uniform(0, 2, ROWS)))


def row_of(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def squares(params, batch):
    return 0.5 * jnp.mean(jnp.sum((batch[0] @ params["w"] + params["b"] - batch[1]) ** 2, -1))


def dense_fisher(params, batch, weights, num_rows):
    """sum_i w_i g_i g_i' / num_rows, ordered (b, w)."""
    error = np.asarray(batch[0] @ params["w"] + params["b"] - batch[1])
    rows = [np.concatenate([e, np.outer(x, e).ravel()]) for x, e in zip(batch[0], error)]
    return sum(w * np.outer(g, g) for w, g in zip(np.asarray(weights), rows)) / num_rows


@jax.jit
def woodburies(params, batch, rhs, weights, damping):
    gradients = per_example(squares)(params, batch)
    one = row_of(rhs, 0)
    return (
        woodbury(damping=damping, many=True)(gradients, rhs, weights=weights),
        woodbury(damping=damping)(gradients, one, weights=weights, num_rows=7),
    )


@given(seed=seeds, damping=st.sampled_from([1e-4, 0.1, 10.0]))
def test_woodbury_is_the_dense_damped_fisher_inverse(seed, damping, x64):
    params, batch, rhs, weights = model(seed)
    weights = weights.at[1].set(0.0)
    many, one = woodburies(params, batch, rhs, weights, damping)
    fisher = dense_fisher(params, batch, weights, 1.0)
    for i in range(2):
        side = oracles.flat(row_of(rhs, i))
        want = np.linalg.solve(fisher / float(jnp.sum(weights)) + damping * np.eye(8), side)
        got = oracles.flat(row_of(many.x, i))
        assert oracles.relative_gap(got, want) < 1e-9
        assert float(many.residual_norm[i]) < 1e-9 * np.linalg.norm(side)
    side = oracles.flat(row_of(rhs, 0))
    want = np.linalg.solve(fisher / 7 + damping * np.eye(8), side)
    assert oracles.relative_gap(oracles.flat(one.x), want) < 1e-9
    assert not bool(one.negative_curvature)


def test_woodbury_never_forms_the_gradients(x64):
    params, batch, rhs, weights = model(0)
    text = str(jax.make_jaxpr(woodburies)(params, batch, rhs, weights, 0.1))
    assert f"f64[{ROWS},{ROWS}]" in text
    assert f"f64[{ROWS},3,2]" not in text
    assert f"f64[{ROWS},8]" not in text
    assert f"f64[{ROWS},6]" not in text


class Counted:
    """Per-example gradients that count the calls of their methods."""

    def __init__(self, gradients):
        self.gradients, self.calls = gradients, collections.Counter()

    def __getattr__(self, name):
        value = getattr(self.gradients, name)
        if not callable(value):
            return value

        def counted(*args):
            self.calls[name] += 1
            return value(*args)

        return counted


def test_woodbury_takes_as_many_products_as_it_says():
    params, batch, rhs, _ = model(2)
    for rounds in (0, 2):
        gradients = Counted(per_example(squares)(params, batch))
        found = woodbury(damping=0.1, num_refinements=rounds)(gradients, row_of(rhs, 0))
        assert int(found.num_iterations) == 1 + 2 * rounds
        spent = 1 + 2 * rounds + 1
        assert gradients.calls == {"gram": 1, "dot": spent, "sum": spent}


def test_woodbury_leaves_out_rows_that_are_not_finite_and_flags_negative_weights(x64):
    params, (x, y), rhs, weights = model(1)
    spoilt = (x.at[2].set(jnp.nan), y)
    _, got = woodburies(params, spoilt, rhs, weights, 0.1)
    _, want = woodburies(params, (x, y), rhs, weights.at[2].set(0.0), 0.1)
    assert oracles.relative_gap(got.x, want.x) < 1e-12  # over 7 rows, whoever counts
    flagged, _ = woodburies(params, (x, y), rhs, weights.at[0].set(-1.0), 0.1)
    assert np.all(flagged.negative_curvature)
    assert not np.any(oracles.flat(flagged.x))
    with pytest.raises(ValueError, match=r"Expected weights of shape \(5,\)"):
        woodbury(damping=1.0)(per_example(squares)(params, (x, y)), rhs, weights=weights[:3])


# Nystrom


@functools.partial(jax.jit, static_argnums=2)
def approximate(matrix, vector, rank, key):
    return nystrom(times(matrix), vector, rank=rank, key=key)


@given(seed=seeds)
def test_nystrom_is_exact_at_the_rank_of_the_operator(seed, x64):
    values = np.array([0, 0, 0, 0, 0, 0.1, 3.0, 50.0])
    matrix, rhs = system(seed, values)
    approximation = approximate(matrix, rhs, 4, jax.random.key(seed % 997))
    assert np.allclose(approximation.eigenvalues, [50.0, 3.0, 0.1, 0.0], atol=1e-9)
    assert oracles.relative_gap(approximation.product(rhs), matrix @ rhs) < 1e-8
    solution = approximation.solver(0.01)(times(matrix + 0.01 * np.eye(SIZE)), jnp.asarray(rhs))
    want = np.linalg.solve(matrix + 0.01 * np.eye(SIZE), rhs)
    assert oracles.relative_gap(solution.x, want) < 1e-6
    assert float(solution.residual_norm) < 1e-6 * np.linalg.norm(rhs)
    assert int(solution.num_iterations) == 0


@given(seed=seeds)
def test_nystrom_never_exceeds_the_operator_and_has_orthonormal_vectors(seed, x64):
    matrix, rhs = system(seed, np.geomspace(1e-6, 1.0, SIZE))
    approximation = approximate(matrix, rhs, 5, jax.random.key(seed % 997))
    u, values = np.asarray(approximation.vectors), np.asarray(approximation.eigenvalues)
    assert np.allclose(u @ u.T, np.eye(5), atol=1e-9)
    assert np.linalg.eigvalsh(matrix - (u.T * values) @ u)[0] > -1e-12
    assert not bool(approximation.negative_curvature)


@pytest.mark.slow
def test_the_nystrom_preconditioner_makes_the_condition_number_small(x64):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    values = np.concatenate([np.geomspace(1e3, 1.0, 20), np.full(40, 1e-3)])
    matrix = jnp.asarray((q * values) @ q.T)
    rhs = jnp.asarray(rng.normal(size=(3, 60)))

    @jax.jit
    def figures(matrix, rhs):
        damped = times(matrix + 0.01 * jnp.eye(60, dtype=matrix.dtype))
        inverse = nystrom(times(matrix), rhs[0], rank=30, key=KEY).preconditioner(0.01)
        options = {"tol": 1e-4, "max_iterations": 200, "many": True}
        return (
            cg(**options)(jax.vmap(damped), rhs),
            cg(**options, preconditioner=jax.vmap(inverse))(jax.vmap(damped), rhs),
            jax.vmap(inverse)(jnp.eye(60, dtype=matrix.dtype)),
        )

    plain, helped, _ = figures(matrix, rhs)
    assert np.max(helped.num_iterations) < 0.3 * np.min(plain.num_iterations)
    assert np.all(helped.residual_norm <= 1.1e-4 * np.linalg.norm(rhs, axis=1))
    *_, inverse = figures(matrix.astype(jnp.float32), rhs.astype(jnp.float32))
    inverse = np.asarray(inverse, np.float64)
    assert np.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0] > 0


def test_nystrom_reports_what_it_cannot_approximate(x64):
    rhs = jnp.ones(SIZE)
    assert bool(nystrom(lambda v: -v, rhs, rank=3, key=KEY).negative_curvature)
    spoilt = nystrom(lambda v: jnp.nan * v, rhs, rank=3, key=KEY)
    assert bool(spoilt.negative_curvature)
    assert not float(spoilt.solver(1.0)(lambda v: v, rhs).residual_norm) <= 1e30
    nothing = nystrom(lambda v: 0.0 * v, rhs, rank=3, key=KEY)
    assert np.array_equal(nothing.inverse(2.0)(rhs), np.full(SIZE, 0.5))
    with pytest.raises(ValueError, match="Expected 1 <= rank=9 <= 8"):
        nystrom(lambda v: v, rhs, rank=9, key=KEY)
    with pytest.raises(ValueError, match=r"Expected damping=0\.0 > 0"):
        nothing.preconditioner(0.0)


@pytest.mark.slow
def test_nystrom_takes_pytrees_and_stacks_of_products():
    vector = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    scale = {"a": jnp.array([[5.0, 1.0], [0.0, 0.0]]), "b": jnp.array([2.0, 0.0, 0.0])}
    product = lambda v: jax.tree.map(jnp.multiply, scale, v)
    one = nystrom(product, vector, rank=4, key=KEY)
    many = nystrom(jax.vmap(product), vector, rank=4, key=KEY, many=True)
    assert np.allclose(one.eigenvalues, [5.0, 2.0, 1.0, 0.0], atol=1e-4)
    assert np.allclose(many.eigenvalues, one.eigenvalues, atol=1e-4)
    ones = jax.tree.map(jnp.ones_like, vector)
    assert oracles.relative_gap(one.product(ones), scale) < 1e-4


# Preconditioned and refined


@given(seed=seeds)
def test_a_preconditioner_changes_the_path_and_not_the_solution(seed, x64):
    matrix, rhs = system(seed)
    scales = np.geomspace(0.1, 100.0, SIZE)
    matrix = scales[:, None] * matrix * scales
    solution = precondition(matrix, rhs)
    assert oracles.relative_gap(solution.x, np.linalg.solve(matrix, rhs)) < 1e-7
    assert int(solution.num_iterations) <= 2 * SIZE


@jax.jit
def precondition(matrix, rhs):
    solver = cg(tol=1e-12, preconditioner=jacobi(jnp.diag(matrix)), max_iterations=2 * SIZE)
    return solver(times(matrix), rhs)


def test_the_inverse_as_preconditioner_needs_one_step(x64):
    matrix, rhs = system(0)
    inverse = jnp.linalg.inv(jnp.asarray(matrix))
    assert int(cg(preconditioner=times(inverse))(times(matrix), rhs).num_iterations) == 1


def test_pairs_of_one_solve_precondition_the_next(x64):
    """With the curvature along the seven largest directions one eigenvalue is left to find."""
    matrix, rhs = system(5)
    _, directions = np.linalg.eigh(matrix)
    memory = lbfgs.init(jnp.zeros(SIZE), SIZE - 1)
    for s in directions.T[1:]:
        memory, _ = lbfgs.push(memory, jnp.asarray(s), jnp.asarray(matrix @ s))
    plain = cg(tol=1e-8)(times(matrix), rhs)
    helped = cg(tol=1e-8, preconditioner=lambda v: lbfgs.inverse_product(memory, v))(
        times(matrix), rhs
    )
    assert int(plain.num_iterations) == SIZE
    assert int(helped.num_iterations) <= 2
    assert oracles.relative_gap(helped.x, np.linalg.solve(matrix, rhs)) < 1e-8
    sides = jnp.stack([rhs, 2 * rhs, rhs**2])
    many = cg(many=True, tol=1e-8, preconditioner=lambda v: lbfgs.inverse_product_many(memory, v))(
        jax.vmap(times(matrix)), sides
    )
    assert np.all(many.num_iterations <= 2)
    assert oracles.relative_gap(many.x.T, np.linalg.solve(matrix, sides.T)) < 1e-8


@pytest.mark.parametrize("factor", [-1.0, 0.0, np.nan])
def test_a_preconditioner_that_is_not_positive_is_flagged(factor, x64):
    matrix, rhs = system(1)
    solution = cg(preconditioner=lambda v: factor * v)(times(matrix), rhs)
    assert bool(solution.negative_curvature)
    assert np.array_equal(solution.x, np.zeros(SIZE))
    assert np.allclose(solution.residual_norm, np.linalg.norm(rhs))


def test_entries_of_a_diagonal_that_are_not_positive_are_replaced():
    inverse = jacobi({"a": jnp.array([2.0, -1.0]), "b": jnp.array([6.0, jnp.nan])})
    got = inverse({"a": jnp.ones(2), "b": jnp.ones(2)})
    assert np.allclose(oracles.flat(got), [1 / 2, 1 / 4, 1 / 6, 1 / 4])


def test_refinement_repairs_what_single_precision_left():
    matrix, rhs = (a.astype(np.float32) for a in system(3, np.geomspace(1e-3, 1.0, SIZE)))
    short = cg(tol=0.1, max_iterations=50)
    plain, better = solve(short, matrix, rhs), solve(refined(short, num_rounds=4), matrix, rhs)
    assert float(better.residual_norm) < 0.01 * float(plain.residual_norm)
    assert int(better.num_iterations) > int(plain.num_iterations)
    flags = jnp.array(0), jnp.array(False)
    worse = refined(lambda matvec, b: Solution(9 * b, jnp.abs(8 * b), *flags))
    assert float(worse(lambda x: x, jnp.array(1.0)).x) == 9.0  # the second round would be worse


def test_a_first_guess_that_solves_the_system_is_kept(x64):
    matrix, rhs = system(4)
    solved = np.linalg.solve(matrix, rhs)
    for solver in (cg(tol=1e-10), neumann(step=0.1, tol=1e-10)):
        solution = solver(times(matrix), rhs, x0=solved)
        assert int(solution.num_iterations) == 0
        assert np.array_equal(solution.x, solved)


def test_integers_are_numbers_and_complex_ones_are_refused():
    assert cg()(lambda x: 2.0 * x, jnp.array([2, 5])).x.dtype == jnp.float32
    with pytest.raises(TypeError, match="Expected real right-hand sides"):
        cg()(lambda x: x, jnp.array([1j]))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (neumann, {"step": -1.0}),
        (neumann, {"step": 0.0}),
        (neumann, {"step": 1.0, "safety": 0.5}),
        (neumann, {"step": 1.0, "tol": -1.0}),
        (lissa, {"num_steps": 0}),
        (lissa, {"num_steps": 1, "num_repeats": 0}),
        (woodbury, {"damping": 0.0}),
        (jacobi, {"diagonal": 1.0, "damping": -1.0}),
        (functools.partial(refined, cholesky()), {"num_rounds": 0}),
        (spectral_radius, {"matvec": None, "vector": 1.0, "key": KEY, "num_iterations": 0}),
    ],
)
def test_a_bad_configuration_is_refused_at_once(make, options):
    with pytest.raises(ValueError, match="Expected"):
        make(**options)
