"""Eager calls of solvers and of L-BFGS: compiled once, and never from what they read before."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.kernels import _programs, lbfgs, newton_step
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels.solves import (
    block_cg,
    cg,
    cholesky,
    lissa,
    minres,
    neumann,
    spectral_radius,
)

SIDE = np.arange(1.0, 4.0, dtype=np.float32)
STACK = np.stack([SIDE, SIDE[::-1], 0 * SIDE])
KEY = jax.random.key(0)


def product_by(scale):
    """A product that is made anew, of a matrix that is made anew."""
    matrix = jnp.diag(jnp.asarray(scale * np.array([1.0, 2.0, 5.0], np.float32)))
    return lambda v: jnp.matmul(v, matrix, precision="highest")


def squared_distance(w, x):
    return jnp.mean(0.5 * jnp.sum((x - w) ** 2, axis=-1))


STEP = newton_step(squared_distance, l2=0.1, solver=cholesky())


def filled(scale):
    memory = lbfgs.init(jnp.zeros(3), 2)
    return lbfgs.push(memory, jnp.ones(3), scale * jnp.ones(3))[0]


CALLS = {
    "cg": lambda c: cg(max_iterations=9)(product_by(c), SIDE),
    "cholesky": lambda c: cholesky()(product_by(c), SIDE),
    "newton_step": lambda c: STEP(SIDE, STACK * c, np.arange(3), np.array([1, 0, 1], np.float32)),
    "minres": lambda c: minres(max_iterations=9)(product_by(c), SIDE),
    "block_cg": lambda c: block_cg(max_iterations=9)(product_by(c), STACK),
    "neumann": lambda c: neumann(key=KEY, max_iterations=9)(product_by(c), SIDE),
    "lissa": lambda c: lissa(num_steps=3, num_power_iterations=2)(
        product_by(c), SIDE, sampled=lambda v, key: product_by(c)(v), key=KEY
    ),
    "spectral_radius": lambda c: spectral_radius(product_by(c), SIDE, key=KEY),
    "push": filled,
    "correct": lambda c: lbfgs.correct(filled(c), 0, c * jnp.ones(3)),
    "inverse_product": lambda c: lbfgs.inverse_product(filled(c), SIDE),
    "product": lambda c: lbfgs.product(filled(c), SIDE, form="unrolled"),
    "damped": lambda c: lbfgs.inverse_product(filled(c), SIDE, damping=c, form="compact"),
}


class Compilations(logging.Handler):
    """Counts the programs that XLA compiles."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        if "Finished XLA compilation" in record.getMessage():
            self.names.append(record.getMessage())


@pytest.fixture
def compilations():
    handler, logger = Compilations(), logging.getLogger("jax")
    before = jax.config.jax_log_compiles, logger.propagate
    jax.config.update("jax_log_compiles", True)
    logger.propagate = False
    logger.addHandler(handler)
    yield handler.names
    logger.removeHandler(handler)
    logger.propagate = before[1]
    jax.config.update("jax_log_compiles", before[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("cg", "push", "lissa") else pytest.mark.slow)
        for name in CALLS
    ],
)
def test_a_second_eager_call_compiles_nothing(name, compilations):
    jax.block_until_ready(CALLS[name](1.0))
    assert compilations  # the counter counts
    compilations.clear()
    jax.block_until_ready(CALLS[name](2.0))
    assert not compilations


def test_what_a_product_reads_is_read_again_at_each_call():
    scale = [1.0]
    product = lambda v: scale[0] * v
    first = cg()(product, SIDE)
    scale[0] = 4.0
    second = cg()(product, SIDE)
    np.testing.assert_allclose(second.x, first.x / 4, rtol=1e-6)


def test_programs_that_differ_in_a_number_are_not_shared():
    add = lambda number: compiled_once(lambda x: x + jnp.float32(number), jnp.float32(1))
    assert float(add(0.1)) != float(add(0.2))
    sign = lambda zero: compiled_once(lambda x: jnp.copysign(x, zero), jnp.float32(1))
    assert [float(sign(0.0)), float(sign(-0.0))] == [1.0, -1.0]
    order = lambda flip: compiled_once(lambda x, y: y - x if flip else x - y, 1.0, 3.0)
    assert [float(order(False)), float(order(True))] == [-2.0, 2.0]
    inner = lambda matrix: compiled_once(jax.jit(lambda x: x * matrix), jnp.ones(2))
    np.testing.assert_array_equal(inner(jnp.full(2, 3.0)), [3, 3])
    np.testing.assert_array_equal(inner(jnp.full(2, 7.0)), [7, 7])


def test_functions_with_their_own_derivative_share_a_program():
    before = _programs._compiled.cache_info().misses
    for scale in (1.0, 2.0):
        matrix = jnp.full(2, scale)
        found = compiled_once(lambda x, m=matrix: jax.nn.relu(x * m), jnp.array([-1.0, 1.0]))
        np.testing.assert_array_equal(found, [0, scale])
    assert _programs._compiled.cache_info().misses <= before + 1


def test_within_a_trace_nothing_is_traced_apart():
    text = str(jax.make_jaxpr(lambda x: compiled_once(lambda y: y + 1, x))(1.0))
    assert "jit" not in text
    outer = jax.jit(lambda c: compiled_once(lambda y: y * c, 3.0))
    assert float(outer(2.0)) == 6.0
    slope = jax.jvp(lambda c: compiled_once(lambda y: y * c, 3.0), (2.0,), (1.0,))[1]
    assert float(slope) == 3.0
