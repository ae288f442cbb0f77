"""Factored per-example gradients: against vmap(grad), and for what no reference shows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import errors
from jaxunlearn.kernels import factors
from jaxunlearn.kernels.factors import _outer
from jaxunlearn.kernels.per_example import per_example

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=8, deadline=None)
NUM_ROWS = 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def mlp(params, batch):
    x, y = batch
    h = jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"])
    return squared(h @ params["second"]["w"] + params["second"]["b"], y)


def mlp_operands(seed=0):
    first = {"w": normal(seed, 7, 6), "b": normal(seed + 1, 6)}
    second = {"w": normal(seed + 2, 6, 3), "b": normal(seed + 3, 3)}
    batch = (normal(seed + 4, NUM_ROWS, 7), normal(seed + 5, NUM_ROWS, 3))
    return {"first": first, "second": second}, batch


def sequence(params, batch):
    return squared(jnp.tanh(batch @ params["w"] + params["b"]) @ params["v"], 0.3)


def heads(params, batch):
    h = jnp.tanh(jnp.einsum("btd,edh->bthe", batch, params["split"]))
    return squared(jnp.einsum("bthd,hde->bthe", h, params["stacked"]), 0.1)


def grid(params, batch):
    return squared(jnp.tanh(jnp.einsum("bxyd,de->bxye", batch, params)).sum((1, 2)), 0.1)


def convolution(params, batch):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(batch, params, (1, 1), "SAME", dimension_numbers=dims)
    return squared(jnp.tanh(h), 0.2)


def embedding(params, batch):
    return squared(jnp.tanh(params["table"][batch] @ params["w"]), 0.1)


def layer_norm(params, batch):
    h = batch - batch.mean(-1, keepdims=True)
    h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
    return squared(h * params["scale"] + params["bias"], batch**2)


def shared(params, batch):
    return squared(jnp.tanh(jnp.tanh(batch @ params) @ params), 0.1)


def tied(params, batch):
    return squared(jnp.tanh(batch @ params) @ params.T, 0.1)


def scaled(params, batch):
    return squared(batch @ (params * 0.25), 0.1) + squared(jnp.tanh(batch @ (-params / 3)), 0.2)


def nested(params, batch):
    (w, (b,)), gain, unused = params
    return squared(gain * jnp.tanh(batch @ w + b), 0.1) + 0.5 * jnp.sum(unused**2)


def rematerialised(params, batch):
    block = jax.checkpoint(lambda h, w: jnp.tanh(jax.jit(jnp.matmul)(h, w)))
    return squared(block(block(batch, params[0]), params[1]), 0.1)


CASES = {
    "mlp": (mlp, *mlp_operands()),
    "sequence": (
        sequence,
        {"w": normal(0, 12, 20), "b": normal(1, 20), "v": normal(2, 20, 2)},
        normal(3, NUM_ROWS, 3, 12),
    ),
    "heads": (
        heads,
        {"split": normal(0, 20, 16, 2), "stacked": normal(1, 2, 20, 16)},
        normal(3, NUM_ROWS, 3, 16),
    ),
    "two free axes": (grid, normal(0, 20, 30), normal(1, NUM_ROWS, 2, 2, 20)),
    "convolution": (convolution, normal(0, 3, 3, 2, 4), normal(1, NUM_ROWS, 5, 5, 2)),
    "embedding": (
        embedding,
        {"table": normal(0, 11, 4), "w": normal(1, 4, 3)},
        jnp.asarray(np.random.default_rng(2).integers(0, 11, (NUM_ROWS, 6))),
    ),
    "layer norm": (
        layer_norm,
        {"scale": normal(0, 8), "bias": normal(1, 8)},
        normal(2, NUM_ROWS, 3, 8),
    ),
    "weight used twice": (shared, normal(0, 9, 9), normal(1, NUM_ROWS, 9)),
    "tied weight": (tied, normal(0, 9, 4), normal(1, NUM_ROWS, 9)),
    "scaled weight": (scaled, normal(0, 9, 4), normal(1, NUM_ROWS, 9)),
    "scalar": (lambda a, x: squared(a * x, 1.0), jnp.float32(0.7), normal(0, NUM_ROWS)),
    "nested tuples": (
        nested,
        ((normal(0, 4, 3), (normal(1, 3),)), jnp.float32(1.5), normal(2, 6, 7)),
        normal(3, NUM_ROWS, 4),
    ),
    "remat and jit": (rematerialised, (normal(0, 6, 6), normal(1, 6, 6)), normal(2, NUM_ROWS, 6)),
    "batch of one": (mlp, mlp_operands()[0], jax.tree.map(lambda x: x[:1], mlp_operands()[1])),
}
PATHS = {
    "mlp": {"factored", "vector"},
    "sequence": {"factored", "vector", "product"},
    "heads": {"factored"},
    "two free axes": {"factored"},
    "convolution": {"product"},
    "embedding": {"factored", "product"},
    "layer norm": {"vector"},
    "weight used twice": {"factored"},
    "nested tuples": {"factored", "vector", "shared"},
    "remat and jit": {"factored"},
}


def reference(loss_fn, params, batch, keys=None):
    """vmap(grad) with a row seen as a batch of one, flattened to (B, P), as NumPy float64."""

    def one(params, row, *key):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row), *key)

    operands = (params, batch) if keys is None else (params, batch, keys)
    axes = (None, *[0] * (len(operands) - 1))
    return rows_of(jax.jit(jax.vmap(jax.grad(one), axes))(*operands))


def rows_of(tree):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_near(got, want, tolerance=2e-5):
    scale = np.max(np.abs(want)) if np.size(want) else 0.0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale + 1e-30)


@jax.jit
def linear_figures(grads, weights, vector):
    """All that the gradients can be asked but norms, compiled together."""
    sums = grads.sum(), grads.sum(weights)
    return grads.materialize(), *sums, grads.dot(vector), grads.gram()


@pytest.mark.parametrize("name", CASES)
def test_everything_equals_what_vmap_grad_gives(name):
    loss_fn, params, batch = CASES[name]
    rows = reference(loss_fn, params, batch)
    grads = per_example(loss_fn)(params, batch)
    weights = np.linspace(-1, 2, rows.shape[0])
    vector = jax.tree.map(lambda leaf: normal(9, *leaf.shape), params)
    each, total, weighted, dots, gram = linear_figures(grads, jnp.asarray(weights), vector)
    norms, bounds = grads.norms(), grads.norm_bounds()
    clip = float(np.median(norms))
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert_near(rows_of(each), rows)
    assert_near(flat(total), rows.sum(0))
    assert_near(flat(weighted), weights @ rows)
    assert_near(np.asarray(dots), rows @ flat(vector))
    assert_near(np.asarray(gram), rows @ rows.T)
    # Clipping needs the norm of what is summed; norm_bounds also know how that was rounded.
    scales = np.float64(grads.clip_weights(clip))
    assert np.all(scales >= np.minimum(1, clip / np.float64(norms + bounds)) * (1 - 1e-6))
    assert np.all(scales <= np.minimum(1, clip / np.float64(norms)) * (1 + 1e-6))
    assert_near(flat(grads.clipped_sum(clip)), scales @ rows)
    assert int(grads.num_non_finite) == 0
    assert bool(grads.is_finite.all())
    assert jax.tree.structure(total) == jax.tree.structure(params)


@pytest.mark.parametrize("name", PATHS)
def test_explain_announces_the_path_of_every_leaf(name):
    loss_fn, params, batch = CASES[name]
    explanation = per_example(loss_fn)(params, batch).explain()
    assert {row.path for row in explanation.rows} == PATHS[name]
    assert [row.shape for row in explanation.rows] == [x.shape for x in jax.tree.leaves(params)]
    for row in explanation.rows:
        assert row.leaf in str(explanation)


def test_explain_names_the_primitive_that_has_no_rule():
    loss_fn = lambda w, x: squared(jnp.tanh(x @ jnp.sort(w, axis=0)), 0.1)
    (row,) = per_example(loss_fn)(normal(0, 9, 4), normal(1, NUM_ROWS, 9)).explain().rows
    assert row.path == "materialised"
    assert "scatter" in row.reason or "sort" in row.reason or "gather" in row.reason


def test_pack_undoes_unpack():
    steps = (("reshape", (2, 6, 5), (2, 3, 2, 5)), ("transpose", (1, 3, 0, 2), ()))
    x = normal(0, 2, 6, 5)
    moved = factors.unpack(x[None], steps)[0]
    assert moved.shape == (3, 5, 2, 2)
    assert np.array_equal(factors.pack(moved, steps), x)


def test_a_dense_gradient_is_never_materialised():
    params = {"w": jnp.zeros((300, 400))}
    loss_fn = lambda p, x: squared(x @ p["w"], 1.0)
    step = jax.jit(lambda p, x: per_example(loss_fn)(p, x).clipped_sum(1.0))
    memory = step.lower(params, jnp.ones((64, 300))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 300 * 400 * 4 / 10


@few
@given(seed=SEEDS, clip=st.floats(1e-3, 1e3))
def test_float64_norm_of_every_contribution_is_at_most_the_clip_norm(seed, clip):
    params, batch = mlp_operands(seed)
    scales = jnp.asarray([1.0, 1e-6, 1e3, 1e6, 0.0])
    grads = per_example(mlp)(params, (batch[0] * scales[:, None], batch[1]))
    contributions = contributions_of(grads, clip)
    assert np.all(np.linalg.norm(contributions, axis=1) <= clip)


@jax.jit
def each_contribution(grads, clip):
    upper = grads.norms() + grads.norm_bounds()
    scale = jnp.where(upper <= clip, 1, clip * (1 - 2.0**-21) / jnp.where(upper <= clip, 1, upper))
    return jax.lax.map(lambda keep: grads.sum(jnp.where(keep, scale, 0)), jnp.eye(NUM_ROWS) > 0)


def contributions_of(grads, clip):
    """What each row adds to the clipped sum, alone, as NumPy float64."""
    return rows_of(each_contribution(grads, clip))


def test_clipped_sum_is_the_sum_of_its_contributions():
    params, batch = mlp_operands()
    grads = per_example(mlp)(params, batch)
    clip = float(jnp.median(grads.norms()))
    assert_near(flat(grads.clipped_sum(clip)), contributions_of(grads, clip).sum(0), 1e-6)


@few
@given(seed=SEEDS)
def test_a_single_clipped_row_stays_within_the_clip_norm(seed):
    params, batch = mlp_operands(seed)
    grads = per_example(mlp)(params, jax.tree.map(lambda leaf: leaf[:1], batch))
    clip = np.float32(0.37)
    assert np.linalg.norm(flat(grads.clipped_sum(clip))) <= clip


def linear(w, batch):
    """The gradient of w in row i is sum_t x[i, t] g[i, t]^T, exactly."""
    x, g = batch
    return jnp.mean(jnp.sum((x @ w) * g, axis=(1, 2)))


def cancelling(seed, num_tokens=64, left=1.0, right=1.0):
    """64 tokens in pairs that cancel but for one part in 1e4."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(NUM_ROWS, num_tokens // 2, 300))
    g = rng.normal(size=(NUM_ROWS, num_tokens // 2, 400))
    x = np.concatenate([x, x * (1 + 1e-4 * rng.normal(size=x.shape))], 1) * left
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.concatenate([g, -g], 1) * right, jnp.float32)


@few
@given(seed=SEEDS)
def test_norms_survive_tokens_that_nearly_cancel(seed):
    x, g = cancelling(seed)
    grads = per_example(linear)(jnp.zeros((300, 400)), (x, g))
    exact = np.einsum("btm,btn->bmn", np.asarray(x, np.float64), np.asarray(g, np.float64))
    norms = np.linalg.norm(exact.reshape(NUM_ROWS, -1), axis=1)
    assert grads.explain().rows[0].path == "factored"
    np.testing.assert_allclose(grads.norms(), norms, rtol=1e-3)
    assert np.all(norms <= np.asarray(grads.norms(), np.float64) + np.asarray(grads.norm_bounds()))
    clip = float(norms.min() / 2)
    assert np.all(np.linalg.norm(contributions_of(grads, clip), axis=1) <= clip)


@few
@given(seed=SEEDS)
def test_the_gram_trick_is_wrong_where_tokens_cancel_and_its_bound_says_so(seed):
    x, g = cancelling(seed)
    exact = np.einsum("btm,btn->bmn", np.asarray(x, np.float64), np.asarray(g, np.float64))
    norms = np.linalg.norm(exact.reshape(NUM_ROWS, -1), axis=1)
    by_gram, upper = _outer._gram_norms(*_outer._balanced(x[:, None], g[:, None]))
    assert np.any(np.abs(by_gram - norms) > 0.1 * norms)
    assert np.all(np.float64(upper) >= norms)


@few
@given(seed=SEEDS)
def test_norms_of_tokens_that_do_not_cancel_keep_their_accuracy(seed):
    rng = np.random.default_rng(seed)
    x, g = (jnp.asarray(rng.normal(size=(NUM_ROWS, 64, d)), jnp.float32) for d in (300, 400))
    grads = per_example(linear)(jnp.zeros((300, 400)), (x, g))
    exact = np.einsum("btm,btn->bmn", np.asarray(x, np.float64), np.asarray(g, np.float64))
    norms = np.linalg.norm(exact.reshape(NUM_ROWS, -1), axis=1)
    np.testing.assert_allclose(grads.norms(), norms, rtol=1e-5)
    assert np.all(np.asarray(grads.norm_bounds()) <= 1e-2 * norms)


@pytest.mark.parametrize(
    ("left", "right"), [(1e25, 1e-20), (1e-25, 1e20), (1e25, 1e5), (1e18, 1e-37)]
)
@pytest.mark.parametrize("num_tokens", [1, 2, 64])
def test_norms_neither_overflow_nor_underflow(left, right, num_tokens):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(NUM_ROWS, num_tokens, 300)) * left)
    g = np.float32(np.clip(rng.normal(size=(NUM_ROWS, num_tokens, 400)), 1, 2) * right)
    grads = per_example(linear)(jnp.zeros((300, 400)), (jnp.asarray(x), jnp.asarray(g)))
    exact = np.einsum("btm,btn->bmn", np.float64(x), np.float64(g))
    norms = np.linalg.norm(exact.reshape(NUM_ROWS, -1), axis=1)
    np.testing.assert_allclose(np.float64(grads.norms()), norms, rtol=1e-5)
    assert int(grads.num_non_finite) == 0
    assert np.all(np.isfinite(flat(grads.clipped_sum(1.0))))


def test_a_token_with_a_large_left_and_one_with_a_large_right_factor_do_not_hide_each_other():
    x = jnp.stack([jnp.full((1, 300), 1e-25), jnp.full((1, 300), 1e15)], 1)
    g = jnp.stack([jnp.full((1, 400), 1e15), jnp.full((1, 400), 1e-25)], 1)
    grads = per_example(linear)(jnp.zeros((300, 400)), (x, g))
    np.testing.assert_allclose(grads.norms(), 2e-10 * np.sqrt(300 * 400), rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_a_row_that_is_not_finite_contributes_zero_and_changes_no_other_by_a_bit(poison):
    """1e30 is a finite input whose squared loss is not."""
    params, (x, y) = mlp_operands()
    clean = per_example(mlp)(params, (x, y))
    dirty = per_example(mlp)(params, (x.at[2, 3].set(poison), y))
    keep = np.arange(NUM_ROWS) != 2
    assert np.array_equal(dirty.is_finite, keep)
    assert dirty.num_non_finite == 1
    assert dirty.num_non_finite.dtype == jnp.int32
    for f in (lambda g: g.norms(), lambda g: g.losses, lambda g: g.dot(params), lambda g: g.gram()):
        assert np.array_equal(f(dirty)[keep], f(clean)[keep] * (keep if f(clean).ndim == 2 else 1))
        assert not np.any(f(dirty)[2])
    weights = jnp.linspace(1, 2, NUM_ROWS)
    without = clean.sum(weights.at[2].set(0))
    assert np.array_equal(flat(dirty.sum(weights)), flat(without))
    assert np.array_equal(flat(dirty.sum(weights.at[2].set(jnp.nan))), flat(without))
    assert np.all(np.isfinite(flat(dirty.clipped_sum(1.0))))
    assert not np.any(rows_of(dirty.materialize())[2])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_poisoned_input_is_left_out_of_sums_that_read_it_block_by_block(transposed):
    """784 columns are several blocks, and the input is on either side of the product."""
    w = normal(0, 300, 784) if transposed else normal(0, 784, 300)
    x = normal(1, NUM_ROWS, 784) / 30
    loss_fn = lambda w, x: squared(x @ (w.T if transposed else w), 0.1)
    keep = np.arange(NUM_ROWS) != 2
    rows = reference(loss_fn, w, x)[keep]

    @jax.jit
    def figures(w, x):
        grads = per_example(loss_fn)(w, x)
        return grads.sum(), grads.clipped_sum(0.1), grads.norms(), grads.norm_bounds()

    for poison in (np.nan, np.inf):
        total, clipped, norms, bounds = figures(w, x.at[2, 700].set(poison))
        assert_near(flat(total), rows.sum(0))
        upper = np.float64(norms + bounds)[keep]
        assert_near(flat(clipped), np.minimum(1, 0.1 / upper) @ rows)


def test_temporary_memory_is_near_that_of_the_plain_gradient():
    def used(function, *operands):
        return jax.jit(function).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    widths, batch = (784, 256, 256, 10), jnp.ones((256, 784))
    params = [(jnp.ones((m, n)), jnp.ones(n)) for m, n in itertools.pairwise(widths)]

    def loss_fn(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return squared(x @ params[-1][0] + params[-1][1], 1.0)

    clipped = lambda p, x: per_example(loss_fn)(p, x).clipped_sum(1.0)
    assert used(clipped, params, batch) <= 1.5 * used(jax.grad(loss_fn), params, batch)
    regression = lambda w, x: squared(x @ w, 1.0)
    clipped = lambda w, x: per_example(regression)(w, x).clipped_sum(1.0)
    assert used(clipped, jnp.ones((784, 10)), batch) < batch.nbytes / 2  # the input is not copied


def test_a_gradient_that_is_not_finite_is_counted_though_input_and_loss_are():
    grads = per_example(lambda w, x: jnp.mean(jnp.sqrt(x @ w)))(jnp.ones((3, 2)), jnp.eye(4, 3))
    assert np.array_equal(grads.is_finite, [True, True, True, False])
    assert np.all(np.isfinite(flat(grads.sum())))


def test_a_nan_in_the_parameters_makes_every_row_count():
    params, batch = mlp_operands()
    params["first"]["w"] = params["first"]["w"].at[0, 0].set(jnp.nan)
    grads = per_example(mlp)(params, batch)
    assert int(grads.num_non_finite) == NUM_ROWS
    assert not np.any(flat(grads.clipped_sum(1.0)))


def test_rows_with_zero_gradient_are_neither_scaled_nor_nan():
    grads = per_example(linear)(jnp.zeros((3, 2)), (jnp.zeros((4, 1, 3)), jnp.ones((4, 1, 2))))
    assert not np.any(grads.norms())
    assert not np.any(flat(grads.clipped_sum(1e-3)))
    assert int(grads.num_non_finite) == 0


def dropout(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch.shape)
    return squared(jnp.where(keep, 2 * batch, 0) @ params, 0.1)


def test_every_row_sees_its_own_key():
    params, batch = normal(0, 9, 4), normal(1, NUM_ROWS, 9)
    keys = jax.random.split(jax.random.key(0), NUM_ROWS)
    grads = per_example(dropout)(params, batch, keys=keys)
    rows = reference(dropout, params, batch, keys)
    np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    swapped = per_example(dropout)(params, batch[::-1], keys=keys[::-1])
    assert np.array_equal(swapped.norms(), grads.norms()[::-1])


def test_bfloat16_parameters_accumulate_in_float32_and_return_as_bfloat16():
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp_operands())
    grads = per_example(mlp)(params, batch)
    rows = rows_of(grads.materialize())
    assert grads.norms().dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads.sum())} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=4e-3)
    assert_near(flat(grads.sum()), rows.sum(0), 1e-2)


def test_float64_is_kept_where_it_is_enabled():
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mlp_operands())
        grads = per_example(mlp)(params, batch)
        rows = reference(mlp, params, batch)
        np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=1e-14)
        assert_near(flat(grads.sum()), rows.sum(0), 1e-14)
        x, g = (leaf.astype(jnp.float64) for leaf in cancelling(0, num_tokens=16))
        norms = per_example(linear)(jnp.zeros((300, 400)), (x, g)).norms()
        exact = jnp.einsum("btm,btn->bmn", x, g).reshape(NUM_ROWS, -1)
        np.testing.assert_allclose(norms, jnp.linalg.norm(exact, axis=1), rtol=1e-9)


def test_jit_and_eager_agree_and_the_gradients_may_leave_a_jit():
    params, batch = mlp_operands()
    left = jax.jit(per_example(mlp))(params, batch)
    inside = jax.jit(lambda p, b: per_example(mlp)(p, b).clipped_sum(0.5))(params, batch)
    assert_near(flat(left.clipped_sum(0.5)), flat(inside), 1e-6)
    again = jax.tree.unflatten(jax.tree.structure(left), jax.tree.leaves(left))
    assert str(again.explain()) == str(left.explain())
    assert_near(flat(per_example(mlp)(params, batch).sum()), flat(left.sum()), 1e-6)


def test_eager_calls_trace_the_loss_once():
    traces = []

    def loss_fn(params, batch):
        traces.append(None)
        return mlp(params, batch)

    params, batch = mlp_operands()
    for _ in range(3):
        per_example(loss_fn)(params, batch).norms()
    assert len(traces) == 1


def test_no_parameters_have_norm_zero():
    grads = per_example(lambda params, x: jnp.mean(x))({}, jnp.ones(3))
    assert np.array_equal(grads.norms(), np.zeros(3))
    assert grads.clipped_sum(1.0) == {}


def test_a_traced_clip_norm_is_accepted():
    params, batch = mlp_operands()
    grads = per_example(mlp)(params, batch)
    assert_near(
        flat(jax.jit(grads.clipped_sum)(jnp.float32(0.5))), flat(grads.clipped_sum(0.5)), 1e-6
    )


@pytest.mark.parametrize("clip", [-1, -1.0, float("nan")])
def test_a_clip_norm_below_zero_is_refused(clip):
    params, batch = mlp_operands()
    with pytest.raises(ValueError, match=r"Expected l2_clip_norm=.* >= 0"):
        per_example(mlp)(params, batch).clipped_sum(clip)


def test_an_integer_parameter_is_refused_by_name():
    with pytest.raises(TypeError, match=r"int32 at params\['step'\]"):
        per_example(mlp)({"step": jnp.int32(3)}, jnp.ones(3))


@pytest.mark.parametrize(
    ("loss_fn", "keyed", "message"),
    [
        (lambda params: 0.0, False, "calling it so fails"),
        (dropout, False, "Pass keys="),
        (mlp, True, "Leave keys= out"),
        (lambda params, batch: batch @ params, False, "got \\(1, 2\\)"),
        (lambda params, batch: (jnp.mean(batch @ params), 0), False, "return a scalar"),
        (lambda params, batch: jnp.int32(1), False, "floating-point loss"),
    ],
)
def test_a_loss_of_the_wrong_form_is_refused(loss_fn, keyed, message):
    keys = jax.random.split(jax.random.key(0), 4) if keyed else None
    with pytest.raises(errors.LossSignatureError, match=message):
        per_example(loss_fn)(jnp.ones((3, 2)), jnp.ones((4, 3)), keys=keys)


def test_shapes_that_would_broadcast_are_refused():
    params, batch = mlp_operands()
    grads = per_example(mlp)(params, batch)
    with pytest.raises(ValueError, match="Expected weights of shape"):
        grads.sum(jnp.ones((1,)))
    with pytest.raises(ValueError, match="Expected a vector with the structure"):
        grads.dot({"first": params["first"]})
    with pytest.raises(ValueError, match="Expected typed keys"):
        per_example(dropout)(normal(0, 9, 4), normal(1, 5, 9), keys=jnp.zeros((5, 2), jnp.uint32))
    with pytest.raises(ValueError, match="leading axis"):
        per_example(mlp)(params, (batch[0], batch[1][:2]))


def test_an_nnx_model_takes_the_factored_path():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(12, 20, rngs=rngs), nnx.relu, nnx.Linear(20, 3, rngs=rngs))
    graph, params = nnx.split(model, nnx.Param)
    loss_fn = lambda p, batch: squared(nnx.merge(graph, p)(batch[0]), batch[1])
    batch = (normal(0, NUM_ROWS, 12), normal(1, NUM_ROWS, 3))
    grads = per_example(loss_fn)(params, batch)
    assert {row.path for row in grads.explain().rows} == {"factored", "vector"}
    rows = reference(loss_fn, params, batch)
    np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert_near(flat(grads.sum()), rows.sum(0))


def test_a_linen_model_with_tokens_takes_the_factored_path():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Dense(20), nn.LayerNorm(), nn.relu, nn.Dense(16)])
    batch = normal(0, NUM_ROWS, 3, 12)
    params = jax.jit(model.init)(jax.random.key(0), batch)
    loss_fn = lambda p, x: squared(model.apply(p, x), 0.1)
    grads = per_example(loss_fn)(params, batch)
    assert {row.path for row in grads.explain().rows} == {"factored", "vector"}
    rows = reference(loss_fn, params, batch)
    np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert_near(flat(grads.sum()), rows.sum(0))
