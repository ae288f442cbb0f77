"""Deletion requests: what is an id, what is not; nothing is clamped, wrapped or dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import errors
from jaxunlearn.records import bucket, show_ids, validate_ids

NOT_INTEGERS = {
    "float": (3.0, "3.0 of type float"),
    "list of float": ([1, 3.0], "3.0 of type float"),
    "array of float": (np.array([3.0]), "of type float64"),
    "scalar array of float": (np.array(3.0), "of type float64"),
    "jax array of float": (jnp.array([3.0]), "of type float32"),
    "set of float": ({3.0}, "3.0 of type float"),
    "NaN": (float("nan"), "NaN is nobody's id"),
    "NaN in a list": ([float("nan")], "NaN is nobody's id"),
    "NaN in an array": (np.array([np.nan]), "NaN is nobody's id"),
    "bool": (True, "True of type bool"),
    "bool in a list": ([1, True], "True of type bool"),
    "numpy bool": ([np.True_], "of type bool"),
    "mask": (np.array([True, False]), "of type bool"),
    "jax mask": (jnp.array([True, False]), "of type bool"),
    "bool behind an array": ([np.array(True)], "of type ndarray"),
    "str": ("3", "'3' of type str"),
    "str in a list": (["user-7"], "'user-7' of type str"),
    "array of str": (np.array(["3"]), "of type str_"),
    "bytes": (b"3", "of type bytes"),
    "bytearray": (bytearray(b"3"), "of type bytearray"),
    "memoryview": (memoryview(b"3"), "of type memoryview"),
    "None": (None, "None of type NoneType"),
    "None in a list": ([1, None], "None of type NoneType"),
    "None in an object array": (np.array([1, None], object), "None of type NoneType"),
    "float in an object array": (np.array([1, 1.5], object), "1.5 of type float"),
    "bool in an object array": (np.array([1, True], object), "True of type bool"),
    "two axes": (np.array([[1, 2]]), "along one axis"),
    "nested lists": ([[1, 2]], "of type list"),
    "arrays in a list": ([np.array([1])], "of type ndarray"),
    "complex": (1j, "of type complex"),
    "date": (np.datetime64("2020-01-01"), "of type datetime64"),
    "typed key": (jax.random.key(0), "of type"),
    "object": (object(), "of type object"),
}
OUT_OF_RANGE = {
    "num_examples": (10, "got 10"),
    "padding": (-1, "negative -1. -1 is padding"),
    "padding in an array": (np.array([3, -1], np.int32), "negative -1"),
    "negative": ([3, -7, 2], "negative -7"),
    "2**32 + 5": (2**32 + 5, "got 4294967301"),
    "2**32 + 5 in a list": ([2**32 + 5], "got 4294967301"),
    "2**32 + 5 in uint64": (np.array([2**32 + 5], np.uint64), "got 4294967301"),
    "2**32 + 5 in int64": (np.int64(2**32 + 5), "got 4294967301"),
    "2**64 - 1": (np.uint64(2**64 - 1), "got 18446744073709551615"),
    "2**100": (2**100, "got 1267650600228229401496703205376"),
    "-2**100": ([-(2**100)], "negative -1267650600228229401496703205376"),
}
GOOD = {
    "int": 3,
    "numpy int": np.int16(3),
    "scalar array": np.array(3),
    "jax scalar": jnp.array(3),
    "list": [3],
    "tuple": (3,),
    "set": {3},
    "frozenset": frozenset([3]),
    "range": range(3, 4),
    "generator": (i for i in [3]),
    "dict": {3: "the keys count"},
    "array": np.array([3], np.uint8),
    "big-endian array": np.array([3], ">i8"),
    "object array": np.array([3], object),
    "object array of numpy ints": np.array([np.int32(3)], object),
    "jax array": jnp.array([3], jnp.uint32),
    "list of jax scalars": [jnp.array(3)],
    "mixed list": [np.uint64(3), 3, jnp.int32(3)],
}
EMPTY = {"list": [], "set": set(), "range": range(0), "float array": np.array([])}


@pytest.mark.parametrize("name", NOT_INTEGERS)
def test_what_is_not_an_integer_is_refused_and_named(name):
    ids, told = NOT_INTEGERS[name]
    with pytest.raises(errors.IdTypeError) as caught:
        validate_ids(ids, 10)
    assert told in str(caught.value)
    assert str(caught.value).startswith("Expected")


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_and_never_wraps(name):
    ids, told = OUT_OF_RANGE[name]
    with pytest.raises(errors.IdRangeError) as caught:
        validate_ids(ids, 10)
    assert told in str(caught.value)
    assert "in 0..9" in str(caught.value)


def test_every_refusal_is_an_id_error_and_a_value_error():
    for kind in (errors.IdTypeError, errors.IdRangeError):
        assert issubclass(kind, errors.IdError)
        assert issubclass(kind, ValueError)
        assert issubclass(kind, errors.JaxUnlearnError)
    assert issubclass(errors.IdTypeError, TypeError)


@pytest.mark.parametrize("name", GOOD)
def test_every_collection_of_integers_is_a_request(name):
    ids, _ = validate_ids(GOOD[name], 10)
    assert ids.dtype == np.int32
    assert ids.tolist() == [3]


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_a_request_for_nothing(name):
    ids, num_duplicates = validate_ids(EMPTY[name], 10)
    assert (ids.dtype, ids.shape, num_duplicates) == (np.int32, (0,), 0)


@given(ids=st.lists(st.integers(0, 99), max_size=30), kind=st.sampled_from([list, np.array, set]))
def test_a_request_is_a_set_and_repeats_are_counted(ids, kind):
    request = kind(ids) if ids else []
    unique, num_duplicates = validate_ids(request, 100)
    assert unique.tolist() == sorted(set(ids))
    assert num_duplicates == (0 if kind is set else len(ids) - len(set(ids)))


@given(value=st.integers(-(2**70), 2**70))
def test_an_id_is_accepted_if_and_only_if_it_is_in_range(value):
    if 0 <= value < 1000:
        assert validate_ids([value], 1000)[0].tolist() == [value]
    else:
        with pytest.raises(errors.IdRangeError, match=str(value)):
            validate_ids([value], 1000)


def test_the_largest_id_of_all_is_an_id():
    assert validate_ids([2**31 - 2], 2**31 - 1)[0].tolist() == [2**31 - 2]


def test_the_request_is_copied():
    request = np.array([1, 2, 3], np.int32)
    ids, _ = validate_ids(request, 10)
    request[:] = 7
    assert ids.tolist() == [1, 2, 3]


def test_a_long_list_of_bad_ids_is_not_printed_whole():
    with pytest.raises(errors.IdRangeError) as caught:
        validate_ids(range(100, 10_000), 10)
    assert "100, 101, 102, 103, 104, ... (9900 ids)" in str(caught.value)
    assert show_ids([1, 2]) == "1, 2"


@given(size=st.integers(0, 70))
def test_a_bucket_is_the_next_power_of_two_padded_with_minus_one(size):
    ids = np.arange(size, dtype=np.int32)
    padded = bucket(ids)
    assert padded.dtype == np.int32
    assert len(padded) == min(2**k for k in range(8) if 2**k >= size)
    assert padded[:size].tolist() == ids.tolist()
    assert np.all(padded[size:] == -1)


def test_jax_itself_would_have_corrupted_each_of_these_requests():
    """The reason for checking on the host: clamped reads, dropped writes, repeats, wrapped ids."""
    buffer = jnp.arange(4)
    assert int(buffer[7]) == 3
    assert int(buffer[-1]) == 3
    assert np.array_equal(buffer.at[7].set(9), buffer)
    assert int(buffer.at[jnp.array([1, 1])].add(-1)[1]) == -1
    assert int(np.array([2**32 + 5], np.uint64).astype(np.uint32)[0]) == 5
