"""Products with L-BFGS operators, and their distances, against dense BFGS in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import kernels, tree
from jaxunlearn.kernels import lbfgs
from tests import oracles
from tests.kernels import lbfgs_oracles as dense

seeds = st.integers(0, 2**32 - 1)
SIZE = 5
push = jax.jit(lbfgs.push)
inverse_product = jax.jit(lbfgs.inverse_product)


@functools.cache
def empty(dtype="float32"):
    return lbfgs.init(dense.split(np.zeros(dense.DIMENSION, dtype)), SIZE)


def filled(steps, changes, dtype="float32"):
    memory = empty(dtype)
    for s, y in zip(steps, changes):
        memory, admitted = push(memory, dense.split(s), dense.split(y))
        assert bool(admitted)
    return memory


@jax.jit
def every_product(memory, vectors, gamma, damping):
    """All products that the package offers, of a stack of vectors, with given scale and damping."""
    each = lambda f, **more: jax.vmap(lambda v: f(memory, v, **more))(vectors)
    free, given_ = {}, {"scale": gamma}
    return {
        "H": {
            "one by one": each(lbfgs.inverse_product),
            "compact": each(lbfgs.inverse_product, form="compact"),
            "two loops": each(lbfgs.inverse_product, form="two_loop"),
            "many": lbfgs.inverse_product_many(memory, vectors, **free),
            "many two loops": lbfgs.inverse_product_many(memory, vectors, form="two_loop"),
        },
        "H scaled": {
            "many": lbfgs.inverse_product_many(memory, vectors, **given_),
            "two loops": each(lbfgs.inverse_product, form="two_loop", **given_),
        },
        "H damped": {
            "many": lbfgs.inverse_product_many(memory, vectors, damping=damping),
            "one by one": each(lbfgs.inverse_product, damping=damping),
        },
        "B": {
            "one by one": each(lbfgs.product),
            "unrolled": each(lbfgs.product, form="unrolled"),
            "many": lbfgs.product_many(memory, vectors),
            "many unrolled": lbfgs.product_many(memory, vectors, form="unrolled"),
        },
        "B scaled": {
            "many": lbfgs.product_many(memory, vectors, **given_),
            "unrolled": lbfgs.product_many(memory, vectors, form="unrolled", **given_),
        },
        "B damped": {
            "many": lbfgs.product_many(memory, vectors, damping=damping),
            "unrolled": lbfgs.product_many(memory, vectors, damping=damping, form="unrolled"),
        },
    }


def check_every_product(memory, steps, changes, vectors, tolerance):
    gamma, damping = 0.7, 0.3
    b, h = dense.bfgs(steps, changes)
    scaled_b, scaled_h = dense.bfgs(steps, changes, gamma)
    eye = np.eye(dense.DIMENSION)
    want = {"H": h, "H scaled": scaled_h, "H damped": np.linalg.inv(b + damping * eye)}
    want |= {"B": b, "B scaled": scaled_b, "B damped": b + damping * eye}
    found = every_product(memory, dense.split(vectors), gamma, damping)
    for operator, ways in found.items():
        for way, trees in ways.items():
            gap = oracles.relative_gap(dense.join(trees, 1), vectors @ want[operator])
            assert gap < tolerance, (operator, way, gap)


@pytest.mark.parametrize("count", [0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 3])
def test_every_product_equals_dense_bfgs_of_the_newest_pairs(count):
    steps, changes = dense.pairs(count, count)
    vectors = np.random.default_rng(1).normal(size=(3, dense.DIMENSION)).astype(np.float32)
    memory = filled(steps, changes)
    check_every_product(memory, steps[-SIZE:], changes[-SIZE:], vectors, 2e-5)


@settings(max_examples=10)
@given(seed=seeds)
def test_every_product_equals_dense_bfgs_in_double_precision(seed, x64):
    steps, changes = dense.pairs(seed, SIZE + 2, dtype=np.float64)
    vectors = np.random.default_rng(seed).normal(size=(3, dense.DIMENSION))
    memory = filled(steps, changes, "float64")
    assert memory.pair_gram.dtype == jnp.float64
    check_every_product(memory, steps[-SIZE:], changes[-SIZE:], vectors, 1e-11)


@given(seed=seeds)
def test_both_operators_satisfy_the_newest_secant_equation(seed):
    steps, changes = dense.pairs(seed, SIZE)
    memory = filled(steps, changes)
    s, y = steps[-1], changes[-1]
    found = every_product(memory, dense.split(np.stack([s, y, s])), 0.7, 0.0)
    assert oracles.relative_gap(dense.join(found["H"]["many"], 1)[1], s) < 1e-5
    assert oracles.relative_gap(dense.join(found["B"]["many"], 1)[0], y) < 1e-5


def test_what_lies_in_an_empty_slot_is_never_seen():
    steps, changes = dense.pairs(3, 2)
    memory = filled(steps, changes)
    spoilt = memory._replace(
        pairs=jax.tree.map(lambda leaf: leaf.at[2:].set(1e3), memory.pairs),
        pair_gram=memory.pair_gram.at[2:].set(1e6).at[:, :, 2:].set(1e6),
    )
    vectors = np.random.default_rng(1).normal(size=(3, dense.DIMENSION)).astype(np.float32)
    check_every_product(spoilt, steps, changes, vectors, 2e-5)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
def test_nearly_parallel_pairs_lose_no_more_than_their_own_conditioning(noise):
    rng = np.random.default_rng(0)
    steps, _ = dense.pairs(0, SIZE)
    steps = (steps[0] + noise * rng.normal(size=steps.shape)).astype(np.float32)
    curvature = np.linspace(1.0, 3.0, dense.DIMENSION)
    changes = (steps * curvature).astype(np.float32)
    vectors = rng.normal(size=(3, dense.DIMENSION)).astype(np.float32)
    memory = filled(steps, changes)
    # What float32 pairs can mean at all: the spread of float64 BFGS under rounding of the pairs.
    b, h = dense.bfgs(steps, changes)
    spread = {"B": 0.0, "H": 0.0}
    for _ in range(20):
        jitter = lambda x: x * (1 + 2.0**-24 * rng.normal(size=x.shape))
        b2, h2 = dense.bfgs(jitter(steps), jitter(changes))
        spread["B"] = max(spread["B"], oracles.relative_gap(vectors @ b2, vectors @ b))
        spread["H"] = max(spread["H"], oracles.relative_gap(vectors @ h2, vectors @ h))
    found = every_product(memory, dense.split(vectors), 0.7, 0.3)
    for operator, matrix in (("B", b), ("H", h)):
        for way, trees in found[operator].items():
            gap = oracles.relative_gap(dense.join(trees, 1), vectors @ matrix)
            assert gap < 1e-5 + 50 * spread[operator], (operator, way, gap)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_length_of_the_pairs_is_of_no_matter(size):
    steps, changes = dense.pairs(5, SIZE)
    memory = filled(steps * np.float32(size), changes * np.float32(size))
    vectors = np.random.default_rng(1).normal(size=(3, dense.DIMENSION)).astype(np.float32)
    check_every_product(memory, steps, changes, vectors, 2e-5)


def test_optax_agrees():
    steps, changes = dense.pairs(7, SIZE, dtype=np.float32)
    tx = optax.scale_by_lbfgs(memory_size=SIZE)
    update = jax.jit(tx.update)
    params, gradient = np.zeros(dense.DIMENSION, np.float32), np.ones(dense.DIMENSION, np.float32)
    state = tx.init(jnp.asarray(params))
    for s, y in zip(steps, changes):
        _, state = update(jnp.asarray(gradient), state, jnp.asarray(params))
        params, gradient = params + s, gradient + y
    theirs, state = update(jnp.asarray(gradient), state, jnp.asarray(params))
    order = np.roll(np.arange(SIZE), -int((state.count - 1) % SIZE))
    used = (
        np.asarray(leaf)[order] for leaf in (state.diff_params_memory, state.diff_updates_memory)
    )
    ours = inverse_product(filled(*used), dense.split(gradient))
    assert oracles.relative_gap(dense.join(ours), theirs) < 1e-5


def test_bfloat16_vectors_are_multiplied_in_float32_and_come_back_as_they_were():
    steps, changes = dense.pairs(2, SIZE)
    memory = filled(steps, changes)
    vector = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), dense.split(steps[0]))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), vector)
    found, want = inverse_product(memory, vector), inverse_product(memory, wide)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), want)
    assert tree.same_bits(found, rounded)


def test_more_right_hand_sides_than_pairs_take_the_other_order_and_agree():
    steps, changes = dense.pairs(4, SIZE)
    memory, (b, h) = filled(steps, changes), dense.bfgs(steps, changes)
    vectors = np.random.default_rng(1).normal(size=(5 * SIZE, dense.DIMENSION)).astype(np.float32)
    found = every_product(memory, dense.split(vectors), 0.7, 0.3)
    assert oracles.relative_gap(dense.join(found["H"]["many"], 1), vectors @ h) < 1e-5
    assert oracles.relative_gap(dense.join(found["B"]["many"], 1), vectors @ b) < 1e-5


def test_products_vmap_over_memories():
    sets = [dense.pairs(seed, seed + 2) for seed in range(3)]
    memories = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(filled(*one) for one in sets))
    vectors = np.random.default_rng(1).normal(size=(3, dense.DIMENSION)).astype(np.float32)
    found = jax.jit(jax.vmap(lbfgs.inverse_product))(memories, dense.split(vectors))
    want = [v @ dense.bfgs(*one)[1] for v, one in zip(vectors, sets)]
    assert oracles.relative_gap(dense.join(found, 1), want) < 2e-5


def test_an_apply_reads_each_pair_twice_and_nothing_else_of_its_size():
    """The cost that the docstring states: 4 m d floats, counted in the compiled program."""
    memory = lbfgs.init(jnp.zeros(10_000), 8)
    for function in (lbfgs.inverse_product, lbfgs.product):
        jaxpr = jax.make_jaxpr(function)(memory, jnp.zeros(10_000))
        users = [e for e in jaxpr.jaxpr.eqns if jaxpr.jaxpr.invars[0] in list(e.invars)]
        assert [eqn.primitive.name for eqn in users] == ["dot_general", "dot_general"]
        compiled = jax.jit(function).lower(memory, jnp.zeros(10_000)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 10_000


@pytest.mark.parametrize(("dimension", "solves"), [(1024, 0), (1025, 2)])
def test_few_numbers_take_two_loops_and_more_the_compact_form(dimension, solves):
    memory = lbfgs.init(jnp.zeros(dimension), 4)
    text = str(jax.make_jaxpr(lbfgs.inverse_product)(memory, jnp.zeros(dimension)))
    assert text.count("triangular_solve[") == solves


def test_kernels_lbfgs_is_the_one_address():
    assert kernels.lbfgs is lbfgs


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lbfgs.inverse_product, {"form": "unrolled"}, "form='unrolled'"),
        (lbfgs.product, {"form": "two_loop"}, "form='two_loop'"),
        (lbfgs.inverse_product, {"form": "two_loop", "damping": 0.1}, "damping=0.0"),
        (lbfgs.inverse_product, {"damping": -1.0}, "damping=-1.0"),
        (lbfgs.product, {"damping": float("nan")}, "damping=nan"),
    ],
)
def test_what_cannot_be_done_is_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(empty(), dense.split(np.zeros(dense.DIMENSION, np.float32)), **options)


def test_a_vector_of_another_shape_is_refused():
    vector = dense.split(np.zeros(dense.DIMENSION, np.float32))
    with pytest.raises(ValueError, match="like the parameters"):
        lbfgs.product(empty(), vector | {"w": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="like the parameters"):
        lbfgs.product_many(empty(), vector)


# Distances and spectra.

WIDE = 40  # more parameters than 4 m, so that the compact forms are used


def wide_memory(steps, changes, size=3):
    memory = lbfgs.init(jnp.zeros(steps.shape[1], steps.dtype), size)
    for s, y in zip(steps, changes):
        memory, _ = push(memory, s, y)
    return memory


@jax.jit
def distances(memory, other):
    return lbfgs.operator_distance(memory, other), lbfgs.operator_distance(
        memory, other, inverse=False
    )


eigenvalue_range = jax.jit(lbfgs.eigenvalue_range, static_argnames="inverse")


def dense_distances(one, other):
    (b, h), (b2, h2) = dense.bfgs(*one), dense.bfgs(*other)
    return np.linalg.norm(h - h2, 2), np.linalg.norm(b - b2, 2)


@settings(max_examples=5)
@given(seed=seeds)
@pytest.mark.parametrize(("dimension", "tolerance"), [(WIDE, 1e-10), (6, 1e-10)])
def test_operator_distance_equals_that_of_the_dense_matrices(dimension, tolerance, seed, x64):
    one, other = (
        dense.pairs([seed, i], 3, dimension=dimension, dtype=np.float64) for i in range(2)
    )
    found = distances(wide_memory(*one), wide_memory(*other))
    want = dense_distances(one, other)
    np.testing.assert_allclose(found, want, rtol=tolerance)


def test_operator_distance_in_single_precision_loses_what_its_docstring_says():
    gaps = []
    for seed in range(30):
        one, other = (dense.pairs([seed, i], 3, dimension=WIDE) for i in range(2))
        found, want = distances(wide_memory(*one), wide_memory(*other)), dense_distances(one, other)
        gaps.append(np.max(np.abs(np.array(found) / want - 1)))
    assert np.median(gaps) < 1e-5
    assert np.max(gaps) < 1e-3


def test_nearly_equal_memories_do_not_cancel():
    steps, changes = dense.pairs(0, 3, dimension=WIDE)
    moved = changes.copy()
    moved[1] += (2e-5 * np.random.default_rng(0).normal(size=WIDE)).astype(np.float32)
    one, other = wide_memory(steps, changes), wide_memory(steps, moved)
    want = dense_distances((steps, changes), (steps, moved))
    assert want[1] < 1e-4 * np.linalg.norm(dense.bfgs(steps, changes)[0], 2)
    np.testing.assert_allclose(distances(one, other), want, rtol=0.05)


def test_equal_memories_are_at_distance_zero_and_an_empty_one_is_the_identity():
    one = wide_memory(*dense.pairs(0, 4, dimension=WIDE))
    assert [float(x) for x in distances(one, one)] == [0.0, 0.0]
    none = lbfgs.drop(one, jnp.ones(3, bool))
    _, h = dense.bfgs(*(x[1:] for x in dense.pairs(0, 4, dimension=WIDE)))
    np.testing.assert_allclose(
        distances(one, none)[0], np.linalg.norm(h - np.eye(WIDE), 2), rtol=1e-5
    )


def test_memories_of_different_sizes_can_be_compared():
    pairs = dense.pairs(0, 4, dimension=WIDE)
    small, large = wide_memory(*pairs, size=2), wide_memory(*pairs, size=4)
    _, h = dense.bfgs(*(x[2:] for x in pairs))
    _, h2 = dense.bfgs(*pairs)
    found, _ = distances(small, large)
    np.testing.assert_allclose(found, np.linalg.norm(h - h2, 2), rtol=1e-5)


@pytest.mark.parametrize("dimension", [WIDE, 5])
@pytest.mark.parametrize("count", [0, 2, 3])
def test_eigenvalue_range_equals_that_of_the_dense_matrices(dimension, count):
    steps, changes = dense.pairs(count, count, dimension=dimension)
    memory = wide_memory(steps.reshape(count, dimension), changes.reshape(count, dimension))
    for matrix, inverse in zip(dense.bfgs(steps, changes), (False, True)):
        values = np.linalg.eigvalsh(matrix)
        found = eigenvalue_range(memory, inverse=inverse)
        np.testing.assert_allclose(found, (values[0], values[-1]), rtol=2e-5)


def test_long_vectors_are_multiplied_in_blocks_and_agree_with_one_by_one():
    dimension = 4 * 8192 + 5
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(2, dimension)).astype(np.float32)
    memory = wide_memory(steps, steps * np.linspace(1, 2, dimension, dtype=np.float32), size=2)
    vectors = rng.normal(size=(9, dimension)).astype(np.float32)
    many = jax.jit(lbfgs.inverse_product_many)(memory, vectors)
    one_by_one = np.stack([inverse_product(memory, v) for v in vectors])
    assert oracles.relative_gap(many, one_by_one) < 1e-6
