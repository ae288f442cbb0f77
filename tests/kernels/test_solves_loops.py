"""Where the loop of a solver runs, and how many products it spends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.kernels.solves import (
    block_cg,
    cg,
    cholesky,
    lissa,
    minres,
    neumann,
    nystrom,
    refined,
    spectral_radius,
)
from tests import oracles

SIZE = 6
KEY = jax.random.key(0)
MATRIX = oracles.spd_matrix(np.random.default_rng(0), SIZE, 20.0)
RHS = np.random.default_rng(1).normal(size=SIZE)
STACK = np.random.default_rng(2).normal(size=(3, SIZE))
MAKERS = {
    "cg": cg,
    "cg_many": functools.partial(cg, many=True),
    "minres": minres,
    "neumann": functools.partial(neumann, step=0.08),
    "block_cg": block_cg,
}
by_maker = pytest.mark.parametrize("name", MAKERS)


def side(name):
    return STACK if name in ("block_cg", "cg_many") else RHS


class Counted:
    """A dense product that counts the vectors it is given, inside XLA loops too."""

    def __init__(self, matrix=MATRIX):
        self.matrix, self.rows = matrix, 0

    def _add(self, x):
        self.rows += int(np.prod(x.shape[:-1]))
        return np.asarray(x)

    def __call__(self, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = jax.pure_callback(self._add, shape, x, vmap_method="expand_dims")
        return jnp.matmul(x, jnp.asarray(self.matrix, x.dtype).T)


@pytest.mark.parametrize("loop", ["host", pytest.param("unrolled", marks=pytest.mark.slow)])
@by_maker
def test_every_loop_takes_the_same_path(name, loop, x64):
    options = {"tol": 1e-30, "max_iterations": 4}
    matvec = jax.jit(lambda x: jnp.matmul(x, jnp.asarray(MATRIX).T))
    got = MAKERS[name](loop=loop, **options)(matvec, side(name))
    want = MAKERS[name](**options)(matvec, side(name))
    assert oracles.relative_gap(got.x, want.x) < 1e-12
    assert np.array_equal(got.num_iterations, want.num_iterations)
    assert np.array_equal(got.negative_curvature, want.negative_curvature)


def test_unrolled_systems_stand_still_once_they_are_solved(x64):
    solution = cg(loop="unrolled", max_iterations=5)(lambda x: 2.0 * x, RHS)
    assert int(solution.num_iterations) == 1
    assert np.array_equal(solution.x, RHS / 2)


@pytest.mark.parametrize("many", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_convolution_on_a_cpu_is_solved_by_a_loop_on_the_host(many):
    kernel = jnp.array([[[1.0, 4.0, 1.0]]])
    calls = []

    def matvec(x):
        calls.append(x.shape)
        rows = x if many else x[None]
        out = jax.lax.conv_general_dilated(rows[:, None], kernel, (1,), "SAME")[:, 0]
        return out if many else out[0]

    rhs = jnp.asarray(STACK if many else RHS, jnp.float32)
    dense = 4 * np.eye(SIZE) + np.eye(SIZE, k=1) + np.eye(SIZE, k=-1)
    solution = cg(many=many)(matvec, rhs)
    assert len(calls) == 2 + int(np.max(solution.num_iterations))  # one trace, and the residual
    assert oracles.relative_gap(solution.x, np.linalg.solve(dense, np.asarray(rhs).T).T) < 1e-5
    calls.clear()
    traced = jax.jit(lambda b: cg(many=many)(matvec, b))(rhs)
    assert len(calls) == 2  # the body and the residual, whatever the number of iterations
    assert oracles.relative_gap(traced.x, solution.x) < 1e-5


@pytest.mark.slow
def test_under_vmap_a_convolution_is_solved_on_the_device():
    kernel = jnp.array([[[1.0, 4.0, 1.0]]])
    product = lambda x: jax.lax.conv_general_dilated(x[None, None], kernel, (1,), "SAME")[0, 0]
    rhs = jnp.asarray(RHS, jnp.float32)
    mapped = jax.vmap(lambda s: cg()(lambda x: s * product(x), rhs))(jnp.array([1.0, 2.0]))
    assert oracles.relative_gap(2 * mapped.x[1], cg()(product, rhs).x) < 1e-5


@by_maker
def test_the_host_loop_refuses_to_be_traced(name):
    solver = MAKERS[name](loop="host")
    with pytest.raises(ValueError, match='Expected loop="host" outside jit'):
        jax.jit(lambda b: solver(lambda x: 2.0 * x, b))(jnp.asarray(side(name), jnp.float32))


@by_maker
def test_products_are_as_many_as_stated(name, x64):
    rhs, matvec = side(name), Counted()
    sides = np.prod(rhs.shape[:-1], dtype=int)
    solution = MAKERS[name](tol=1e-6, max_iterations=40, loop="device")(matvec, jnp.asarray(rhs))
    jax.block_until_ready(solution)
    assert np.max(solution.num_iterations) >= 2
    assert matvec.rows == sides * (np.max(solution.num_iterations) + 1)
    matvec.rows = 0
    guess = jnp.zeros_like(rhs)
    solution = MAKERS[name](max_iterations=2, loop="device")(matvec, jnp.asarray(rhs), x0=guess)
    jax.block_until_ready(solution)
    assert matvec.rows == sides * (2 + 2)


@pytest.mark.parametrize("maker", [cg, minres])
def test_the_preconditioner_is_called_as_often_as_stated(maker, x64):
    matvec, scaled = Counted(), Counted(np.diag(1 / np.diag(MATRIX)))
    solution = maker(preconditioner=scaled, tol=1e-6, loop="device")(matvec, jnp.asarray(RHS))
    jax.block_until_ready(solution)
    assert int(solution.num_iterations) >= 2
    assert matvec.rows == solution.num_iterations + 1
    assert scaled.rows == matvec.rows + (maker is minres)  # which starts afresh when it measures


@pytest.mark.slow
def test_the_others_cost_what_they_say(x64):
    rhs, matvec = jnp.asarray(RHS), Counted()

    def spent(result):
        jax.block_until_ready(result)
        count, matvec.rows = matvec.rows, 0
        return count

    assert spent(cholesky()(matvec, rhs)) == SIZE + 1
    assert spent(cholesky(many=True)(matvec, jnp.asarray(STACK))) == SIZE + len(STACK)
    assert spent(spectral_radius(matvec, rhs, key=KEY, num_iterations=7)) == 7
    approximation = nystrom(matvec, rhs, rank=3, key=KEY)
    assert spent(approximation) == 3
    assert spent(approximation.solver(0.1)(matvec, rhs)) == 1
    assert spent(refined(cholesky())(matvec, rhs)) == 2 * (SIZE + 1) + 2
    measured = neumann(key=KEY, num_power_iterations=5, max_iterations=3)(matvec, rhs)
    assert int(measured.num_iterations) == 8
    assert spent(measured) == 8 + 1
    calls = []
    stochastic = lissa(num_steps=4, num_repeats=2, num_power_iterations=3, num_radius_samples=2)(
        lambda v: calls.append(0) or jnp.asarray(MATRIX) @ v,
        rhs,
        key=KEY,
        sampled=lambda v, key: matvec(v + 0.0 * jax.random.normal(key, v.shape)),
    )
    assert int(stochastic.num_iterations) == 4 * 2 + 3 * 2
    assert spent(stochastic) == 4 * 2 + 3 * 2
    assert len(calls) == 1


def test_an_unknown_loop_is_refused():
    with pytest.raises(ValueError, match="Expected loop='gpu' to be one of auto, device"):
        cg(loop="gpu")
