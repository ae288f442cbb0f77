"""Real data sets under the data protocol: `ds[ids]` gives a batch, in NumPy, row by example id.

`digits` and the small tables come with scikit-learn (extra `data`). The others are read from the
folder that the environment variable `JAXUNLEARN_DATA` names and checked byte for byte; nothing is
ever downloaded. `npz` loads your own.
"""

from jaxunlearn.datasets.dataset import Dataset, Split
from jaxunlearn.datasets.loaders import (
    adult,
    breast_cancer,
    cifar10,
    diabetes,
    digits,
    iris,
    load,
    mnist,
    names,
    npz,
    wine,
)

__all__ = [
    "Dataset",
    "Split",
    "adult",
    "breast_cancer",
    "cifar10",
    "diabetes",
    "digits",
    "iris",
    "load",
    "mnist",
    "names",
    "npz",
    "wine",
]
