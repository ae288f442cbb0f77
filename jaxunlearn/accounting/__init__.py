"""Epsilon, delta and the noise behind them: float64 and integers on the host, never traced.

Every bound names its theorem and its direction. Marks in docstrings: [D] derived there, [C] read in
the authors' code, [S] read in a secondary source, [R] recalled. Where a paper's constant is no more
than recalled, or is looser than what can be derived, the derived bound is the default and
`paper_constants=True` gives the paper's.
"""

from jaxunlearn.accounting.amounts import (
    amount_below,
    amount_of,
    split_budget,
    units_down,
    units_up,
)
from jaxunlearn.accounting.budget import (
    BUDGET_UNITS,
    Charge,
    charge_release,
    check_capacity,
    check_request,
    odometer_of,
    worst_case_noise,
)
from jaxunlearn.accounting.capacity import (
    StronglyConvex,
    capacity_ceiling,
    dp_capacity_order,
    newton_beats_output_perturbation,
    newton_capacity_order,
    sample_complexity,
    strongly_convex_capacity,
)
from jaxunlearn.accounting.composition import (
    Privacy,
    basic_composition,
    group_privacy,
    optimal_composition,
)
from jaxunlearn.accounting.contraction import (
    NoisySteps,
    Stationarity,
    contract,
    contraction_rate,
    renyi_decay,
    stationary_lsi,
    steps_to_stationary_target,
    steps_to_unlearn,
)
from jaxunlearn.accounting.convex import (
    LossConstants,
    balanced_l2,
    classic_noise,
    stored_noise,
)
from jaxunlearn.accounting.descent_to_delete import (
    Descent,
    Schedule,
    full_state_mu,
    full_state_schedule,
    output_only_noise,
)
from jaxunlearn.accounting.distances import (
    deep_newton_distance,
    minimiser_distance,
    recollection_distance,
    rewind_distance,
)
from jaxunlearn.accounting.dp_training import (
    dp_training_epsilon,
    dp_training_noise,
)
from jaxunlearn.accounting.finetuning import (
    ClippedSteps,
    best_num_steps,
    clipped_finetuning_mu,
    clipped_finetuning_noise,
)
from jaxunlearn.accounting.gaussian import (
    compose_gaussian,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_noise_stddev,
)
from jaxunlearn.accounting.hockey_stick import (
    hockey_stick_recursion,
    model_clipping_noise,
    model_clipping_steps,
)
from jaxunlearn.accounting.iteration import (
    contracted_mu,
    iteration_mu,
)
from jaxunlearn.accounting.langevin import (
    langevin_curve,
    langevin_learning_curve,
    langevin_steps,
)
from jaxunlearn.accounting.memory_pair import (
    Capacity,
    DeletionOdometer,
    OdometerQuote,
    RegretModel,
    composed_noise,
    deletion_capacity,
    largest_within,
    published_noise,
    zcdp_noise,
)
from jaxunlearn.accounting.noise import (
    Entropy,
    Release,
    add_grid_noise,
    cast_sensitivity,
    discrete_gaussian,
    grid_of,
    grid_sensitivity,
    source_of,
)
from jaxunlearn.accounting.noisy_sgd import (
    NoisySGD,
    noisy_sgd_epochs,
)
from jaxunlearn.accounting.odometer import (
    Alarm,
    Odometer,
    Option,
    Preview,
    Request,
    Spent,
)
from jaxunlearn.accounting.per_instance import (
    InstanceLoss,
    holder_orders,
    holder_weights,
    per_instance_loss,
    step_losses,
)
from jaxunlearn.accounting.perturbed import objective_noise, perturbed_residual
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
from jaxunlearn.accounting.renyi import (
    RenyiCurve,
    renyi_delta,
    renyi_epsilon,
    renyi_group,
    renyi_triangle,
)
from jaxunlearn.accounting.residual_budget import (
    removal_budget,
    removals_within,
    total_residual,
    worst_case_residual,
)
from jaxunlearn.accounting.rounding import (
    round_down,
    round_up,
)
from jaxunlearn.accounting.sharding import (
    sharded_retraining,
    slice_epochs,
    sliced_retraining,
)
from jaxunlearn.accounting.subsampled import (
    SUBSAMPLED_ORDERS,
    subsampled_curve,
    subsampled_group_divergence,
    subsampled_log_moment,
    subsampled_log_moments,
)
from jaxunlearn.accounting.zcdp import (
    compose_zcdp,
    group_zcdp,
    zcdp_budget,
    zcdp_delta,
    zcdp_epsilon,
    zcdp_rho,
)

__all__ = [
    "BUDGET_UNITS",
    "SUBSAMPLED_ORDERS",
    "Alarm",
    "Capacity",
    "Charge",
    "ClippedSteps",
    "DeletionOdometer",
    "Descent",
    "Entropy",
    "InstanceLoss",
    "LinearModel",
    "LossConstants",
    "NoisySGD",
    "NoisySteps",
    "Odometer",
    "OdometerQuote",
    "Option",
    "Preview",
    "Privacy",
    "RegretModel",
    "Release",
    "RenyiCurve",
    "Request",
    "ResidualBound",
    "Schedule",
    "Spent",
    "Stationarity",
    "StronglyConvex",
    "WorstCase",
    "add_grid_noise",
    "amount_below",
    "amount_of",
    "balanced_l2",
    "basic_composition",
    "best_num_steps",
    "capacity_ceiling",
    "cast_sensitivity",
    "certified_mu",
    "certified_noise",
    "charge_release",
    "check_capacity",
    "check_request",
    "classic_noise",
    "clipped_finetuning_mu",
    "clipped_finetuning_noise",
    "compose_gaussian",
    "compose_zcdp",
    "composed_noise",
    "contract",
    "contracted_mu",
    "contraction_rate",
    "corollary_1",
    "deep_newton_distance",
    "deletion_capacity",
    "discrete_gaussian",
    "discretisation_epsilon",
    "dp_capacity_order",
    "dp_training_epsilon",
    "dp_training_noise",
    "full_state_mu",
    "full_state_schedule",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "gaussian_noise_stddev",
    "grid_of",
    "grid_sensitivity",
    "group_privacy",
    "group_zcdp",
    "hockey_stick_recursion",
    "holder_orders",
    "holder_weights",
    "iteration_mu",
    "langevin_curve",
    "langevin_learning_curve",
    "langevin_steps",
    "largest_within",
    "linear_remainder",
    "minimiser_distance",
    "model_clipping_noise",
    "model_clipping_steps",
    "newton_beats_output_perturbation",
    "newton_capacity_order",
    "newton_distance",
    "noisy_sgd_epochs",
    "objective_noise",
    "odometer_of",
    "optimal_composition",
    "output_only_noise",
    "per_instance_loss",
    "perturbed_residual",
    "published_noise",
    "recollection_distance",
    "release_epsilon",
    "release_mu",
    "removal_budget",
    "removals_within",
    "renyi_decay",
    "renyi_delta",
    "renyi_epsilon",
    "renyi_group",
    "renyi_triangle",
    "residual_bound",
    "rewind_distance",
    "round_down",
    "round_up",
    "sample_complexity",
    "sharded_retraining",
    "slice_epochs",
    "sliced_retraining",
    "source_of",
    "spectral_norm_bound",
    "split_budget",
    "stationary_lsi",
    "step_losses",
    "steps_to_stationary_target",
    "steps_to_unlearn",
    "stored_noise",
    "strongly_convex_capacity",
    "subsampled_curve",
    "subsampled_group_divergence",
    "subsampled_log_moment",
    "subsampled_log_moments",
    "summation_slack",
    "total_residual",
    "units_down",
    "units_up",
    "worst_case_noise",
    "worst_case_residual",
    "zcdp_budget",
    "zcdp_delta",
    "zcdp_epsilon",
    "zcdp_noise",
    "zcdp_rho",
]
