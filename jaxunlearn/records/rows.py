"""Rows by id: the data protocol, with zeros where there is no row to read."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxunlearn import errors
from jaxunlearn.records.participation import Participation, seen_ids
from jaxunlearn.types import Batch


class RowReader:
    """Reads batches by id. `-1` never reaches the data: its row is zeros.

    Args:
      data: an object with `data[ids] -> batch`, or a pytree of arrays with one leading axis.

    Raises:
      MissingDataError: `data` is None or breaks the protocol.
    """

    def __init__(self, data: Any):
        if data is None:
            raise errors.MissingDataError(
                "Expected data=, to read the retained rows again: an object with data[ids] -> "
                "batch, or a pytree of arrays whose row i is example i."
            )
        is_arrays = isinstance(data, dict | list | tuple | np.ndarray | jax.Array)
        if not is_arrays and not hasattr(data, "__getitem__"):
            raise errors.MissingDataError(
                f"Expected data with data[ids] -> batch, got {type(data).__name__}."
            )
        self._data = jax.tree.map(np.asarray, data) if is_arrays else data
        self._is_arrays = is_arrays
        self._template: PyTree | None = None

    def __call__(self, ids: np.ndarray) -> Batch:
        """The rows of `ids`, any shape: leaves of shape (*ids.shape, ...)."""
        flat = np.asarray(ids, np.int32).ravel()
        real = flat >= 0
        if not real.any():
            return self._zeros(np.shape(ids))
        rows = self._fetch(flat[real])
        self._template = jax.tree.map(lambda leaf: leaf[:0], rows)
        if real.all():
            return jax.tree.map(lambda leaf: leaf.reshape(*np.shape(ids), *leaf.shape[1:]), rows)

        def place(leaf):
            full = np.zeros((flat.size, *leaf.shape[1:]), leaf.dtype)
            full[real] = leaf
            return full.reshape(*np.shape(ids), *leaf.shape[1:])

        return jax.tree.map(place, rows)

    def prepare(self, ids: np.ndarray, *, may_be_empty: bool = False) -> None:
        """Learn the shape of a row from one that may be read, for batches that hold none.

        may_be_empty: where `ids` is empty, ask the data for no rows at all and look at their shape.
        """
        if self._template is None and (len(ids) or may_be_empty):
            rows = self._fetch(np.asarray(ids[:1], np.int32))
            self._template = jax.tree.map(lambda leaf: leaf[:0], rows)

    def _zeros(self, shape) -> Batch:
        if self._template is None:
            raise errors.MissingDataError(
                "Expected at least one retained row to learn row shapes from."
            )
        zeros = lambda leaf: np.zeros((*shape, *leaf.shape[1:]), leaf.dtype)
        return jax.tree.map(zeros, self._template)

    def _fetch(self, ids: np.ndarray) -> Batch:
        try:
            if self._is_arrays:
                rows = jax.tree.map(lambda leaf: leaf[ids], self._data)
            else:
                is_column = lambda node: isinstance(node, list)  # Hugging Face without a format
                rows = jax.tree.map(np.asarray, self._data[ids], is_leaf=is_column)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise errors.MissingDataError(
                f"Expected data[ids] to give the rows of {len(ids)} int32 ids, got "
                f"{type(error).__name__}: {error}"
            ) from error
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
        if lengths != {(len(ids),)}:
            raise errors.MissingDataError(
                f"Expected leaves of data[ids] with leading axis {len(ids)}, got {lengths or 0}."
            )
        has_objects = lambda leaf: isinstance(leaf, np.ndarray) and leaf.dtype.hasobject
        if any(has_objects(leaf) for leaf in jax.tree.leaves(rows)):
            raise errors.MissingDataError(
                "Expected arrays of numbers from data[ids], got a list that is not one: a batch "
                "is columns of rows, not a list of examples."
            )
        return rows


class AllRows(NamedTuple):
    """Every row of a run at a shape that no request changes: leading axis num_examples.

    ids: -1 and a row of zeros where a row was never seen or is forgotten.
    weights: float64, 1 for a retained row, 0 for one to forget and for padding.
    """

    rows: Batch
    ids: np.ndarray
    weights: np.ndarray


def all_rows(
    reader: RowReader, participation: Participation, ids: np.ndarray, num_examples: int
) -> AllRows:
    """Reads all rows still in the model, those to forget included, in id order.

    Raises:
      RetainSetEmptyError: every row still in the model is to be forgotten.
    """
    seen = seen_ids(participation)
    if len(seen) == len(ids):
        raise errors.RetainSetEmptyError(
            "Expected at least one row to be retained: there is nothing left to fit. Start afresh."
        )
    padded = np.full((num_examples,), -1, np.int32)
    padded[seen] = seen
    weights = (padded >= 0).astype(np.float64)
    weights[ids] = 0.0
    return AllRows(rows=reader(padded), ids=padded, weights=weights)
