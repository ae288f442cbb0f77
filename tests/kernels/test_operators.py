"""Operator objects, against their dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxunlearn import kernels
from jaxunlearn.kernels import operators
from tests import oracles

ROWS = 5


def outputs(params, batch):
    return jnp.tanh(batch @ params["w"]) @ params["v"]


def square(z, batch):
    return jnp.mean(jnp.sum(z**2, -1))


def loss_fn(params, batch):
    return square(outputs(params, batch), batch)


def problem(seed):
    rng = np.random.default_rng(seed)
    params = {"v": rng.normal(size=(2, 2)), "w": rng.normal(size=(3, 2))}
    return jax.tree.map(jnp.asarray, (params, rng.normal(size=(ROWS, 3))))


def dense_hessian(params, batch):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda p: loss_fn(unravel(p), batch))(flat))


def all_operators(params, batch, **options):
    makers = {
        "hessian": kernels.hessian_operator(loss_fn),
        "ggn": kernels.ggn_operator(outputs, square),
        "fisher": kernels.fisher_operator(outputs, GAUSSIAN),
        "empirical": kernels.empirical_fisher_operator(loss_fn),
    }
    return {name: make(params, batch, **options) for name, make in makers.items()}


GAUSSIAN = kernels.gaussian(0.5)


@pytest.mark.slow
def test_to_dense_is_the_matrix(x64):
    params, batch = problem(0)
    dense = {name: op.to_dense() for name, op in all_operators(params, batch).items()}
    assert oracles.relative_gap(dense["hessian"], dense_hessian(params, batch)) < 1e-12
    assert oracles.relative_gap(dense["ggn"], dense["fisher"]) < 1e-12
    flat, unravel = ravel_pytree(params)
    one = lambda x: jax.grad(lambda p: loss_fn(unravel(p), x[None]))(flat)
    gradients = np.asarray(jax.vmap(one)(batch))
    assert oracles.relative_gap(dense["empirical"], gradients.T @ gradients / ROWS) < 1e-12


def test_sums_multiples_and_damping_are_those_of_the_matrices(x64):
    params, batch = problem(1)
    ops = all_operators(params, batch)
    a, b = ops["hessian"], ops["ggn"]
    made = (2.0 * a - b * jnp.float32(0.5) + (-a)).damped(0.3)
    want = a.to_dense() - 0.5 * b.to_dense() + 0.3 * np.eye(10)
    assert oracles.relative_gap(made.to_dense(), want) < 1e-12
    assert made.shape == (10, 10)
    assert made.T is made


def test_a_vector_gives_a_vector_and_a_stack_a_stack(x64):
    params, batch = problem(2)
    op = kernels.hessian_operator(loss_fn)(params, batch)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, leaf**2]), params)
    many = op @ stack
    for k in range(3):
        pick = lambda leaf, k=k: leaf[k]
        one = op @ jax.tree.map(pick, stack)
        assert oracles.relative_gap(jax.tree.map(pick, many), one) < 1e-12
    with pytest.raises(ValueError, match="Expected vector like params, of structure"):
        op @ {"v": params["v"]}
    with pytest.raises(ValueError, match=r"Expected vector like params, of shape \(3, 2\)"):
        op @ {"v": params["v"], "w": params["w"].T}
    with pytest.raises(ValueError, match=r"Expected vectors like params, .* at vectors\['w'\]"):
        op @ {"v": stack["v"], "w": params["w"]}


def test_options_pass_through(x64):
    params, batch = problem(3)
    weights = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0])
    op = kernels.hessian_operator(loss_fn)(params, batch, weights=weights, leave_out=4)
    rows = batch[jnp.array([0, 2, 2])]
    assert oracles.relative_gap(op.to_dense(), dense_hessian(params, rows)) < 1e-12


def test_an_operator_passes_through_jit_with_its_data_as_leaves():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), problem(4))
    op = kernels.hessian_operator(loss_fn)(params, batch).damped(0.1)
    leaves = jax.tree.leaves(op)
    assert any(leaf is batch for leaf in leaves)
    product = jax.jit(lambda op, v: op @ v)
    assert oracles.relative_gap(product(op, params), op @ params) < 1e-6
    again = jax.jit(lambda p: p)(op)
    assert oracles.relative_gap(again @ params, op @ params) < 1e-6


def test_another_operator_of_the_same_shapes_compiles_nothing():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), problem(5))
    sizes = []
    for shift in (0.0, 1.0):
        for op in all_operators(params, batch + shift).values():
            assert np.all(np.isfinite(oracles.flat(op.damped(0.1 + shift) @ params)))
        sizes.append(operators._product._cache_size())
    assert sizes[0] == sizes[1]


def test_a_solver_takes_an_operator(x64):
    params, batch = problem(6)
    op = kernels.ggn_operator(outputs, square)(params, batch).damped(0.5)
    solution = jax.jit(lambda op, rhs: kernels.cg(tol=1e-12)(op, rhs))(op, params)
    assert oracles.relative_gap(op(solution.x), params) < 1e-10


def test_operators_on_other_shapes_do_not_add():
    params, batch = problem(7)
    op = kernels.hessian_operator(loss_fn)(params, batch)
    other = kernels.hessian_operator(lambda w, x: jnp.mean(w**2))(jnp.ones(2), batch)
    with pytest.raises(ValueError, match="Expected operators on the same shapes"):
        op + other
