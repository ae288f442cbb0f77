"""The data protocol: rows by id, zeros where there is no row, and a typed refusal of the rest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import errors
from jaxunlearn.records import RowReader
from jaxunlearn.types import Data

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10, dtype=np.int32)


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class Source:
    """Rows by id that writes down what it was asked for."""

    def __init__(self, wrap=lambda x, y: {"x": x, "y": y}):
        self.asked = []
        self.wrap = wrap

    def __getitem__(self, ids):
        self.asked.append(ids)
        return self.wrap(X[ids], Y[ids])


SOURCES = {
    "protocol": lambda: Source(),
    "protocol of jax arrays": lambda: Source(lambda x, y: {"x": jnp.asarray(x), "y": y}),
    "protocol of tuples": lambda: Source(lambda x, y: (x, y)),
    "dict": lambda: {"x": X, "y": Y},
    "dict of jax arrays": lambda: {"x": jnp.asarray(X), "y": jnp.asarray(Y)},
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y],
    "NamedTuple": lambda: Pair(X, Y),
    "nested": lambda: {"inputs": (X,), "y": Y},
}


def leaves(batch):
    """x and y, whatever they are wrapped in."""
    x, y = jax.tree.leaves(batch)
    return x, y


@pytest.mark.parametrize("name", SOURCES)
def test_rows_come_in_the_order_and_shape_of_the_ids(name):
    ids = np.array([[3, 1, 9], [0, 3, 3]])
    x, y = leaves(RowReader(SOURCES[name]())(ids))
    assert np.array_equal(x, X[ids])
    assert np.array_equal(y, Y[ids])
    assert (x.dtype, y.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("name", SOURCES)
def test_padding_is_rows_of_zeros(name):
    ids = np.array([[3, -1], [-1, 9]])
    x, y = leaves(RowReader(SOURCES[name]())(ids))
    assert np.array_equal(x, np.where((ids >= 0)[..., None], X[ids], 0.0))
    assert np.array_equal(y, np.where(ids >= 0, Y[ids], 0))
    assert (x.dtype, y.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("name", SOURCES)
def test_padding_alone_is_zeros_of_the_shape_learnt_from_a_row(name):
    reader = RowReader(SOURCES[name]())
    reader.prepare(np.array([4, 2], np.int32))
    batch = reader(np.full((3, 2), -1))
    x, y = leaves(batch)
    assert (x.shape, y.shape) == ((3, 2, 2), (3, 2))
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    assert not np.any(x)
    assert jax.tree.structure(batch) == jax.tree.structure(reader(np.array([1])))


def test_an_array_is_data():
    assert np.array_equal(RowReader(X)(np.array([2, -1])), [X[2], np.zeros(2)])


def test_padding_never_reaches_the_data():
    source = Source()
    reader = RowReader(source)
    reader(np.array([[-1, 7], [2, -1]], np.int32))
    reader(np.array([-1, -1]))
    assert [asked.tolist() for asked in source.asked] == [[7, 2]]
    assert source.asked[0].dtype == np.int32
    assert isinstance(source.asked[0], np.ndarray)


def test_preparing_reads_one_row_once():
    source = Source()
    reader = RowReader(source)
    reader.prepare(np.array([4, 5, 6]))
    reader.prepare(np.array([7]))
    reader.prepare(np.array([], np.int32))
    assert [asked.tolist() for asked in source.asked] == [[4]]


def test_padding_alone_is_refused_before_any_row_was_read():
    with pytest.raises(errors.MissingDataError, match="at least one retained row"):
        RowReader(Source())(np.array([-1]))


def test_no_data_is_refused_and_the_message_says_what_data_is():
    with pytest.raises(errors.MissingDataError, match=r"data\[ids\] -> batch"):
        RowReader(None)


@pytest.mark.parametrize("data", [3, object(), lambda ids: ids])
def test_what_cannot_be_indexed_is_refused(data):
    with pytest.raises(errors.MissingDataError, match=r"got (int|object|function)"):
        RowReader(data)


class Broken:
    def __init__(self, answer):
        self.answer = answer

    def __getitem__(self, ids):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        {"x": X[:1], "y": Y[:2]},
        {"x": X[:2].T[:1], "y": Y[:2]},
        {"x": X[:3]},
        {},
        None,
        np.float32(3.0),
        [{"x": np.zeros(3)}, {"x": np.zeros(3)}, {"x": np.zeros(3)}],
        {"x": [[1.0, 2.0]], "y": [0, 1]},
    ],
)
def test_a_batch_with_another_leading_axis_is_refused(answer):
    with pytest.raises(errors.MissingDataError, match="leading axis 2"):
        RowReader(Broken(answer))(np.array([0, 1]))


@pytest.mark.parametrize("error", [IndexError("row 7"), KeyError(7), TypeError("no arrays")])
def test_a_source_that_cannot_find_the_row_is_named(error):
    with pytest.raises(errors.MissingDataError, match=type(error).__name__) as caught:
        RowReader(Broken(error))(np.array([0, 1]))
    assert caught.value.__cause__ is error


def test_a_list_of_examples_is_refused_for_it_has_no_columns():
    with pytest.raises(errors.MissingDataError, match="columns of rows"):
        RowReader(Broken([{"x": np.zeros(3)}, {"x": np.zeros(3)}]))(np.array([0, 1]))


def test_columns_that_are_lists_are_read_as_arrays():
    rows = RowReader(Broken({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0, 1]}))(np.array([0, 1]))
    assert np.array_equal(rows["x"], [[1.0, 2.0], [3.0, 4.0]])
    assert np.array_equal(rows["y"], [0, 1])


def test_any_other_error_of_the_source_is_left_alone():
    with pytest.raises(ZeroDivisionError):
        RowReader(Broken(ZeroDivisionError()))(np.array([0]))


def test_arrays_that_are_too_short_are_refused_rather_than_clamped():
    for data in ({"x": X}, {"x": jnp.asarray(X)}):
        with pytest.raises(errors.MissingDataError, match="IndexError"):
            RowReader(data)(np.array([3, 10]))


def test_the_protocol_is_checkable():
    assert isinstance(Source(), Data)
    assert isinstance(X, Data)
    assert not isinstance(object(), Data)


def test_batches_do_not_alias_the_arrays_they_were_read_from():
    data = {"x": X.copy()}
    batch = RowReader(data)(np.arange(10))
    data["x"][:] = -1.0
    assert np.array_equal(batch["x"], X)
