"""Plain Optax transforms for training: online L-BFGS, its step sizes, its admission rules."""

from jaxunlearn.transforms.admissions import (
    levenberg_damped,
    prudente_souza,
    relative_curvature,
)
from jaxunlearn.transforms.online_lbfgs import (
    AdaptiveRate,
    OnlineLBFGSState,
    inverse_time,
    online_lbfgs,
    step_size,
)
from jaxunlearn.transforms.step_back import PaperDeletion, gaussian_noise, make_step_back

__all__ = [
    "AdaptiveRate",
    "OnlineLBFGSState",
    "PaperDeletion",
    "gaussian_noise",
    "inverse_time",
    "levenberg_damped",
    "make_step_back",
    "online_lbfgs",
    "prudente_souza",
    "relative_curvature",
    "step_size",
]
