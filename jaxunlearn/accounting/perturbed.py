"""Objective perturbation: the noise in the objective, and what a removal leaves of its gradient.

`removal_budget` says how much of that the noise covers.
"""

import secrets
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting.convex import LossConstants
from jaxunlearn.accounting.noise import Entropy, add_grid_noise
from jaxunlearn.accounting.removal import LinearModel, corollary_1, summation_slack


class PerturbedFigures(Protocol):
    """What a removal measured; `kernels.PerturbedFigures` with Python numbers in it."""

    num_retained: int
    num_removed: int
    start_residual: float
    final_residual: float
    solver_gap: float
    gradient_norm_sum: float
    step_norm: float
    displacement_norm: float
    displacement_square_norm: float
    class_product_sum: float
    class_product_norm: float
    perturbation_norm: float
    largest_gradient: float
    largest_feature: float


def objective_noise(
    size: int, *, noise_stddev: float, entropy: Entropy = secrets.token_bytes
) -> Float64[np.ndarray, " size"]:
    """b: a discrete Gaussian on the grid, with a uniform part of a grid step added.

    The second makes of a shift by any u, on the grid or off it, a mixture of shifts by grid points
    within |u| + grid sqrt(size), for which `release_mu` pays (joint convexity of the hockey-stick
    divergence): without it, one look at the last digits tells b - u from b.

    >>> objective_noise(3, noise_stddev=10.0).shape
    (3,)
    """
    release = add_grid_noise(np.zeros(size), noise_stddev=noise_stddev, entropy=entropy)
    words = np.frombuffer(entropy(4 * size), "<u4").astype(np.float64)
    if words.size != size:
        raise ValueError(f"Expected {4 * size} bytes from the entropy source, got fewer.")
    return release.values + release.grid * ((words + 0.5) * 2.0**-32 - 0.5)


def perturbed_residual(
    figures: PerturbedFigures,
    *,
    l2: float,
    bound: str,
    model: LinearModel | None = None,
    constants: LossConstants | None = None,
    feature_norm: float | None = None,
    carried: float | None = None,
    one_vs_rest: bool = False,
    paper_constants: bool = False,
) -> dict[str, float]:
    """Terms that add up to a bound of ||grad L_b(w + v; R)||, in sum form.

        tight        ||H v + grad L_b(w; R)|| + (gamma / 2) ||X|| ||(x_i'v)^2||
        evaluated    ||grad L_b(w + v; R)||
        corollary_1  carried + ||H v - delta|| + gamma max(1, max_i ||x_i|| / 2) ||X|| ||v|| ||X v||
        worst_case   carried + ||H v - delta|| + M (n - m) ||v||^2 / 2,
                     ||v|| <= (||delta|| + ||H v - delta||) / (l2 (n - m)),
                     ||delta|| <= m (2 L + (||b|| + ||grad L_b(w; D)||) / n)

    Theorem 1 as printed has 4 M L^2 m^2 / (l2^2 (n - m)) and no b, which moves the minimiser beyond
    ||w|| <= L / l2; `paper_constants` charges it where it is the larger. Rounding in the sums is
    estimated and added.

    Args:
      figures: measured in float64.
      bound: which of these.
      feature_norm: at least ||X||_2; for "tight" and "corollary_1".
      carried: the residual before the step; None takes the measured one.
      one_vs_rest: "corollary_1" takes the root of the squares of the classes' remainders, and with
        `paper_constants` their sum, as the authors' code does, which is no smaller.

    Raises:
      AssumptionError: "worst_case", and a row refutes the constants at w.

    References: Guo et al. 2020, Theorem 1, Corollaries 1 and 2.

    >>> import types
    >>> names = "num_retained num_removed start_residual final_residual solver_gap "
    >>> names += "gradient_norm_sum step_norm displacement_norm displacement_square_norm "
    >>> names += "class_product_sum class_product_norm perturbation_norm "
    >>> names += "largest_gradient largest_feature"
    >>> ones = types.SimpleNamespace(**dict.fromkeys(names.split(), 1))
    >>> perturbed_residual(ones, l2=1.0, bound="evaluated")
    {'residual': 1.000000000...}
    """
    slack = summation_slack(
        figures.gradient_norm_sum, num_rows=figures.num_retained + figures.num_removed
    )
    if bound == "evaluated":
        return {"residual": figures.final_residual + slack}
    solver = figures.solver_gap + slack
    start = figures.start_residual + slack if carried is None else carried
    if bound == "worst_case":
        if constants is None:
            raise ValueError('Expected constants with bound="worst_case".')
        constants.check()
        constants.check_rows(
            largest_gradient=figures.largest_gradient, largest_feature=figures.largest_feature
        )
        count = figures.num_retained + figures.num_removed
        outside = (figures.perturbation_norm + figures.start_residual + slack) / count
        delta = figures.num_removed * (2 * constants.lipschitz + outside)
        step = (delta + solver) / (l2 * figures.num_retained)
        curvature = constants.hessian_lipschitz * figures.num_retained * step**2 / 2
        printed = (2 * figures.num_removed * constants.lipschitz / l2) ** 2
        printed *= constants.hessian_lipschitz / figures.num_retained
        if paper_constants:
            curvature = max(curvature, printed)
        return {"carried": start, "solver": solver, "curvature": curvature}
    if model is None or feature_norm is None:
        raise ValueError(f"Expected a LinearModel and feature_norm with bound={bound!r}.")
    gamma = model.curvature_lipschitz
    if bound == "tight":
        curvature = 0.5 * gamma * feature_norm * figures.displacement_square_norm
        return {"solver": solver, "curvature": curvature}
    product = figures.step_norm * figures.displacement_norm
    if one_vs_rest:
        product = figures.class_product_norm
        if paper_constants:
            product = figures.class_product_sum
    curvature = corollary_1(
        curvature_lipschitz=gamma, feature_norm=feature_norm, step_norm=1.0,
        displacement_norm=product, largest_feature=figures.largest_feature,
    )  # fmt: skip
    return {"carried": start, "solver": solver, "curvature": curvature}
