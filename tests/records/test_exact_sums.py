"""Integer sums on a grid, against Python's integers."""

import fractions

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import errors, records

seeds = st.integers(0, 2**32 - 1)


def python_product(a, b):
    """a.T @ b in Python's integers."""
    return a.astype(object).T @ b.astype(object)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, bits_a=st.integers(1, 24), bits_b=st.integers(1, 24))
def test_a_cross_product_is_that_of_pythons_integers(seed, bits_a, bits_b):
    rng = np.random.default_rng(seed)
    a = rng.integers(-(2**bits_a), 2**bits_a + 1, (300, 3))
    b = rng.integers(-(2**bits_b), 2**bits_b + 1, (300, 4))
    assert np.array_equal(records.cross_product(a, b), python_product(a, b))


def test_a_cross_product_of_the_largest_values_is_exact():
    a = np.full((1000, 2), -(2**24))
    b = np.full((1000, 3), 2**24)
    assert np.array_equal(records.cross_product(a, b), python_product(a, b))
    squares = np.full((100, 1), 2**48)
    assert int(records.cross_product(np.ones((100, 1), np.int64), squares)[0, 0]) == 100 * 2**48


def test_a_cross_product_of_no_rows_is_zero():
    nothing = np.zeros((0, 2), np.int64)
    assert np.array_equal(records.cross_product(nothing, nothing), np.zeros((2, 2), np.int64))


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_sums_do_not_depend_on_order_or_batches_and_come_back_after_subtraction(seed):
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.normal(size=20) * 2.0**e for e in (-10, 0, 4)])[:, None]
    units = records.quantise(rows, 2.0**-16)
    ones = np.ones_like(units)
    total = records.cross_product(ones, units)
    order = rng.permutation(len(rows))
    parts = np.split(units[order], np.sort(rng.integers(0, len(rows), 5)))
    again = sum(records.cross_product(np.ones_like(part), part) for part in parts)
    assert np.array_equal(again, total)
    less = records.add_exactly(total, -records.cross_product(ones[7:8], units[7:8]))
    kept = np.arange(len(rows)) != 7
    assert np.array_equal(less, records.cross_product(ones[kept], units[kept]))


@settings(deadline=None, max_examples=50)
@given(value=st.floats(-200, 200, width=32), exponent=st.integers(-16, 3))
def test_quantising_is_exact_rounding_with_halves_to_even(value, exponent):
    grid = 2.0**exponent
    steps = round(fractions.Fraction(value) / fractions.Fraction(grid))
    assert int(records.quantise(np.float32(value), grid)) == steps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "bool"])
def test_quantising_takes_every_dtype(dtype):
    values = np.array([0, 1, 1]).astype(jax.numpy.dtype(dtype))
    assert records.quantise(values, 0.5).tolist() == [0, 2, 2]


def test_what_does_not_fit_is_a_typed_error():
    with pytest.raises(errors.SumOverflowError, match="coarser grid"):
        records.quantise(np.array([1e6]), 2.0**-16)
    with pytest.raises(errors.NonFiniteError, match="finite"):
        records.quantise(np.array([np.inf]), 2.0**-16)
    largest = np.array([2**63 - 1])
    for a, b in ((largest, np.array([1])), (-largest, np.array([-2]))):
        with pytest.raises(errors.SumOverflowError, match="2\\^63"):
            records.add_exactly(a, b)
    assert records.add_exactly(largest, -largest) == 0
    wide = np.full((2**16, 1), 2**24)
    with pytest.raises(errors.SumOverflowError):
        records.cross_product(wide, wide)


@pytest.mark.parametrize("grid", [0.1, 3.0, 0.0, -0.5, float("nan"), float("inf")])
def test_a_grid_that_is_no_power_of_two_is_refused(grid):
    with pytest.raises(ValueError, match="power of two"):
        records.check_grid(grid)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_words_hold_every_integer(shape):
    values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, shape, endpoint=True)
    words = records.pack_int64(np.asarray(values))
    assert words.shape == (*shape, 2)
    back = records.unpack_int64(words)
    assert np.array_equal(back, values)
    assert back.shape == shape


def test_fingerprints_tell_rows_and_swapped_values_apart():
    rng = np.random.default_rng(0)
    x, y = rng.integers(-9, 9, (500, 4)), rng.integers(0, 3, 500)
    prints = records.fingerprints(x, y)
    rows = {(*row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True)}
    assert len(set(prints.tolist())) == len({(*map(int, row),) for row in rows})
    assert np.array_equal(records.fingerprints(x[::-1], y[::-1]), prints[::-1])
    changed = x.copy()
    changed[:, 0], changed[:, 1] = x[:, 1], x[:, 0]
    assert np.array_equal(records.fingerprints(changed, y) != prints, x[:, 0] != x[:, 1])
