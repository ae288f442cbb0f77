"""`clipped_grad`: sums of clipped per-example gradients that state their sensitivity."""

import collections
import dataclasses
import fractions
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import _operations, _stable
from jaxunlearn.kernels._meshes import in_automatic_axes, row_specs, shapes_of, specs_of
from jaxunlearn.kernels.example_gradients import PerExampleGradients
from jaxunlearn.kernels.factors import Dense, cleaned
from jaxunlearn.kernels.microbatches import check_size, over_microbatches, unit_sizes
from jaxunlearn.kernels.per_example import checked_loss, hashable, padding_of
from jaxunlearn.kernels.rowwise import check_params, num_rows_of
from jaxunlearn.types import Params

AuxiliaryOutput = collections.namedtuple("AuxiliaryOutput", ["values", "grad_norms", "aux"])
"""Figures per example, each (B, ...); None for what was not asked for."""

_SENSITIVITIES = {
    "ADD_OR_REMOVE_ONE": 1,
    "REPLACE_ONE": 2,
    "CHANGE_ONE": 2,
    "REPLACE_SPECIAL": 1,
    "ZERO_OUT": 1,
}


@dataclasses.dataclass(frozen=True)
class BoundedSensitivityCallable:
    """A function of a batch that says how far one example can move what it returns.

    fun: the function; calling the object calls it.
    l2_norm_bound: what one example contributes at most, in L2 norm, after every scaling.
    has_aux: whether `fun` returns (value, aux); the bound holds for the value alone.
    dtype: what sums are cast to in the end; None: they stay in float32 or wider.
    """

    fun: Callable[..., Any]
    l2_norm_bound: Any
    has_aux: bool
    dtype: Any = None

    def __call__(self, *args, **kwargs):
        return self.fun(*args, **kwargs)

    def sensitivity(self, neighboring_relation: Any = "REPLACE_SPECIAL"):
        """The L2 sensitivity between batches that differ in one example.

        Noise that hides an example is added to what `fun` returns, at this scale: `normalize_by` is
        in it already. Dividing a sum by the batch size afterwards divides the sensitivity too.

        Args:
          neighboring_relation: "ADD_OR_REMOVE_ONE", "REPLACE_ONE" (or "CHANGE_ONE"), or
            "REPLACE_SPECIAL" (or "ZERO_OUT": an example turns into padding), in any case, or the
            member of `dp_accounting.NeighboringRelation` of that name.

        Returns:
          `l2_norm_bound`, or twice that for "REPLACE_ONE". It bounds the float64 difference of the
          contributions, rounded as they are; adding them up rounds as any sum of that dtype does.

        Raises:
          ValueError: a relation that is none of these, or sums cast to less than float32: with
            bfloat16, one row of a thousand with a clip norm of 1 moves the rounded sum by 4.

        >>> import jax.numpy as jnp
        >>> grad = clipped_grad(lambda w, x: jnp.mean(x * w), l2_clip_norm=3.0, normalize_by=4.0)
        >>> grad.sensitivity(), grad.sensitivity("replace_one")
        (0.75, 1.5)
        """
        name = str(getattr(neighboring_relation, "name", neighboring_relation))
        factor = _SENSITIVITIES.get(name.upper().replace("-", "_"))
        if factor is None:
            raise ValueError(
                f"Expected neighboring_relation in {sorted(_SENSITIVITIES)}, "
                f"got {neighboring_relation!r}."
            )
        if self.dtype is not None and jnp.dtype(self.dtype).itemsize < 4:
            raise ValueError(
                f"Expected sums in float32 or wider, got dtype={self.dtype}: rounding can move a "
                "sum by more than one example does. Leave dtype=None, add noise, then cast."
            )
        return factor * self.l2_norm_bound


def clipped_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: float,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[PyTree], PyTree] | None = None,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
) -> BoundedSensitivityCallable:
    """sum_i g_i min(1, C / ||g_i||) as a drop-in for `jax_privacy.clipping.clipped_grad`.

    Same keywords, same results up to rounding, from factored per-example gradients. Six things
    differ, all on the safe side:

    - Inside `shard_map` a device clips its own rows, whether or not the parameters are replicated.
      (JAX sums the gradient of replicated parameters over devices; clipping such a sum lets one
      example change the contributions of every device.) Add the devices up with `jax.lax.psum`.
    - The bound holds with rounding: a norm is taken with its rounding bound, the clip norm and the
      weights are rounded down, and the bound that is stated is rounded up.
    - With bfloat16 or float16 parameters the result is in float32, so that noise is added before
      the sum is rounded to them; `optax.apply_updates` casts. (There: in the parameters' dtype,
      whose rounding can move a sum by more than one example does.)
    - A row with a NaN or an infinity, in it or in its gradient, contributes zero as a whole
      (there: its other elements still count).
    - `values`, `grad_norms` and `aux` of such a row, and of padding, are zero.
    - `microbatch_size` need not divide the batch.

    Args:
      fun: fun(params, batch) -> scalar, the loss of the rows it is given.
      argnums: what to differentiate with respect to; a tuple gives a tuple of gradients.
      has_aux: `fun` returns (scalar, aux).
      l2_clip_norm: C >= 0, infinity included. 0 gives zero, or with `rescale_to_unit_norm` the sum
        of g_i / ||g_i||. May be traced: one below zero then counts as 0, NaN makes all NaN.
      rescale_to_unit_norm: divide by C, so that an example contributes at most 1.
      normalize_by: > 0; divides the result, and the sensitivity.
      batch_argnums: the arguments with a batch axis, first and of the same length. Keyword
        arguments have one too. Any other argument is the same for every example.
      keep_batch_dim: give `fun` each row as a batch of one; otherwise without that axis: for a loss
        of one example, or for rows that are units of several examples.
      return_values, return_grad_norms: also return the losses, the norms before clipping.
      pre_clipping_transform: from one example's gradient to what is clipped and summed in its
        place. Materialises the gradients.
      microbatch_size: examples at a time, for bounded memory; see `microbatched`.
      nan_safe: if False, a row that is not finite, or whose transformed gradient is not, makes the
        whole result NaN.
      dtype: of the result; None: that of each parameter, but float32 for narrower ones. With one
        below float32 `sensitivity` refuses: the cast comes before the noise.
      prng_argnum: an argument that is a key, split into one key for each example.
      spmd_axis_name: see `jax.vmap`.

    Returns:
      A `BoundedSensitivityCallable` with the arguments of `fun`, and `is_padding_example=`, bool of
      shape (B,), for rows that contribute zero. It returns the gradients, or (gradients,
      `AuxiliaryOutput`) if `has_aux`, `return_values` or `return_grad_norms`. It is jitted, and may
      be jitted again; a second call does not compile again, also at another clip norm. With
      `units_of_rows=`, `num_units=` and `max_rows_per_unit=`, as in `microbatched`, the sum of a
      unit's gradients is clipped, the sensitivity is that of a unit, figures are (num_units,), and
      `aux` is None. Without `max_rows_per_unit=` it compiles for each power of two that bounds
      the rows of the largest unit.

    Rows that `fun` couples (BatchNorm in training mode, token counts over the batch) show in no
    trace, since a row is seen alone: run `check_loss` once, eagerly.

    Cost: that of `PerExampleGradients.clipped_sum`, about one gradient of the batch.

    Raises:
      ValueError: an option outside its range, or batch arguments of different lengths.
      LossSignatureError, TypeError: as `per_example`.

    References: Abadi et al. 2016, algorithm 1; De et al. 2022, section 2.2 (rescaling); the
      `clipped_grad` of JAX Privacy 2.0.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
    >>> grad = clipped_grad(loss, l2_clip_norm=jnp.inf, return_values=True, return_grad_norms=True)
    >>> value, aux = grad(3.0, jnp.array([0.0, 7.0, -2.0]))
    >>> value
    Array(4., dtype=float32)
    >>> aux.values, aux.grad_norms
    (Array([ 4.5,  8. , 12.5], dtype=float32), Array([3., 4., 5.], dtype=float32))
    """
    _check_options(l2_clip_norm, normalize_by)
    call = Call.of(fun, argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)
    plan = Plan(
        call,
        pre_clipping_transform,
        None if microbatch_size is None else check_size(microbatch_size),
        rescale_to_unit_norm,
        float(normalize_by),
        (return_values, return_grad_norms, has_aux),
        nan_safe,
        None if dtype is None else jnp.dtype(dtype),
        spmd_axis_name,
    )

    def clipped(
        *args, is_padding_example=None, units_of_rows=None, num_units=None, max_rows_per_unit=None,
        **kwargs,
    ):  # fmt: skip
        operands = call.split(args, kwargs)
        num_rows, clip = num_rows_of(operands[1]), _lowered_clip(operands[0], l2_clip_norm)
        padding = padding_of(is_padding_example, None, num_rows)
        said = units_of_rows, num_units, max_rows_per_unit
        sizes = unit_sizes(*said, num_rows, plan.microbatch_size)
        return _clipped(plan, sizes, *operands, padding, units_of_rows, clip)

    bound = _over(1.0 if rescale_to_unit_norm else l2_clip_norm, normalize_by)
    return BoundedSensitivityCallable(clipped, bound, any(plan.wanted), plan.dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a function's arguments are dealt out, and put together again for one row."""

    fun: Callable
    argnums: tuple[int, ...]
    is_single: bool
    batch_argnums: tuple[int, ...]
    has_aux: bool
    keep_batch_dim: bool
    prng_argnum: int | None

    @classmethod
    def of(cls, fun, argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum) -> "Call":
        """Checks what can be checked without arguments."""
        batched = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
        is_single = isinstance(argnums, int)
        differentiated = (argnums,) if is_single else tuple(argnums)
        if not batched or not differentiated or min(batched + differentiated) < 0:
            raise ValueError(
                f"Expected argnums={argnums} and batch_argnums={batch_argnums} >= 0, one at least."
            )
        if set(batched) & set(differentiated):
            raise ValueError(
                f"Expected argnums={argnums} without a batch axis, got batch_argnums={batched}."
            )
        if prng_argnum is not None and prng_argnum in batched + differentiated:
            raise ValueError(f"Expected prng_argnum={prng_argnum} to be an argument of its own.")
        fun = hashable(fun)
        return cls(fun, differentiated, is_single, batched, has_aux, keep_batch_dim, prng_argnum)

    def split(self, args, kwargs) -> tuple[Params, PyTree, Any, dict]:
        """(params, rows, keys, shared) from the arguments of a call."""
        own = () if self.prng_argnum is None else (self.prng_argnum,)
        taken = {*self.argnums, *self.batch_argnums, *own}
        last = max(taken)
        if len(args) <= last:
            raise ValueError(f"Expected at least {last + 1} positional arguments, got {len(args)}.")
        params = tuple(args[k] for k in self.argnums)
        params = params[0] if self.is_single else params
        check_params(params)
        rows = tuple(args[k] for k in self.batch_argnums), kwargs
        num_rows = num_rows_of(rows)
        split = lambda key: jax.random.split(key, num_rows)
        keys = None if self.prng_argnum is None else jax.tree.map(split, args[self.prng_argnum])
        return params, rows, keys, {k: arg for k, arg in enumerate(args) if k not in taken}

    def __call__(self, params, row, key, shared):
        """(loss, aux) of one row."""
        differentiated = (params,) if self.is_single else params
        args = dict(shared) | dict(zip(self.argnums, differentiated))
        batched, kwargs = row
        if self.keep_batch_dim:
            batched = jax.tree.map(lambda leaf: leaf[None], batched)
        args |= dict(zip(self.batch_argnums, batched))
        if self.prng_argnum is not None:
            args[self.prng_argnum] = key
        returned = self.fun(*(args[k] for k in range(len(args))), **kwargs)
        return checked_loss(returned, self.has_aux)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static of one `clipped_grad`: the key of its compilation."""

    call: Call
    transform: Callable | None
    microbatch_size: int | None
    rescale: bool
    divisor: float
    wanted: tuple[bool, bool, bool]
    nan_safe: bool
    dtype: Any
    spmd_axis_name: Any

    def consume(self, l2_clip_norm, grads: PerExampleGradients) -> tuple[PyTree, PyTree]:
        """(the clipped sum, the figures per example) of the rows of one microbatch."""
        clipped = grads if self.transform is None else _transformed(grads, self.transform)
        everything = _operations.one_group(clipped)
        (upper,), (limits,) = _operations.bounds(clipped, everything)
        weights = _operations.clip_scales(
            upper, l2_clip_norm, limits=limits, rescale=self.rescale, divisor=self.divisor
        )
        weights = jax.lax.optimization_barrier(weights)
        wide = tuple(_stable.widened(self.dtype or own, own) for own in clipped.dtypes)
        clipped = dataclasses.replace(clipped, dtypes=wide)
        total = _operations.weighted_sum(clipped, (weights,), everything, None)
        if not self.nan_safe:
            total = tree.poison(total, clipped.num_non_finite > 0)
        return total, self._figures(grads)

    def cast(self, total: PyTree) -> PyTree:
        """The sum over all microbatches, in the dtype that was asked for."""
        if self.dtype is None:
            return total
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), total)

    def _figures(self, grads: PerExampleGradients) -> AuxiliaryOutput:
        values, grad_norms, aux = self.wanted
        return AuxiliaryOutput(
            values=grads.losses if values else None,
            grad_norms=grads.norms() if grad_norms else None,
            aux=jax.tree.map(self._without_unit_axis, grads.aux) if aux else None,
        )

    def _without_unit_axis(self, leaf: Array) -> Array:
        """A figure of a batch of one, (B, 1, ...), as one of an example, (B, ...)."""
        has_unit_axis = self.call.keep_batch_dim and leaf.ndim > 1 and leaf.shape[1] == 1
        return leaf[:, 0] if has_unit_axis else leaf


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clipped(
    plan: Plan, sizes, params, rows, keys, shared, padding, units_of_rows, l2_clip_norm
):  # fmt: skip
    """The clipped sum, and the figures per example if any is wanted."""

    def clipped(*operands):
        consume = functools.partial(plan.consume, operands[-1])
        options = {"spmd_axis_name": plan.spmd_axis_name}
        first = plan.call, consume, plan.microbatch_size, sizes
        total, figures = over_microbatches(*first, *operands[:-1], **options)
        return plan.cast(total), figures

    operands = params, rows, keys, shared, padding, units_of_rows, l2_clip_norm

    def specs():
        placed = row_specs(shapes_of(clipped, *operands), rows)
        return placed if plan.transform else (specs_of(params), placed[1])

    total, figures = in_automatic_axes(clipped, *operands, specs=specs)
    return (total, figures) if any(plan.wanted) else total


def _transformed(grads: PerExampleGradients, transform: Callable) -> PerExampleGradients:
    """The gradients with each one replaced by what `transform` makes of it."""
    rows = jax.vmap(transform)(grads.materialize())
    leaves, treedef = jax.tree.flatten(rows)
    factors = tuple(Dense.of(leaf) for leaf in leaves)
    sizes = _stable.joint_norm([factor.size for factor in factors], grads.losses.shape[0])
    is_usable = grads.is_finite & jnp.isfinite(sizes)
    padding = grads.is_padding  # finite, whatever the transform makes of a zero gradient
    is_finite = is_usable if padding is None else is_usable | padding
    return dataclasses.replace(
        grads,
        is_finite=is_finite,
        num_non_finite=jnp.sum(~is_finite, dtype=jnp.int32),
        factors=cleaned(factors, jnp.all(is_usable), is_usable),
        paths=(),
        dtypes=tuple(leaf.dtype for leaf in leaves),
        treedef=treedef,
        specs=(PartitionSpec(),) * len(leaves),
    )


def _check_options(l2_clip_norm, normalize_by) -> None:
    """Refuse numbers out of range."""
    _operations.known("l2_clip_norm", l2_clip_norm)
    if not (normalize_by > 0 and math.isfinite(normalize_by)):
        raise ValueError(f"Expected a finite normalize_by={normalize_by} > 0.")


def _lowered_clip(params: Params, l2_clip_norm):
    """The clip norm in the dtype of the norms, rounded towards zero."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    wide = jnp.result_type(jnp.float32, *dtypes)
    return _operations.lowered("l2_clip_norm", l2_clip_norm, wide)


def _over(numerator, denominator: float):
    """The quotient in float64, rounded up; of a traced number, as it comes."""
    number = _operations.known("l2_clip_norm", numerator)
    if number is None:
        return jnp.maximum(numerator, 0) / denominator
    quotient = number / denominator
    if math.isinf(quotient):
        return quotient
    exact = fractions.Fraction(number) / fractions.Fraction(denominator)
    rounded_down = fractions.Fraction(quotient) < exact
    return math.nextafter(quotient, math.inf) if rounded_down else quotient
