"""What curvature products and operators are called with: eagerly, with anything, and refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import errors, kernels
from tests import oracles
from tests.kernels.costs import compilations

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5])}


def outputs(params, batch):
    return jnp.tanh(batch @ params["w"])


def square(z, batch):
    return jnp.mean(z**2)


def loss_fn(params, batch):
    return square(outputs(params, batch), batch)


def keyed_loss(params, batch, key):
    return loss_fn(params, batch)


PRODUCTS = {
    "hvp": lambda **o: kernels.hvp(loss_fn, **o),
    "ggn_vp": lambda **o: kernels.ggn_vp(outputs, square, **o),
    "fisher_vp": lambda **o: kernels.fisher_vp(outputs, kernels.gaussian(), **o),
    "empirical_fisher_vp": lambda **o: kernels.empirical_fisher_vp(loss_fn, **o),
}


# --- called outside any trace ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_second_eager_call_compiles_nothing_however_the_product_is_made(name):
    product = PRODUCTS[name](damping=0.1)
    operands = jnp.asarray(X), PARAMS
    product(PARAMS, *operands)
    others = jax.tree.map(lambda leaf: leaf + 1, operands)
    jax.block_until_ready(others)
    with compilations() as compiled:
        product(PARAMS, *others)
        got = PRODUCTS[name](damping=0.1)(PARAMS, *others)
    assert compiled == []
    assert oracles.relative_gap(got, jax.jit(product)(PARAMS, *others)) < 1e-6


def test_a_second_eager_call_with_options_compiles_nothing():
    many = kernels.hvp_many(loss_fn, damping=jnp.float32(0.1), microbatch_size=2)
    vectors = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), PARAMS)
    options = {"weights": jnp.ones(5), "num_rows": jnp.int32(4), "leave_out": jnp.array([1, -1])}
    first = many(PARAMS, X, vectors, **options)
    with compilations() as compiled:
        again = many(PARAMS, X, vectors, **options)
    assert compiled == []
    assert np.array_equal(oracles.flat(first), oracles.flat(again))


def test_an_eager_call_reads_what_the_loss_closes_over_anew():
    scale = [1.0]
    product = kernels.hvp(lambda p, batch: scale[0] * loss_fn(p, batch))
    first = product(PARAMS, X, PARAMS)
    scale[0] = 3.0
    assert oracles.relative_gap(product(PARAMS, X, PARAMS), 3 * first["w"]) < 1e-6


def test_an_eager_call_inside_a_trace_is_part_of_it():
    """Its operands are known there; what the loss and the damping close over is not."""

    def along(scale):
        product = kernels.hvp(lambda p, batch: scale * loss_fn(p, batch), damping=scale)
        return product(PARAMS, X, PARAMS)["w"]

    want = along(1.0)
    for scale, got in ((2.0, jax.jit(along)(2.0)), (3.0, jax.vmap(along)(jnp.array([3.0]))[0])):
        assert oracles.relative_gap(got, scale * want) < 1e-6
    assert oracles.relative_gap(jax.jvp(along, (2.0,), (1.0,))[1], want) < 1e-6


# --- losses that hold a linear solve --------------------------------------------------------------


def solve_loss(w, batch):
    return jnp.mean(jnp.linalg.solve(jnp.eye(3) + w @ w.T, batch.T) ** 2)


def cg_loss(w, batch):
    matrix = jnp.eye(3) + w @ w.T
    solve = lambda row: jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, row, tol=1e-14)[0]
    return jnp.mean(jax.vmap(solve)(batch) ** 2)


def test_a_loss_may_hold_a_linear_solve(x64):
    rng = np.random.default_rng(1)
    w, v, batch = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=(4, 3))
    want = jnp.tensordot(jax.jit(jax.hessian(solve_loss))(w, batch), v, 2)
    for loss in (solve_loss, cg_loss):
        product = jax.jit(kernels.hvp(loss))
        assert oracles.relative_gap(product(w, batch, v), want) < 1e-9
    weighted = jax.jit(kernels.hvp(solve_loss))(w, batch, v, weights=np.ones(4))
    assert oracles.relative_gap(weighted, want) < 1e-9


# --- rows left out that are none ------------------------------------------------------------------


def test_a_traced_row_that_is_none_leaves_nothing_out():
    vectors = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf]), PARAMS)
    many = jax.jit(kernels.hvp_many(loss_fn))
    whole = many(PARAMS, X, vectors, leave_out=jnp.full((3,), -1))
    for rows in (jnp.array([99, 5, -7]), jnp.array([5, 2**31, 2**32 - 1], jnp.uint32)):
        got = many(PARAMS, X, vectors, leave_out=rows)
        assert np.array_equal(oracles.flat(got), oracles.flat(whole))
    for row in (jnp.int32(99), jnp.int32(-7), jnp.uint8(255)):
        got = many(PARAMS, X, vectors, leave_out=row)
        assert oracles.relative_gap(got, whole) < 1e-6
    some = many(PARAMS, X, vectors, leave_out=jnp.array([4, 99, 2]))
    for k, row in enumerate((4, None, 2)):
        rows = X if row is None else np.delete(X, row, axis=0)
        vector = jax.tree.map(lambda leaf, k=k: leaf[k], vectors)
        want = kernels.hvp(loss_fn)(PARAMS, rows, vector)
        assert oracles.relative_gap(jax.tree.map(lambda leaf, k=k: leaf[k], some), want) < 1e-5


# --- refused by name ------------------------------------------------------------------------------

VECTORS = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
KEYS = jax.random.split(jax.random.key(0), 5)
REFUSED = [
    (PARAMS | {"n": jnp.arange(2)}, PARAMS, TypeError, r"got int32 at params\['n'\]"),
    (PARAMS, {"v": PARAMS["w"]}, ValueError, "Expected vector like params, of structure"),
    (PARAMS, {"w": jnp.ones(2)}, ValueError, r"Expected vector like params, .* vector\['w'\]"),
    (PARAMS, {"w": 1j * jnp.ones(3)}, TypeError, r"real numbers at vector\['w'\], got complex64"),
    (PARAMS, {"w": KEYS[:3]}, TypeError, r"real numbers at vector\['w'\]"),
]


@pytest.mark.parametrize(("params", "vector", "error", "message"), REFUSED)
def test_operands_that_do_not_fit_are_refused_by_name(params, vector, error, message):
    for make in PRODUCTS.values():
        with pytest.raises(error, match=message):
            make()(params, X, vector)
    with pytest.raises(error, match=message):
        kernels.hessian_operator(loss_fn)(params, X) @ vector


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (PARAMS, r"Expected vectors like params, of a leading axis .* got \(3,\)"),
        ({"w": 1.0}, "Expected vectors like params"),
        ({"w": jnp.ones((2, 2))}, "Expected vectors like params"),
    ],
)
def test_a_stack_that_does_not_fit_is_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        kernels.hvp_many(loss_fn)(PARAMS, X, vectors)
    two = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}
    like = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"Expected vectors of one number, got leading axes"):
        kernels.hvp_many(lambda p, b: loss_fn({"w": p["a"] * p["b"]}, b))(like, X, two)


def test_losses_that_do_not_fit_are_refused_by_name():
    refused = functools.partial(pytest.raises, errors.LossSignatureError)
    with refused(match=r"Expected loss_fn\(params, batch\).*'key'.*Pass keys="):
        kernels.hvp(keyed_loss)(PARAMS, X, PARAMS)
    with refused(match=r"Expected outputs_fn\(params, batch, key\).*Leave keys= out"):
        kernels.ggn_vp(outputs, square)(PARAMS, X, PARAMS, keys=KEYS)
    with refused(match=r"Expected outputs_fn\(params, batch\).*Pass keys="):
        kernels.fisher_vp(keyed_loss, kernels.gaussian())(PARAMS, X, PARAMS)
    for loss in (outputs, lambda p, b: (loss_fn(p, b), 1.0)):
        with refused(match="Expected loss_fn to return a scalar"):
            kernels.hvp(loss)(PARAMS, X, PARAMS)
    with refused(match="Expected loss_fn to return a floating-point number, got int32"):
        kernels.hvp(lambda p, b: jnp.sum(p["w"] > 0))(PARAMS, X, PARAMS)
    with refused(match="Expected outputs_loss to return a scalar"):
        kernels.ggn_vp(outputs, lambda z, b: z)(PARAMS, X, PARAMS)
    with refused(match="Expected outputs_fn to return one array"):
        kernels.fisher_vp(lambda p, b: {"z": outputs(p, b)}, kernels.gaussian())(PARAMS, X, PARAMS)


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.asarray])
def test_negative_damping_is_refused_whatever_number_it_is(kind):
    operator = kernels.hessian_operator(loss_fn)(PARAMS, X)
    for use in (operator.damped, lambda x: kernels.hvp(loss_fn, damping=x)):
        with pytest.raises(ValueError, match=r"Expected damping=-1\.0 >= 0"):
            use(kind(-1.0))
        with pytest.raises(ValueError, match="Expected damping=nan >= 0"):
            use(kind(np.nan))
        with pytest.raises(ValueError, match="Expected damping to be one number"):
            use(jnp.ones(2))
        use(kind(0.0))


def test_an_option_that_is_none_is_refused_in_the_name_of_the_operator():
    for name, make in (
        ("hessian_operator", kernels.hessian_operator(loss_fn)),
        ("empirical_fisher_operator", kernels.empirical_fisher_operator(loss_fn)),
    ):
        with pytest.raises(TypeError, match=rf"Expected options of {name}.*got \['weight'\]"):
            make(PARAMS, X, weight=jnp.ones(5))
    with pytest.raises(TypeError, match=r"hvp_many\(\.\.\.\)\(\) got an unexpected .* 'weight'"):
        kernels.hvp(loss_fn)(PARAMS, X, PARAMS, weight=jnp.ones(5))


# --- no parameters at all -------------------------------------------------------------------------


def test_no_parameters_have_a_product_with_no_entries():
    mean = lambda params, batch: jnp.mean(batch)
    assert kernels.hvp(mean, damping=0.5)({}, X, {}) == {}
    assert jax.jit(kernels.hvp_many(mean, microbatch_size=2))({}, X, {}) == {}
    operator = kernels.hessian_operator(mean)({}, X).damped(0.5)
    assert operator @ {} == {}
    assert operator.shape == operator.to_dense().shape == (0, 0)
    key = jax.random.key(0)
    for trace in (
        kernels.hutchinson_trace(operator, key=key, num_probes=2),
        kernels.hutch_pp_trace(operator, key=key, num_products=6),
    ):
        assert (trace.mean, trace.standard_error) == (0.0, 0.0)
    assert kernels.hutchinson_diagonal(operator, key=key, num_probes=2).mean == {}
