"""One function for each data set: a `Split` of training and test rows, always the same rows."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from jaxunlearn.datasets import files
from jaxunlearn.datasets.dataset import Dataset, Split
from jaxunlearn.errors import DatasetMissingError, MissingExtraError


def digits(*, flatten: bool = False) -> Split:
    """Handwritten digits, 8 by 8, ten classes: rows 0..1499 train, the other 297 test. Offline.

    x is float32 in [0, 1] (sixteenths, exact), shape (8, 8, 1), or (64,) with `flatten`.

    Raises:
      MissingExtraError: scikit-learn is not installed and `JAXUNLEARN_DATA` has no copy.

    References: Alpaydin and Kaynak (1998), UCI Optical Recognition of Handwritten Digits.
    """
    x, y, names = _small("digits")
    shape = (64,) if flatten else (8, 8, 1)
    full = Dataset(
        x.astype(np.uint8), y, name="digits", divisor=16, row_shape=shape, feature_names=names
    )
    return _split(full, np.arange(len(full)) < 1500)


def mnist(path: str | os.PathLike | None = None, *, flatten: bool = False) -> Split:
    """MNIST, 60000 training and 10000 test rows in the official order, ten classes.

    x is float32 in [0, 1], shape (28, 28, 1), or (784,) with `flatten`. Held as bytes.

    Args:
      path: the file; None means `mnist.npz` in the folder that `JAXUNLEARN_DATA` names. Its bytes
        are checked either way; `npz` loads other data in this layout.

    Raises:
      DatasetMissingError, DatasetChecksumError: the file is absent, or is another one.

    References: LeCun, Cortes and Burges, the MNIST database, CC BY-SA 3.0.
    """
    found = files.locate(files.MNIST, path)
    return _layout(found, name="mnist", flatten=flatten, num_classes=10)


def cifar10(*, flatten: bool = False) -> Split:
    """CIFAR-10, lossless: the first 4000 official training rows and the first 1000 test rows.

    x is float32 in [0, 1], shape (32, 32, 3), or (3072,) with `flatten`. Held as bytes.

    Raises:
      DatasetMissingError, DatasetChecksumError: the file is absent, or is another one.

    References: Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
    """
    found = files.locate(files.CIFAR10)
    return _layout(found, name="cifar10", flatten=flatten, num_classes=10)


def adult() -> Split:
    """Adult (census income), 32561 training and 16281 test rows; class 1 is an income over 50K.

    x is float32 of shape (108,): 6 numeric columns, standardised, then 8 categorical columns, one
    entry for each value ("?" is one). Mean, standard deviation and the list of values come from
    all training rows: a row forgotten later keeps its share in them.

    Raises:
      DatasetMissingError, DatasetChecksumError: the file is absent, or is another one.

    References: Becker and Kohavi (1996), UCI Adult, CC BY 4.0.
    """
    parts = ("num_train", "cat_train", "y_train", "num_test", "cat_test", "y_test")
    names = ("num_names", "cat_names", "cat_values")
    raw = files.read(files.locate(files.ADULT), parts + names)
    values = [str(joined).split("\t") for joined in raw["cat_values"]]
    feature_names = [str(name) for name in raw["num_names"]]
    for name, column in zip(raw["cat_names"], values, strict=True):
        feature_names.extend(f"{name}={value}" for value in column)

    def encode(part):
        codes = raw[f"cat_{part}"]
        one_hot = [
            np.eye(len(column), dtype=np.float32)[codes[:, i]] for i, column in enumerate(values)
        ]
        numeric = _standardized(raw[f"num_{part}"], raw["num_train"])
        return Dataset(
            np.concatenate([numeric, *one_hot], axis=1),
            raw[f"y_{part}"],
            name="adult",
            num_classes=2,
            feature_names=tuple(feature_names),
        )

    return Split(encode("train"), encode("test"))


def breast_cancer(*, standardize: bool = True) -> Split:
    """Breast cancer Wisconsin (diagnostic), 30 features, two classes: the first 400 rows train.

    x is float32 of shape (30,). `standardize` uses mean and standard deviation of all training
    rows: a row forgotten later keeps its share in them. Offline with scikit-learn.

    Raises:
      MissingExtraError: scikit-learn is not installed and `JAXUNLEARN_DATA` has no copy.

    References: Wolberg, Mangasarian, Street and Street (1993), UCI, CC BY 4.0.
    """
    return _table("breast_cancer", lambda n: np.arange(n) < 400, standardize)


def wine(*, standardize: bool = True) -> Split:
    """Wine, 13 features, three classes: 143 rows train, every fifth of the 178 (4, 9, ...) tests.

    The rows are sorted by class, hence every fifth. x, `standardize` and Raises as `breast_cancer`.

    References: Aeberhard and Forina (1992), UCI Wine, CC BY 4.0.
    """
    return _table("wine", _not_every_fifth, standardize)


def iris(*, standardize: bool = True) -> Split:
    """Iris, 4 features, three classes: 120 rows train, every fifth of the 150 (4, 9, ...) tests.

    The rows are sorted by class, hence every fifth. x, `standardize` and Raises as `breast_cancer`.

    References: Fisher (1936), UCI Iris, CC BY 4.0.
    """
    return _table("iris", _not_every_fifth, standardize)


def diabetes(*, standardize: bool = True) -> Split:
    """Diabetes progression, 10 features, a regression: 354 rows train, every fifth of 442 tests.

    y is float32, the progression one year later (25 to 346), unscaled. scikit-learn publishes the
    features already centred and scaled over all 442 rows; `standardize` then brings the training
    rows to unit variance. x and Raises as `breast_cancer`.

    References: Efron, Hastie, Johnstone and Tibshirani (2004), Least Angle Regression.
    """
    return _table("diabetes", _not_every_fifth, standardize)


def npz(path: str | os.PathLike, *, flatten: bool = False, num_classes: int | None = None) -> Split:
    """Any data in the MNIST layout: an .npz file with x_train, y_train, x_test and y_test.

    Fashion-MNIST, USPS or your own. uint8 rows are divided by 255 and held as bytes; other integers
    become float32 and floats keep their dtype, both unscaled. Rows of shape (H, W) come out as
    (H, W, 1), others as they are, or flat with `flatten`. No checksum; nothing is unpickled.

    Args:
      path: the file.
      flatten: whether a row of "x" is a vector.
      num_classes: None means one more than the largest label in either part.

    Raises:
      DatasetMissingError: no such file.
      ValueError: not an .npz file, an array missing, shapes or labels that do not fit.
    """
    found = pathlib.Path(path).expanduser()
    if not found.is_file():
        raise DatasetMissingError(
            f"Expected an .npz file with {', '.join(files.LAYOUT)} at {found}, found none."
        )
    return _layout(found, name=found.stem, flatten=flatten, num_classes=num_classes)


_LOADERS: dict[str, Callable[..., Split]] = {
    "adult": adult,
    "breast_cancer": breast_cancer,
    "cifar10": cifar10,
    "diabetes": diabetes,
    "digits": digits,
    "iris": iris,
    "mnist": mnist,
    "wine": wine,
}


def names() -> tuple[str, ...]:
    """The names that `load` knows, sorted."""
    return tuple(_LOADERS)


def load(name: str, **options) -> Split:
    """The data set of that name; `options` go to its loader.

    Raises:
      ValueError: a name that is not in `names()`.
    """
    if name not in _LOADERS:
        raise ValueError(f"Expected one of {', '.join(names())}, got {name!r}.")
    return _LOADERS[name](**options)


def _layout(path: pathlib.Path, *, name: str, flatten: bool, num_classes: int | None) -> Split:
    """A file in the MNIST layout as a split, checked."""
    raw = files.read(path, files.LAYOUT)
    _check_layout(path, raw)
    if num_classes is None:
        num_classes = 1 + max(int(raw["y_train"].max()), int(raw["y_test"].max()))

    def part(which):
        x = raw[f"x_{which}"]
        shape = (*x.shape[1:], 1) if x.ndim == 3 else x.shape[1:]
        return Dataset(
            x,
            raw[f"y_{which}"],
            name=name,
            num_classes=num_classes,
            divisor=255 if x.dtype == np.uint8 else 1,
            row_shape=(int(np.prod(shape)),) if flatten else shape,
        )

    return Split(part("train"), part("test"))


def _check_layout(path: pathlib.Path, raw: dict[str, np.ndarray]) -> None:
    """Raises ValueError where the four arrays do not fit together; `Dataset` checks the rest."""
    for which in ("train", "test"):
        x, y = raw[f"x_{which}"], raw[f"y_{which}"]
        if x.ndim < 2 or x.dtype.kind not in "iuf":
            raise ValueError(
                f"Expected numeric x_{which} of shape (N, ...) in {path}, got {x.dtype} {x.shape}."
            )
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not y.size:
            raise ValueError(
                f"Expected integer y_{which} of shape ({x.shape[0]},) in {path}, at least one row, "
                f"got {y.dtype} {y.shape}."
            )
    if raw["x_train"].shape[1:] != raw["x_test"].shape[1:]:
        raise ValueError(
            f"Expected rows of one shape in {path}, got x_train {raw['x_train'].shape} and "
            f"x_test {raw['x_test'].shape}."
        )


def _table(name: str, is_train: Callable[[int], np.ndarray], standardize: bool) -> Split:
    """A small scikit-learn table as a float32 split."""
    x, y, feature_names = _small(name)
    train = is_train(len(x))
    x = _standardized(x, x[train]) if standardize else x.astype(np.float32)
    y = y.astype(np.float32) if y.dtype.kind == "f" else y
    return _split(Dataset(x, y, name=name, feature_names=feature_names), train)


def _small(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Features, labels and feature names: from scikit-learn, else from the data folder."""
    try:
        from sklearn import datasets as sklearn_datasets
    except ImportError as error:
        try:
            found = files.locate(files.SKLEARN_SMALL)
        except DatasetMissingError as missing:
            raise MissingExtraError(
                f"The {name} data comes with scikit-learn: pip install jaxunlearn[data]. "
                f"Without it: {missing}"
            ) from error
        raw = files.read(found, (f"{name}_x", f"{name}_y"))
        return raw[f"{name}_x"], raw[f"{name}_y"], ()
    bunch = getattr(sklearn_datasets, f"load_{name}")()
    return bunch.data, bunch.target, tuple(str(feature) for feature in bunch.feature_names)


def _standardized(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(x - mean) / stddev of `reference`, as float32; a constant column becomes zero."""
    mean, stddev = reference.mean(axis=0), reference.std(axis=0)
    return ((x - mean) / np.where(stddev > 0, stddev, 1.0)).astype(np.float32)


def _split(full: Dataset, train: np.ndarray) -> Split:
    """Training rows where `train` is true, test rows elsewhere."""
    return Split(full.where(train), full.where(~train))


def _not_every_fifth(num_rows: int) -> np.ndarray:
    """False at rows 4, 9, 14, ..."""
    return np.arange(num_rows) % 5 != 4
