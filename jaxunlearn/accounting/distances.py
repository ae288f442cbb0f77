"""How far an update may land from what retraining would give: upper bounds, from constants alone.

Each is a sensitivity for `gaussian_noise_stddev` or, on the released grid, `certified_noise`.
`newton_distance` and the measured bounds stand in `removal`, those from stored sums in `convex`.
"""

import math

import numpy as np

from jaxunlearn.accounting._checks import expect, expect_all, expect_count
from jaxunlearn.accounting.rounding import raised


def minimiser_distance(
    *, num_forgotten: int, num_retained: int, l2: float, lipschitz: float
) -> float:
    """||minimiser - retain-set minimiser||: an upper bound, m L / (l2 (n - m)) [D].

    The gradient of the retained objective at the minimiser is minus the forgotten rows' sum over
    n - m, and l2-strong convexity turns it into a distance. This is what output perturbation pays.

    Args:
      lipschitz: L of each row's loss with its L2 term.

    >>> round(minimiser_distance(num_forgotten=1, num_retained=9, l2=0.5, lipschitz=0.9), 9)
    0.2
    """
    forgotten = expect_count("num_forgotten", num_forgotten)
    retained = expect_count("num_retained", num_retained)
    expect_all(above_=0.0, l2=l2, lipschitz=lipschitz)
    return raised(forgotten * lipschitz / (l2 * retained))


def rewind_distance(
    *,
    num_forgotten: int,
    num_examples: int,
    gradient_bound: float,
    learning_rate: float,
    num_steps: int,
    num_rewound: int,
    smoothness: float | None = None,
    strong_convexity: float | None = None,
) -> float:
    """Distance of rewound full-batch descent from retraining: an upper bound [D].

    Of T steps the last K are run anew on retained data, from the checkpoint at T - K. Gradients of
    the two objectives differ by at most 2 m G / n, so with a = T - K

        L-smooth, no convexity     (2 m G / (n L)) ((1 + eta L)^a - 1) (1 + eta L)^K
        convex, eta <= 2 / L       2 eta m G a / n
        l-strongly convex          (2 m G / (n l)) (1 - (1 - eta l)^a) (1 - eta l)^K,  eta <= 1 / L

    Rewind-to-Delete of Mu and Klabjan 2025, whose h(K) has the shape of the first.

    Args:
      num_forgotten: m.  num_examples: n.  gradient_bound: G, of each row.
      num_steps: T.  num_rewound: K <= T; K = T is retraining, at distance 0.
      smoothness: L; given alone, nothing else is assumed.
      strong_convexity: l; 0 for convex. Given, `learning_rate` must meet its condition, for which
        `smoothness` must be given too.

    >>> sizes = {"num_forgotten": 10, "num_examples": 1000, "gradient_bound": 1.0}
    >>> sizes |= {"learning_rate": 0.01, "num_steps": 200, "smoothness": 1.0}
    >>> round(rewind_distance(**sizes, num_rewound=100), 6)
    0.092224
    """
    a = expect_count("num_steps", num_steps) - expect_count("num_rewound", num_rewound, at_least=0)
    if a < 0:
        raise ValueError(f"Expected num_rewound={num_rewound} <= num_steps={num_steps}.")
    expect_all(above_=0.0, gradient_bound=gradient_bound, learning_rate=learning_rate)
    if smoothness is None:
        raise ValueError("Expected smoothness: no bound here does without it.")
    expect("smoothness", smoothness, above_=0.0)
    gap = 2 * num_forgotten * gradient_bound / num_examples
    if strong_convexity is None:
        grown = math.expm1(a * math.log1p(learning_rate * smoothness))
        kept = math.exp(num_rewound * math.log1p(learning_rate * smoothness))
        return raised(gap / smoothness * grown * kept)
    limit = (1.0 if strong_convexity else 2.0) / smoothness
    if learning_rate > limit:
        raise ValueError(f"Expected learning_rate={learning_rate} <= {limit}.")
    if strong_convexity == 0.0:
        return raised(gap * learning_rate * a)
    left = math.log1p(-min(learning_rate * strong_convexity, 1 - 1e-16))
    shrunk = -math.expm1(a * left) * math.exp(num_rewound * left)
    return raised(gap / strong_convexity * shrunk)


def recollection_distance(
    *,
    learning_rates: np.ndarray,
    contractions: np.ndarray,
    seen: np.ndarray,
    batch_size: int,
    gradient_bound: float,
    hessian_lipschitz: float,
    smoothness: float = 0.0,
) -> float:
    """Error of the Hessian-free recollection of one row after its run: an upper bound [D].

        d_(t+1) = c_t d_t + 1[u in B_t] eta_t G / |B|                       the row's own effect
        e_(t+1) = c_t e_t + eta_t [(M/2) d_t^2 + 1[u in B_t] (beta/|B|) d_t]

    The last term is the row's own Hessian, which the recursion of Qiao et al. 2025 leaves out; it
    vanishes (`smoothness=0`) where the Hessian of the other rows is used. Retraining keeps the
    initialisation, the batches and the divisor |B|.

    Args:
      learning_rates: eta_t.  contractions: c_t >= ||I - eta_t H|| along both runs.
      seen: whether the row is in the batch of step t.
      gradient_bound: G.  hessian_lipschitz: M.  smoothness: beta of the row, or 0.

    >>> zeros = recollection_distance(learning_rates=np.ones(3), contractions=np.ones(3),
    ...     seen=np.ones(3, bool), batch_size=2, gradient_bound=1.0, hessian_lipschitz=0.0)
    >>> zeros
    0.0
    """
    batch = expect_count("batch_size", batch_size)
    expect_all(
        at_least=0.0,
        gradient_bound=gradient_bound,
        hessian_lipschitz=hessian_lipschitz,
        smoothness=smoothness,
    )
    moved = error = 0.0
    steps = zip(
        np.asarray(learning_rates, np.float64).tolist(),
        np.asarray(contractions, np.float64).tolist(),
        np.asarray(seen, bool).tolist(),
        strict=True,
    )
    for rate, contraction, own in steps:
        expect("learning_rates", rate, at_least=0.0)
        expect("contractions", contraction, at_least=0.0)
        bend = hessian_lipschitz / 2 * moved**2 + own * smoothness / batch * moved
        error = contraction * error + rate * bend
        moved = contraction * moved + own * rate * gradient_bound / batch
    return raised(error * (1 + 8 * len(learning_rates) * 2.0**-52))


def deep_newton_distance(
    *,
    radius: float,
    damping: float,
    least_curvature: float,
    hessian_lipschitz: float,
    residual_gradient: float = 0.0,
) -> float:
    """Distance of a damped Newton step from the retrained network, both clipped: an upper bound.

        (2 C (M C + lambda) + G) / (lambda + lambda_min)

    Zhang et al. 2024, Theorem 3.4 [S; G of an unconverged start R]. It does not shrink with the
    number of rows: for the damping that it needs, lambda >= ||H||, it is about C or more, no better
    than clipping to the radius and adding noise (diameter 2 C), and M of a network is not known.

    Args:
      radius: C of the projection.  damping: lambda.  least_curvature: lambda_min of the Hessian,
        with damping + least_curvature > 0.

    >>> deep_newton_distance(radius=20.0, damping=1.0, least_curvature=0.0, hessian_lipschitz=0.0)
    40.0...
    """
    expect_all(
        at_least=0.0,
        radius=radius,
        damping=damping,
        hessian_lipschitz=hessian_lipschitz,
        residual_gradient=residual_gradient,
    )
    curvature = damping + least_curvature
    expect("damping + least_curvature", curvature, above_=0.0)
    shift = 2 * radius * (hessian_lipschitz * radius + damping) + residual_gradient
    return raised(shift / curvature)
