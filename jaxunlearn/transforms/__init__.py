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

__all__ = [
    "AdaptiveRate",
    "OnlineLBFGSState",
    "inverse_time",
    "levenberg_damped",
    "online_lbfgs",
    "prudente_souza",
    "relative_curvature",
    "step_size",
]
