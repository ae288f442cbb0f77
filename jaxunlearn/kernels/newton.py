"""The Newton step of certified removal, and the figures from which its residual is bounded."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxunlearn import tree
from jaxunlearn.kernels.gradients import weighted_grad
from jaxunlearn.kernels.per_example import per_example
from jaxunlearn.kernels.products import hvp
from jaxunlearn.kernels.rowwise import finite_rows, largest_feature
from jaxunlearn.kernels.solves import Solver
from jaxunlearn.types import Batch, LossFn, Params


class RemovalFigures(NamedTuple):
    """What `removal_figures` measures around a step v from w to w + v.

    R are the retained rows, U the removed ones, D both; gradients are sums over rows, of
    L_S = sum_S loss_i + |S| (l2 / 2) ||.||^2.

    num_retained, num_removed: |R| and |U|.
    solver_gap: ||hess L_R(w) v - delta||, delta = grad L_D(w) - grad L_R(w).
    start_residual: ||grad L_D(w)||.  final_residual: ||grad L_R(w + v)||.
    gradient_norm_sum: sum of the norms of the summands of grad L_D(w) or of grad L_R(w + v),
      whichever is larger; what rounding in those sums is proportional to.
    step_norm: ||v||.  displacement_norm: ||X v||_F.  displacement_square_norm: norm of the
      vector of ||x_i' v||^2, X the retained features (0 without features).
    num_non_finite: rows left out because their inputs or loss are not finite.
    largest_feature: max_i ||x_i|| over D (0 without features).
    """

    num_retained: Int[Array, ""]
    num_removed: Int[Array, ""]
    solver_gap: Float[Array, ""]
    start_residual: Float[Array, ""]
    final_residual: Float[Array, ""]
    gradient_norm_sum: Float[Array, ""]
    step_norm: Float[Array, ""]
    displacement_norm: Float[Array, ""]
    displacement_square_norm: Float[Array, ""]
    num_non_finite: Int[Array, ""]
    largest_feature: Float[Array, ""]


def newton_step(
    loss_fn: LossFn,
    *,
    l2: float,
    solver: Solver,
    microbatch_size: int | None = None,
    refine: bool = False,
):
    """One Newton step towards the minimiser of the retained rows (Guo et al. 2020, section 3).

        w + H^-1 delta,  H = hess L_R(w),  delta = sum_U grad loss_i(w) + |U| l2 w

    Args:
      l2: strong convexity of the mean objective.
      solver: (matvec, rhs) -> `Solution`; the system is divided by |R|, so that `l2` is a lower
        bound of its spectrum.
      refine: take delta = -grad L_R(w) instead, a Newton step from anywhere; the same step where
        grad L_D(w) = 0.

    Returns:
      A function (params, rows, ids, weights) -> (new params, `Solution`). Weight 1 retains a row,
      0 removes it, and id -1 is padding; leaves of `rows` have a leading axis.

    Cost: one gradient and the solver's products.

    >>> from jaxunlearn.kernels.solves import cholesky
    >>> mean_square = lambda w, x: jnp.mean(0.5 * (x - w) ** 2)
    >>> step = newton_step(mean_square, l2=1.0, solver=cholesky())
    >>> x, ids = jnp.array([1.0, 3.0, 8.0]), jnp.arange(3)
    >>> step(jnp.array(2.0), x, ids, jnp.array([1.0, 1.0, 0.0]))[0]
    Array(1., dtype=float32)
    """
    gradient = weighted_grad(loss_fn)
    product = hvp(loss_fn, microbatch_size=microbatch_size)

    def step(params: Params, rows: Batch, ids, weights):
        removed = ((ids >= 0) & (weights == 0)).astype(weights.dtype)
        num_retained = jnp.maximum(jnp.sum(weights), 1.0)
        summed = -weights if refine else removed
        sums = gradient(params, rows, summed, num_rows=1)
        penalty = l2 * jnp.sum(summed)
        delta = jax.tree.map(lambda s, p: (s + penalty * p) / num_retained, sums, params)
        matvec = lambda v: jax.tree.map(
            lambda h, x: h + l2 * x, product(params, rows, v, weights=weights), v
        )
        solution = solver(matvec, delta)
        return jax.tree.map(jnp.add, params, solution.x), solution

    return step


def removal_figures(
    loss_fn: LossFn,
    *,
    l2: float,
    microbatch_size: int | None = None,
    features: Callable[[Batch], Float[Array, "b d"]] | None = None,
):
    """Measures how far any step, exact or not, lands from the retained minimiser's equation.

    Returns:
      A function (params, new_params, rows, ids, weights) -> `RemovalFigures`.

    Cost: three gradients, two per-example norms and one Hessian product over all rows. Run it in
    float64: the residual is a difference of nearly equal sums.

    References: Guo et al. 2020, proof of Theorem 1; keeping Hv - delta makes it solver-agnostic.
    """
    gradient = weighted_grad(loss_fn)
    product = hvp(loss_fn, microbatch_size=microbatch_size)
    per_row = per_example(loss_fn)

    def total_gradient(params, rows, weights):
        sums = gradient(params, rows, weights, num_rows=1)
        return _axpy(l2 * jnp.sum(weights), params, sums)

    def norm_sum(params, rows, weights):
        norms = per_row(params, rows).norms()
        return jnp.sum(weights * (norms + l2 * _norm(params)))

    def figures(params: Params, new_params: Params, rows: Batch, ids, weights) -> RemovalFigures:
        removed = ((ids >= 0) & (weights == 0)).astype(weights.dtype)
        present = weights + removed
        moved = jax.tree.map(jnp.subtract, new_params, params)
        whole = total_gradient(params, rows, present)
        delta = total_gradient(params, rows, removed)
        curved = product(params, rows, moved, weights=weights, num_rows=1)
        curved = _axpy(l2 * jnp.sum(weights), moved, curved)
        displaced = _displacements(features, rows, weights, moved)
        squares, finite = jnp.sum(displaced**2, axis=1), finite_rows(rows)
        return RemovalFigures(
            num_retained=jnp.sum(weights > 0, dtype=jnp.int32),
            num_removed=jnp.sum(removed > 0, dtype=jnp.int32),
            solver_gap=_norm(jax.tree.map(jnp.subtract, curved, delta)),
            start_residual=_norm(whole),
            final_residual=_norm(total_gradient(new_params, rows, weights)),
            gradient_norm_sum=jnp.maximum(
                norm_sum(params, rows, present), norm_sum(new_params, rows, weights)
            ),
            step_norm=_norm(moved),
            displacement_norm=jnp.sqrt(jnp.sum(squares)),
            displacement_square_norm=jnp.linalg.norm(squares),
            num_non_finite=jnp.sum((present > 0) & ~finite, dtype=jnp.int32),
            largest_feature=largest_feature(features, rows, (present > 0) & finite),
        )

    return figures


def feature_gram(features: Callable[[Batch], Float[Array, "b d"]]):
    """A function (rows, weights) -> X'X of shape (d, d) over the rows of non-zero weight."""

    def gram(rows: Batch, weights):
        counted = (weights > 0) & finite_rows(rows)
        x = jnp.where(counted[:, None], features(rows), 0.0)
        return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)

    return gram


def _displacements(features, rows, weights, moved):
    """x_i' v for every retained row, shape (B, k); zeros without features."""
    if features is None:
        return jnp.zeros((1, 1), weights.dtype)
    leaves = jax.tree.leaves(moved)
    if len(leaves) != 1:
        raise ValueError(
            f"Expected one parameter leaf of shape (d,) or (d, k) with a LinearModel, got "
            f"{len(leaves)}. Append a constant feature in place of a bias."
        )
    (leaf,) = leaves
    columns = leaf.reshape(leaf.shape[0], -1)
    counted = (weights > 0) & finite_rows(rows)
    x = jnp.where(counted[:, None], features(rows), 0.0)
    return jnp.matmul(x, columns, precision=jax.lax.Precision.HIGHEST)


def _axpy(scale, x, y):
    return jax.tree.map(lambda a, b: b + scale * a, x, y)


def _norm(vector) -> Float[Array, ""]:
    return jnp.sqrt(tree.vdot(vector, vector))
