"""Per-example gradients, kept as the factors that backpropagation computes anyway."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key, PyTree

from jaxunlearn import errors
from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._meshes import local_params, placed_as_rows, specs_of
from jaxunlearn.kernels._rules import LeafPath, factored
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.factors import Dense, cleaned
from jaxunlearn.kernels.rowwise import check_operands, num_rows_of
from jaxunlearn.types import Batch, LossFn, Params


def per_example(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., PerExampleGradients]:
    """Per-example gradients of a mean loss, factored: norms and clipped sums at the cost of one.

    The gradient of a dense weight is sum_t a_t b_t^T, and both factors exist before it is formed:
    the jaxpr of `vmap(grad)` is evaluated equation by equation, and for each parameter the operands
    of the equation that made its gradient are kept in place of the product.

    Args:
      loss_fn: mean of per-example losses for any batch size; a row is seen as a batch of one.
      has_aux: `loss_fn` returns (loss, aux); the rows' aux, stacked, comes back as `aux`, zero
        for a row that does not contribute.

    Returns:
      A function (params, batch, *, keys=None, is_padding_example=None, ids=None) ->
      `PerExampleGradients`. keys: typed keys of shape (B,); row i is then
      `loss_fn(params, row, keys[i])`. is_padding_example: bool, (B,), and ids: int, (B,), -1 for
      padding: rows that are none, whatever they hold; they contribute zero and are not counted as
      not finite. The function is jitted, and may be jitted again. Inside `shard_map` the gradients
      are those of the device's own rows.

    Rows that the loss couples (BatchNorm in training mode, token counts over the batch) show in no
    trace, since a row is seen alone: run `check_loss` once, eagerly.

    Cost: one forward and one backward pass without the weight gradients. Memory: the factors, that
    is the activations and their cotangents; (B, *shape) for a parameter that has no factors, as
    `explain()` says. `microbatched` bounds it.

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
    row_loss = BatchOfOne(hashable(loss_fn), has_aux)

    def gradients(
        params: Params,
        batch: Batch,
        *,
        keys: Key[Array, " b"] | None = None,
        is_padding_example: Bool[Array, " b"] | None = None,
        ids: Int[Array, " b"] | None = None,
    ) -> PerExampleGradients:
        check_operands(loss_fn, params, batch, keys)
        padding = padding_of(is_padding_example, ids, num_rows_of(batch))
        return evaluate_rows(row_loss, params, batch, keys, None, padding)

    return gradients


@dataclasses.dataclass(frozen=True)
class BatchOfOne:
    """The loss of one row, as a batch of one, and its aux. Equal to another of the same loss."""

    loss_fn: LossFn
    has_aux: bool

    def __call__(self, params: Params, row: Batch, key, shared: None):
        single = jax.tree.map(lambda leaf: leaf[None], row)
        return checked_loss(
            self.loss_fn(params, single) if key is None else self.loss_fn(params, single, key),
            self.has_aux,
        )


def hashable(loss_fn: LossFn) -> LossFn:
    """`loss_fn`, or a function around it where it cannot be the key of a compilation cache."""
    return loss_fn if isinstance(loss_fn, Hashable) else lambda *args: loss_fn(*args)


def padding_of(is_padding_example, ids, num_rows: int) -> Bool[Array, " b"] | None:
    """Which rows are none, or None where nothing was said."""
    said = [] if is_padding_example is None else [jnp.asarray(is_padding_example)]
    if is_padding_example is not None and said[0].dtype != bool:
        raise ValueError(f"Expected a boolean is_padding_example, got {said[0].dtype}.")
    if ids is not None:
        said.append(jnp.asarray(ids) < 0)
    for padding in said:
        if padding.shape != (num_rows,):
            raise ValueError(
                f"Expected is_padding_example and ids of shape ({num_rows},), got {padding.shape}."
            )
    return functools.reduce(jnp.logical_or, said) if said else None


def checked_loss(returned, has_aux: bool):
    """(loss, aux), refusing a loss that is not one real floating-point number."""
    pair = isinstance(returned, tuple) and len(returned) == 2
    loss, aux = returned if has_aux and pair else (returned, None)
    got = jax.tree.map(jnp.shape, loss)
    if not isinstance(loss, jax.Array) or loss.shape != () or has_aux > pair:
        more = "(scalar, aux) for has_aux=True" if has_aux else "a scalar"
        raise errors.LossSignatureError(
            f"Expected loss_fn to return {more}, the mean over the batch, got {got}. Take "
            "jnp.mean over the rows, and return nothing else."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise errors.LossSignatureError(f"Expected a floating-point loss, got {loss.dtype}.")
    return loss, aux


@functools.partial(jax.jit, static_argnums=0, static_argnames="spmd_axis_name")
def evaluate_rows(
    row_loss: Callable, params: Params, rows: Batch, keys, shared, padding, *, spmd_axis_name=None
) -> PerExampleGradients:
    """Trace vmap(value_and_grad), evaluate it, keep the factors, find the rows to leave out.

    `row_loss(params, row, key, shared) -> (loss, aux)`; `shared` is the same for every row.
    """
    specs = tuple(specs_of(jax.tree.leaves(params)))

    def evaluated(params, rows, keys, shared, padding):
        operands = params, rows, keys, shared, padding
        return _evaluate_rows(row_loss, *operands, spmd_axis_name, specs)

    return placed_as_rows(evaluated, params, rows, keys, shared, padding, batch=rows)


def _evaluate_rows(row_loss, params, rows, keys, shared, padding, spmd_axis_name, specs):
    params = local_params(params, (rows, keys))
    num_rows = num_rows_of(rows)
    live = _finite_rows(rows) if padding is None else _finite_rows(rows) & ~padding
    operands = (params, rows, keys, shared)
    axes = (None, 0, None if keys is None else 0, None)
    value_and_grad = jax.value_and_grad(row_loss, has_aux=True)
    mapped = jax.vmap(value_and_grad, in_axes=axes, spmd_axis_name=spmd_axis_name)
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in named]
    loss, aux, found, shared_by = _factored(mapped, operands, names)
    sizes = _stable.joint_norm([factor.size for factor, _ in found], num_rows)
    is_usable = jnp.isfinite(sizes)
    # The barrier keeps XLA from working this out again for every element that it masks.
    finite = lax.optimization_barrier(live & jnp.isfinite(loss) & is_usable)
    kept = functools.partial(_stable.rows_where, finite)
    is_finite = finite if padding is None else finite | padding
    is_clean = jnp.all(finite if padding is None else is_finite & is_usable)
    return PerExampleGradients(
        losses=kept(loss),
        is_finite=is_finite,
        num_non_finite=jnp.sum(~is_finite, dtype=jnp.int32),
        factors=cleaned(tuple(factor for factor, _ in found), is_clean, finite, shared_by),
        is_padding=padding,
        aux=_aux(aux, kept),
        paths=tuple(path for _, path in found),
        dtypes=tuple(jnp.result_type(leaf) for _, leaf in named),
        treedef=treedef,
        specs=specs,
    )


def _finite_rows(rows: Batch) -> Bool[Array, " b"]:
    """Which rows are finite in every inexact leaf; zero times anything else is NaN.

    XLA on CPU sums in the pass that multiplies, where `all(isfinite(x))` writes a mask as large.
    """
    finite = jnp.ones((num_rows_of(rows),), bool)
    for leaf in jax.tree.leaves(rows):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            flat = jnp.asarray(leaf).reshape(leaf.shape[0], _stable.size_of(leaf.shape[1:]))
            finite &= jnp.isfinite(jnp.sum(0 * flat, axis=1))
    return finite


def _factored(mapped: Callable, operands: tuple, names: list[str]):
    """Losses, aux, and a factor with its explanation for each gradient that `mapped` returns."""
    closed, shapes = jax.make_jaxpr(mapped, return_shape=True)(*operands)
    if not shapes[0][0].size:  # nothing to look at
        (loss, aux), gradients = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        factors = [Dense.of(leaf) for leaf in jax.tree.leaves(gradients)]
        row = lambda name, f: LeafPath(name, f.value.shape[1:], "materialised", f.floats, "no rows")
        return loss, aux, [(f, row(name, f)) for name, f in zip(names, factors, strict=True)], {}
    treedef: Any = jax.tree.structure(shapes[0][1])
    per_row = (False, True, True, False)  # params, rows, keys, shared
    varies = [own for own, part in zip(per_row, operands) for _ in jax.tree.leaves(part)]
    num_plain = 1 + treedef.num_leaves
    (loss, *aux), found, shared_by = factored(
        closed, jax.tree.leaves(operands), varies, num_plain, names
    )
    return loss, jax.tree.unflatten(treedef, aux), found, shared_by


def _aux(aux: PyTree, kept: Callable) -> PyTree:
    """Zeros in the rows that do not count; a key has no zero and stays."""
    return jax.tree.map(lambda leaf: leaf if _is_key(leaf) else kept(jnp.asarray(leaf)), aux)


def _is_key(leaf) -> bool:
    """Whether a leaf is an array of typed keys."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
