"""What can be asked of per-example gradients, against NumPy float64 on vmap(grad)."""

import collections
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import kernels
from jaxunlearn.kernels import _operations, projection

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=8, deadline=None)
NUM_ROWS = 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss_fn(params, batch):
    """Two tokens a row: an embedding, a dense layer with bias, a head of one token."""
    tokens, target = batch
    h = jnp.tanh(params["table"][tokens] @ params["dense"]["w"] + params["dense"]["b"])
    return jnp.mean((h.sum(1) @ params["head"] - target) ** 2)


def operands(seed=0, num_rows=NUM_ROWS, num_tokens=2):
    rng = np.random.default_rng(seed)
    params = {
        "table": normal(seed, 9, 12),
        "dense": {"w": normal(seed + 1, 12, 20), "b": normal(seed + 2, 20)},
        "head": normal(seed + 3, 20, 3),
    }
    tokens = jnp.asarray(rng.integers(0, 9, (num_rows, num_tokens)))
    return params, (tokens, normal(seed + 4, num_rows, 3))


def linear(params, batch):
    """The gradient of row i is sum_t x_it g_it^T."""
    x, g = batch
    return jnp.mean(jnp.sum((x @ params) * g, axis=(1, 2)))


def reference(loss_fn, params, batch):
    """vmap(grad) with a row seen as a batch of one: every leaf (B, *shape) in NumPy float64."""

    def one(params, row):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))

    rows = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(params, batch)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), rows)


def matrix(tree):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    size = lambda leaf: int(np.prod(leaf.shape[1:]))
    return np.concatenate([leaf.reshape(leaf.shape[0], size(leaf)) for leaf in leaves], axis=1)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_near(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        got, want, rtol=0, atol=tolerance * np.max(np.abs(want), initial=0) + 1e-30
    )


@pytest.fixture(scope="module")
def case():
    """(gradients, the same in float64 by leaf, the same as a matrix)."""
    params, batch = operands()
    leaves = reference(loss_fn, params, batch)
    return kernels.per_example(loss_fn)(params, batch), leaves, matrix(leaves)


# --- norms by leaf and by layer -------------------------------------------------------------------


def test_leaf_norms_are_shaped_like_the_parameters(case):
    grads, leaves, _ = case
    norms = grads.leaf_norms()
    want = jax.tree.map(lambda leaf: np.linalg.norm(leaf.reshape(NUM_ROWS, -1), axis=1), leaves)
    assert jax.tree.structure(norms) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), norms, want)


def test_a_weight_and_its_bias_are_one_layer(case):
    grads, leaves, _ = case
    norms = grads.layer_norms()
    assert set(norms) == {"params", "params['dense']"}
    want = np.linalg.norm(matrix(leaves["dense"]), axis=1)
    np.testing.assert_allclose(norms["params['dense']"], want, rtol=1e-5)
    want = np.linalg.norm(matrix([leaves["head"], leaves["table"]]), axis=1)
    np.testing.assert_allclose(norms["params"], want, rtol=1e-5)


def test_layers_can_be_named_by_a_function_of_the_leaf(case):
    grads, leaves, _ = case
    norms = grads.layer_norms(layer_of=lambda leaf: "in" if "table" in leaf else "rest")
    assert list(norms) == ["rest", "in"]
    np.testing.assert_allclose(
        norms["in"], np.linalg.norm(matrix(leaves["table"]), axis=1), rtol=1e-5
    )


def test_an_nnx_layer_is_named_without_the_box_around_its_arrays():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    forward = lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)
    norms = kernels.per_example(forward)(params, normal(0, 4, 3)).layer_norms()
    assert list(norms) == ["params['layers'][0]", "params['layers'][1]"]


# --- sums -----------------------------------------------------------------------------------------


def scaled_rows(rows, scales):
    return np.asarray(scales, np.float64) @ rows


def test_clip_weights_are_those_of_the_clipped_sum(case):
    grads, _, rows = case
    clip = float(np.median(np.linalg.norm(rows, axis=1)))
    weights = grads.clip_weights(clip)
    assert_near(weights, np.minimum(1, clip / np.linalg.norm(rows, axis=1)))
    assert np.array_equal(flat(grads.sum(weights)), flat(grads.clipped_sum(clip)))


def test_an_infinite_clip_norm_clips_nothing(case):
    grads, _, rows = case
    assert_near(flat(grads.clipped_sum(np.inf)), rows.sum(0))


@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0])
def test_automatic_clipping_divides_by_norm_plus_gamma(case, gamma):
    grads, _, rows = case
    norms = np.linalg.norm(rows, axis=1)
    assert_near(
        flat(grads.automatic_sum(0.5, gamma=gamma)), scaled_rows(rows, 0.5 / (norms + gamma))
    )


def test_an_automatic_sum_is_the_sum_by_its_scales_bit_for_bit(case):
    """And the scales are those of the slow form at the norms with their bounds, rounded down."""
    grads, _, rows = case
    clip, gamma = np.float32(0.5), np.float32(0.25)
    (upper,), (limits,) = _operations.bounds(grads, _operations.one_group(grads))
    scales = _operations.automatic_scales(upper, clip, gamma, limits=limits)
    assert np.array_equal(flat(grads.sum(scales)), flat(grads.automatic_sum(clip, gamma=gamma)))
    upper, norms = np.float64(upper), np.linalg.norm(rows, axis=1)
    assert np.all(np.float64(scales) <= clip / (upper + gamma))
    assert np.all(np.float64(scales) >= (1 - 2.0**-20) * clip / (upper + gamma))
    assert np.all(norms <= upper * (1 + 1e-6))


def test_a_normalised_sum_adds_unit_vectors_and_leaves_zeros_zero(case):
    grads, _, rows = case
    assert_near(flat(grads.normalized_sum()), scaled_rows(rows, 1 / np.linalg.norm(rows, axis=1)))
    x, g = jnp.zeros((2, 1, 3)).at[0, 0, 1].set(2e-30), jnp.ones((2, 1, 2))
    tiny = kernels.per_example(linear)(jnp.zeros((3, 2)), (x, g)).normalized_sum()
    np.testing.assert_allclose(tiny, np.array([[0, 0], [1, 1], [0, 0]]) / np.sqrt(2), rtol=1e-5)


def layer_scales(leaves, layers, clips):
    """The clipped sum leaf by leaf: {layer: its leaves' names}, {layer: its clip norm}."""
    found = {}
    for layer, names in layers.items():
        norms = np.linalg.norm(matrix([leaves[name] for name in names]), axis=1)
        for name in names:
            scales = np.minimum(1, clips[layer] / norms)
            found[name] = jax.tree.map(lambda x, s=scales: np.tensordot(s, x, 1), leaves[name])
    return found


def test_layers_are_clipped_each_on_its_own(case):
    grads, leaves, rows = case
    clip = float(np.median(np.linalg.norm(rows, axis=1)))
    layers = {"params": ["head", "table"], "params['dense']": ["dense"]}
    even = layer_scales(leaves, layers, dict.fromkeys(layers, clip / np.sqrt(2)))
    assert_near(flat(grads.layer_clipped_sum(clip)), flat(even))
    traced = jax.jit(grads.layer_clipped_sum)(jnp.float32(clip))
    assert_near(flat(traced), flat(even))
    own = {"params": clip, "params['dense']": clip / 10}
    assert_near(flat(grads.layer_clipped_sum(own)), flat(layer_scales(leaves, layers, own)))


def test_a_pytree_of_clip_norms_has_a_layer_for_each_of_its_leaves(case):
    grads, leaves, _ = case
    clips = {"table": 0.1, "dense": 0.2, "head": 0.3}
    want = layer_scales(leaves, {name: [name] for name in clips}, clips)
    assert_near(flat(grads.layer_clipped_sum(clips)), flat(want))
    with pytest.raises(ValueError, match="one number, a dict"):
        grads.layer_clipped_sum({"table": 0.1})
    with pytest.raises(ValueError, match=r"Expected l2_clip_norm=-0\.3 >= 0"):
        grads.layer_clipped_sum(clips | {"head": -0.3})


NUMBERS = [float, np.float32, np.float64, np.asarray, jnp.float32]


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_out_of_range_is_refused_whatever_its_type(case, kind):
    grads, _, _ = case
    for bad in (-1.2, np.nan):
        bad = kind(bad)
        calls = [
            lambda bad=bad: grads.clipped_sum(bad),
            lambda bad=bad: grads.clip_weights(bad),
            lambda bad=bad: grads.layer_clipped_sum(bad),
            lambda bad=bad: grads.automatic_sum(bad),
            lambda bad=bad: grads.automatic_sum(1.0, gamma=bad),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"(l2_clip_norm|gamma)=.* >= 0"):
                call()
    with pytest.raises(ValueError, match="one number"):
        grads.clipped_sum(kind(1.0) * np.ones(2, np.float32))


def test_a_traced_number_out_of_range_never_exceeds_the_bound(case):
    grads, _, _ = case

    @jax.jit
    def sums(clip, gamma):
        return grads.clipped_sum(clip), grads.automatic_sum(1.0, gamma=gamma)

    clipped, automatic = sums(-1.0, -1.2)
    assert not flat(clipped).any()
    assert_near(flat(automatic), flat(grads.normalized_sum()))
    for total in sums(jnp.nan, jnp.nan):
        assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(total))
    assert not flat(grads.clipped_sum(0.0)).any()


@given(value=st.floats(1e-30, 1e30))
@settings(max_examples=50, deadline=None)
def test_a_clip_norm_is_rounded_towards_zero(value):
    rounded = _operations.lowered("l2_clip_norm", value, np.float32)
    assert float(rounded) <= value < float(np.nextafter(rounded, np.float32(np.inf)))


def test_a_scale_that_is_no_normal_number_is_zero():
    upper = jnp.asarray([1.0, 1e3, 0.0], jnp.float32)
    tiny = float(np.finfo(np.float32).tiny)
    scales = _operations.clip_scales(upper, np.float32(8 * tiny))
    assert scales[0] >= tiny
    assert scales[1] == 0
    assert scales[2] == 1
    assert _operations.automatic_scales(upper, np.float32(8 * tiny), np.float32(0))[1] == 0
    assert _operations.clip_scales(upper, np.float32(1), divisor=1e36)[1] == 0
    assert np.isnan(_operations.clip_scales(upper, np.float32(np.nan))).all()


def test_no_rows_have_a_gram_matrix_and_no_units_a_sum(case):
    grads, _, _ = case
    params, batch = operands()
    none = kernels.per_example(loss_fn)(params, jax.tree.map(lambda leaf: leaf[:0], batch))
    assert none.gram(grads).shape == (0, NUM_ROWS)
    assert grads.gram(none).shape == (NUM_ROWS, 0)
    empty = grads.by_unit(jnp.full((NUM_ROWS,), -1), num_units=0)
    assert empty.norms().shape == (0,)
    assert not flat(empty.clipped_sum(1.0)).any()


@pytest.mark.slow
def test_sums_come_in_the_dtype_that_is_asked_for():
    params, batch = operands()
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    grads = kernels.per_example(loss_fn)(narrow, batch)
    wide = grads.clipped_sum(1.0, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads.sum())} == {jnp.dtype(jnp.bfloat16)}
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    assert np.array_equal(flat(cast), flat(grads.clipped_sum(1.0)))


def contributions(grads, total):
    """Each row's part of `total(grads)`, alone: (B, P) in float64."""
    alone = []
    for i in range(grads.losses.shape[0]):
        padding = jnp.arange(grads.losses.shape[0]) != i
        alone.append(flat(total(grads, padding)))
    return np.stack(alone)


SCALES = [1e-25, 1e-3, 1.0, 1e3, 1e12]


@few
@given(seed=SEEDS, clip=st.floats(1e-3, 1e3))
def test_no_contribution_exceeds_its_bound_in_float64(seed, clip):
    """Rows of all magnitudes, rows whose norm is the clip norm, and tokens that nearly cancel."""
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(6, 4, 24)), rng.normal(size=(6, 4, 24))
    x *= np.array([*SCALES, 1.0])[:, None, None]
    x[5, 2:], g[5, 2:] = x[5, :2] * (1 + 1e-6 * rng.normal(size=(2, 24))), -g[5, :2]
    x[2] *= clip / np.linalg.norm(x[2].T @ g[2])
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
    rows = _bounded_rows(batch, clip)
    bounds = {"clipped": clip, "automatic": clip, "normalized": 1.0, "layer": clip}
    for name, bound in bounds.items():
        assert np.all(np.linalg.norm(matrix(rows[name]), axis=1) <= bound), name
    assert np.linalg.norm(matrix(rows["clipped"])[4]) >= clip * (1 - 1e-4)


@jax.jit
def _bounded_rows(batch, clip):
    """The contribution of every row to each kind of sum."""

    def alone(i):
        padding = jnp.arange(6) != i
        grads = kernels.per_example(linear)(jnp.zeros((24, 24)), batch, is_padding_example=padding)
        return {
            "clipped": grads.clipped_sum(clip),
            "automatic": grads.automatic_sum(clip, gamma=0.0),
            "normalized": grads.normalized_sum(),
            "layer": grads.layer_clipped_sum(clip),
        }

    parts = [alone(i) for i in range(6)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


# --- Gram and projections ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [2, 5])
def test_gram_between_two_batches_is_that_of_the_rows(case, num_tokens):
    grads, _, rows = case
    params, batch = operands(7, 4, num_tokens)
    params = operands()[0]
    other = kernels.per_example(loss_fn)(params, batch)
    others = matrix(reference(loss_fn, params, batch))
    assert_near(grads.gram(other), rows @ others.T)
    assert_near(other.gram(grads), others @ rows.T)
    assert_near(grads.gram(), rows @ rows.T)


def test_gram_of_an_output_is_the_tangent_kernel():
    params, x = normal(0, 5, 3), normal(1, NUM_ROWS, 5)
    output = lambda params, x: jnp.mean(jnp.tanh(x @ params)[:, 0])
    kernel = kernels.per_example(output)(params, x).gram()
    jacobian = jax.jacobian(lambda p: jnp.tanh(x @ p)[:, 0])(params).reshape(NUM_ROWS, -1)
    assert_near(kernel, np.float64(jacobian) @ np.float64(jacobian).T)


def test_gram_and_dot_refuse_other_parameters(case):
    grads, _, _ = case
    other = kernels.per_example(linear)(
        jnp.zeros((3, 2)), (jnp.ones((4, 1, 3)), jnp.ones((4, 1, 2)))
    )
    with pytest.raises(ValueError, match="gradients of the same parameters"):
        grads.gram(other)


@pytest.mark.parametrize(
    "distribution", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)]
)
def test_a_projection_is_the_product_with_directions_that_the_key_alone_decides(distribution):
    """Unit gradients read the directions; other batches, paths and chunks see the same."""
    key, k = jax.random.key(3), 40
    size = 9 * 12
    unit = lambda table, x: jnp.mean(jnp.sum(table * x, axis=(1, 2)))
    units = jnp.eye(size).reshape(size, 9, 12)
    alone = kernels.per_example(unit)(jnp.zeros((9, 12)), units)
    directions = np.float64(alone.project(key, k, distribution=distribution))
    if distribution == "rademacher":
        np.testing.assert_allclose(np.abs(directions), 1 / np.sqrt(k), rtol=1e-6)
    for num_tokens in (1, 2, 30):  # factored, by token Grams, and as the product
        batch = (normal(1, 4, num_tokens, 9), normal(2, 4, num_tokens, 12))
        rows = matrix(reference(linear, jnp.zeros((9, 12)), batch))
        grads = kernels.per_example(linear)(jnp.zeros((9, 12)), batch)
        assert_near(grads.project(key, k, distribution=distribution), rows @ directions)
    few_rows = grads.project(key, k, distribution=distribution)
    assert_near(few_rows, rows @ directions)


def test_directions_of_rank_one_are_the_same_by_every_path_and_keep_inner_products():
    key, k = jax.random.key(3), 4096
    u, v = projection.halves(jax.random.fold_in(key, 0), 0, k, (9, 12), "rademacher")
    directions = (np.float64(u)[:, :, None] * np.float64(v)[:, None]).reshape(k, -1) / np.sqrt(k)
    outwards = lambda params, batch: linear(params.T, batch[::-1])
    for num_tokens, loss in ((1, linear), (2, linear), (30, linear), (1, outwards)):
        batch = (normal(1, 4, num_tokens, 9), normal(2, 4, num_tokens, 12))
        rows = matrix(reference(loss, jnp.zeros((9, 12)), batch))
        grads = kernels.per_example(loss)(jnp.zeros((9, 12)), batch)
        sketch = np.float64(grads.project(key, k, structure="kronecker"))
        assert_near(sketch, rows @ directions.T)
        norms = np.linalg.norm(rows, axis=1)
        gap = (sketch @ sketch.T - rows @ rows.T) / np.outer(norms, norms)
        assert np.max(np.abs(gap)) < 5 * np.sqrt(8 / k)


def test_directions_of_rank_one_are_cheap():
    params, x = jnp.zeros((128, 128)), normal(0, 8, 128)
    grads = kernels.per_example(lambda w, x: jnp.mean((x @ w - 1) ** 2))(params, x)
    cheap = flops(lambda g: g.project(jax.random.key(0), 64, structure="kronecker"), grads)
    assert cheap < flops(lambda g: g.project(jax.random.key(0), 64), grads) / 8


@pytest.mark.slow
def test_a_projection_in_chunks_is_the_projection(case, monkeypatch):
    grads, _, _ = case
    key = jax.random.key(0)
    whole = grads.project(key, 33)
    for floats in (1, 700):
        monkeypatch.setattr("jaxunlearn.kernels.projection._CHUNK_FLOATS", floats)
        jax.clear_caches()
        assert_near(grads.project(key, 33), whole)


@pytest.mark.slow
def test_a_projection_keeps_inner_products_and_half_the_directions_do_not():
    """With k = 4096 all 21 inner products are within five standard deviations of sqrt(2 / k)."""
    params, batch = operands()
    grads = kernels.per_example(loss_fn)(params, batch)
    norms = np.float64(grads.norms())
    want = np.float64(grads.gram()) / np.outer(norms, norms)
    for distribution in ("rademacher", "gaussian"):
        sketch = np.float64(grads.project(jax.random.key(1), 4096, distribution=distribution))
        got = sketch @ sketch.T / np.outer(norms, norms)
        assert np.max(np.abs(got - want)) < 5 * np.sqrt(2 / 4096)
        assert np.max(np.abs(got * 2 - want)) > 5 * np.sqrt(2 / 4096)


def test_a_projection_never_holds_the_directions():
    params = {"w": jnp.zeros((512, 512))}
    forward = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    step = jax.jit(lambda p, x: kernels.per_example(forward)(p, x).project(jax.random.key(0), 512))
    memory = step.lower(params, jnp.ones((4, 512))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 512 * 512 * 4 / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jax.random.PRNGKey(0), 3), "one typed key"),
        ((jax.random.split(jax.random.key(0)), 3), "one typed key"),
        ((jax.random.key(0), 0), "num_directions=0 >= 1"),
        ((jax.random.key(0), 2.0), "integer num_directions"),
    ],
)
def test_a_projection_without_key_or_directions_is_refused(case, arguments, message):
    with pytest.raises(ValueError, match=message):
        case[0].project(*arguments)
    with pytest.raises(ValueError, match="Expected distribution in"):
        case[0].project(jax.random.key(0), 2, distribution="cauchy")
    with pytest.raises(ValueError, match="Expected structure in"):
        case[0].project(jax.random.key(0), 2, structure="diagonal")


# --- padding --------------------------------------------------------------------------------------

FIGURES = {
    "norms": lambda grads: grads.norms(),
    "losses": lambda grads: grads.losses,
    "clipped sum": lambda grads: flat(grads.clipped_sum(0.5)),
    "gram": lambda grads: grads.gram(),
    "projection": lambda grads: grads.project(jax.random.key(0), 3),
    "dot": lambda grads: grads.dot(operands()[0]),
}


@pytest.mark.slow
def test_padding_rows_are_as_if_they_were_not_there():
    """Whatever they hold, a target that is not finite too."""
    params, (tokens, targets) = operands()
    padding = jnp.array([False, True, False, False, True, False])
    rows = np.flatnonzero(~padding)
    targets = targets.at[1].set(jnp.nan)
    padded = kernels.per_example(loss_fn)(params, (tokens, targets), is_padding_example=padding)
    plain = kernels.per_example(loss_fn)(params, (tokens[rows], targets[rows]))
    assert int(padded.num_non_finite) == 0
    for name, figure in FIGURES.items():
        got, want = np.asarray(figure(padded)), np.asarray(figure(plain))
        if got.shape[:1] == (NUM_ROWS,):
            assert not np.any(got[np.asarray(padding)]), name
            got = got[rows][:, rows] if name == "gram" else got[rows]
        assert_near(got, want, 1e-6)
    ids = jnp.where(padding, -1, jnp.arange(NUM_ROWS))
    by_id = kernels.per_example(loss_fn)(params, (tokens, targets), ids=ids)
    assert np.array_equal(by_id.norms(), padded.norms())


def test_a_row_of_zeros_for_padding_is_harmless_to_a_loss_that_divides_by_it():
    normalised = lambda w, x: jnp.mean((x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ w)
    x = normal(0, 3, 4).at[1].set(0)
    padding = jnp.array([False, True, False])
    grads = kernels.per_example(normalised)(jnp.ones(4), x, is_padding_example=padding)
    assert bool(grads.is_finite.all())
    assert np.array_equal(grads.sum(), grads.materialize()[0] + grads.materialize()[2])
    np.testing.assert_allclose(grads.norms(), [1, 0, 1], rtol=1e-6)


def test_a_row_that_is_padding_and_one_that_is_not_finite_are_told_apart():
    params, (tokens, targets) = operands()
    targets = targets.at[1].set(jnp.nan).at[2].set(jnp.inf)
    padding = jnp.arange(NUM_ROWS) == 1
    grads = kernels.per_example(loss_fn)(params, (tokens, targets), is_padding_example=padding)
    assert np.array_equal(grads.is_finite, np.arange(NUM_ROWS) != 2)
    assert np.array_equal(grads.contributes, np.isin(np.arange(NUM_ROWS), [1, 2], invert=True))
    assert int(grads.num_non_finite) == 1
    rows = matrix(reference(loss_fn, params, (tokens[3:], targets[3:])))
    first = matrix(reference(loss_fn, params, (tokens[:1], targets[:1])))
    assert_near(flat(grads.sum()), rows.sum(0) + first[0])
    undeclared = kernels.per_example(loss_fn)(params, (tokens, targets))
    assert_near(flat(undeclared.sum()), rows.sum(0) + first[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_padding_example": jnp.zeros(NUM_ROWS)}, "boolean"),
        ({"is_padding_example": jnp.zeros(3, bool)}, "of shape"),
        ({"ids": jnp.zeros((NUM_ROWS, 1), jnp.int32)}, "of shape"),
    ],
)
def test_padding_of_another_shape_or_type_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.per_example(loss_fn)(*operands(), **arguments)


@pytest.mark.parametrize("num_rows", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_row_and_one_row_are_batches_too(num_rows):
    params, batch = operands(num_rows=num_rows)
    rows = matrix(reference(loss_fn, params, batch))
    grads = kernels.per_example(loss_fn)(params, batch)
    np.testing.assert_allclose(grads.norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert_near(flat(grads.sum()), rows.sum(0))
    assert_near(grads.gram(), rows @ rows.T)
    assert grads.project(jax.random.key(0), 3).shape == (num_rows, 3)
    units = jnp.zeros(num_rows, jnp.int32)
    assert grads.by_unit(units, num_units=2).norms().shape == (2,)


# --- aux -----------------------------------------------------------------------------------------


def test_aux_comes_back_row_by_row():
    def with_aux(params, batch):
        loss = loss_fn(params, batch)
        return loss, {"twice": 2 * loss, "token": batch[0]}

    params, (tokens, targets) = operands()
    targets = targets.at[2].set(jnp.nan)
    grads = kernels.per_example(with_aux, has_aux=True)(params, (tokens, targets))
    np.testing.assert_allclose(grads.aux["twice"], 2 * grads.losses)
    keep = np.arange(NUM_ROWS) != 2
    assert np.array_equal(grads.aux["token"][:, 0], tokens * keep[:, None])
    plain = kernels.per_example(loss_fn)(params, (tokens, targets))
    assert_near(flat(grads.sum()), flat(plain.sum()), 1e-6)


# --- units ---------------------------------------------------------------------------------------

UNITS = np.array([2, 0, -1, 2, 2, 0])
NUM_UNITS = 4


def unit_rows(rows, units=UNITS):
    return np.stack([rows[units == unit].sum(0) for unit in range(NUM_UNITS)])


def test_units_are_the_sums_of_their_rows_whatever_is_asked(case):
    grads, _, rows = case
    units, want = grads.by_unit(jnp.asarray(UNITS), num_units=NUM_UNITS), unit_rows(rows)
    norms = np.linalg.norm(want, axis=1)
    clip = float(np.median(norms[norms > 0]))
    np.testing.assert_allclose(units.norms(), norms, rtol=1e-5)
    scales = np.where(norms > 0, np.minimum(1, clip / np.where(norms > 0, norms, 1)), 0)
    assert_near(flat(units.clipped_sum(clip)), scales @ want)
    assert_near(units.gram(), want @ want.T)
    assert_near(matrix(units.materialize()), want)
    assert_near(units.losses, unit_rows(np.float64(grads.losses)))
    assert units.losses.shape == units.is_finite.shape == (NUM_UNITS,)
    assert not np.any(matrix(units.materialize())[[1, 3]])


@pytest.mark.slow
def test_units_of_every_kind_of_leaf_are_the_sums_of_their_rows():
    """Convolutions, a tied table, a leaf that no row touches, an elementwise matrix."""

    def zoo(params, batch):
        image, tokens = batch
        dims = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            image, params["conv"], (1, 1), "SAME", dimension_numbers=dims
        )
        e = params["table"][tokens] + params["place"][:2] * params["gate"]
        logits = jnp.tanh(e) @ params["table"].T
        return jnp.mean(jnp.tanh(h)) + jnp.mean(logits**2) + 0.1 * jnp.sum(params["idle"] ** 2)

    params = {
        "conv": normal(0, 3, 3, 2, 4),
        "table": normal(1, 9, 5),
        "place": normal(2, 6, 5),
        "gate": normal(3, 2, 5),
        "idle": normal(4, 3),
    }
    batch = normal(5, NUM_ROWS, 5, 5, 2), operands()[1][0]
    rows = matrix(reference(zoo, params, batch))
    grads = kernels.per_example(zoo)(params, batch)

    @jax.jit
    def figures(grads):
        units = grads.by_unit(jnp.asarray(UNITS), num_units=NUM_UNITS, max_rows_per_unit=3)
        return units.norms(), units.norm_bounds(), units.sum(jnp.arange(1.0, 5.0)), units.gram()

    norms, bounds, weighted, gram = figures(grads)
    want = unit_rows(rows)
    np.testing.assert_allclose(norms, np.linalg.norm(want, axis=1), rtol=1e-5)
    assert np.all(bounds < 1e-3 * (norms + 1))
    assert_near(flat(weighted), np.arange(1, 5) @ want)
    assert_near(gram, want @ want.T)
    assert_near(grads.project(jax.random.key(0), 4)[0], _dotted(rows[0], params, 4))


def _dotted(row, params, k):
    """A row's products with the directions, drawn leaf by leaf."""
    draw = projection.directions
    parts = [
        draw(jax.random.fold_in(jax.random.key(0), leaf), 0, k, x.shape, "rademacher")
        for leaf, x in enumerate(jax.tree.leaves(params))
    ]
    return matrix(parts) @ row / np.sqrt(k)


def test_traced_units_are_those_that_are_not(case):
    grads, _, rows = case
    norms = jax.jit(
        lambda grads, units: grads.by_unit(units, num_units=NUM_UNITS, max_rows_per_unit=3).norms()
    )
    traced = norms(grads, jnp.asarray(UNITS))
    np.testing.assert_allclose(traced, np.linalg.norm(unit_rows(rows), axis=1), rtol=1e-5)
    crowded = jnp.asarray([0, 0, 0, 0, 1, 1])
    norms = np.linalg.norm(unit_rows(rows, np.asarray(crowded)), axis=1)
    with pytest.raises(ValueError, match="at most max_rows_per_unit=3 rows, got 4"):
        grads.by_unit(crowded, num_units=NUM_UNITS, max_rows_per_unit=3)
    found = jax.jit(
        lambda grads, units: grads.by_unit(units, num_units=NUM_UNITS, max_rows_per_unit=3)
    )(grads, crowded)
    assert np.array_equal(found.is_finite, [False, True, True, True])
    assert int(found.num_non_finite) == 1
    np.testing.assert_allclose(found.norms()[1:], norms[1:], rtol=1e-5)
    assert not np.any(found.norms()[0])


def test_rows_that_do_not_count_add_nothing_to_their_unit():
    params, (tokens, targets) = operands()
    targets = targets.at[3].set(jnp.nan)
    padding = jnp.arange(NUM_ROWS) == 4
    grads = kernels.per_example(loss_fn)(params, (tokens, targets), is_padding_example=padding)
    units = grads.by_unit(jnp.asarray(UNITS), num_units=NUM_UNITS)
    left = np.where(np.isin(np.arange(NUM_ROWS), [3, 4]), -1, UNITS)
    safe = matrix(reference(loss_fn, params, (tokens, jnp.nan_to_num(targets))))
    np.testing.assert_allclose(
        units.norms(), np.linalg.norm(unit_rows(safe, left), axis=1), rtol=1e-5
    )
    assert int(units.num_non_finite) == 0


@few
@given(seed=SEEDS)
def test_a_unit_whose_rows_nearly_cancel_stays_within_the_clip_norm(seed):
    """The norm of the sum is a ten-thousandth of the rows' norms; one unit for each path."""
    rng = np.random.default_rng(seed)
    for num_tokens, m, n in ((1, 40, 50), (8, 6, 6)):
        x, g = rng.normal(size=(4, num_tokens, m)), rng.normal(size=(4, num_tokens, n))
        x = np.concatenate([x, x * (1 + 1e-4 * rng.normal(size=x.shape))])
        batch = jnp.asarray(x, jnp.float32), jnp.asarray(np.concatenate([g, -g]), jnp.float32)
        exact = np.einsum("btm,btn->bmn", *(np.asarray(part, np.float64) for part in batch))
        exact = (exact[:4] + exact[4:]).reshape(4, -1)
        norms = np.linalg.norm(exact, axis=1)
        grads = kernels.per_example(linear)(jnp.zeros((m, n)), batch)
        units = grads.by_unit(jnp.tile(jnp.arange(4), 2), num_units=4)
        upper = np.float64(units.norms()) + np.float64(units.norm_bounds())
        assert np.all(norms <= upper)
        np.testing.assert_allclose(units.norms(), norms, rtol=2e-2)
        clip = float(norms.min() / 2)
        scales = np.float64(units.clip_weights(clip))
        assert np.all(scales * norms <= clip)


@pytest.mark.parametrize(
    ("units", "options", "message"),
    [
        (np.zeros(NUM_ROWS), {}, "integer units of shape"),
        (np.zeros(3, int), {}, "integer units of shape"),
        (UNITS + 2, {}, r"units in -1\.\.3, got 1\.\.4"),
        (UNITS - 1, {}, r"units in -1\.\.3, got -2\.\.1"),
        (UNITS, {"max_rows_per_unit": 0}, "max_rows_per_unit=0 >= 1"),
    ],
)
def test_units_that_cannot_be_are_refused(case, units, options, message):
    with pytest.raises(ValueError, match=message):
        case[0].by_unit(units, num_units=NUM_UNITS, **options)


# --- compilation and cost -------------------------------------------------------------------------


def test_nothing_compiles_again_on_a_second_call():
    params, _ = operands()
    figures = [
        *FIGURES.values(),
        lambda grads: grads.layer_clipped_sum(1.0),
        lambda grads: grads.normalized_sum(),
        lambda grads: grads.by_unit(jnp.asarray(UNITS), num_units=NUM_UNITS).norms(),
    ]

    def ask(seed):
        grads = kernels.per_example(loss_fn)(params, operands(seed)[1])
        for figure in figures:
            figure(grads)
        grads.clipped_sum(0.1 + seed)

    ask(0)
    with jax.log_compiles(), _counted_compilations() as count:
        ask(1)
    assert count == collections.Counter()


class _counted_compilations:
    """Counts the messages that `jax.log_compiles` makes of compilations."""

    def __enter__(self):
        self.count = collections.Counter()
        self.handler = logging.Handler()
        self.handler.emit = self._emit
        logging.getLogger("jax").addHandler(self.handler)
        return self.count

    def _emit(self, record):
        if record.getMessage().startswith("Compiling"):
            self.count[record.getMessage().split()[1]] += 1

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self.handler)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_costs_are_those_of_the_docstrings():
    """MLP, B rows, one token: flops by XLA's count, against those of the plain gradient."""
    num_rows, m, n = 32, 256, 192
    params = {"first": normal(0, m, n), "second": normal(1, n, m)}
    forward = lambda p, x: jnp.mean((jnp.tanh(x @ p["first"]) @ p["second"]) ** 2)
    x = normal(2, num_rows, m)
    weights = 2 * m * n
    rows = kernels.per_example(forward)
    passes = flops(lambda p, x: jax.grad(forward, argnums=0)(p, x), params, x)
    norms = flops(lambda p, x: rows(p, x).norms(), params, x)
    clipped = flops(lambda p, x: rows(p, x).clipped_sum(1.0), params, x)
    assert norms < passes - 2 * num_rows * weights * 0.9  # no weight gradient is formed
    both = 2 * num_rows * weights  # XLA counts the branch for rows that are not finite, too
    assert clipped - both < passes * 1.05
    grads = rows(params, x)
    assert flops(lambda g: g.sum(), grads) - both < 2 * num_rows * weights * 1.05
    assert flops(lambda g, v: g.dot(v), grads, params) < 2 * num_rows * weights * 1.05
    assert flops(lambda g: g.gram(), grads) < 2 * 2 * num_rows**2 * (m + n) * 1.1
    assert flops(lambda g: g.norms(), grads) < 20 * num_rows * (m + n)
