"""Rows in memory, addressed by example id: the data protocol, in NumPy alone."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows and labels that meet the data protocol: `ds[ids]` gives `{"x": ..., "y": ...}`.

    Row i of `rows` is example id i. The arrays are held as read-only views of what was passed, in
    the dtype they came in, and converted one batch at a time: `x = rows[ids] / divisor`, integers
    as float32 and floats in their own dtype. MNIST therefore stays uint8, 47 MB rather than 188.

    Args:
      rows: shape (N, ...), integers or floats.
      labels: shape (N,); integers are classes from 0 and come out as int32, floats are targets and
        keep their dtype.
      name: for reports.
      num_classes: None means the largest integer label plus one, or no classes for float targets.
      feature_names: one per feature, or empty.
      divisor: what integers are divided by on the way out, 255 for bytes.
      row_shape: shape of one row of "x", as many elements as stored; None keeps the stored shape.

    Cost: one copy of the batch; nothing is computed at construction.

    Raises:
      ValueError: lengths, shapes, dtypes or labels that do not fit together.

    >>> ds = Dataset(np.array([[0], [51], [255]], np.uint8), np.array([0, 1, 1]), divisor=255)
    >>> batch = ds[np.array([2, 0])]
    >>> batch["x"].tolist(), batch["y"].tolist()
    ([[1.0], [0.0]], [1, 0])
    """

    rows: np.ndarray
    labels: np.ndarray
    _: dataclasses.KW_ONLY
    name: str = "data"
    num_classes: int | None = None
    feature_names: tuple[str, ...] = ()
    divisor: float = 1
    row_shape: tuple[int, ...] | None = None

    def __post_init__(self):
        rows, labels = _read_only(self.rows), _read_only(self.labels)
        if rows.ndim < 1 or labels.shape != rows.shape[:1]:
            raise ValueError(
                f"Expected rows of shape (N, ...) and labels of shape (N,), "
                f"got {rows.shape} and {labels.shape}."
            )
        if rows.dtype.kind not in "iuf" or labels.dtype.kind not in "iuf":
            raise ValueError(
                f"Expected integer or float rows and labels, got {rows.dtype} and {labels.dtype}."
            )
        row_shape = rows.shape[1:] if self.row_shape is None else tuple(self.row_shape)
        if np.prod(row_shape, dtype=np.int64) != np.prod(rows.shape[1:], dtype=np.int64):
            raise ValueError(f"Expected row_shape={row_shape} to hold a row of {rows.shape[1:]}.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "row_shape", row_shape)
        object.__setattr__(self, "num_classes", _num_classes(labels, self.num_classes))
        object.__setattr__(self, "feature_names", tuple(self.feature_names))

    def __getitem__(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of these ids, in their order; repeats are allowed.

        Raises:
          TypeError: ids that are not a one-dimensional array of integers.
          IndexError: an id below 0 or not below `num_examples`. Nothing wraps around.
        """
        index = self._index(ids)
        x = self.rows[index].reshape(index.shape + self._shape)
        if x.dtype.kind != "f":
            x = x.astype(np.float32)
            x /= self.divisor
        y = self.labels[index]
        return {"x": x, "y": y if y.dtype.kind == "f" else y.astype(np.int32)}

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __repr__(self) -> str:
        x_dtype = self.rows.dtype if self.rows.dtype.kind == "f" else np.dtype(np.float32)
        return (
            f"Dataset(name={self.name!r}, num_examples={len(self)}, x={self._shape} {x_dtype}, "
            f"num_classes={self.num_classes})"
        )

    @property
    def num_examples(self) -> int:
        """How many rows there are: ids run from 0 to one below."""
        return len(self)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every row as one batch, in id order."""
        return self[np.arange(len(self))]

    def subset(self, ids: np.ndarray) -> "Dataset":
        """The data set of these rows only. Its ids start again at 0, in the order given."""
        index = self._index(ids)
        return dataclasses.replace(self, rows=self.rows[index], labels=self.labels[index])

    def take(self, num_examples: int) -> "Dataset":
        """The first `num_examples` rows, without a copy; fewer rows than that is an IndexError."""
        if not 0 <= num_examples <= len(self):
            raise IndexError(f"Expected 0 <= num_examples={num_examples} <= {len(self)}.")
        return dataclasses.replace(
            self, rows=self.rows[:num_examples], labels=self.labels[:num_examples]
        )

    def where(self, mask: np.ndarray) -> "Dataset":
        """The rows whose entry in `mask`, booleans of shape (N,), is true. Ids start again at 0.

        >>> ds = Dataset(np.eye(3), np.array([3, 8, 3]))
        >>> ds.where(ds.labels == 3).arrays()["x"].tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise ValueError(
                f"Expected a boolean mask of shape ({len(self)},), got {mask.dtype} {mask.shape}."
            )
        return self.subset(np.flatnonzero(mask))

    def relabel(self, classes: Mapping[int, int]) -> "Dataset":
        """The same rows with every class replaced: `{3: 0, 8: 1}` makes a binary problem of two.

        >>> Dataset(np.eye(3), np.array([3, 8, 3])).relabel({3: 0, 8: 1}).labels.tolist()
        [0, 1, 0]
        """
        if self.num_classes is None:
            raise ValueError("Expected classes to relabel; this data set has float targets.")
        present = np.unique(self.labels).tolist()
        missing = [label for label in present if label not in classes]
        if missing:
            raise ValueError(f"Expected a new label for every class, none given for {missing}.")
        table = np.zeros(self.num_classes, np.int32)
        for label in present:
            table[label] = classes[label]
        return dataclasses.replace(
            self, labels=table[self.labels], num_classes=max(classes.values()) + 1
        )

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one row of "x"."""
        return self.rows.shape[1:] if self.row_shape is None else self.row_shape

    def _index(self, ids: np.ndarray) -> np.ndarray:
        """`ids` as array indices, checked."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise TypeError(
                f"Expected integer ids of shape (B,), got {ids.dtype} of shape {ids.shape}. "
                "Use take, where or subset to select rows."
            )
        bad = (ids < 0) | (ids >= len(self))
        if np.any(bad):
            raise IndexError(
                f"Expected ids in 0..{len(self) - 1} of {self.name!r}, got {ids[bad][0]}."
            )
        return ids.astype(np.intp)


class Split(NamedTuple):
    """Training and test rows; each numbers its ids from 0."""

    train: Dataset
    test: Dataset


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through; the caller's array keeps its own flag."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _num_classes(labels: np.ndarray, num_classes: int | None) -> int | None:
    """The number of classes, checked against the labels; None for float targets."""
    if labels.dtype.kind == "f":
        if num_classes is not None:
            raise ValueError(f"Expected integer labels for num_classes={num_classes}, got floats.")
        return None
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, -1)
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ValueError(f"Expected labels in 0..{num_classes - 1}, got {low}..{high}.")
    return num_classes
