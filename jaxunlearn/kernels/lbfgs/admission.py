"""Which pairs may enter: rules from the literature on L-BFGS without convexity."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxunlearn.kernels.lbfgs._trees import inner
from jaxunlearn.kernels.lbfgs.products import product
from jaxunlearn.kernels.lbfgs.state import LBFGSMemory

GradientNorm = float | Float[Array, ""] | None
Admission = Callable[[LBFGSMemory, PyTree, PyTree, GradientNorm], tuple[PyTree, Bool[Array, ""]]]
"""`rule(memory, s, y, gradient_norm) -> (y, admitted)`: y perhaps modified, and whether the pair
may enter. `memory` holds the pairs before this one."""


def curvature(tolerance: float = 1e-8) -> Admission:
    """s'y > tolerance ||s|| ||y||: the angle between step and gradient change.

    Args:
      tolerance: in [0, 1); with 0 any positive curvature will do.

    Cost: three inner products.

    >>> _, admitted = curvature(0.1)(None, jnp.array([1.0, 0.0]), jnp.array([1.0, 20.0]), None)
    >>> bool(admitted)
    False
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"Expected tolerance={tolerance} in [0, 1).")

    def rule(memory, s, y, gradient_norm):
        lengths = jnp.sqrt(inner(s, s)) * jnp.sqrt(inner(y, y))
        return y, inner(s, y) > tolerance * lengths

    return rule


def cautious(tolerance: float = 1e-6, exponent: float = 1.0) -> Admission:
    """The cautious update: s'y >= tolerance ||g||^exponent ||s||^2, with s'y > 0.

    Args:
      tolerance: > 0.
      exponent: > 0; how fast the demand falls as the gradient does.

    Cost: two inner products.

    Raises:
      ValueError: when the rule is used without a `gradient_norm`.

    References: Li and Fukushima 2001, "On the global convergence of the BFGS method for nonconvex
      unconstrained optimization problems", SIAM J. Optim. 11, the cautious update. Deviation: the
      sign of s'y is asked for as well, since both sides can round to zero.

    >>> rule = cautious(tolerance=0.5, exponent=1.0)
    >>> [bool(rule(None, jnp.ones(1), jnp.ones(1), norm)[1]) for norm in (1.0, 3.0)]
    [True, False]
    """
    if not tolerance > 0 or not exponent > 0:
        raise ValueError(f"Expected tolerance={tolerance} > 0 and exponent={exponent} > 0.")

    def rule(memory, s, y, gradient_norm):
        curved, size = inner(s, y), _required(gradient_norm, "cautious")
        return y, (curved >= tolerance * size**exponent * inner(s, s)) & (curved > 0)

    return rule


def powell(threshold: float = 0.2) -> Admission:
    """Powell's damping: y <- t y + (1 - t) B s, so that s'y >= threshold s'Bs. Admits all.

    t = 1 where s'y >= threshold s'Bs, and (1 - threshold) s'Bs / (s'Bs - s'y) elsewhere; B is the
    memory's, before this pair.

    Args:
      threshold: in (0, 1).

    Cost: `product`, and two inner products.

    References: Powell 1978, "Algorithms for nonlinear constraints that use Lagrangian functions",
      Math. Programming 14, with threshold 0.2; as in Nocedal and Wright 2006, procedure 18.2.

    >>> from jaxunlearn.kernels import lbfgs
    >>> rule, empty = powell(threshold=0.25), lbfgs.init(jnp.zeros(1), 1)
    >>> y, admitted = rule(empty, jnp.array([2.0]), jnp.array([-1.0]), None)
    >>> y, bool(admitted)
    (Array([0.5], dtype=float32), True)
    """
    if not 0 < threshold < 1:
        raise ValueError(f"Expected threshold={threshold} in (0, 1).")

    def rule(memory, s, y, gradient_norm):
        image = product(memory, s)
        curved, expected = inner(s, y), inner(s, image)
        low = ~(curved >= threshold * expected)
        part = (1 - threshold) * expected / jnp.where(low, expected - curved, 1)
        share = jnp.where(low, part, jnp.ones_like(part))
        damped = lambda y, b: jnp.where(low, share * y + (1 - share) * b, y).astype(y.dtype)
        return jax.tree.map(damped, y, image), jnp.isfinite(curved)

    return rule


def regularised(shift: float = 1.0) -> Admission:
    """Li and Fukushima's y <- y + (shift ||g|| + max(0, -s'y / s's)) s. Admits all.

    Then s'y >= shift ||g|| ||s||^2, whatever the curvature was.

    Args:
      shift: > 0; theirs is 1. Biases every y by shift ||g|| s, which vanishes with the gradient.

    Cost: two inner products.

    Raises:
      ValueError: when the rule is used without a `gradient_norm`.

    References: Li and Fukushima 2001, "A modified BFGS method and its global convergence in
      nonconvex minimization", J. Comput. Appl. Math. 129.

    >>> y, _ = regularised(shift=0.5)(None, jnp.array([2.0]), jnp.array([-6.0]), 4.0)
    >>> y
    Array([4.], dtype=float32)
    """
    if not shift > 0:
        raise ValueError(f"Expected shift={shift} > 0.")

    def rule(memory, s, y, gradient_norm):
        curved, length2 = inner(s, y), inner(s, s)
        quotient = curved / jnp.where(length2 > 0, length2, 1)
        size = shift * _required(gradient_norm, "regularised") + jnp.maximum(0, -quotient)
        lifted = lambda y, s: (y + size * s).astype(y.dtype)
        return jax.tree.map(lifted, y, s), jnp.isfinite(curved)

    return rule


def is_usable(s_s: Array, s_y: Array, y_y: Array) -> Bool[Array, ""]:
    """Whether rho, gamma and its reciprocal exist: all figures positive and finite."""
    figures = jnp.stack([s_s, s_y, y_y, s_y / y_y, y_y / s_y])
    return jnp.all(jnp.isfinite(figures) & (figures > 0))


def _required(gradient_norm, rule: str):
    """The norm, or an error that says who needs it."""
    if gradient_norm is None:
        raise ValueError(f"Expected gradient_norm=, which the rule {rule} needs, got None.")
    return gradient_norm
