"""Pytrees as vectors and as bytes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import tree

MIXED = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.ones(3, jnp.bfloat16),
    "count": jnp.zeros((), jnp.int32),
    "flags": jnp.array([True, False]),
    "key": jax.random.key(0),
    "none": None,
    "nested": (jnp.ones(()), [jnp.zeros((0, 4))]),
}


class Pair(NamedTuple):
    w: object
    b: object


def test_bytes_are_counted_by_dtype_keys_included():
    assert tree.num_bytes(MIXED) == 24 + 6 + 4 + 2 + 8 + 4 + 0
    assert tree.num_bytes(jax.eval_shape(lambda: MIXED)) == tree.num_bytes(MIXED)
    assert tree.num_bytes(()) == 0


def test_parameters_are_counted_by_shape():
    assert tree.num_parameters({"w": jnp.ones((2, 3)), "b": jnp.ones(()), "e": jnp.ones(0)}) == 7


def test_only_floats_and_complex_numbers_are_inexact():
    kinds = {"w": True, "half": True, "count": False, "flags": False, "key": False}
    assert {name: bool(tree.is_inexact(MIXED[name])) for name in kinds} == kinds
    assert tree.is_inexact(jnp.ones(1, jnp.complex64))
    assert tree.is_inexact(1.0)
    assert not tree.is_inexact(1)


def test_a_copy_has_the_same_bits_in_other_buffers():
    again = tree.copy(MIXED)
    assert tree.same_bits(again, MIXED)
    assert again["w"].unsafe_buffer_pointer() != MIXED["w"].unsafe_buffer_pointer()
    jax.jit(lambda t: jax.tree.map(lambda leaf: leaf + 1, t), donate_argnums=0)({"w": again["w"]})
    assert not MIXED["w"].is_deleted()


def test_a_copy_of_numpy_arrays_does_not_alias_them():
    source = {"w": np.zeros(100_000, np.float32)}
    again = tree.copy(source)
    source["w"][:] = 1.0
    assert not np.any(again["w"])


def test_weak_types_are_matched_and_values_kept():
    weak, strong = jnp.asarray(1.0), jnp.ones((), jnp.float32)
    assert weak.weak_type
    assert not strong.weak_type
    matched = tree.match_weak_types({"a": strong, "b": strong}, {"a": weak, "b": strong})
    assert matched["a"].weak_type
    assert not matched["b"].weak_type
    assert float(matched["a"]) == 1.0


@pytest.mark.parametrize("failed", [True, False])
def test_poison_reaches_every_inexact_leaf_and_no_other(failed):
    spoilt = jax.jit(tree.poison)(MIXED, jnp.array(failed))
    if not failed:
        assert tree.same_bits(spoilt, MIXED)
        return
    for name in ("w", "half"):
        assert np.all(np.isnan(np.asarray(spoilt[name], np.float32)))
        assert spoilt[name].dtype == MIXED[name].dtype
    assert np.isnan(spoilt["nested"][0])
    exact = ("count", "flags", "key")
    assert tree.same_bits([spoilt[n] for n in exact], [MIXED[n] for n in exact])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_not_all_finite(bad):
    assert bool(tree.all_finite(MIXED))
    assert not bool(tree.all_finite(MIXED | {"half": jnp.array([1, bad], jnp.bfloat16)}))
    assert bool(tree.all_finite({"count": jnp.array(3)}))
    assert bool(tree.all_finite({}))


@given(seed=st.integers(0, 2**32 - 1))
def test_the_inner_product_is_that_of_the_flat_vectors(seed, x64):
    rng = np.random.default_rng(seed)
    a, b = ({"w": rng.normal(size=(3, 4)), "b": rng.normal()} for _ in range(2))
    flat = lambda t: np.append(t["w"].ravel(), t["b"])
    assert abs(float(tree.vdot(a, b)) - flat(a) @ flat(b)) < 1e-12


def test_the_inner_product_of_half_precision_is_summed_in_float32():
    ones = jnp.ones(5000, jnp.bfloat16)
    assert tree.vdot(ones, ones).dtype == jnp.float32
    assert float(tree.vdot(ones, ones)) == 5000.0
    assert float(tree.vdot((), ())) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        {"w": jnp.array([1.0, 2.0]), "b": jnp.zeros(1)},
        {"w": jnp.array([1.0, 2.0]), "c": jnp.zeros(())},
        {"w": jnp.array([1.0, 2.0], jnp.bfloat16), "b": jnp.zeros(())},
        {"w": jnp.array([1.0, np.nextafter(np.float32(2), 3)]), "b": jnp.zeros(())},
        {"w": jnp.array([1.0, 2.0]), "b": -jnp.zeros(())},
        {"w": jnp.array([1.0, 2.0]), "b": jnp.zeros((), jnp.int32)},
        {"w": jnp.array([1.0, 2.0]), "b": None},
    ],
)
def test_same_bits_sees_every_difference(other):
    one = {"w": jnp.array([1.0, 2.0]), "b": jnp.zeros(())}
    assert tree.same_bits(one, jax.tree.map(np.asarray, one))
    assert not tree.same_bits(one, other)
    assert tree.digest(one) != tree.digest(other)


def test_nan_is_the_same_bits_as_nan():
    assert tree.same_bits(jnp.array([jnp.nan]), jnp.array([jnp.nan]))


@given(seed=st.integers(0, 2**32 - 1))
def test_the_relative_distance_is_that_of_the_flat_vectors(seed):
    rng = np.random.default_rng(seed)
    a, b = ({"w": rng.normal(size=3), "n": rng.integers(9)} for _ in range(2))
    want = np.linalg.norm(a["w"] - b["w"]) / np.linalg.norm(b["w"])
    assert np.isclose(tree.relative_distance(a, b), want, rtol=1e-12)
    assert tree.relative_distance(a, a) == 0.0


def test_the_relative_distance_is_infinite_where_there_is_no_scale():
    one, zero, nan = jnp.ones(2), jnp.zeros(2), jnp.array([jnp.nan, 0.0])
    assert tree.relative_distance(one, zero) == float("inf")
    assert tree.relative_distance(zero, zero) == 0.0
    assert tree.relative_distance(nan, one) == float("inf")
    assert tree.relative_distance(one, nan) == float("inf")


def test_a_digest_does_not_depend_on_device_or_byte_order():
    x = np.arange(5, dtype=np.float32)
    assert tree.digest({"w": x}) == tree.digest({"w": jnp.asarray(x)})
    assert tree.digest({"w": x}) == tree.digest({"w": x.astype(">f4")})
    assert tree.digest({"w": x}).startswith("sha256:")
    assert len(tree.digest({"w": x})) == 7 + 64


def test_a_digest_tells_names_shapes_and_dtypes_apart():
    x = np.zeros(4, np.float32)
    others = [{"v": x}, {"w": x.reshape(2, 2)}, {"w": x.view(np.int32)}, {"w": x[:3]}, {"w": [x]}]
    digests = {tree.digest(t) for t in [{"w": x}, *others]}
    assert len(digests) == 6


def test_a_digest_of_keys_tells_keys_apart():
    zero, one = (tree.digest({"k": jax.random.key(i)}) for i in range(2))
    assert zero != one


def test_key_free_gives_the_words_of_a_key_and_nothing_else_changes():
    assert np.array_equal(tree.key_free(jax.random.key(7)), jax.random.key_data(jax.random.key(7)))
    assert tree.key_free(MIXED["w"]) is MIXED["w"]
    assert tree.key_free(3) == 3
