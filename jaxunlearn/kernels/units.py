"""Several rows as one unit: their factors side by side, as tokens of one example are."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._meshes import placed_as_rows
from jaxunlearn.kernels.factors import (
    Conv,
    Dense,
    Factor,
    Lookup,
    Outer,
    Placed,
    Product,
    Shared,
    Sum,
    cleaned,
    gram_is_cheaper,
    product_slack,
)

if TYPE_CHECKING:
    from jaxunlearn.kernels.example_gradients import PerExampleGradients


def check(
    units_of_rows, num_rows: int, num_units: int, max_rows: int | None, at_most: int | None = None
) -> int:
    """Refuse units that cannot be; how many rows a unit can have, a static size.

    Where they are counted it is a power of two, or `at_most`: each size is a compilation. It is
    above `at_most` only where a unit has more rows than that.
    """
    if jnp.shape(units_of_rows) != (num_rows,) or not jnp.issubdtype(
        jnp.result_type(units_of_rows), jnp.integer
    ):
        raise ValueError(
            f"Expected integer units of shape ({num_rows},), got {jnp.result_type(units_of_rows)} "
            f"of shape {jnp.shape(units_of_rows)}."
        )
    if num_units < 0 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"Expected num_units={num_units} >= 0 and max_rows_per_unit={max_rows} >= 1."
        )
    try:
        known = np.asarray(units_of_rows)
    except jax.errors.TracerArrayConversionError:
        return max(1, min(max_rows or num_rows, num_rows))
    if known.size and not (known.min() >= -1 and known.max() < num_units):
        raise ValueError(
            f"Expected units in -1..{num_units - 1}, got {known.min()}..{known.max()}."
        )
    most = 0 if num_units == 0 else int(np.bincount(known[known >= 0], minlength=1).max())
    if max_rows is not None and most > max_rows:
        raise ValueError(f"Expected at most max_rows_per_unit={max_rows} rows, got {most}.")
    power = 1 << max(0, most - 1).bit_length()
    return max_rows or max(1, most, min(power, num_rows, at_most or num_rows))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "size", "hidden", "slack"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Summed(Product):
    """Gradients that are sums of several rows' gradients.

    slack: (U,), what adding the rows up can have hidden of the norm.
    """

    slack: Float[Array, " u"]

    def kept(self, mask: Array) -> "Summed":
        product = super().kept(mask)
        slack = _stable.rows_where(mask, self.slack)
        return Summed(product.value, product.size, product.hidden, slack)

    def scaled(self, exponents: Array) -> "Summed":
        product = super().scaled(exponents)
        slack = _stable.scale_by(self.slack, exponents)
        return Summed(product.value, product.size, product.hidden, slack)

    def norms(self) -> tuple[Array, Array]:
        norm, upper = super().norms()
        return norm, upper + self.slack


@functools.partial(jax.jit, static_argnums=(2, 3))
def merge(
    grads: "PerExampleGradients", units_of_rows: Int[Array, " b"], num_units: int, max_rows: int
) -> "PerExampleGradients":
    """The gradients of units; rows that do not count, and rows of no unit, add zero."""

    def merged(grads, units_of_rows):
        return _merge(grads, units_of_rows, num_units, max_rows)

    return placed_as_rows(merged, grads, units_of_rows, batch=None)


def _merge(grads, units_of_rows, num_units: int, max_rows: int) -> "PerExampleGradients":
    counts = grads.contributes & (units_of_rows >= 0) & (units_of_rows < num_units)
    places = jnp.where(counts, units_of_rows, num_units)
    table, fits = _table(places, num_units, max_rows)
    if num_units:
        merged = [_merged(factor, counts, places, table, num_units) for factor in grads.factors]
    else:
        empty = zip(grads.paths, grads.dtypes)
        merged = [Dense.of(jnp.zeros((0, *path.shape), dtype)) for path, dtype in empty]
    sizes = _stable.joint_norm([factor.size for factor in merged], num_units)
    is_finite = jax.lax.optimization_barrier(fits & jnp.isfinite(sizes))
    losses = jax.ops.segment_sum(jnp.where(counts, grads.losses, 0), places, num_units)
    return dataclasses.replace(
        grads,
        losses=_stable.rows_where(is_finite, losses),
        is_finite=is_finite,
        num_non_finite=jnp.sum(~is_finite, dtype=jnp.int32),
        factors=cleaned(tuple(merged), jnp.all(is_finite), is_finite),
        is_padding=None,
        aux=None,
    )


def table_of(
    units_of_rows: Int[Array, " b"], padding, num_units: int, max_rows: int
) -> tuple[Array, Array]:
    """`_table` of the rows that are not padding; a unit whose rows do not fit has none in it."""
    counts = (units_of_rows >= 0) & (units_of_rows < num_units)
    counts = counts if padding is None else counts & ~padding
    table, fits = _table(jnp.where(counts, units_of_rows, num_units), num_units, max_rows)
    return jnp.where(fits[:, None], table, units_of_rows.shape[0]), fits


def side_by_side(
    grads: "PerExampleGradients", fits: Bool[Array, " u"], padding: Bool[Array, " u"] | None
) -> "PerExampleGradients":
    """The gradients of units whose rows follow one another, as many for each.

    fits: a unit that does not is not finite.  padding: units that are none.
    """
    num_units, num_rows = fits.shape[0], grads.losses.shape[0]
    max_rows = num_rows // num_units
    merged = merge(grads, jnp.arange(num_rows) // max_rows, num_units, max_rows)
    is_finite = merged.is_finite & fits if padding is None else merged.is_finite & fits | padding
    num_non_finite = jnp.sum(~is_finite, dtype=jnp.int32)
    options = {"is_padding": padding, "is_finite": is_finite, "num_non_finite": num_non_finite}
    return dataclasses.replace(merged, **options)


def _table(places: Int[Array, " b"], num_units: int, max_rows: int) -> tuple[Array, Array]:
    """(U, max_rows) row numbers, B where a unit has no more rows; and whether all its rows fit."""
    num_rows = places.shape[0]
    order = jnp.append(jnp.argsort(places), num_rows)
    counts = jnp.zeros((num_units + 1,), jnp.int32).at[places].add(1)[:num_units]
    starts = jnp.cumsum(counts) - counts
    rank = jnp.arange(max_rows, dtype=jnp.int32)
    at = jnp.where(rank < counts[:, None], starts[:, None] + rank, num_rows)
    return order[at], counts <= max_rows


def _merged(factor: Any, counts: Array, places: Array, table: Array, num_units: int) -> Any:
    """The factor of the units' sums; a row that does not count is in no place of the table."""
    if _has_tokens(factor):
        merged = _side_by_side(factor, table)
        if isinstance(merged, Outer) and not _stays_factored(merged):
            dense = Dense.of(merged.materialize())
            return Product(dense.value, dense.size, product_slack(merged))
        return merged
    if isinstance(factor, Sum) and all(map(_has_tokens, factor.parts)):
        return Sum.of(tuple(_side_by_side(part, table) for part in factor.parts), factor.shape)
    if isinstance(factor, Shared):
        rows = jnp.zeros((num_units + 1,), factor.rows.dtype).at[places].add(factor.rows)
        norm = jnp.max(factor.kept(counts).size, initial=0)
        return Shared(factor.kept(counts).value, rows[:num_units], rows[:num_units] * norm)
    if isinstance(factor, Placed):
        return Placed(_summed(factor.inner.kept(counts), places, table, num_units), factor.steps)
    return _summed(factor.kept(counts), places, table, num_units)


def _has_tokens(factor: Any) -> bool:
    """Whether a factor sums over tokens, so that several rows' can stand side by side."""
    return isinstance(factor, Outer | Lookup | Conv)


def _stays_factored(outer: Outer) -> bool:
    """Whether the factors are cheaper than their product."""
    _, _, num_tokens, m = outer.left.shape
    return num_tokens == 1 or gram_is_cheaper(num_tokens, m, outer.right.shape[-1])


def _side_by_side(factor: Any, table: Array) -> Any:
    """The tokens of a unit's rows, one row after the other."""

    def joined(x, axis):
        rows = jnp.moveaxis(jnp.take(x, table, axis=0, mode="fill", fill_value=0), 1, axis)
        return rows.reshape(*rows.shape[:axis], -1, *rows.shape[axis + 2 :])

    if isinstance(factor, Lookup):
        index, rows = joined(factor.index, 1), joined(factor.rows, 1)
        return Lookup.of(index, rows, factor.num_rows, factor.steps)
    axis = 1 if isinstance(factor, Conv) else 2
    left, right = joined(factor.left, axis), joined(factor.right, axis)
    if isinstance(factor, Conv):
        return Conv.of(left, right, factor.geometry, factor.steps)
    return Outer.of(left, right, factor.steps)


def _summed(factor: Factor, places: Array, table: Array, num_units: int) -> Summed:
    """The sums of materialised gradients, (U, *shape)."""
    value = factor.materialize()
    # Zeros and ones: every product is exact, and a scatter is slow on CPU.
    members = (jnp.arange(num_units)[:, None] == places).astype(_stable.widened(value))
    summed = Dense.of(_stable.contract("ub,b...->u...", members, value))
    _, uppers = factor.norms()
    roundoff = _stable.unit_roundoff(summed.size.dtype)
    relative = 2 * (table.shape[1] + _stable.SLACK) * roundoff
    hidden = jnp.zeros_like(uppers) if isinstance(factor, Dense) else product_slack(factor)
    hidden = jnp.where(places < num_units, getattr(factor, "hidden", hidden), 0)
    hidden, upper = (
        _stable.contract("ub,b->u", members, x) * (1 + relative) for x in (hidden, uppers)
    )
    return Summed(summed.value, summed.size, hidden, relative * upper)
