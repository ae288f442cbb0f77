"""Solvers for symmetric positive definite systems: solution, residual, iterations, curvature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxunlearn import tree


class Solution(NamedTuple):
    """What a solver returns.

    x: the solution, like the right-hand side.
    residual_norm: ||matvec(x) - rhs||_2, evaluated at x, not carried by a recurrence.
    num_iterations: products with the matrix, without the one for the residual.
    negative_curvature: whether some direction p had p' A p <= 0; then x is the last good iterate.
    """

    x: PyTree
    residual_norm: Float[Array, ""]
    num_iterations: Int[Array, ""]
    negative_curvature: Bool[Array, ""]


Solver = Callable[[Callable[[PyTree], PyTree], PyTree], Solution]


def cg(*, tol: float = 1e-6, max_iterations: int = 100) -> Solver:
    """Conjugate gradients (Hestenes and Stiefel 1952) on pytrees.

    Args:
      tol: stop when ||A x - rhs|| <= tol * ||rhs|| by the recurrence; >= 0.
      max_iterations: >= 1.

    Returns:
      A function (matvec, rhs) -> `Solution`. Jits and vmaps. Stops at negative curvature.

    Cost: one product an iteration and one for the residual; four copies of the right-hand side.

    >>> solution = cg(tol=1e-6, max_iterations=10)(lambda x: 2.0 * x, jnp.array([2.0, 4.0]))
    >>> solution.x, int(solution.num_iterations)
    (Array([1., 2.], dtype=float32), 1)
    """
    if not tol >= 0:
        raise ValueError(f"Expected tol={tol} >= 0.")
    if max_iterations < 1:
        raise ValueError(f"Expected max_iterations={max_iterations} >= 1.")

    def solve(matvec, rhs: PyTree) -> Solution:
        rhs = jax.tree.map(jnp.asarray, rhs)
        rhs_norm2 = tree.vdot(rhs, rhs)
        stop = (tol**2) * rhs_norm2

        def proceed(carry):
            _, _, _, residual_norm2, iteration, negative = carry
            return (residual_norm2 > stop) & (iteration < max_iterations) & ~negative

        def step(carry):
            x, residual, direction, residual_norm2, iteration, _ = carry
            product = matvec(direction)
            curvature = tree.vdot(direction, product)
            negative = ~(curvature > 0)
            alpha = jnp.where(negative, 0.0, residual_norm2 / jnp.where(negative, 1.0, curvature))
            x = _axpy(alpha, direction, x)
            residual = _axpy(-alpha, product, residual)
            new_norm2 = tree.vdot(residual, residual)
            direction = _axpy(new_norm2 / residual_norm2, direction, residual)
            return x, residual, direction, new_norm2, iteration + 1, negative

        zero = jax.tree.map(jnp.zeros_like, rhs)
        start = (zero, rhs, rhs, rhs_norm2, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        x, _, _, _, iterations, negative = jax.lax.while_loop(proceed, step, start)
        return Solution(x, _residual_norm(matvec, x, rhs), iterations, negative)

    return solve


def cholesky(*, max_dimension: int = 4096) -> Solver:
    """Dense Cholesky solve: builds the matrix from products with the unit vectors.

    Args:
      max_dimension: refuse larger systems, since memory is dimension squared; >= 1.

    Returns:
      A function (matvec, rhs) -> `Solution`; `negative_curvature` when the matrix is not positive
      definite, and then x is zero. `num_iterations` is the dimension.

    Raises:
      ValueError: the right-hand side has more than `max_dimension` entries.

    >>> cholesky()(lambda x: 4.0 * x, jnp.array([4.0, 8.0])).x
    Array([1., 2.], dtype=float32)
    """
    if max_dimension < 1:
        raise ValueError(f"Expected max_dimension={max_dimension} >= 1.")

    def solve(matvec, rhs: PyTree) -> Solution:
        flat, unravel = ravel_pytree(rhs)
        if flat.size > max_dimension:
            raise ValueError(
                f"Expected at most max_dimension={max_dimension} unknowns, got {flat.size}. "
                "Use cg, or raise max_dimension."
            )
        columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        matrix = 0.5 * (columns + columns.T)
        factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
        indefinite = ~jnp.all(jnp.isfinite(factor[0]))
        solved = jax.scipy.linalg.cho_solve(factor, flat)
        x = unravel(jnp.where(indefinite, 0.0, solved).astype(flat.dtype))
        iterations = jnp.full((), flat.size, jnp.int32)
        return Solution(x, _residual_norm(matvec, x, rhs), iterations, indefinite)

    return solve


def _axpy(scale, x: PyTree, y: PyTree) -> PyTree:
    """y + scale * x, in the dtype of y."""
    return jax.tree.map(lambda a, b: b + (scale * a).astype(b.dtype), x, y)


def _residual_norm(matvec, x: PyTree, rhs: PyTree) -> Float[Array, ""]:
    """||matvec(x) - rhs||_2."""
    gap = jax.tree.map(jnp.subtract, matvec(x), rhs)
    return jnp.sqrt(tree.vdot(gap, gap))
