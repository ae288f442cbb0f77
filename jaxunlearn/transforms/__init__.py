"""Plain Optax transforms for training: Gaussian noise; online L-BFGS, its steps and admission."""

from jaxunlearn.transforms.admissions import (
    levenberg_damped,
    prudente_souza,
    relative_curvature,
)
from jaxunlearn.transforms.gaussian_noise import GaussianNoiseState, gaussian_noise
from jaxunlearn.transforms.online_lbfgs import (
    AdaptiveRate,
    OnlineLBFGSState,
    inverse_time,
    online_lbfgs,
    step_size,
)
from jaxunlearn.transforms.step_back import PaperDeletion, deletion_noise, make_step_back

__all__ = [
    "AdaptiveRate",
    "GaussianNoiseState",
    "OnlineLBFGSState",
    "PaperDeletion",
    "deletion_noise",
    "gaussian_noise",
    "inverse_time",
    "levenberg_damped",
    "make_step_back",
    "online_lbfgs",
    "prudente_souza",
    "relative_curvature",
    "step_size",
]
