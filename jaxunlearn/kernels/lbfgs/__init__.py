"""L-BFGS: a memory of curvature pairs that can be filled, multiplied with, and made to forget."""

from jaxunlearn.kernels.lbfgs.admission import Admission, cautious, curvature, powell, regularised
from jaxunlearn.kernels.lbfgs.distance import eigenvalue_range, operator_distance
from jaxunlearn.kernels.lbfgs.memory import ages, find, init, owned, push
from jaxunlearn.kernels.lbfgs.products import (
    initial_scale,
    inverse_product,
    inverse_product_many,
    product,
    product_many,
)
from jaxunlearn.kernels.lbfgs.state import LBFGSMemory, is_occupied
from jaxunlearn.kernels.lbfgs.surgery import correct, drop

__all__ = [
    "Admission",
    "LBFGSMemory",
    "ages",
    "cautious",
    "correct",
    "curvature",
    "drop",
    "eigenvalue_range",
    "find",
    "init",
    "initial_scale",
    "inverse_product",
    "inverse_product_many",
    "is_occupied",
    "operator_distance",
    "owned",
    "powell",
    "product",
    "product_many",
    "push",
    "regularised",
]
