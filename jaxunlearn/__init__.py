"""Optax optimizers with a third function, `forget`."""

from jaxunlearn import (
    accounting,
    adapters,
    certificates,
    datasets,
    errors,
    kernels,
    records,
    unlearners,
)
from jaxunlearn.kernels import check_loss
from jaxunlearn.records import oracle
from jaxunlearn.types import (
    Budget,
    Data,
    ExactLearner,
    ForgetInfo,
    Forgotten,
    Quote,
    Status,
    Unlearner,
    UnlearnerState,
    released,
)

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Data",
    "ExactLearner",
    "ForgetInfo",
    "Forgotten",
    "Quote",
    "Status",
    "Unlearner",
    "UnlearnerState",
    "accounting",
    "adapters",
    "certificates",
    "check_loss",
    "datasets",
    "errors",
    "kernels",
    "oracle",
    "records",
    "released",
    "unlearners",
]
