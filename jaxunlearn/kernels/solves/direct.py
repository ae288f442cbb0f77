"""Direct solvers: dense Cholesky, Woodbury on per-example gradients, and iterative refinement."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxunlearn.kernels.solves.common import (
    Matvec,
    Solution,
    Solver,
    Space,
    as_vector,
    check_stack,
    like,
    measured,
    problem,
    widened,
    zeros,
)

if TYPE_CHECKING:
    from jaxunlearn.kernels.per_example import PerExampleGradients


def cholesky(*, max_dimension: int = 4096, many: bool = False) -> Solver:
    """Dense Cholesky solve: builds the matrix from products with the unit vectors.

    Args:
      max_dimension: refuse larger systems, since memory is dimension squared; >= 1.
      many: leaves of the right-hand side have a leading axis K and `matvec` maps stacks of any
        length to stacks; the matrix is built and factorised once.

    Returns:
      A function (matvec, rhs) -> `Solution`; `negative_curvature` when the matrix is not positive
      definite, and then x is zero. `num_iterations` is the dimension. Computes in float32 or wider.

    Cost: as many products as there are unknowns, and one for the residual (K with `many`).

    Raises:
      ValueError: the right-hand side has more than `max_dimension` entries.

    >>> cholesky()(lambda x: 4.0 * x, jnp.array([4.0, 8.0])).x
    Array([1., 2.], dtype=float32)
    """
    if max_dimension < 1:
        raise ValueError(f"Expected max_dimension={max_dimension} >= 1.")
    space = Space(many)

    def solve(matvec: Matvec, rhs: PyTree) -> Solution:
        if many:
            check_stack(rhs)
        system = problem(space, matvec, rhs, None, 0.0)
        one = jax.tree.map(lambda leaf: leaf[0], system.rhs) if many else system.rhs
        flat, unravel = ravel_pytree(widened(one))
        if flat.size > max_dimension:
            raise ValueError(
                f"Expected at most max_dimension={max_dimension} unknowns, got {flat.size}. "
                "Use cg, or raise max_dimension."
            )
        units = jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))
        columns = system.product(units) if many else jax.vmap(system.product)(units)
        columns = jax.vmap(lambda column: ravel_pytree(column)[0])(columns)
        factor = jax.scipy.linalg.cho_factor(0.5 * (columns + columns.T), lower=True)
        indefinite = ~jnp.all(jnp.isfinite(factor[0]))

        def back(residual):
            solved = jax.scipy.linalg.cho_solve(factor, ravel_pytree(residual)[0])
            return unravel(jnp.where(indefinite, 0.0, solved))

        x = jax.vmap(back)(system.residual) if many else back(system.residual)
        iterations = zeros(space, system.rhs, jnp.int32) + flat.size
        return system.solution(x, iterations, zeros(space, system.rhs, bool) | indefinite)

    return solve


def woodbury(
    *, damping: float | Float[Array, ""], num_refinements: int = 1, many: bool = False
) -> Callable[..., Solution]:
    """Damped empirical Fisher inverse through the rows of a batch, whatever the parameter count.

        (damping I + sum_i w_i g_i g_i' / num_rows)^-1 v
          = (v - G' W^1/2 (damping num_rows I + W^1/2 G G' W^1/2)^-1 W^1/2 G v) / damping

    Uses the gram, dot and sum of factored per-example gradients: (B, P) is never formed.

    Args:
      damping: > 0.
      num_refinements: rounds of solving again for what is left, >= 0: the difference above cancels
        where `damping` is small beside the largest eigenvalue.
      many: leaves of the right-hand side have a leading axis K; the (B, B) system is factorised
        once.

    Returns:
      A function (gradients, rhs, *, weights=None, num_rows=None) -> `Solution`, `gradients` from
      `per_example(loss_fn)(params, batch)`. weights: (B,), >= 0; None means ones. num_rows: the
      divisor; None means the sum of the weights. `num_iterations` is 1 + 2 num_refinements;
      `negative_curvature` says that (B, B) was not positive definite, by rounding or by a negative
      weight, and then x is zero.

    Cost: one Gram matrix, its Cholesky factor (B^3 / 3 operations), and for each
    right-hand side 1 + 2 num_refinements products with G and G', and one for the residual. Memory:
    (B, B) and the factors.

    Raises:
      ValueError: `damping` or a weight out of range, or weights of the wrong shape.

    >>> from jaxunlearn.kernels.per_example import per_example
    >>> gradients = per_example(lambda w, x: jnp.mean(x @ w))(jnp.zeros(2), jnp.eye(2) * 2.0)
    >>> woodbury(damping=1.0)(gradients, jnp.array([3.0, 6.0])).x.round(5)
    Array([1., 2.], dtype=float32)

    References: Woodbury 1950; Ren and Goldfarb 2019, "Efficient subsampled Gauss-Newton and natural
      gradient methods for training neural networks", equation 10.
    """
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(f"Expected damping={damping} > 0.")
    if num_refinements < 0:
        raise ValueError(f"Expected num_refinements={num_refinements} >= 0.")
    space = Space(many)

    def solve(
        gradients: "PerExampleGradients",
        rhs: PyTree,
        *,
        weights: Float[Array, " b"] | None = None,
        num_rows: float | Array | None = None,
    ) -> Solution:
        if many:
            check_stack(rhs)
        weights = _row_weights(gradients, weights)
        divisor = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        divisor = jnp.where(divisor == 0, 1.0, divisor)
        root = jnp.sqrt(weights)
        inner = root[:, None] * gradients.gram() * root[None, :]
        shift = damping * divisor * jnp.eye(len(root), dtype=inner.dtype)
        factor = jax.scipy.linalg.cho_factor(inner + shift, lower=True)
        indefinite = ~jnp.all(jnp.isfinite(factor[0]))

        def product(vector):
            pulled = gradients.sum(weights * gradients.dot(vector) / divisor)
            return jax.tree.map(lambda g, v: g + damping * v, pulled, vector)

        def apply(vector):
            inside = jax.scipy.linalg.cho_solve(factor, root * gradients.dot(vector))
            pulled = gradients.sum(root * inside)
            x = jax.tree.map(lambda v, g: (v - g) / damping, vector, pulled)
            return jax.tree.map(lambda leaf: jnp.where(indefinite, 0.0, leaf), x)

        over = jax.vmap if many else lambda function: function
        system = problem(space, over(product), rhs, None, 0.0)
        x = over(apply)(system.residual)
        for _ in range(num_refinements):
            gap = jax.tree.map(jnp.subtract, system.residual, over(product)(x))
            x = jax.tree.map(jnp.add, x, over(apply)(gap))
        count = zeros(space, system.rhs, jnp.int32) + (1 + 2 * num_refinements)
        return system.solution(x, count, zeros(space, system.rhs, bool) | indefinite)

    return solve


def refined(solver: Solver, *, num_rounds: int = 1, many: bool = False) -> Solver:
    """Iterative refinement: solve, then solve again for what is left (Wilkinson 1963).

        x <- x + solver(A, rhs - A x)

    Where a solver's own recurrence has drifted from the truth (float32, many iterations), or its
    inverse is approximate (Nystrom, half precision), each round multiplies the residual by the
    relative residual that the solver reaches.

    Args:
      solver: (matvec, rhs) -> `Solution`.
      num_rounds: extra solves, >= 1.
      many: `solver` takes stacks.

    Returns:
      A function (matvec, rhs) -> `Solution`, of the best x met; products add up.

    Cost: `num_rounds + 1` solves and as many products for their residuals.

    >>> half = lambda matvec, b: Solution(b / 2, jnp.abs(b / 2), jnp.array(0), jnp.array(False))
    >>> refined(half, num_rounds=2)(lambda x: x, jnp.array(1.0)).x
    Array(0.875, dtype=float32)
    """
    if num_rounds < 1:
        raise ValueError(f"Expected num_rounds={num_rounds} >= 1.")
    space = Space(many)

    def solve(matvec: Matvec, rhs: PyTree, **options) -> Solution:
        rhs = as_vector(rhs)
        solution = solver(matvec, rhs, **options)
        for _ in range(num_rounds):
            gap = jax.tree.map(jnp.subtract, widened(rhs), widened(matvec(solution.x)))
            more = solver(matvec, like(gap, rhs), **options)
            x = like(jax.tree.map(jnp.add, widened(solution.x), widened(more.x)), rhs)
            count = solution.num_iterations + more.num_iterations
            negative = solution.negative_curvature | more.negative_curvature
            new = measured(space, matvec, rhs, x, count, negative)
            better = new.residual_norm < solution.residual_norm
            solution = Solution(
                x=space.select(better, x, solution.x),
                residual_norm=jnp.where(better, new.residual_norm, solution.residual_norm),
                num_iterations=count,
                negative_curvature=negative,
            )
        return solution

    return solve


def _row_weights(gradients: "PerExampleGradients", weights) -> Float[Array, " b"]:
    """Weights as floats, zero for the rows whose gradient is not finite."""
    dtype = jnp.promote_types(gradients.losses.dtype, jnp.float32)
    if weights is None:
        weights = jnp.ones(gradients.losses.shape, dtype)
    if jnp.shape(weights) != gradients.losses.shape:
        raise ValueError(
            f"Expected weights of shape {gradients.losses.shape}, got {jnp.shape(weights)}."
        )
    return jnp.where(gradients.is_finite, jnp.asarray(weights, dtype), 0.0)
