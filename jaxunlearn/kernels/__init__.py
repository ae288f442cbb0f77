"""Kernels: a loss function goes in, a function comes out. Pure JAX; the caller jits and vmaps."""

from jaxunlearn.kernels import lbfgs
from jaxunlearn.kernels.clipping import (
    AuxiliaryOutput,
    BoundedSensitivityCallable,
    clipped_grad,
)
from jaxunlearn.kernels.coupling import check_loss
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.gradients import GradientInfo, weighted_grad, weighted_loss
from jaxunlearn.kernels.microbatches import microbatched
from jaxunlearn.kernels.newton import RemovalFigures, feature_gram, newton_step, removal_figures
from jaxunlearn.kernels.per_example import per_example
from jaxunlearn.kernels.precision import check_float64, narrowings
from jaxunlearn.kernels.products import hvp, hvp_many
from jaxunlearn.kernels.rowwise import example_keys, row_losses, takes_key
from jaxunlearn.kernels.solves import (
    NystromApproximation,
    Solution,
    Solver,
    block_cg,
    cg,
    cholesky,
    jacobi,
    lissa,
    minres,
    neumann,
    nystrom,
    refined,
    spectral_radius,
    woodbury,
)

__all__ = [
    "AuxiliaryOutput",
    "BoundedSensitivityCallable",
    "GradientInfo",
    "NystromApproximation",
    "PerExampleGradients",
    "RemovalFigures",
    "Solution",
    "Solver",
    "block_cg",
    "cg",
    "check_float64",
    "check_loss",
    "cholesky",
    "clipped_grad",
    "example_keys",
    "feature_gram",
    "hvp",
    "hvp_many",
    "jacobi",
    "lissa",
    "lbfgs",
    "microbatched",
    "minres",
    "narrowings",
    "neumann",
    "newton_step",
    "nystrom",
    "per_example",
    "refined",
    "removal_figures",
    "row_losses",
    "spectral_radius",
    "takes_key",
    "weighted_grad",
    "weighted_loss",
    "woodbury",
]
