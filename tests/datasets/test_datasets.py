"""The data sets are the right rows, under the data protocol, and say so when they are not."""

import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from jaxunlearn import datasets, types
from jaxunlearn.errors import (
    DatasetChecksumError,
    DatasetMissingError,
    JaxUnlearnError,
    MissingExtraError,
)

SKLEARN_NAMES = ("breast_cancer", "diabetes", "digits", "iris", "wine")
FILE_NAMES = ("adult", "cifar10", "mnist")


@pytest.fixture
def data_folder():
    """The folder that JAXUNLEARN_DATA names; the test is skipped where it names none."""
    folder = os.environ.get("JAXUNLEARN_DATA")
    if not folder:
        pytest.skip("JAXUNLEARN_DATA is not set")
    return pathlib.Path(folder)


@pytest.fixture
def without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)


@pytest.fixture
def layout():
    """Four small arrays in the MNIST layout."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 4, 5), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "x_test": rng.integers(0, 256, (3, 4, 5), dtype=np.uint8),
        "y_test": np.array([2, 1, 0], np.uint8),
    }


def small_dataset(num_examples=7):
    rows = np.arange(2 * num_examples, dtype=np.uint8).reshape(num_examples, 2)
    return datasets.Dataset(rows, np.arange(num_examples) % 3, divisor=255)


def logistic_regression(split, *, strength):
    """Training and test accuracy and the coefficients' norm of scikit-learn's own fit."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = split.train.arrays(), split.test.arrays()
    # The reference fits were made in float64, to a gradient of 1e-6.
    fit = linear_model.LogisticRegression(C=strength, tol=1e-6, max_iter=5000)
    fit.fit(train["x"].astype(np.float64), train["y"])
    return (
        fit.score(train["x"].astype(np.float64), train["y"]),
        fit.score(test["x"].astype(np.float64), test["y"]),
        np.linalg.norm(fit.coef_),
    )


# The protocol.


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint64])
def test_a_batch_holds_the_rows_of_the_ids_in_their_order(dtype):
    batch = small_dataset()[np.array([5, 0, 5, 3], dtype)]
    np.testing.assert_array_equal(batch["x"] * 255, [[10, 11], [0, 1], [10, 11], [6, 7]])
    np.testing.assert_array_equal(batch["y"], [2, 0, 2, 0])


@pytest.mark.parametrize("name", SKLEARN_NAMES)
def test_every_small_set_meets_the_protocol(name):
    pytest.importorskip("sklearn")
    check_protocol(datasets.load(name))


@pytest.mark.data
@pytest.mark.parametrize("name", FILE_NAMES)
def test_every_set_from_a_file_meets_the_protocol(data_folder, name):
    check_protocol(datasets.load(name))


def check_protocol(split):
    for part in split:
        assert isinstance(part, types.Data)
        assert len(part) == part.num_examples > 0
        ids = np.array([len(part) - 1, 0, 1], np.int32)
        batch = part[ids]
        assert set(batch) == {"x", "y"}
        assert batch["x"].dtype == np.float32
        assert batch["x"].shape[0] == 3
        assert batch["y"].shape == (3,)
        assert np.isfinite(batch["x"]).all()
        everything = part.arrays()
        for leaf in ("x", "y"):
            np.testing.assert_array_equal(batch[leaf], everything[leaf][ids])
        if part.num_classes is None:
            assert batch["y"].dtype == np.float32
        else:
            assert batch["y"].dtype == np.int32
            np.testing.assert_array_equal(np.unique(everything["y"]), np.arange(part.num_classes))
    assert split.train.num_classes == split.test.num_classes
    assert split.train[np.array([0])]["x"].shape == split.test[np.array([0])]["x"].shape


def test_an_empty_batch_keeps_shapes_and_dtypes():
    batch = small_dataset()[np.zeros(0, np.int32)]
    assert batch["x"].shape == (0, 2)
    assert batch["x"].dtype == np.float32
    assert batch["y"].shape == (0,)


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**40)])
def test_an_id_out_of_range_raises_and_never_wraps_around(bad):
    with pytest.raises(IndexError, match=rf"0\.\.6.*{bad}"):
        small_dataset()[np.array([0, bad, 1])]


def test_an_id_beyond_int64_does_not_wrap_around():
    with pytest.raises(IndexError, match=str(2**64 - 1)):
        small_dataset()[np.array([2**64 - 1], np.uint64)]


@pytest.mark.parametrize(
    "bad", [np.array([True, False]), np.array([0.0]), 3, slice(0, 2), "x", np.zeros((1, 1), int)]
)
def test_ids_that_are_not_a_vector_of_integers_are_refused(bad):
    with pytest.raises(TypeError, match="integer ids of shape"):
        small_dataset()[bad]


def test_bytes_stay_bytes_until_a_batch_is_asked_for():
    rows = np.array([[0, 51, 255]], np.uint8)
    ds = datasets.Dataset(rows, np.array([0]), divisor=255, row_shape=(3, 1))
    assert ds.rows.dtype == np.uint8
    assert np.shares_memory(ds.rows, rows)
    np.testing.assert_array_equal(ds[np.array([0])]["x"], np.float32([[[0.0], [0.2], [1.0]]]))


def test_float64_rows_and_targets_keep_their_dtype():
    batch = datasets.Dataset(np.eye(2), np.array([0.5, 1.5])).arrays()
    assert batch["x"].dtype == batch["y"].dtype == np.float64


def test_neither_the_dataset_nor_a_batch_gives_write_access_to_the_rows():
    rows = np.zeros((3, 2), np.float32)
    ds = datasets.Dataset(rows, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="read-only"):
        ds.rows[0, 0] = 1
    ds[np.array([0])]["x"][:] = 7
    ds.arrays()["x"][:] = 7
    np.testing.assert_array_equal(ds.rows, 0)
    rows[0, 0] = 1  # the caller's own array stays the caller's


def test_subsets_number_their_ids_from_zero():
    ds = small_dataset()
    np.testing.assert_array_equal(ds.subset(np.array([4, 2])).labels, [1, 2])
    np.testing.assert_array_equal(ds.where(ds.labels == 1).rows[:, 0], [2, 8])
    np.testing.assert_array_equal(ds.take(2).arrays()["x"], ds[np.array([0, 1])]["x"])
    with pytest.raises(IndexError, match=r"0\.\.1"):
        ds.take(2)[np.array([2])]
    assert ds.where(ds.labels == 1).num_classes == 3


def test_two_classes_make_a_binary_problem():
    ds = datasets.Dataset(np.eye(4), np.array([3, 8, 5, 8]))
    pair = ds.where(np.isin(ds.labels, (3, 8))).relabel({3: 0, 8: 1})
    assert pair.num_classes == 2
    np.testing.assert_array_equal(pair.labels, [0, 1, 1])
    with pytest.raises(ValueError, match=r"none given for \[5\]"):
        ds.relabel({3: 0, 8: 1})


@pytest.mark.parametrize(
    ("select", "error"),
    [
        (lambda ds: ds.take(8), IndexError),
        (lambda ds: ds.take(-1), IndexError),
        (lambda ds: ds.subset(np.array([-1])), IndexError),
        (lambda ds: ds.where(np.arange(7)), ValueError),
        (lambda ds: ds.where(np.ones(6, bool)), ValueError),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(select, error):
    with pytest.raises(error, match="Expected"):
        select(small_dataset())


@pytest.mark.parametrize(
    ("rows", "labels", "options"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), {}),
        (np.zeros((3, 2)), np.zeros((3, 1), int), {}),
        (np.zeros((3, 2)), np.array([0, -1, 1]), {}),
        (np.zeros((3, 2)), np.array([0, 1, 2]), {"num_classes": 2}),
        (np.zeros((3, 2)), np.zeros(3), {"num_classes": 2}),
        (np.zeros((3, 2)), np.zeros(3, int), {"row_shape": (3,)}),
        (np.array(["a", "b", "c"]), np.zeros(3, int), {}),
        (np.zeros((3, 2), object), np.zeros(3, int), {}),
        (np.zeros((3, 2)), np.zeros(3, bool), {}),
    ],
)
def test_rows_and_labels_that_do_not_fit_are_refused(rows, labels, options):
    with pytest.raises(ValueError, match="Expected"):
        datasets.Dataset(rows, labels, **options)


# The right rows.


def test_digits_agree_with_the_reference_accuracies():
    pytest.importorskip("sklearn")
    split = datasets.digits(flatten=True)
    assert (len(split.train), len(split.test)) == (1500, 297)
    train, test, norm = logistic_regression(split, strength=1.0)
    assert train == pytest.approx(0.98933, abs=1e-3)
    assert test == pytest.approx(0.91582, abs=4e-3)
    assert norm == pytest.approx(17.13303, rel=1e-3)


def test_breast_cancer_agrees_with_the_reference_accuracies():
    pytest.importorskip("sklearn")
    split = datasets.breast_cancer()
    assert (len(split.train), len(split.test)) == (400, 169)
    train, test, norm = logistic_regression(split, strength=1.0)
    assert train == pytest.approx(0.9825, abs=1e-6)
    assert test == pytest.approx(0.97041, abs=1e-5)
    assert norm == pytest.approx(3.42961, rel=1e-3)


@pytest.mark.slow
@pytest.mark.data
def test_adult_agrees_with_the_reference_accuracies(data_folder):
    split = datasets.adult()
    assert split.train.arrays()["x"].shape == (32561, 108)
    train, test, norm = logistic_regression(split, strength=1.0)
    assert train == pytest.approx(0.85308, abs=2e-4)
    assert test == pytest.approx(0.85314, abs=2e-4)
    assert norm == pytest.approx(6.13540, rel=2e-3)


@pytest.mark.slow
@pytest.mark.data
def test_mnist_agrees_with_the_reference_accuracies(data_folder):
    split = datasets.mnist(flatten=True)
    assert (len(split.train), len(split.test)) == (60000, 10000)
    first = split._replace(train=split.train.take(10000))
    train, test, norm = logistic_regression(first, strength=0.01)
    assert train == pytest.approx(0.9148, abs=5e-4)
    assert test == pytest.approx(0.9025, abs=5e-4)
    assert norm == pytest.approx(5.49044, rel=1e-3)


@pytest.mark.parametrize("name", ["wine", "iris"])
def test_both_parts_of_a_set_sorted_by_class_hold_every_class_alike(name):
    pytest.importorskip("sklearn")
    split = datasets.load(name)
    assert len(split.train) in (143, 120)
    shares = [np.bincount(part.labels) / len(part) for part in split]
    np.testing.assert_allclose(*shares, atol=0.05)


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "iris", "wine"])
def test_standardising_uses_training_rows_only(name):
    pytest.importorskip("sklearn")
    split, plain = datasets.load(name), datasets.load(name, standardize=False)
    x = split.train.arrays()["x"].astype(np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=0), 1, rtol=1e-5)
    raw_train, raw_test = (part.arrays()["x"].astype(np.float64) for part in plain)
    np.testing.assert_allclose(
        split.test.arrays()["x"],
        (raw_test - raw_train.mean(axis=0)) / raw_train.std(axis=0),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.data
def test_adult_is_six_numbers_and_eight_one_hot_columns(data_folder):
    train, test = datasets.adult()
    for part in (train, test):
        x = part.arrays()["x"]
        np.testing.assert_array_equal(x[:, 6:].sum(axis=1), 8)
        np.testing.assert_array_equal(np.unique(x[:, 6:]), [0, 1])
    numeric = train.arrays()["x"][:, :6].astype(np.float64)
    np.testing.assert_allclose(numeric.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(numeric.std(axis=0), 1, rtol=1e-6)
    assert train.feature_names[:2] == ("age", "fnlwgt")
    assert len(train.feature_names) == 108
    private = train.feature_names.index("workclass=Private")
    assert train.arrays()["x"][:, private].sum() == 22696  # as the UCI description counts


@pytest.mark.data
def test_images_are_the_stored_bytes_over_255(data_folder):
    for name in ("mnist", "cifar10"):
        with np.load(
            data_folder / f"{'mnist' if name == 'mnist' else 'cifar10_lossless_4k1k'}.npz"
        ) as raw:
            stored, labels = raw["x_test"], raw["y_test"]
        test = datasets.load(name).test
        assert test.rows.dtype == np.uint8
        ids = np.array([3, 999, 0])
        images = test[ids]["x"]
        assert images.shape == (3, *stored.shape[1:3], 1 if name == "mnist" else 3)
        np.testing.assert_array_equal(
            images.reshape(3, *stored.shape[1:]), stored[ids].astype(np.float32) / np.float32(255)
        )
        np.testing.assert_array_equal(test[ids]["y"], labels[ids])
        flat = datasets.load(name, flatten=True).test[ids]["x"]
        np.testing.assert_array_equal(flat, images.reshape(3, -1))


def test_digits_are_sixteenths_as_vectors_or_as_images():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    pixels = sklearn_datasets.load_digits().data
    flat, images = datasets.digits(flatten=True), datasets.digits()
    np.testing.assert_array_equal(flat.train.arrays()["x"], pixels[:1500] / 16)
    np.testing.assert_array_equal(flat.test.arrays()["x"], pixels[1500:] / 16)
    np.testing.assert_array_equal(
        images.train.arrays()["x"], pixels[:1500].reshape(-1, 8, 8, 1) / 16
    )


@pytest.mark.data
@pytest.mark.parametrize("name", SKLEARN_NAMES)
def test_small_sets_are_the_same_with_and_without_scikit_learn(data_folder, name, request):
    pytest.importorskip("sklearn")
    with_sklearn = datasets.load(name)
    request.getfixturevalue("without_sklearn")
    for ours, other in zip(with_sklearn, datasets.load(name), strict=True):
        for leaf in ("x", "y"):
            np.testing.assert_array_equal(ours.arrays()[leaf], other.arrays()[leaf])


# What is missing or wrong.


@pytest.mark.parametrize("name", FILE_NAMES)
def test_an_unset_variable_is_named_with_the_file_and_its_layout(monkeypatch, name):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    with pytest.raises(DatasetMissingError, match=rf"JAXUNLEARN_DATA is not set.*{name}.*_train"):
        datasets.load(name)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_missing_file_is_named_with_the_place_looked_in(monkeypatch, tmp_path, name):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    with pytest.raises(DatasetMissingError, match=rf"{tmp_path}/{name}.*JAXUNLEARN_DATA.*SHA-256"):
        datasets.load(name)


def test_without_scikit_learn_and_data_folder_the_extra_is_named(monkeypatch, without_sklearn):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install jaxunlearn\[data\].*sklearn_small"):
        datasets.digits()


def test_a_file_with_one_bit_flipped_is_refused(data_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    copy = tmp_path / "adult.npz"
    shutil.copyfile(data_folder / "adult.npz", copy)
    datasets.adult()  # untouched, and now known as good
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    os.utime(copy, ns=(copy.stat().st_atime_ns, copy.stat().st_mtime_ns + 1))
    with pytest.raises(DatasetChecksumError, match=r"adult\.npz, got [0-9a-f]{64}"):
        datasets.adult()


def test_an_unchanged_file_is_hashed_once(data_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    shutil.copyfile(data_folder / "adult.npz", tmp_path / "adult.npz")
    calls = []
    real = datasets.files.hashlib.file_digest
    monkeypatch.setattr(
        datasets.files.hashlib, "file_digest", lambda *a: calls.append(a) or real(*a)
    )
    datasets.adult()
    datasets.adult()
    assert len(calls) == 1


def test_another_file_under_the_name_of_mnist_is_refused(tmp_path, layout):
    np.savez(tmp_path / "mnist.npz", **layout)
    with pytest.raises(DatasetChecksumError, match=r"datasets\.npz\(path\)"):
        datasets.mnist(tmp_path / "mnist.npz")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"adult, .*wine, got 'imagenet'"):
        datasets.load("imagenet")
    assert datasets.names() == tuple(sorted(SKLEARN_NAMES + FILE_NAMES))


# Any file in the MNIST layout.


def test_a_file_in_the_mnist_layout_loads_by_path(tmp_path, layout):
    np.savez_compressed(tmp_path / "mine.npz", **layout)
    train, test = datasets.npz(tmp_path / "mine.npz")
    assert (train.name, train.num_classes, len(train), len(test)) == ("mine", 3, 6, 3)
    assert train.rows.dtype == np.uint8
    np.testing.assert_array_equal(test.arrays()["x"][..., 0], layout["x_test"] / np.float32(255))
    flat = datasets.npz(str(tmp_path / "mine.npz"), flatten=True, num_classes=5).train
    assert flat.arrays()["x"].shape == (6, 20)
    assert flat.num_classes == 5


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_only_bytes_in_a_file_are_rescaled(tmp_path, layout, dtype):
    layout |= {key: layout[key].astype(dtype) for key in ("x_train", "x_test")}
    np.savez(tmp_path / "numbers.npz", **layout)
    x = datasets.npz(tmp_path / "numbers.npz").train.arrays()["x"]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[..., 0], layout["x_train"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, r"missing y_test; it holds x_train, y_train, x_test"),
        ({"y_train": np.zeros(5, np.uint8)}, r"y_train of shape \(6,\).*\(5,\)"),
        ({"y_train": np.zeros((6, 1), np.uint8)}, r"y_train of shape \(6,\).*\(6, 1\)"),
        ({"y_test": np.array([0.0, 1.0, 2.0])}, r"integer y_test"),
        ({"y_test": np.array([0, -1, 2])}, r"labels in 0\.\.2, got -1"),
        ({"x_test": np.zeros((3, 5, 4), np.uint8)}, r"one shape.*\(6, 4, 5\).*\(3, 5, 4\)"),
        ({"x_train": np.zeros(6, np.uint8)}, r"x_train of shape \(N, \.\.\.\)"),
        ({"x_train": np.full((6, 4, 5), "a")}, r"numeric x_train"),
        ({"x_test": np.zeros((0, 4, 5), np.uint8), "y_test": np.zeros(0, int)}, r"at least one"),
        ({"x_train": np.full((6, 4, 5), None, object)}, r"readable numeric arrays"),
    ],
)
def test_a_wrong_layout_is_named(tmp_path, layout, change, message):
    arrays = {key: value for key, value in (layout | change).items() if value is not None}
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        datasets.npz(tmp_path / "wrong.npz")


def test_a_label_beyond_the_declared_classes_is_refused(tmp_path, layout):
    np.savez(tmp_path / "mine.npz", **layout)
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2"):
        datasets.npz(tmp_path / "mine.npz", num_classes=2)


def test_a_file_of_another_kind_is_refused(tmp_path, layout):
    (tmp_path / "text.npz").write_text("no arrays here")
    np.save(tmp_path / "one.npy", layout["x_train"])
    np.savez(tmp_path / "whole.npz", **layout)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("text.npz", "one.npy", "cut.npz"):
        with pytest.raises(ValueError, match=r"Expected an \.npz file"):
            datasets.npz(tmp_path / name)
    with pytest.raises(DatasetMissingError, match="absent"):
        datasets.npz(tmp_path / "absent.npz")


@pytest.mark.parametrize("error", [DatasetMissingError, DatasetChecksumError, MissingExtraError])
def test_one_except_clause_catches_every_error_of_the_loaders(error):
    assert issubclass(error, JaxUnlearnError)
