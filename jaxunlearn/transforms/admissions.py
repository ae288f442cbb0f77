"""Which pairs of online L-BFGS may enter: the published rules, beside those of `kernels.lbfgs`."""

import jax
import jax.numpy as jnp

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs


def levenberg_damped(
    threshold: float = 1e-6, *, floor: float = 1e-10, relative_floor: float = 1e-8
) -> lbfgs.Admission:
    """The rule of Memory Pair: y <- y + max(0, threshold - s'y / s's) s, then s'y > a floor.

    A shift, not Powell's damping: afterwards s'y >= threshold ||s||^2. Admitted where
    s'y > max(floor, relative_floor s's). The absolute floor means that steps shorter than about
    1e-5 leave no pair; `floor=0.0` takes it away.

    Args:
      threshold: > 0, the least curvature that is left alone.
      floor, relative_floor: >= 0.

    Cost: two inner products.

    References: Stewart 2025, "Memory Pair" (arXiv 2508.10193), pair admission of the final version
      with m_t = 1e-6.

    >>> rule = levenberg_damped(0.5)
    >>> y, admitted = rule(None, jnp.array([2.0]), jnp.array([-6.0]), None)
    >>> y, bool(admitted)
    (Array([1.], dtype=float32), True)
    """
    if not threshold > 0 or not floor >= 0 or not relative_floor >= 0:
        raise ValueError(
            f"Expected threshold={threshold} > 0, floor={floor} >= 0 and "
            f"relative_floor={relative_floor} >= 0."
        )

    def rule(memory, s, y, gradient_norm):
        size = tree.vdot(s, s)
        missing = jnp.maximum(0, threshold * size - tree.vdot(s, y))
        shift = jnp.where(size > 0, missing / jnp.where(size > 0, size, 1), 0)
        y = jax.tree.map(lambda y, s: (y + shift * s).astype(y.dtype), y, s)
        return y, tree.vdot(s, y) > jnp.maximum(floor, relative_floor * size)

    return rule


def relative_curvature(
    tolerance: float = 1e-5, *, damping: float = 1e-10, floor: float = 1e-12
) -> lbfgs.Admission:
    """The rule of the first experiments with Memory Pair: s'y >= tolerance ||s|| ||y||.

    Where s'y <= floor, y + damping s stands for y. Deviations: theirs compares |s'y| and so lets
    negative curvature in, which would make H indefinite; theirs drops the oldest pair before it
    decides about the new one.

    Args:
      tolerance: in [0, 1).  damping, floor: >= 0.

    Cost: four inner products.

    >>> rule = relative_curvature(0.1)
    >>> bool(rule(None, jnp.array([1.0, 0.0]), jnp.array([1.0, 20.0]), None)[1])
    False
    """
    if not 0 <= tolerance < 1 or not damping >= 0 or not floor >= 0:
        raise ValueError(
            f"Expected tolerance={tolerance} in [0, 1), damping={damping} and floor={floor} >= 0."
        )

    def rule(memory, s, y, gradient_norm):
        low = tree.vdot(s, y) <= floor
        y = jax.tree.map(lambda y, s: jnp.where(low, y + damping * s, y).astype(y.dtype), y, s)
        curved = tree.vdot(s, y)
        lengths = jnp.sqrt(tree.vdot(s, s)) * jnp.sqrt(tree.vdot(y, y))
        return y, (curved >= tolerance * lengths) & (curved >= floor) & (curved > 0)

    return rule


def prudente_souza(shift: float = 0.1) -> lbfgs.Admission:
    """Every pair positive: y <- y + (shift ||g|| + max(0, -s'y / s's)) s, with shift 0.1.

    Then s'y >= shift ||g|| ||s||^2 whatever the curvature was, so that each pair is positive by
    itself: whichever of them a deletion takes, H and B of the others stay positive definite.

    References: Prudente and Souza 2024, "Global convergence of a BFGS-type algorithm for nonconvex
      multiobjective optimization problems", for one objective, where it is the modified update of
      Li and Fukushima 2001 (`kernels.lbfgs.regularised`).

    >>> y, _ = prudente_souza()(None, jnp.array([2.0]), jnp.array([-6.0]), 10.0)
    >>> y
    Array([2.], dtype=float32)
    """
    return lbfgs.regularised(shift)
