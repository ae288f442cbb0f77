"""One Newton step of an objective with a linear term, and the figures that bound its residual."""

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
from jaxunlearn.kernels.solves import Solution, Solver
from jaxunlearn.types import Batch, LossFn, Params


class PerturbedFigures(NamedTuple):
    """What is measured round a step v from w, of L_S = sum_S loss_i + |S| (l2 / 2) ||.||^2 + b'.

    R are the retained rows, U the removed ones, D both; X the features of R.

    num_retained, num_removed: |R| and |U|.
    start_residual: ||grad L_D(w)||.  final_residual: ||grad L_R(w + v)||.
    solver_gap: ||hess L_R(w) v + grad L_R(w)||; of a published step ||hess L_R(w) v - delta||.
    gradient_norm_sum: sum of the norms of the summands of these gradients, the larger one.
    step_norm: ||v||.  displacement_norm: ||X v||_F.
    displacement_square_norm: of one class, or of a loss that couples its k columns, the norm of
      the vector of ||x_i' v||^2; one against the rest, that of all (x_i' v_k)^2.
    class_product_sum, class_product_norm: of the ||v_k|| ||X v_k|| over the columns of v, the sum
      and the Euclidean norm.
    perturbation_norm: ||b||.
    num_non_finite: rows left out because their inputs are not finite.
    largest_gradient, largest_feature: max_i ||grad loss_i(w)|| and max_i ||x_i|| over D.
    """

    num_retained: Int[Array, ""]
    num_removed: Int[Array, ""]
    start_residual: Float[Array, ""]
    final_residual: Float[Array, ""]
    solver_gap: Float[Array, ""]
    gradient_norm_sum: Float[Array, ""]
    step_norm: Float[Array, ""]
    displacement_norm: Float[Array, ""]
    displacement_square_norm: Float[Array, ""]
    class_product_sum: Float[Array, ""]
    class_product_norm: Float[Array, ""]
    perturbation_norm: Float[Array, ""]
    num_non_finite: Int[Array, ""]
    largest_gradient: Float[Array, ""]
    largest_feature: Float[Array, ""]


def perturbed_step(
    loss_fn: LossFn,
    *,
    l2: float,
    solver: Solver,
    published: bool = False,
    features: Callable[[Batch], Float[Array, "b d"]] | None = None,
    row_features: Callable[[Batch], Float[Array, "b d"]] | None = None,
    one_vs_rest: bool = False,
    microbatch_size: int | None = None,
):
    """A Newton step to the retained minimiser of a perturbed objective (Guo et al. 2020, 3.2).

        v = -H^-1 grad L_R(w),   H = hess L_R(w)            steps away what was left before, too
        v = H^-1 delta,  delta = sum_U grad loss_i + |U| l2 w             published=True

    Args:
      solver: (matvec, rhs) -> `Solution`; the system is divided by |R|.
      features: batch -> X of shape (B, d), for a single parameter leaf (d,) or (d, k).
      row_features: batch -> X whose largest row is measured; None takes `features`.
      one_vs_rest: the loss is a sum of k losses, each of its own column of the parameters.

    Returns:
      A function (params, perturbation, rows, ids, weights) -> (moved, `Solution`,
      `PerturbedFigures`); perturbation is b, a tree like params. Weight 1 retains a row, 0 removes
      it, id -1 is padding.

    Cost: three gradients, one Hessian product and the solver's. Run it in float64.

    >>> from jaxunlearn.kernels.solves import cholesky
    >>> step = perturbed_step(lambda w, x: jnp.mean(0.5 * (x - w) ** 2), l2=1.0, solver=cholesky())
    >>> x, ids = jnp.array([1.0, 3.0, 8.0]), jnp.arange(3)
    >>> moved, _, _ = step(jnp.array(2.0), jnp.array(8.0), x, ids, jnp.array([1.0, 1.0, 0.0]))
    >>> round(float(moved), 5)
    -1.0
    """
    gradient = weighted_grad(loss_fn)
    product = hvp(loss_fn, microbatch_size=microbatch_size)
    per_row = per_example(loss_fn)

    def summed(params, rows, weights, shift=None):
        sums = gradient(params, rows, weights, num_rows=1)
        sums = _axpy(l2 * jnp.sum(weights), params, sums)
        return sums if shift is None else _axpy(1.0, shift, sums)

    def norm_sum(params, rows, weights):
        return jnp.sum(weights * (per_row(params, rows).norms() + l2 * _norm(params)))

    def step(params: Params, perturbation: Params, rows: Batch, ids, weights):
        removed = ((ids >= 0) & (weights == 0)).astype(weights.dtype)
        present = weights + removed
        count = jnp.maximum(jnp.sum(weights), 1.0)
        over = lambda scale, vector: jax.tree.map(lambda leaf: leaf * scale, vector)
        whole = summed(params, rows, present, perturbation)
        if published:
            wanted = summed(params, rows, removed)
        else:
            wanted = over(-1.0, summed(params, rows, weights, perturbation))
        curved = lambda v: _axpy(l2, v, product(params, rows, v, weights=weights))
        solution: Solution = solver(curved, over(1 / count, wanted))
        moved = jax.tree.map(jnp.add, params, solution.x)
        v = jax.tree.map(jnp.subtract, moved, params)
        gap = jax.tree.map(jnp.subtract, over(count, curved(v)), wanted)
        finite = finite_rows(rows)
        shown, columns = _displacements(features, rows, (weights > 0) & finite, v)
        squares = shown**2 if one_vs_rest else jnp.sum(shown**2, axis=1, keepdims=True)
        products = jnp.linalg.norm(columns, axis=0) * jnp.linalg.norm(shown, axis=0)
        figures = PerturbedFigures(
            num_retained=jnp.sum(weights > 0, dtype=jnp.int32),
            num_removed=jnp.sum(removed > 0, dtype=jnp.int32),
            start_residual=_norm(whole),
            final_residual=_norm(summed(moved, rows, weights, perturbation)),
            solver_gap=_norm(gap),
            gradient_norm_sum=_norm(perturbation)
            + jnp.maximum(norm_sum(params, rows, present), norm_sum(moved, rows, weights)),
            step_norm=_norm(v),
            displacement_norm=jnp.linalg.norm(shown),
            displacement_square_norm=jnp.linalg.norm(squares),
            class_product_sum=jnp.sum(products),
            class_product_norm=jnp.linalg.norm(products),
            perturbation_norm=_norm(perturbation),
            num_non_finite=jnp.sum((present > 0) & ~finite, dtype=jnp.int32),
            largest_gradient=jnp.max(jnp.where(present > 0, per_row(params, rows).norms(), 0.0)),
            largest_feature=largest_feature(row_features or features, rows, (present > 0) & finite),
        )
        return moved, solution, figures

    return step


def _displacements(features, rows, counted, v):
    """X v over the counted rows, and v as columns; zeros without features."""
    if features is None:
        return jnp.zeros((1, 1)), jnp.zeros((1, 1))
    leaves = jax.tree.leaves(v)
    if len(leaves) != 1:
        raise ValueError(
            f"Expected one parameter leaf of shape (d,) or (d, k) with a LinearModel, got "
            f"{len(leaves)}. Append a constant feature in place of a bias."
        )
    columns = leaves[0].reshape(leaves[0].shape[0], -1)
    x = jnp.where(counted[:, None], features(rows), 0.0)
    return jnp.matmul(x, columns, precision=jax.lax.Precision.HIGHEST), columns


def _axpy(scale, x, y):
    return jax.tree.map(lambda a, b: b + scale * a, x, y)


def _norm(vector) -> Float[Array, ""]:
    return jnp.sqrt(tree.vdot(vector, vector))
