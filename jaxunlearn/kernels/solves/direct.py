"""Direct solvers: dense Cholesky, Woodbury on per-example gradients, and iterative refinement."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels._checks import check_number, concrete
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.solves.block import placed, stacked
from jaxunlearn.kernels.solves.common import (
    Matvec,
    Solution,
    Solver,
    Space,
    as_function,
    as_vector,
    check_count,
    check_stack,
    like,
    measured,
    problem,
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
      A function (matvec, rhs, *, x0=None, key=None) -> `Solution`; neither `x0` nor `key` is read.
      `negative_curvature` when the matrix is not positive definite, and then x is zero.
      `num_iterations` is the dimension. Computes in float32 or wider.

    Cost: as many products as there are unknowns, and one for the residual (K with `many`).

    Raises:
      ValueError: the right-hand side has more than `max_dimension` entries.

    >>> cholesky()(lambda x: 4.0 * x, jnp.array([4.0, 8.0])).x
    Array([1., 2.], dtype=float32)
    """
    check_count("max_dimension", max_dimension)

    def solve(matvec: Matvec, rhs: PyTree, *, x0=None, key=None) -> Solution:
        del x0, key
        if many:
            check_stack(rhs)
        size = tree.num_parameters(rhs) // (len(jax.tree.leaves(rhs)[0]) if many else 1)
        if size > max_dimension:
            raise ValueError(
                f"Expected at most max_dimension={max_dimension} unknowns, got {size}. "
                "Use cg, or raise max_dimension."
            )
        return compiled_once(functools.partial(_cholesky, many, as_function(matvec)), rhs)

    return solve


def _cholesky(many: bool, matvec: Matvec, rhs: PyTree) -> Solution:
    """The solution by the columns of the matrix."""
    space = Space(many)
    system = problem(space, matvec, rhs, None, 0.0)
    one = jax.tree.map(lambda leaf: leaf[0], system.residual) if many else system.residual
    units = placed(_units, one, like=one, template=stacked)
    columns = system.product(units) if many else jax.vmap(system.product)(units)
    back = functools.partial(_solved, many)
    template = lambda vectors, small: (vectors, small)
    residual = system.residual
    x, indefinite = placed(back, columns, residual, like=residual, template=template)
    iterations = zeros(space, system.rhs, jnp.int32) + tree.num_parameters(one)
    return system.solution(x, iterations, zeros(space, system.rhs, bool) | indefinite)


def _units(one: PyTree) -> PyTree:
    """The unit vectors like `one`, stacked in the order of its leaves."""
    flat, unravel = ravel_pytree(one)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))


def _solved(many: bool, columns: PyTree, residual: PyTree) -> tuple[PyTree, Array]:
    """The solution for a matrix given by its columns, and whether that matrix is not definite."""
    matrix = jax.vmap(lambda column: ravel_pytree(column)[0])(columns)
    factor = jax.scipy.linalg.cho_factor(0.5 * (matrix + matrix.T), lower=True)
    indefinite = ~jnp.all(jnp.isfinite(factor[0]))

    def back(residual):
        flat, unravel = ravel_pytree(residual)
        return unravel(jnp.where(indefinite, 0.0, jax.scipy.linalg.cho_solve(factor, flat)))

    return (jax.vmap(back) if many else back)(residual), indefinite


def woodbury(
    *, damping: float | Float[Array, ""], num_refinements: int = 1, many: bool = False
) -> Callable[..., Solution]:
    """Damped empirical Fisher inverse through the rows of a batch, whatever the parameter count.

        (damping I + sum_i w_i g_i g_i' / num_rows)^-1 v
          = (v - G' W^1/2 (damping num_rows I + W^1/2 G G' W^1/2)^-1 W^1/2 G v) / damping

    The matrix of `empirical_fisher_vp(loss_fn, damping=damping)` on the same rows, weights and
    divisor: padding has weight zero, and a row that is not finite counts but contributes nothing.
    Uses the gram, dot and sum of factored per-example gradients: (B, P) is never formed.

    Args:
      damping: > 0.
      num_refinements: rounds of solving again for what is left, >= 0: the difference above cancels
        where `damping` is small beside the largest eigenvalue.
      many: leaves of the right-hand side have a leading axis K; the (B, B) system is factorised
        once.

    Returns:
      A function (gradients, rhs, *, x0=None, key=None, weights=None, num_rows=None) -> `Solution`:
      a solver whose matrix is given by `gradients`, from `per_example(loss_fn)(params, batch)`, and
      not by its products. x0, key: not read. weights: (B,), >= 0; None means ones. num_rows: the
      divisor; None means the sum of the weights of all rows that are not padding. `num_iterations`
      is 1 + 2 num_refinements; `negative_curvature` says that (B, B) was not positive definite, by
      rounding or by a negative weight in a trace, and then x is zero.

    Cost: one Gram matrix, its Cholesky factor (B^3 / 3 operations), and for each
    right-hand side 1 + 2 num_refinements products with G and G', and one for the residual. Memory:
    (B, B) and the factors.

    Raises:
      ValueError: `damping` or a weight out of range, where they are not traced, or weights of the
        wrong shape.

    >>> from jaxunlearn.kernels.per_example import per_example
    >>> gradients = per_example(lambda w, x: jnp.mean(x @ w))(jnp.zeros(2), jnp.eye(2) * 2.0)
    >>> woodbury(damping=1.0)(gradients, jnp.array([3.0, 6.0])).x.round(5)
    Array([1., 2.], dtype=float32)

    References: Woodbury 1950; Ren and Goldfarb 2019, "Efficient subsampled Gauss-Newton and natural
      gradient methods for training neural networks", equation 10.
    """
    check_number("damping", damping, above=0)
    check_number("num_refinements", num_refinements, least=0)

    def solve(
        gradients: "PerExampleGradients",
        rhs: PyTree,
        *,
        x0: PyTree | None = None,
        key: Key[Array, ""] | None = None,
        weights: Float[Array, " b"] | None = None,
        num_rows: float | Array | None = None,
    ) -> Solution:
        del x0, key
        if many:
            check_stack(rhs)
        rhs, weights = as_vector(rhs), _row_weights(gradients, weights)
        run = functools.partial(_woodbury, num_refinements, many)
        operands = gradients, rhs, weights, damping, num_rows
        if all(jax.typeof(leaf).sharding.mesh.empty for leaf in jax.tree.leaves((rhs, weights))):
            return run(*operands)
        template = lambda vectors, small: Solution(vectors, small, small, small)
        return placed(run, *operands, like=rhs, template=template)

    return solve


def _woodbury(num_refinements: int, many: bool, gradients, rhs, weights, damping, num_rows):
    """The solution, the rows that are padding having weight zero."""
    space, over = Space(many), jax.vmap if many else lambda function: function
    divisor = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
    divisor = jnp.where(divisor == 0, 1.0, divisor)
    root = jnp.sqrt(jnp.where(gradients.contributes, weights, 0.0))
    inner = root[:, None] * gradients.gram() * root[None, :]
    shift = damping * divisor * jnp.eye(len(root), dtype=inner.dtype)
    factor = jax.scipy.linalg.cho_factor(inner + shift, lower=True)
    indefinite = ~jnp.all(jnp.isfinite(factor[0]))

    def product(vector):
        pulled = gradients.sum(root**2 * gradients.dot(vector) / divisor)
        return jax.tree.map(lambda g, v: g + damping * v, pulled, vector)

    def apply(vector):
        inside = jax.scipy.linalg.cho_solve(factor, root * gradients.dot(vector))
        pulled = gradients.sum(root * inside)
        x = jax.tree.map(lambda v, g: (v - g) / damping, vector, pulled)
        return jax.tree.map(lambda leaf: jnp.where(indefinite, 0.0, leaf), x)

    system = problem(space, over(product), rhs, None, 0.0)
    x = over(apply)(system.residual)
    for _ in range(num_refinements):
        gap = jax.tree.map(jnp.subtract, system.residual, over(product)(x))
        x = jax.tree.map(jnp.add, x, over(apply)(gap))
    count = zeros(space, system.rhs, jnp.int32) + (1 + 2 * num_refinements)
    return system.solution(x, count, zeros(space, system.rhs, bool) | indefinite)


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
      A function (matvec, rhs, *, x0=None, key=None, **options) -> `Solution`, of the best x met;
      products add up. `x0` goes to the first solve; the others start from zero. `key` is split,
      and each solve draws anew. Other options go to every solve.

    Cost: `num_rounds + 1` solves and as many products for their residuals.

    >>> half = lambda matvec, b: Solution(b / 2, jnp.abs(b / 2), jnp.array(0), jnp.array(False))
    >>> refined(half, num_rounds=2)(lambda x: x, jnp.array(1.0)).x
    Array(0.875, dtype=float32)
    """
    check_count("num_rounds", num_rounds)
    space = Space(many)

    def solve(
        matvec: Matvec,
        rhs: PyTree,
        *,
        x0: PyTree | None = None,
        key: Key[Array, ""] | None = None,
        **options,
    ) -> Solution:
        rhs, product = as_vector(rhs), as_function(matvec)
        keys = [None] * (num_rounds + 1) if key is None else jax.random.split(key, num_rounds + 1)
        own = [options if key is None else {**options, "key": key} for key in keys]
        guess = {} if x0 is None else {"x0": x0}
        solution = solver(matvec, rhs, **guess, **own[0])
        for choice in own[1:]:
            gap = jax.tree.map(jnp.subtract, widen(rhs), widen(product(solution.x)))
            # What is left is its own problem: its first guess is zero, and its draws are new.
            more = solver(matvec, like(gap, rhs), **choice)
            x = like(jax.tree.map(jnp.add, widen(solution.x), widen(more.x)), rhs)
            count = solution.num_iterations + more.num_iterations
            negative = solution.negative_curvature | more.negative_curvature
            new = measured(space, product, rhs, x, count, negative)
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
    """Weights as floats, zero for padding."""
    dtype = jnp.promote_types(gradients.losses.dtype, jnp.float32)
    if weights is None:
        weights = jnp.ones(gradients.losses.shape, dtype)
    if jnp.shape(weights) != gradients.losses.shape:
        raise ValueError(
            f"Expected weights of shape {gradients.losses.shape}, got {jnp.shape(weights)}."
        )
    numbers = concrete(weights)
    if numbers is not None and not np.all((numbers >= 0) & np.isfinite(numbers)):
        raise ValueError(f"Expected finite weights >= 0, got {numbers}.")
    weights = jnp.asarray(weights, dtype)
    return weights if gradients.is_padding is None else jnp.where(gradients.is_padding, 0, weights)
