"""Every rule for factored gradients, alone and combined, against vmap(grad)."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn.kernels.per_example import per_example
from tests.kernels._zoo import NUM_ROWS, ZOO

SEEDS = st.integers(0, 2**31 - 1)
FAST = {
    "a weight per head",
    "convolution, taps",
    "embedding tied to the output",
    "Equinox: mlp",
    "low-rank update",
    "NNX: mlp",
}
every = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)


@functools.lru_cache
def architecture(name):
    """(loss_fn, params, batch, paths), built once."""
    return ZOO[name]()


@functools.lru_cache
def figures_of(name, x64=False):
    """A compiled function to all figures of one architecture, and to the slow gradients."""
    loss_fn = architecture(name)[0]

    def figures(params, batch, others, weights, vector, clip):
        grads = per_example(loss_fn)(params, batch)
        more = per_example(loss_fn)(params, others)
        pairs = zip(grads.factors, more.factors)
        return {
            "norms": grads.norms(),
            "upper": grads.norms() + grads.norm_bounds(),
            "sum": grads.sum(weights),
            "dot": grads.dot(vector),
            "gram": grads.gram(),
            "cross": sum(mine.gram(its) for mine, its in pairs),
            "materialize": grads.materialize(),
            "clip weights": grads.clip_weights(clip),
            "clipped": grads.clipped_sum(clip),
            "paths": grads,
        }

    def slow(params, batch):
        one = lambda row: jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: leaf[None], row))
        return jax.vmap(one)(batch)

    return jax.jit(figures), jax.jit(slow)


def rows_of(tree):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def flat(tree):
    return rows_of(jax.tree.map(lambda leaf: leaf[None], tree))[0]


def drawn(name, seed, dtype):
    """Parameters and rows near the architecture's own, and a direction."""
    _, params, batch, _ = architecture(name)
    rng = np.random.default_rng(seed)

    def near(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.permutation(np.asarray(leaf)))
        return jnp.asarray(np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape), dtype)

    batch = jax.tree.map(near, batch)
    vector = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), params)
    return jax.tree.map(near, params), batch, vector


def assert_near(got, expected, tolerance):
    assert np.shape(got) == np.shape(expected)
    assert np.max(np.abs(np.float64(got) - expected)) <= tolerance * np.max(np.abs(expected))


def check(name, seed, tolerance, dtype=jnp.float32):
    params, batch, vector = drawn(name, seed, dtype)
    figures, slow = figures_of(name, dtype == jnp.float64)
    weights = np.random.default_rng(seed).normal(size=NUM_ROWS)
    others = jax.tree.map(lambda leaf: leaf[2::-1], batch)
    rows = rows_of(slow(params, batch))
    clip = float(np.median(np.linalg.norm(rows, axis=1)))
    found = figures(params, batch, others, jnp.asarray(weights, dtype), vector, clip)
    upper = np.float64(found["upper"])
    np.testing.assert_allclose(found["norms"], np.linalg.norm(rows, axis=1), rtol=tolerance)
    assert_near(flat(found["sum"]), weights @ rows, tolerance)
    assert_near(found["gram"], rows @ rows.T, tolerance)
    assert_near(found["cross"], rows @ rows[2::-1].T, tolerance)
    assert_near(rows_of(found["materialize"]), rows, tolerance)
    # A bound on what is hidden of the rows, which the norms have, may be no part of the weights.
    least, clip_weights = np.minimum(1, clip / upper), np.float64(found["clip weights"])
    most = np.minimum(1, clip / np.linalg.norm(rows, axis=1))
    assert np.all((least * (1 - tolerance) <= clip_weights) & (clip_weights <= most + tolerance))
    assert_near(flat(found["clipped"]), clip_weights @ rows, tolerance)
    scale = np.linalg.norm(rows, axis=1) * np.linalg.norm(flat(vector))
    assert np.all(np.abs(found["dot"] - rows @ flat(vector)) <= tolerance * scale)
    assert {row.path for row in found["paths"].explain().rows} == architecture(name)[3]
    # What a row contributes, in float64: within the clip norm, without any slack.
    for row in range(NUM_ROWS):
        scale = min(1.0, clip * (1 - 2.0**-20) / upper[row])
        alone = jnp.zeros(NUM_ROWS, dtype).at[row].set(scale)
        contribution = figures(params, batch, others, alone, vector, clip)["sum"]
        assert np.linalg.norm(flat(contribution)) <= clip


@every
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_figures_equal_those_of_materialised_gradients(name, seed):
    check(name, seed, 1e-5)


@every
@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_figures_equal_those_of_materialised_gradients_in_float64(name, seed):
    with jax.enable_x64(True):
        check(name, seed, 1e-12, jnp.float64)


@every
@pytest.mark.slow
def test_a_row_that_is_not_finite_changes_no_other_by_a_bit(name):
    """Each row has a factor of its loss beside it, so that rows of ids can be spoilt as well."""
    loss_fn = architecture(name)[0]
    params, rows, _ = drawn(name, 0, jnp.float32)
    weights = jnp.arange(1.0, NUM_ROWS + 1)

    @jax.jit
    def figures(batch, weights):
        grads = per_example(lambda p, b: loss_fn(p, b[0]) * b[1][0])(params, batch)
        clip_weights = grads.clip_weights(0.01)
        return {
            "is_finite": grads.is_finite,
            "rows": (grads.norms(), grads.norm_bounds(), clip_weights, grads.materialize()),
            "sums": (grads.sum(weights), grads.sum(weights * clip_weights)),
        }

    clean = figures((rows, jnp.ones(NUM_ROWS)), weights.at[1].set(0))
    keep = np.arange(NUM_ROWS) != 1
    spoilt = [(rows, jnp.ones(NUM_ROWS).at[1].set(bad)) for bad in (np.nan, np.inf, 3e38)]
    if jnp.issubdtype(rows.dtype, jnp.floating):
        spoilt += [(rows.at[1].set(bad), jnp.ones(NUM_ROWS)) for bad in (np.nan, -np.inf, 3e38)]
    for batch in spoilt:
        dirty = figures(batch, weights)
        bad = not all(np.all(np.isfinite(leaf[1])) for leaf in batch)
        assert not (bad and dirty["is_finite"][1])
        for mine, its in zip(jax.tree.leaves(dirty["rows"]), jax.tree.leaves(clean["rows"])):
            assert np.array_equal(mine[keep], its[keep])
        if dirty["is_finite"][1]:
            continue  # saturated, or large: a row like any other
        assert not np.any(dirty["rows"][0][1])
        assert not np.any(rows_of(dirty["rows"][-1])[1])
        for mine, its in zip(jax.tree.leaves(dirty["sums"]), jax.tree.leaves(clean["sums"])):
            assert np.array_equal(mine, its)


def narrowed(tree):
    """Floating-point leaves in bfloat16."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if floating(x) else x, tree)


@every
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parameters", "compute"])
def test_sums_are_in_float32_where_parameters_or_compute_are_in_bfloat16(name, kind):
    """Against the rows multiplied out in float32, and those against bfloat16's own gradients."""
    loss_fn, paths = architecture(name)[0], architecture(name)[3]
    params, batch, vector = drawn(name, 0, jnp.float32)
    if kind == "parameters":
        params, batch, vector = map(narrowed, (params, batch, vector))
        loss = loss_fn
    else:
        loss = lambda p, x: loss_fn(narrowed(p), narrowed(x)).astype(jnp.float32)
    weights = np.random.default_rng(1).normal(size=NUM_ROWS)

    @jax.jit
    def figures(params, batch):
        grads = per_example(loss)(params, batch)
        return {
            "rows": [factor.materialize() for factor in grads.factors],
            "norms": grads.norms(),
            "upper": grads.norms() + grads.norm_bounds(),
            "sum": grads.sum(jnp.asarray(weights, jnp.float32), dtype=jnp.float32),
            "own": grads.sum(),
            "dot": grads.dot(vector),
            "gram": grads.gram(),
            "paths": grads,
        }

    @jax.jit
    def slow(params, batch):
        one = lambda row: jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[None], row))
        return jax.vmap(one)(batch)

    found, rows = figures(params, batch), rows_of(slow(params, batch))
    wide = rows_of(found["rows"])
    assert_near(wide, rows, 2.0**-5)
    norms = np.linalg.norm(wide, axis=1)
    assert found["norms"].dtype == found["gram"].dtype == jnp.float32
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-5)
    assert np.all(norms <= np.float64(found["upper"]) * (1 + 2.0**-20))
    assert_near(flat(found["sum"]), weights @ wide, 1e-5)
    assert_near(found["gram"], wide @ wide.T, 1e-5)
    scale = norms * np.linalg.norm(flat(vector))
    assert np.all(np.abs(found["dot"] - wide @ flat(vector)) <= 1e-5 * scale)
    assert [x.dtype for x in jax.tree.leaves(found["own"])] == [
        x.dtype for x in jax.tree.leaves(params)
    ]
    assert {row.path for row in found["paths"].explain().rows} <= paths | {"factored", "product"}


@every
@pytest.mark.slow
def test_a_second_call_compiles_nothing(name):
    loss_fn = architecture(name)[0]
    rows = per_example(loss_fn)

    def ask(seed):
        params, batch, vector = drawn(name, seed, jnp.float32)
        grads = rows(params, batch)
        grads.norms(), grads.norm_bounds(), grads.dot(vector), grads.gram(), grads.sum()
        grads.clipped_sum(0.1 + seed), grads.layer_clipped_sum(1.0), grads.automatic_sum(1.0)

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    ask(0)
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            ask(1)
    finally:
        logging.getLogger("jax").removeHandler(handler)
    assert not [message for message in messages if message.startswith("Compiling")]


def test_the_zoo_is_large_and_no_fast_name_is_missing():
    assert len(ZOO) >= 40
    assert set(ZOO) >= FAST
