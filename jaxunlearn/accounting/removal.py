"""How far a removal step may land from the retain-set minimiser: proven bounds, on the host."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Float64

from jaxunlearn.types import Batch

_EPS = float(np.finfo(np.float64).eps)


def spectral_norm_bound(gram: Float64[np.ndarray, "d d"], *, num_rows: int) -> float:
    """||X||_2 from its Gram matrix K = X'X: an upper bound, rounding included.

    The largest eigenvalue by a dense solver, plus the backward error of forming and of decomposing
    K, (n + 4 d) eps trace(K). Power iteration, which published code uses, bounds from below.

    Args:
      gram: X'X in float64, symmetric.  num_rows: rows of X.

    Raises:
      ValueError: not square, or not finite.

    >>> spectral_norm_bound(np.diag([4.0, 1.0]), num_rows=2)
    2.0...
    """
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.all(np.isfinite(gram)):
        raise ValueError(f"Expected a finite square Gram matrix, got shape {gram.shape}.")
    slack = (num_rows + 4 * len(gram)) * _EPS * float(np.trace(gram))
    largest = float(np.linalg.eigvalsh(gram)[-1])
    return float(np.sqrt(max(largest, 0.0) + slack)) * (1 + 4 * _EPS)


def linear_remainder(
    *,
    curvature_lipschitz: float,
    feature_norm: float,
    displacement_square_norm: float,
) -> float:
    """Curvature remainder of a step v of a linear model, in sum form: an upper bound.

        || int_0^1 X' diag(l''(t) - l''(0)) X v dt || <= (gamma / 2) ||X||_2 ||(|x_i' v|^2)_i||_2

    Tighter than Guo et al. 2020, Corollary 1, by the integral's 1/2 and by each row's own
    displacement in place of ||v||.

    Args:
      curvature_lipschitz: gamma, of l''; 1 / (6 sqrt(3)) for the logistic loss.
      feature_norm: at least ||X||_2 of the retained rows.
      displacement_square_norm: Euclidean norm of the vector of squared displacements.

    >>> linear_remainder(curvature_lipschitz=0.5, feature_norm=2.0, displacement_square_norm=3.0)
    1.5
    """
    return 0.5 * curvature_lipschitz * feature_norm * displacement_square_norm


def corollary_1(
    *,
    curvature_lipschitz: float,
    feature_norm: float,
    step_norm: float,
    displacement_norm: float,
    largest_feature: float = 1.0,
) -> float:
    """The same remainder as printed, gamma ||X||_2 ||v|| ||X v||: an upper bound when ||x_i|| <= 1.

    For rows beyond 2 it is multiplied by max_i ||x_i|| / 2, since
    (x_i' v)^2 <= ||x_i|| ||v|| |x_i' v| leaves (gamma / 2) ||X||_2 max_i ||x_i|| ||v|| ||X v||.

    Guo et al. 2020, Corollary 1.

    Args:
      largest_feature: max_i ||x_i|| of the retained rows.

    >>> corollary_1(
    ...     curvature_lipschitz=0.25, feature_norm=2.0, step_norm=1.0, displacement_norm=3.0
    ... )
    1.5
    """
    if not largest_feature >= 0:
        raise ValueError(f"Expected largest_feature={largest_feature} >= 0.")
    scale = max(1.0, 0.5 * largest_feature * (1 + 2.0**-40))
    return curvature_lipschitz * feature_norm * step_norm * displacement_norm * scale


def newton_distance(
    *,
    num_forgotten: int,
    num_retained: int,
    l2: float,
    lipschitz: float,
    hessian_lipschitz: float,
    as_printed: bool = False,
) -> float:
    """||one exact Newton step from the minimiser - retain-set minimiser||_2: an upper bound.

        M m^2 L^2 / (2 l2^3 (n - m)^2)                       derived; the default
        2 M m^2 L^2 / (l2^3 n^2)                             Sekhari et al. 2021, as printed

    Args:
      num_forgotten: m >= 1.  num_retained: n - m >= 1.
      l2: strong convexity, > 0.  lipschitz: L, of the loss with its L2 term.
      hessian_lipschitz: M.

    >>> sizes = {"num_forgotten": 10, "num_retained": 9990, "l2": 0.1}
    >>> bound = newton_distance(**sizes, lipschitz=1.0, hessian_lipschitz=0.5, as_printed=True)
    >>> round(bound, 12)
    0.001
    """
    if num_forgotten < 1 or num_retained < 1:
        raise ValueError(
            f"Expected num_forgotten={num_forgotten}, num_retained={num_retained} >= 1."
        )
    if not (l2 > 0 and lipschitz > 0 and hessian_lipschitz >= 0):
        raise ValueError(
            f"Expected l2={l2} > 0, lipschitz={lipschitz} > 0, hessian_lipschitz="
            f"{hessian_lipschitz} >= 0."
        )
    scale = hessian_lipschitz * (num_forgotten * lipschitz) ** 2 / l2**3
    if as_printed:
        return 2.0 * scale / (num_forgotten + num_retained) ** 2
    return scale / (2.0 * num_retained**2)


def summation_slack(gradient_norm_sum: float, *, num_rows: int) -> float:
    """Rounding in a float64 sum of gradients of total norm `gradient_norm_sum`: an estimate.

    gamma_k = k eps / (1 - k eps) of Higham 2002, section 3.1, with k = num_rows for the sum, and
    1024 granted to the operations inside one gradient, which no general bound covers.

    >>> summation_slack(1.0, num_rows=0) < 1e-12
    True
    """
    operations = (num_rows + 1024) * _EPS
    return operations / (1 - operations) * gradient_norm_sum


class Figures(Protocol):
    """What a removal measured; `kernels.RemovalFigures` with Python numbers in it."""

    num_retained: int
    num_removed: int
    solver_gap: float
    start_residual: float
    final_residual: float
    gradient_norm_sum: float
    step_norm: float
    displacement_norm: float
    displacement_square_norm: float
    largest_feature: float


class LinearModel(NamedTuple):
    """loss_i depends on the parameters through x_i' w alone; enables Guo's gradient-residual bound.

    features: batch -> X of shape (B, d), for a single parameter leaf w of shape (d,) or (d, k).
    curvature_lipschitz: gamma with ||loss''(a) - loss''(b)|| <= gamma ||a - b|| as functions of
      x_i' w: 1 / (6 sqrt(3)) for the logistic loss (1/4, which bounds loss'' itself, is larger).
    paper_bound: use Corollary 1, gamma ||X|| ||v|| ||X v||, times max_i ||x_i|| / 2 for rows
      beyond 2, instead of the integral remainder (gamma / 2) ||X|| ||(x_i' v)^2||, which is
      smaller and as rigorous.
    """

    features: Callable[[Batch], Float[Array, "b d"]]
    curvature_lipschitz: float
    paper_bound: bool = False

    def remainder(self, figures: Figures, feature_norm: float) -> float:
        """The curvature remainder of a measured step, in sum form."""
        if self.paper_bound:
            return corollary_1(
                curvature_lipschitz=self.curvature_lipschitz,
                feature_norm=feature_norm,
                step_norm=figures.step_norm,
                displacement_norm=figures.displacement_norm,
                largest_feature=figures.largest_feature,
            )
        return linear_remainder(
            curvature_lipschitz=self.curvature_lipschitz,
            feature_norm=feature_norm,
            displacement_square_norm=figures.displacement_square_norm,
        )


class WorstCase(NamedTuple):
    """Constants of every example's loss, known before any data; the bound of Sekhari et al. 2021.

    lipschitz: L >= ||grad loss_i|| wherever the parameters may be, without the L2 term. (Their L
      is of the regularised loss, up to twice as large: at the minimiser l2 ||w|| <= L.)
    hessian_lipschitz: M, of hess loss_i.
    as_printed: never charge less than their 2 M m^2 (2 L)^2 / (l2^3 n^2).
    """

    lipschitz: float
    hessian_lipschitz: float
    as_printed: bool = False

    def distance(
        self,
        l2: float,
        num_forgotten: int,
        num_retained: int,
        *,
        start: float = 0.0,
        solver: float = 0.0,
    ) -> float:
        """Distance of one Newton step to the retain-set minimiser: an upper bound.

        With s and g the mean-form residuals of start and solver,

            ||v|| <= (m (2 L + s) / (n - m) + g) / l2,
            distance <= (M ||v||^2 / 2 + s n / (n - m) + g) / l2,

        since delta = sum_U (grad loss_i + l2 w) and l2 ||w|| <= L + s. At s = g = 0 this is
        `newton_distance` with 2 L.

        Args:
          start: ||grad F_D(w)||.  solver: ||H v - delta|| / (n - m).

        Raises:
          ValueError: a constant is negative or not finite.
        """
        if not (0 <= self.lipschitz < np.inf and 0 <= self.hessian_lipschitz < np.inf):
            raise ValueError(f"Expected finite constants >= 0, got {self}.")
        count = num_forgotten + num_retained
        lipschitz = 2.0 * self.lipschitz + start
        step = (num_forgotten * lipschitz / num_retained + solver) / l2
        remainder = 0.5 * self.hessian_lipschitz * step**2
        bound = (remainder + start * count / num_retained + solver) / l2
        if not self.as_printed:
            return bound
        printed = newton_distance(
            num_forgotten=num_forgotten,
            num_retained=num_retained,
            l2=l2,
            lipschitz=2.0 * self.lipschitz,
            hessian_lipschitz=self.hessian_lipschitz,
            as_printed=True,
        )
        return max(printed, bound)


class ResidualBound(NamedTuple):
    """How far a step landed from the retain-set minimiser, and why one may say so.

    residual: at least ||grad L_R|| (a sum over the retained rows) at the result.
    distance: at least its L2 distance to the minimiser.
    status, text: for a certificate's sensitivity.  terms: what was added up, by name.
    assumptions: constants that the bound takes on trust, by name.
    """

    residual: float
    distance: float
    status: str
    text: str
    terms: dict[str, float]
    assumptions: dict[str, str]


def residual_bound(
    figures: Figures,
    *,
    l2: float,
    model: LinearModel | WorstCase | None = None,
    feature_norm: float | None = None,
) -> ResidualBound:
    """Distance from a measured step to the retain-set minimiser: an upper bound.

    F_R is l2-strongly convex, so ||w - w*_R|| <= ||grad L_R(w)|| / (|R| l2), whatever found w.

    Args:
      figures: measured in float64.
      model: None evaluates the gradient at the result; a `LinearModel` bounds it by solver gap,
        curvature remainder and starting residual; `WorstCase` uses its constants instead, with
        solver gap and starting residual added.
      feature_norm: at least ||X||_2, for a `LinearModel`.
    """
    slack = summation_slack(figures.gradient_norm_sum, num_rows=figures.num_retained)
    scale = figures.num_retained * l2
    solver, start = figures.solver_gap + slack, figures.start_residual + slack
    final = figures.final_residual + slack
    if isinstance(model, WorstCase):
        count = figures.num_retained + figures.num_removed
        terms = {"start": start / count, "solver": solver / figures.num_retained}
        distance = model.distance(l2, figures.num_removed, figures.num_retained, **terms)
        terms = {
            "start": terms["start"] * count / figures.num_retained / l2,
            "solver": terms["solver"] / l2,
        }
        terms["newton_error"] = distance - sum(terms.values())
        text = "Sekhari et al. 2021 from assumed constants, with measured start and solver gaps"
        constants = (
            f"Every loss is {model.lipschitz:g}-Lipschitz with a "
            f"{model.hessian_lipschitz:g}-Lipschitz Hessian."
        )
        assumptions = {"loss_constants": constants}
        return ResidualBound(final, distance, "assumed", text, terms, assumptions)
    assumptions = {}
    if model is not None:
        if feature_norm is None:
            raise ValueError("Expected feature_norm with a LinearModel.")
        curvature = model.remainder(figures, feature_norm)
        terms = {"solver": solver, "curvature": curvature, "start": start}
        text = "solver gap, curvature remainder and starting residual, divided by |R| l2"
        gamma = model.curvature_lipschitz
        assumptions["linear_model"] = f"loss'' is {gamma:.6g}-Lipschitz in x'w."
    else:
        terms = {"residual": final}
        text = "gradient residual of the retained objective, divided by |R| l2"
    residual = sum(terms.values())
    return ResidualBound(residual, residual / scale, "measured", text, terms, assumptions)
