"""Where data files are, whether they are the right ones, and what is in them. Never the network."""

import functools
import hashlib
import os
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from jaxunlearn.errors import DatasetChecksumError, DatasetMissingError

VARIABLE = "JAXUNLEARN_DATA"
LAYOUT = ("x_train", "y_train", "x_test", "y_test")


class Source(NamedTuple):
    """A data file that is known byte for byte."""

    filename: str
    sha256: str
    layout: str


_IMAGES = "arrays x_train, y_train, x_test, y_test in uint8; images"
MNIST = Source(
    "mnist.npz",
    "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
    f"{_IMAGES} (60000, 28, 28) and (10000, 28, 28), official order",
)
CIFAR10 = Source(
    "cifar10_lossless_4k1k.npz",
    "227e18cba35fa5a1fd2ec110e73c36123795e4fa40a01a2acc4f87b73d5b202f",
    f"{_IMAGES} (4000, 32, 32, 3) and (1000, 32, 32, 3), the first of the official order",
)
ADULT = Source(
    "adult.npz",
    "e7fae94dcab62e03b01bd36289f7af8dc2b3def327046d7887445a7851920e26",
    "num_train, num_test int32 (N, 6), cat_train, cat_test uint8 codes (N, 8), y_train, y_test, "
    "num_names, cat_names, and cat_values, the tab-joined values of each categorical column",
)
SKLEARN_SMALL = Source(
    "sklearn_small.npz",
    "7f8b093411d6e7549fc746f328811447c9484eb2cce26ba1f587dfba889354b5",
    "<name>_x and <name>_y for digits, breast_cancer, wine, iris and diabetes, as scikit-learn "
    "gives them",
)


def locate(source: Source, path: str | os.PathLike | None = None) -> pathlib.Path:
    """The file of `source` at `path`, or in the folder `JAXUNLEARN_DATA` names; its bytes checked.

    Raises:
      DatasetMissingError: no such file; the message says where it should be and what is in it.
      DatasetChecksumError: a file of that name with other bytes.
    """
    needed = f"{source.filename} is an .npz file with {source.layout} (SHA-256 {source.sha256})."
    if path is not None:
        found = pathlib.Path(path).expanduser()
    elif folder := os.environ.get(VARIABLE):
        found = pathlib.Path(folder).expanduser() / source.filename
    else:
        raise DatasetMissingError(
            f"{VARIABLE} is not set. Set it to the folder that holds {source.filename}. {needed}"
        )
    if not found.is_file():
        raise DatasetMissingError(
            f"Expected the file {found}, found none. Put {source.filename} there, or set "
            f"{VARIABLE} (now {os.environ.get(VARIABLE)!r}) to the folder that holds it. {needed}"
        )
    about = found.stat()
    digest = _sha256(str(found.resolve()), about.st_mtime_ns, about.st_size)
    if digest != source.sha256:
        raise DatasetChecksumError(
            f"Expected SHA-256 {source.sha256} for {found}, got {digest}. The file is damaged or "
            "another one: fetch it again. datasets.npz(path) loads other data in the MNIST layout."
        )
    return found


def read(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file. Object arrays are refused: nothing is unpickled.

    Raises:
      ValueError: not an .npz file, an array missing, or one that cannot be read.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected an .npz file (np.savez), {path} is not one.")
    with np.load(path, allow_pickle=False) as archive:
        missing = [name for name in names if name not in archive.files]
        if missing:
            raise ValueError(
                f"Expected the arrays {', '.join(names)} in {path}, missing {', '.join(missing)}; "
                f"it holds {', '.join(archive.files) or 'nothing'}."
            )
        try:
            return {name: archive[name] for name in names}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"Expected readable numeric arrays {', '.join(names)} in {path}: {error}"
            ) from error


@functools.lru_cache(maxsize=64)
def _sha256(path: str, modified_ns: int, size: int) -> str:
    """SHA-256 of a file, read once per process while its time and size stay the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
