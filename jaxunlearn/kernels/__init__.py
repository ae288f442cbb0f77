"""Kernels: a loss function goes in, a function comes out. Pure JAX; the caller jits and vmaps."""

from jaxunlearn.kernels import lbfgs
from jaxunlearn.kernels.clipping import (
    AuxiliaryOutput,
    BoundedSensitivityCallable,
    clipped_grad,
)
from jaxunlearn.kernels.coupling import check_loss
from jaxunlearn.kernels.estimators import (
    Estimate,
    hutch_pp_trace,
    hutchinson_diagonal,
    hutchinson_trace,
)
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.fisher import (
    Likelihood,
    bernoulli,
    categorical,
    discrete,
    empirical_fisher_vp,
    empirical_fisher_vp_many,
    fisher_vp,
    fisher_vp_many,
    gaussian,
    poisson,
)
from jaxunlearn.kernels.gradients import GradientInfo, weighted_grad, weighted_loss
from jaxunlearn.kernels.microbatches import microbatched
from jaxunlearn.kernels.newton import RemovalFigures, feature_gram, newton_step, removal_figures
from jaxunlearn.kernels.operators import (
    LinearOperator,
    empirical_fisher_operator,
    fisher_operator,
    ggn_operator,
    hessian_operator,
)
from jaxunlearn.kernels.per_example import per_example
from jaxunlearn.kernels.perturbed import PerturbedFigures, perturbed_step
from jaxunlearn.kernels.precision import check_float64, narrowings
from jaxunlearn.kernels.products import ggn_vp, ggn_vp_many, hvp, hvp_many
from jaxunlearn.kernels.retained import CachedStep, Foretold, WeightedRows, retained_gradients
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
from jaxunlearn.kernels.sums import LossSums, loss_sums
from jaxunlearn.kernels.tangents import StateTangents, Tangents, TrackLeaves, state_tangents

__all__ = [
    "AuxiliaryOutput",
    "BoundedSensitivityCallable",
    "CachedStep",
    "Estimate",
    "Foretold",
    "GradientInfo",
    "Likelihood",
    "LinearOperator",
    "LossSums",
    "NystromApproximation",
    "PerExampleGradients",
    "PerturbedFigures",
    "RemovalFigures",
    "Solution",
    "Solver",
    "StateTangents",
    "Tangents",
    "TrackLeaves",
    "WeightedRows",
    "bernoulli",
    "block_cg",
    "categorical",
    "cg",
    "check_float64",
    "check_loss",
    "cholesky",
    "clipped_grad",
    "discrete",
    "empirical_fisher_operator",
    "empirical_fisher_vp",
    "empirical_fisher_vp_many",
    "example_keys",
    "feature_gram",
    "fisher_operator",
    "fisher_vp",
    "fisher_vp_many",
    "gaussian",
    "ggn_operator",
    "ggn_vp",
    "ggn_vp_many",
    "hessian_operator",
    "hutch_pp_trace",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hvp",
    "hvp_many",
    "jacobi",
    "lbfgs",
    "lissa",
    "loss_sums",
    "microbatched",
    "minres",
    "narrowings",
    "neumann",
    "newton_step",
    "nystrom",
    "per_example",
    "perturbed_step",
    "poisson",
    "refined",
    "removal_figures",
    "retained_gradients",
    "row_losses",
    "spectral_radius",
    "state_tangents",
    "takes_key",
    "weighted_grad",
    "weighted_loss",
    "woodbury",
]
