"""All rows of a run at once."""

from typing import NamedTuple

import numpy as np

from jaxunlearn import errors
from jaxunlearn.records import Participation, RowReader, seen_ids
from jaxunlearn.types import Batch


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
