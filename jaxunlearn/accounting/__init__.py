"""Epsilon, delta and the noise behind them: float64 and integers on the host, never traced."""

from jaxunlearn.accounting.budget import (
    BUDGET_UNITS,
    Charge,
    charge_release,
    check_capacity,
    check_request,
)
from jaxunlearn.accounting.gaussian import (
    compose_gaussian,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_noise_stddev,
)
from jaxunlearn.accounting.noise import (
    Entropy,
    Release,
    add_grid_noise,
    discrete_gaussian,
    grid_of,
    grid_sensitivity,
)
from jaxunlearn.accounting.release import (
    certified_mu,
    certified_noise,
    discretisation_epsilon,
    release_epsilon,
    release_mu,
)
from jaxunlearn.accounting.removal import (
    LinearModel,
    ResidualBound,
    WorstCase,
    corollary_1,
    linear_remainder,
    newton_distance,
    residual_bound,
    spectral_norm_bound,
    summation_slack,
)
from jaxunlearn.accounting.rounding import round_down, round_up

__all__ = [
    "BUDGET_UNITS",
    "Charge",
    "Entropy",
    "LinearModel",
    "Release",
    "ResidualBound",
    "WorstCase",
    "add_grid_noise",
    "certified_mu",
    "certified_noise",
    "charge_release",
    "check_capacity",
    "check_request",
    "compose_gaussian",
    "corollary_1",
    "discrete_gaussian",
    "discretisation_epsilon",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "gaussian_noise_stddev",
    "grid_of",
    "grid_sensitivity",
    "linear_remainder",
    "newton_distance",
    "release_epsilon",
    "release_mu",
    "residual_bound",
    "round_down",
    "round_up",
    "spectral_norm_bound",
    "summation_slack",
]
