"""Fisher-vector products, against enumeration over labels and materialised gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxunlearn import kernels
from jaxunlearn.kernels import example_keys
from tests import oracles
from tests.kernels.costs import flops, without_branches

ROWS, FEATURES, CLASSES = 6, 4, 3


def outputs(params, batch):
    return jnp.tanh(batch @ params["w"]) @ params["v"]


def problem(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (FEATURES, 5), "v": (5, CLASSES)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    vectors = {name: rng.normal(size=(3, *shape)) for name, shape in shapes.items()}
    return params, rng.normal(size=(ROWS, FEATURES)), vectors, rng.uniform(0.5, 2.0, ROWS)


def rows_of(tree):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def jacobians(params, batch):
    """Each row's Jacobian (B, C, P) and outputs (B, C)."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, params))
    one = lambda x: jax.jacobian(lambda p: outputs(unravel(p), x[None])[0])(flat)
    return np.asarray(jax.vmap(one)(batch)), np.asarray(outputs(params, batch))


def softmax_fisher(params, batch):
    """Each row's Fisher matrix by enumeration: sum_y p_y g_y g_y'."""
    jacobian, logits = jacobians(params, batch)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = p[:, None, :] - np.eye(CLASSES)
    gradients = np.einsum("byc,bcp->byp", scores, jacobian)
    return np.einsum("by,byp,byq->bpq", p, gradients, gradients)


CROSS_ENTROPY = lambda z, y: jax.nn.logsumexp(z) - z[y]
LIKELIHOODS = {
    "categorical": kernels.categorical(),
    "discrete": kernels.discrete(CROSS_ENTROPY, np.arange(CLASSES)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_fisher_equals_enumeration_over_the_labels(name, x64):
    params, batch, vectors, weights = problem(0)
    want = np.tensordot(weights, softmax_fisher(params, batch), 1)
    for size, num_rows in ((None, None), (4, 9)):
        many = jax.jit(
            kernels.fisher_vp_many(outputs, LIKELIHOODS[name], damping=0.2, microbatch_size=size)
        )
        got = rows_of(many(params, batch, vectors, weights=weights, num_rows=num_rows))
        divisor = weights.sum() if num_rows is None else num_rows
        matrix = want / divisor + 0.2 * np.eye(len(want))
        assert oracles.relative_gap(got, rows_of(vectors) @ matrix) < 1e-12


@pytest.mark.slow
def test_exact_fisher_is_the_gauss_newton_matrix_of_the_likelihood(x64):
    params, batch, vectors, _ = problem(1)
    labels = np.arange(ROWS) % CLASSES
    losses = {
        "categorical": lambda z, b: jnp.mean(jax.vmap(CROSS_ENTROPY)(z, b[1])),
        "bernoulli": lambda z, b: jnp.mean(jnp.sum(jax.nn.softplus(z), -1)),
        "gaussian": lambda z, b: jnp.mean(jnp.sum(0.5 * z**2, -1)),
        "poisson": lambda z, b: jnp.mean(jnp.sum(jnp.exp(z), -1)),
    }
    with_labels = lambda params, b: outputs(params, b[0])
    for name, loss in losses.items():
        likelihood = getattr(kernels, name)()
        newton = jax.jit(kernels.ggn_vp_many(with_labels, loss))
        fisher = jax.jit(kernels.fisher_vp_many(outputs, likelihood))
        want = newton(params, (batch, labels), vectors)
        assert oracles.relative_gap(fisher(params, batch, vectors), want) < 1e-12


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian", "poisson"])
def test_the_fisher_of_a_likelihood_is_the_mean_square_of_its_sampled_scores(name):
    """20000 samples: five standard errors are seen, so a factor of 3/2 or 2/3 is too."""
    likelihood = getattr(kernels, name)()
    z, u = jnp.array([0.3, -0.7, 0.5]), jnp.array([1.0, -2.0, 0.5])

    def along(key):
        return jnp.vdot(likelihood.score(z, likelihood.sample(key, z)), u)

    squares = np.asarray(jax.jit(jax.vmap(along))(jax.random.split(jax.random.key(0), 20000))) ** 2
    exact = float(jnp.vdot(u, likelihood.fisher(z, u)))
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - exact) < 5 * error < 0.2 * exact


@pytest.mark.slow
def test_sampled_fisher_averages_to_the_exact_one_and_keeps_each_rows_labels(x64):
    params, batch, vectors, _ = problem(2)
    keys = example_keys(jax.random.key(1), jnp.arange(ROWS))
    sampled = jax.jit(kernels.fisher_vp_many(outputs, kernels.categorical(), num_samples=4000))
    got = sampled(params, batch, vectors, sample_keys=keys)
    exact = kernels.fisher_vp_many(outputs, kernels.categorical())(params, batch, vectors)
    assert 1e-4 < oracles.relative_gap(got, exact) < 0.05
    kept = np.ones(ROWS)
    kept[2] = 0
    few = jax.jit(kernels.fisher_vp_many(outputs, kernels.categorical(), num_samples=3))
    without = few(params, batch, vectors, sample_keys=keys, weights=kept, num_rows=ROWS)
    rest = kept == 1
    alone = few(params, batch[rest], vectors, sample_keys=keys[rest], num_rows=ROWS)
    assert oracles.relative_gap(without, alone) < 1e-12


@pytest.mark.parametrize("options", [{"num_samples": 2}, {}])
def test_sample_keys_come_with_samples_and_only_then(options):
    params, batch, vectors, _ = problem(3)
    many = kernels.fisher_vp_many(outputs, kernels.categorical(), **options)
    keys = None if options else example_keys(jax.random.key(1), jnp.arange(ROWS))
    with pytest.raises(ValueError, match="sample_keys"):
        many(params, batch, vectors, sample_keys=keys)


def labelled_loss(params, batch):
    x, y = batch
    return jnp.mean(jax.vmap(CROSS_ENTROPY)(outputs(params, x), y))


@pytest.mark.parametrize(("at_once", "size"), [(1, None), (8, 4)])
def test_empirical_fisher_equals_materialised_gradients(at_once, size, x64):
    params, x, vectors, weights = problem(4)
    batch = (x, np.arange(ROWS) % CLASSES)
    one = lambda row: jax.grad(labelled_loss)(params, jax.tree.map(lambda leaf: leaf[None], row))
    gradients = rows_of(jax.vmap(one)(batch))
    many = jax.jit(
        kernels.empirical_fisher_vp_many(
            labelled_loss, damping=0.1, tangents_at_once=at_once, microbatch_size=size
        )
    )
    leave_out = np.array([1, -1, 5], np.int32)
    got = rows_of(many(params, batch, vectors, weights=weights))
    left = rows_of(many(params, batch, vectors, weights=weights, leave_out=leave_out))
    for k, vector in enumerate(rows_of(vectors)):
        along = gradients @ vector
        want = (weights * along) @ gradients / weights.sum() + 0.1 * vector
        assert oracles.relative_gap(got[k], want) < 1e-12
        kept = np.where((np.arange(ROWS) == leave_out[k]), 0, weights)
        want = (kept * along) @ gradients / kept.sum() + 0.1 * vector
        assert oracles.relative_gap(left[k], want) < 1e-12


def test_a_row_that_is_not_finite_leaves_the_fisher_matrices_of_the_others(x64):
    params, batch, vectors, _ = problem(5)
    batch[1] = np.nan
    root = lambda p, x: jnp.sqrt(jnp.abs(outputs(p, x)))
    batch[3] = np.inf
    kept = np.array([0, 2, 4, 5])
    exact = jax.jit(kernels.fisher_vp_many(root, kernels.gaussian()))
    want = exact(params, batch[kept], vectors, num_rows=ROWS)
    assert oracles.relative_gap(exact(params, batch, vectors, num_rows=ROWS), want) < 1e-12
    loss = lambda p, x: jnp.mean(jnp.sum(root(p, x), -1))
    empirical = jax.jit(kernels.empirical_fisher_vp_many(loss))
    want = empirical(params, batch[kept], vectors, num_rows=ROWS)
    assert oracles.relative_gap(empirical(params, batch, vectors, num_rows=ROWS), want) < 1e-12


@pytest.mark.parametrize(
    ("likelihood", "bound"),
    [
        (kernels.categorical(), 10),
        (kernels.bernoulli(), 9),
        (kernels.gaussian(0.7), 1),
        (kernels.poisson(), 2),
    ],
)
def test_a_likelihood_costs_what_its_docstring_says(likelihood, bound):
    z = jnp.ones((8, 16))
    found = jax.jit(likelihood.fisher).lower(z, z).compile().cost_analysis()
    assert 0 < found.get("flops", 0) + found.get("transcendentals", 0) <= bound * z.size


@pytest.mark.slow
def test_fisher_products_cost_what_their_docstrings_say():
    """Vectors are told from set-up by the flops of two and of four; branches are counted out."""
    rng = np.random.default_rng(9)
    shapes = {"w": (96, 96), "v": (96, 8)}
    params = {name: rng.normal(size=s).astype(np.float32) / 9 for name, s in shapes.items()}
    batch = rng.normal(size=(64, 96)).astype(np.float32)
    loss = lambda p, b: jnp.mean(jnp.sum(outputs(p, b) ** 2, -1))
    gradient = flops(jax.grad(loss), params, batch)
    forward = flops(outputs, params, batch)
    exact = kernels.fisher_vp(outputs, kernels.gaussian())
    usual = lambda function: lambda *args: without_branches(function, *args)
    assert flops(usual(exact), params, batch, params) < 5 / 3 * 1.05 * gradient + forward
    assert flops(kernels.empirical_fisher_vp(loss), params, batch, params) < 4 * 1.05 * forward
    vectors = [jax.tree.map(lambda leaf, k=k: np.stack([leaf] * k), params) for k in (2, 4)]
    many = kernels.fisher_vp_many(outputs, kernels.gaussian(), tangents_at_once=8)
    two, four = (flops(usual(many), params, batch, v) for v in vectors)
    assert (four - two) / 2 < 4 / 3 * 1.05 * gradient
    empirical = kernels.empirical_fisher_vp_many(loss, tangents_at_once=8)
    two, four = (flops(empirical, params, batch, v) for v in vectors)
    assert (four - two) / 2 < 2 * 1.05 * forward
