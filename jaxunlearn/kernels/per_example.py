"""Per-example gradients, kept as the factors that backpropagation computes anyway."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxunlearn import errors
from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._rules import LeafPath, factored
from jaxunlearn.kernels.factors import Factor
from jaxunlearn.kernels.rowwise import finite_rows, local_params, num_rows_of
from jaxunlearn.tree import is_inexact
from jaxunlearn.types import Batch, LossFn, Params


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which leaf took which path; `str()` is a table."""

    rows: tuple[LeafPath, ...]

    def __str__(self) -> str:
        cells = [("leaf", "shape", "path", "floats per example", "why")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            cells.append((row.leaf, shape, row.path, str(row.floats), row.reason))
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join(lines)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["losses", "is_finite", "num_non_finite", "factors"],
    meta_fields=["paths", "dtypes", "treedef"],
)
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """The gradients g_1 .. g_B of a batch, factored. A pytree: it may leave a `jit`.

    losses: (B,); zero where not finite.
    is_finite: (B,), whether a row's inputs, loss and gradient are. A row that is not contributes
      zero to everything below. Finite means that the sum over tokens of |left| |right|, which the
      norm cannot exceed, is below the largest number of the dtype.
    num_non_finite: int32, how many rows are not.

    Sums and products accumulate in float32 or wider, at the highest precision of the device.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, batch: jnp.mean(batch @ w)
    >>> grads = per_example(loss)(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 1.0]]))
    >>> grads.norms()
    Array([5., 1.], dtype=float32)
    >>> grads.sum()
    Array([3., 5.], dtype=float32)
    """

    losses: Float[Array, " b"]
    is_finite: Bool[Array, " b"]
    num_non_finite: Int[Array, ""]
    factors: tuple[Factor, ...]
    paths: tuple[LeafPath, ...] = dataclasses.field(repr=False)
    dtypes: tuple[Any, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)

    def norms(self) -> Float[Array, " b"]:
        """Each ||g_i||_2 over all parameters, (B,)."""
        return _norms_and_bounds(self)[0]

    def norm_bounds(self) -> Float[Array, " b"]:
        """What rounding can have hidden: exactly computed, ||g_i|| <= norms + norm_bounds, (B,)."""
        return _norms_and_bounds(self)[1]

    def sum(self, weights: Float[Array, " b"] | None = None) -> Params:
        """sum_i w_i g_i, shaped like the parameters and rounded to their dtypes at the end.

        One matmul per factored weight with w folded into its smaller factor; no second backward.
        The weight of a row that is not finite is not read.
        """
        if weights is not None and jnp.shape(weights) != self.losses.shape:
            raise ValueError(
                f"Expected weights of shape {self.losses.shape}, got {jnp.shape(weights)}."
            )
        return _sum(self, weights)

    def clipped_sum(self, l2_clip_norm: float | Float[Array, ""]) -> Params:
        """sum_i g_i min(1, C / ||g_i||), each norm taken with its rounding bound.

        The float64 norm of every contribution is at most C, rounding included; adding the
        contributions up, and the cast to the parameters' dtypes, round as any sum does.
        """
        concrete = isinstance(l2_clip_norm, int | float | np.number)
        if concrete and not l2_clip_norm > 0:
            raise ValueError(f"Expected l2_clip_norm={l2_clip_norm} > 0.")
        return _clipped_sum(self, l2_clip_norm)

    def dot(self, vector: Params) -> Float[Array, " b"]:
        """<g_i, vector> for a vector shaped like the parameters, (B,)."""
        leaves, treedef = jax.tree.flatten(vector)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if treedef != self.treedef or shapes != [path.shape for path in self.paths]:
            raise ValueError(
                "Expected a vector with the structure and shapes of the parameters, "
                f"{self.treedef} with {[path.shape for path in self.paths]}, "
                f"got {treedef} with {shapes}."
            )
        return _dot(self, leaves)

    def gram(self) -> Float[Array, "b b"]:
        """<g_i, g_j>, (B, B)."""
        return _gram(self)

    def materialize(self) -> PyTree:
        """The gradients, every leaf (B, *shape): B times the memory of the parameters."""
        return _materialize(self)

    def explain(self) -> Explanation:
        """Which leaf took which path, and why. Static: it also works on traced gradients."""
        return Explanation(self.paths)


def per_example(loss_fn: LossFn) -> Callable[..., PerExampleGradients]:
    """Per-example gradients of a mean loss, factored: norms and clipped sums at the cost of one.

    The gradient of a dense weight is sum_t a_t b_t^T, and both factors exist before it is formed:
    the jaxpr of `vmap(grad)` is evaluated equation by equation, and for each parameter the operands
    of the equation that made its gradient are kept in place of the product.

    Args:
      loss_fn: mean of per-example losses for any batch size; a row is seen as a batch of one.

    Returns:
      A function (params, batch, *, keys=None) -> `PerExampleGradients`. keys: typed keys of shape
      (B,); row i is then `loss_fn(params, row, keys[i])`. It is jitted, and may be jitted again.

    Cost: one forward and one backward pass without the weight gradients. Memory: the factors, that
    is the activations and their cotangents; (B, *shape) for a parameter that has no factors, as
    `explain()` says.

    Raises:
      LossSignatureError: `loss_fn` does not take these arguments, or does not return a scalar.
      TypeError: a parameter is not real floating point.
      ValueError: the leaves of `batch` do not share a leading axis.

    References: Goodfellow 2015, "Efficient per-example gradient computations" (one token); Li et
      al. 2022, "Large language models can be strong differentially private learners", section 4
      (the Gram trick over tokens). Deviations: norms carry a rounding bound, and the weighted sum
      reuses the factors where theirs runs a second backward pass.

    >>> import jax.numpy as jnp
    >>> grads = per_example(lambda w, batch: jnp.mean(batch * w))(1.0, jnp.array([2.0, 30.0]))
    >>> grads.clipped_sum(10.0) <= 12.0
    Array(True, dtype=bool)
    """

    def gradients(
        params: Params, batch: Batch, *, keys: Key[Array, " b"] | None = None
    ) -> PerExampleGradients:
        _check_operands(loss_fn, params, batch, keys)
        return _evaluate(_hashable(loss_fn), params, batch, keys)

    return gradients


def _hashable(loss_fn: LossFn) -> LossFn:
    """`loss_fn`, or a function around it where it cannot be the key of a compilation cache."""
    return loss_fn if isinstance(loss_fn, Hashable) else lambda *args: loss_fn(*args)


def _check_operands(loss_fn: LossFn, params: Params, batch: Batch, keys) -> None:
    """Refuse what tracing would only report from deep inside."""
    operands = ("params", "batch") if keys is None else ("params", "batch", "key")
    try:
        inspect.signature(loss_fn).bind(*operands)
    except TypeError as error:
        hint = "Pass keys= for a loss that takes a key." if keys is None else "Leave keys= out."
        raise errors.LossSignatureError(
            f"Expected loss_fn({', '.join(operands)}) -> scalar, but calling it so fails: {error}. "
            f"{hint} Close over everything else."
        ) from error
    except ValueError:  # a built-in without a signature: the call itself will tell
        pass
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Expected floating-point parameters, got {jax.dtypes.result_type(leaf)} at "
                f"params{jax.tree_util.keystr(path)}. Close over it, or move it into the batch."
            )
    num_rows = num_rows_of(batch)
    if keys is not None and not (
        jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and keys.shape == (num_rows,)
    ):
        raise ValueError(
            f"Expected typed keys of shape ({num_rows},), got {keys.dtype} of shape {keys.shape}. "
            "Make them with jax.random.split(jax.random.key(seed), num_rows)."
        )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(loss_fn: LossFn, params: Params, batch: Batch, keys) -> PerExampleGradients:
    """Trace vmap(value_and_grad), evaluate it, keep the factors, find the rows to leave out."""

    params = local_params(params, (batch, keys))

    def row_loss(params, row, key):
        single = jax.tree.map(lambda leaf: leaf[None], row)
        return _checked(loss_fn(params, single) if key is None else loss_fn(params, single, key))

    num_rows = num_rows_of(batch)
    live = finite_rows(batch)
    # Zeros do: rows do not meet in a vmap, and a gradient that is NaN at zero is masked below.
    operands = (params, jax.tree.map(functools.partial(_masked_input, live), batch), keys)
    axes = (None, 0, None if keys is None else 0)
    closed = jax.make_jaxpr(jax.vmap(jax.value_and_grad(row_loss), in_axes=axes))(*operands)

    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in named]
    varies = [own for own, x in zip((False, True, True), operands) for _ in jax.tree.leaves(x)]
    (loss,), found = factored(closed, jax.tree.leaves(operands), varies, 1, names)
    sizes = _stable.joint_norm([factor.size for factor, _ in found], num_rows)
    # The barrier keeps XLA from working this out again for every element that it masks.
    is_finite = lax.optimization_barrier(live & jnp.isfinite(loss) & jnp.isfinite(sizes))
    return PerExampleGradients(
        losses=_stable.rows_where(is_finite, loss),
        is_finite=is_finite,
        num_non_finite=jnp.sum(~is_finite, dtype=jnp.int32),
        factors=tuple(factor for factor, _ in found),
        paths=tuple(path for _, path in found),
        dtypes=tuple(jnp.result_type(leaf) for _, leaf in named),
        treedef=treedef,
    )


def _masked_input(live: Array, leaf: Array) -> Array:
    """Zeros in the rows that are not finite; integers and keys cannot be."""
    return _stable.rows_where(live, leaf) if is_inexact(leaf) else leaf


def _checked(loss):
    """Refuse a loss that is not one real floating-point number."""
    got = jax.tree.map(jnp.shape, loss)
    if not isinstance(loss, jax.Array) or loss.shape != ():
        raise errors.LossSignatureError(
            f"Expected loss_fn to return a scalar, the mean over the batch, got {got}. Take "
            "jnp.mean over the rows, and return nothing else."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise errors.LossSignatureError(f"Expected a floating-point loss, got {loss.dtype}.")
    return loss


@jax.jit
def _norms_and_bounds(grads: PerExampleGradients) -> tuple[Array, Array]:
    """Norms over all parameters, and how far below the truth each may lie."""
    num_rows = grads.losses.shape[0]
    norms, uppers = (
        zip(*(factor.norms() for factor in grads.factors)) if grads.factors else ((), ())
    )
    norm, upper = (_stable.joint_norm(list(values), num_rows) for values in (norms, uppers))
    roundoff = _stable.unit_roundoff(norm.dtype)
    upper = upper * (1 + (len(norms) + 2 * _stable.SLACK) * roundoff)
    bound = _stable.rows_where(grads.is_finite, upper - norm)
    return _stable.rows_where(grads.is_finite, norm), bound


def _over_finite_rows(function, grads: PerExampleGradients, *operands):
    """`function(factors, *operands)`, again with masked factors if some row is not finite.

    A mask copies every factor, and XLA on CPU is slow inside a branch: the usual case has neither.
    """

    def masked(factors):
        return function(tuple(f.kept(grads.is_finite) for f in factors), *operands)

    usual = function(grads.factors, *operands)
    return lax.cond(grads.num_non_finite == 0, lambda _: usual, masked, grads.factors)


@jax.jit
def _sum(grads: PerExampleGradients, weights) -> Params:
    """The weighted sum, leaf by leaf."""
    if weights is not None:
        weights = jnp.where(grads.is_finite, weights, 0)

    def leaves(factors, weights):
        return [f.sum(weights).astype(dtype) for f, dtype in zip(factors, grads.dtypes)]

    return jax.tree.unflatten(grads.treedef, _over_finite_rows(leaves, grads, weights))


@jax.jit
def _clipped_sum(grads: PerExampleGradients, l2_clip_norm) -> Params:
    """Scale by min(1, C / upper bound of the norm), then sum."""
    norm, bound = _norms_and_bounds(grads)
    upper = norm + bound
    fits = upper <= l2_clip_norm
    # The division, and the scale's own two products, round by less than 4 u altogether.
    shrink = l2_clip_norm * (1 - 8 * _stable.unit_roundoff(norm.dtype))
    weights = jnp.where(fits, 1, shrink / jnp.where(fits, 1, upper)).astype(norm.dtype)
    return _sum(grads, lax.optimization_barrier(weights))


@jax.jit
def _dot(grads: PerExampleGradients, leaves: list[Array]) -> Float[Array, " b"]:
    """<g_i, vector>, leaf by leaf."""
    start = jnp.zeros(grads.losses.shape, _stable.widened(grads.losses))
    dots = [factor.dot(jnp.asarray(leaf)) for factor, leaf in zip(grads.factors, leaves)]
    return _stable.rows_where(grads.is_finite, sum(dots, start=start))


@jax.jit
def _gram(grads: PerExampleGradients) -> Float[Array, "b b"]:
    """<g_i, g_j>, leaf by leaf."""
    start = jnp.zeros(grads.losses.shape * 2, _stable.widened(grads.losses))
    return _over_finite_rows(lambda factors: sum((f.gram() for f in factors), start=start), grads)


@jax.jit
def _materialize(grads: PerExampleGradients) -> PyTree:
    """(B, *shape), leaf by leaf, in the parameters' dtypes."""
    leaves = [
        _stable.rows_where(grads.is_finite, factor.materialize()).astype(dtype)
        for factor, dtype in zip(grads.factors, grads.dtypes)
    ]
    return jax.tree.unflatten(grads.treedef, leaves)
