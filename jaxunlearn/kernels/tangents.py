"""First-order effect of a unit's weight on the whole training state, carried along with training.

Qiao, Zhang, Tang, Wei 2025 (arXiv 2404.01712) carry it for SGD, one vector of parameters a sample.
Here the step that is linearised is the complete one, so it holds for any optimizer and for its
state: z = (params, float leaves of the optimizer state), z' = U(g(params), z).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxunlearn.kernels import _cpu
from jaxunlearn.kernels._blocks import (
    Tangents,
    block_size,
    in_blocks,
    over_rows,
    padded_units,
)
from jaxunlearn.kernels._meshes import in_automatic_axes, specs_of
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels._stacks import (
    HOST,
    add_rows,
    moved_by_rows,
    on_device,
    placed_like,
    read_row,
    read_rows,
)
from jaxunlearn.kernels._tracked import Tracked, TrackLeaves
from jaxunlearn.kernels.rowwise import (
    as_weights,
    check_rows,
    fill_rows,
    finite_rows,
    row_losses,
)
from jaxunlearn.types import LossFn, Params

RECURSIONS = ("leave_one_out", "paper")
NORMALIZERS = ("batch", "kept")
FEW_UNITS = 4
"""Up to this many units differentiate the batch with weights of their own."""


class StateTangents(NamedTuple):
    """The functions of `state_tangents`."""

    init: Callable[..., Tangents]
    step: Callable[..., Tangents]
    add: Callable[..., tuple[Params, PyTree]]
    take: Callable[[Params, PyTree], tuple[tuple[Array, ...], tuple[Array, ...]]]
    read: Callable[..., tuple[Array, ...]]


def state_tangents(
    loss_fn: LossFn,
    apply: Callable[[Params, PyTree, Params], tuple[Params, PyTree]],
    *,
    recursion: str = "leave_one_out",
    normalizer: str = "batch",
    track_leaves: TrackLeaves = None,
    storage_dtype: Any = None,
    offload: str | None = None,
    units_at_once: int | None = None,
    microbatch_size: int | None = None,
) -> StateTangents:
    """Tangents of the training state in the weights of units, one for each tracked unit.

    With g = sum_i w_i grad loss_i(p) / N and the update (p', s') = U(g, s, p), unit u's tangent is
    the first-order (state without u) - (state with u), so that deletion ADDS it:

      dz_u' = J_U (dg_u, ds_u, dp_u),
      dg_u = H_B dp_u - sum_{i in u} w_i (grad loss_i + H_i dp_u) / N                     ("batch")
      dg_u = H_B dp_u + sum_{i in u} w_i [(gbar + H_B dp_u) - (grad loss_i + H_i dp_u)] / (N - k)

    for "kept", with k the weight of u in the batch. That is leave-one-out: the linear part is taken
    with u's own weight at zero, which is exact for quadratics. The "paper" recursion takes it with
    that weight in place: it drops H_i dp_u, and H_B dp_u in the bracket of "kept". Where "kept"
    leaves nobody in a batch, the step without u has no gradient: dg_u = -gbar.

    Args:
      loss_fn: mean of per-example losses, for any batch size; may take a key.
      apply: (grads, inner, params) -> (params, inner), the update as a plain differentiable
        function: penalty, optimizer, addition. Optimization barriers in it cost time.
      recursion: "leave_one_out" or "paper".
      normalizer: "batch" divides by `num_rows` whoever is left out, "kept" by the weight that is.
      track_leaves: a tree of booleans (a prefix of params), or a function from params to one. The
        others count as constants, and so do the leaves of the state that belong to them.
      storage_dtype: of the stacks; None keeps each leaf's own, in float32 or wider. Arithmetic is
        in float32 or wider whatever it is.
      offload: "host" keeps the stacks in the host's memory; blocks come to the device and go back.
      units_at_once: tangents in one block; None takes as many as stay in cache on CPU.
      microbatch_size: tracked rows of the batch differentiated at a time; None as units_at_once.

    Returns:
      Five pure functions, for use under `jit` (with the stacks donated), `lax.scan`, and with the
      stacks sharded over units:
      init(params, inner, *, num_units) -> stacks of zeros, (rows, *leaf.shape) each, with a row for
        each unit and a few more to fill up the last block.
      step(tangents, params, inner, grads, batch, weights, slots, *, num_rows=None, keys=None,
        live=None) -> tangents after the step that starts at (params, inner) with `grads`.
        slots: (B,) int, the stacks' row of each example's unit; -1 is nobody's.
        num_rows: the divisor N of "batch", None: sum(weights). "kept" takes sum(weights).
        live: (rows,) bool; tangents of the others become zero.
        Rows of weight zero and rows that are not finite count as in `weighted_grad`.
      add(params, inner, tangents, slots, amounts) -> (params, inner) + sum_j amounts[j] tangent of
        slots[j]; slots out of range add nothing.
      take(params, inner) -> the leaves that have tangents: of params, and of inner.
      read(tangents, slot) -> one tangent, as leaves in the same order.

    Cost: step: one Hessian product (at most two gradients' flops) and one update a unit, written in
      place; one gradient and one product for each tracked row. Memory: the stacks, and one gradient
      for each row of the batch.

    References: Qiao et al. 2025, "Hessian-Free Online Certified Unlearning", equation (6) is
      recursion="paper" with SGD. Here gradients are evaluated before the update, as there; their
      published code contracts the newest term once more.

    >>> square = lambda p, batch: jnp.mean((batch - p) ** 2) / 2
    >>> sgd = lambda g, s, p: (p - 0.5 * g, s)
    >>> tangents = state_tangents(square, sgd)
    >>> stack, p = tangents.init(jnp.zeros(()), (), num_units=2), jnp.zeros(())
    >>> rows, ones = jnp.array([1.0, 3.0]), jnp.ones(2)
    >>> stack = tangents.step(stack, p, (), jnp.array(-2.0), rows, ones, jnp.arange(2))
    >>> stack[0]
    Array([-0.25, -0.75], dtype=float32)
    """
    _check_options(recursion, normalizer, offload, units_at_once, microbatch_size)
    losses_of = row_losses(loss_fn)

    def init(params: Params, inner: PyTree, *, num_units: int) -> Tangents:
        leaves = Tracked.of(params, inner, track_leaves).take(params, inner)
        dtypes = [storage_dtype or jnp.promote_types(x.dtype, jnp.float32) for x in leaves]
        one = tuple(
            jax.ShapeDtypeStruct((1, *leaf.shape), dtype) for leaf, dtype in zip(leaves, dtypes)
        )
        rows = padded_units(num_units, block_size(one, units_at_once))
        stacks = tuple(jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype) for leaf in one)
        return jax.device_put(stacks, HOST) if offload else stacks

    def step(
        tangents,
        params,
        inner,
        grads,
        batch,
        weights,
        slots,
        *,
        num_rows=None,
        keys=None,
        live=None,
    ) -> Tangents:
        check_rows(batch, weights, keys)
        operands = params, inner, grads, batch, as_weights(weights), slots, num_rows, keys, live
        everywhere = lambda: specs_of(tangents)
        return in_automatic_axes(advance, tangents, *operands, specs=everywhere)

    def advance(
        tangents, params, inner, grads, batch, weights, slots, num_rows, keys, live
    ) -> Tangents:
        if not tangents[0].shape[0]:
            return tangents
        tracked = Tracked.of(params, inner, track_leaves)
        with jax.default_matmul_precision("highest"):
            point = _linearised_update(apply, tracked, params, inner, grads)
            rows = _Rows.of(losses_of, tracked, params, batch, weights, slots, num_rows, keys)
            total = block_size(tangents, units_at_once)
            options = recursion == "leave_one_out", normalizer == "kept"
            if tangents[0].shape[0] <= FEW_UNITS:
                return _few(point, rows, tangents, live, *options)
            own = microbatch_size or total
            return _many(point, rows, tangents, live, *options, total, own)

    def add(params, inner, tangents, slots, amounts) -> tuple[Params, PyTree]:
        tracked = Tracked.of(params, inner, track_leaves)
        leaves = tracked.take(params, inner)
        moved = [
            moved_by_rows(leaf, stack, slots, amounts) for leaf, stack in zip(leaves, tangents)
        ]
        in_params, in_inner = tracked.split(moved)
        return tracked.put_params(params, in_params), tracked.put_inner(inner, in_inner)

    def take(params, inner):
        tracked = Tracked.of(params, inner, track_leaves)
        return widen(tracked.take_params(params)), widen(tracked.take_inner(inner))

    def read(tangents, slot):
        return tuple(read_row(leaf, slot) for leaf in tangents)

    return StateTangents(init, step, add, take, read)


def _check_options(recursion, normalizer, offload, units_at_once, microbatch_size) -> None:
    """Refuse a bad configuration at the factory."""
    if recursion not in RECURSIONS:
        raise ValueError(f"Expected recursion to be one of {RECURSIONS}, got {recursion!r}.")
    if normalizer not in NORMALIZERS:
        raise ValueError(f'Expected normalizer "batch" or "kept", got {normalizer!r}.')
    if offload not in (None, "host"):
        raise ValueError(f'Expected offload None or "host", got {offload!r}.')
    for name, size in (("units_at_once", units_at_once), ("microbatch_size", microbatch_size)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"Expected an integer {name}={size} >= 1.")


class _Update(NamedTuple):
    """J_U at the actual step: of everything, and of the gradient alone."""

    tracked: Tracked
    dtypes: tuple[Any, ...]
    of_state: Callable[..., tuple[Array, ...]]
    of_gradient: Callable[..., tuple[Array, ...]]

    def split(self, tangent: Sequence[Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """(dp, ds) in the precision of the arithmetic, whatever the stacks are stored in."""
        return self.tracked.split([x.astype(t) for x, t in zip(tangent, self.dtypes)])


def _linearised_update(apply, tracked: Tracked, params, inner, grads) -> _Update:
    p, s = widen(tracked.take_params(params)), widen(tracked.take_inner(inner))
    g = widen(tracked.take_params(grads))

    def update(g, s, p):
        new = apply(
            tracked.put_params(grads, g), tracked.put_inner(inner, s), tracked.put_params(params, p)
        )
        return widen(tracked.take(*new))

    return _Update(
        tracked,
        tuple(leaf.dtype for leaf in (*p, *s)),
        jax.linearize(update, g, s, p)[1],
        jax.linearize(lambda g: update(g, s, p), g)[1],
    )


class _Rows(NamedTuple):
    """The batch of a step: what counts of it, its mean gradient and the Hessian there.

    counted: weights with zeros for rows that are not finite; `weights` are those of the divisor.
    """

    gradient: Callable[..., tuple[Array, ...]]
    one: Callable[..., tuple[Array, ...]]
    params: tuple[Array, ...]
    batch: PyTree
    keys: Any
    weights: Array
    counted: Array
    slots: Array
    divisor: Array
    mean: tuple[Array, ...]
    hessian: Callable[[tuple[Array, ...]], tuple[Array, ...]]

    @classmethod
    def of(cls, losses_of, tracked, params, batch, weights, slots, num_rows, keys) -> "_Rows":
        p = widen(tracked.take_params(params))
        count = jnp.sum(weights) if num_rows is None else jnp.asarray(num_rows, weights.dtype)
        live = (weights != 0) & (count != 0) & finite_rows(batch)
        losses = losses_of(params, fill_rows(batch, live), keys)
        counts = live & jnp.isfinite(losses)
        batch = fill_rows(batch, counts)
        counted = jnp.where(counts, weights, 0)
        divisor = jnp.where(count == 0, 1.0, count)

        def gradient(p, counted, divisor, batch=batch, keys=keys):
            def total(p):
                losses = widen(losses_of(tracked.put_params(params, p), batch, keys))
                return jnp.sum(jnp.where(counted != 0, counted * losses, 0)) / divisor

            return jax.grad(total)(p)

        def one(p, row, key):
            batch = jax.tree.map(lambda leaf: leaf[None], row)
            keys = None if key is None else key[None]
            return gradient(p, jnp.ones((1,), counted.dtype), 1.0, batch, keys)

        mean, hessian = jax.linearize(lambda p: gradient(p, counted, divisor), p)
        nothing = ~jnp.any(counts)
        mean = tuple(jnp.where(nothing, 0, leaf) for leaf in mean)
        product = _cpu.linear(hessian)
        safe = lambda dp: tuple(jnp.where(nothing, 0, leaf) for leaf in product(dp))
        return cls(
            gradient, one, p, batch, keys, weights, counted, slots, divisor, mean, safe
        )  # fmt: skip


def _few(point: _Update, rows: _Rows, tangents, live, is_loo: bool, is_kept: bool) -> Tangents:
    """All tangents, each unit's batch differentiated with that unit's weights at zero."""
    num_units = tangents[0].shape[0]
    mine = rows.slots == jnp.arange(num_units)[:, None]
    counted = jnp.where(mine, 0, rows.counted)
    divisors = jnp.broadcast_to(rows.divisor, (num_units,))
    if is_kept:
        divisors = jnp.sum(jnp.where(mine, 0, rows.weights), axis=1)

    def one(tangent, counted, divisor):
        dp, ds = point.split(tangent)
        safe = jnp.where(divisor == 0, 1.0, divisor)
        without = lambda p: rows.gradient(p, counted, safe)
        if is_loo:
            gradient, product = jax.jvp(without, (rows.params,), (dp,))
        else:
            gradient, product = without(rows.params), rows.hessian(dp)
        none_left = (divisor == 0) | ~jnp.any(counted != 0)
        no_product = (divisor == 0) | (none_left & is_loo)
        dg = [
            jnp.where(no_product, 0, h) + jnp.where(none_left, 0, g) - mean
            for g, h, mean in zip(gradient, product, rows.mean)
        ]
        return point.of_state(tuple(dg), ds, dp)

    alive = _alive(tuple(map(on_device, tangents)), live)
    new = [one([leaf[k] for leaf in alive], counted[k], divisors[k]) for k in range(num_units)]
    stacked = [jnp.stack(leaves) for leaves in zip(*new)]
    return tuple(placed_like(leaf.astype(x.dtype), x) for leaf, x in zip(stacked, tangents))


def _alive(tangents, live):
    """Tangents with zeros for units that are not live."""
    if live is None:
        return tangents
    on = lambda leaf: live.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return tuple(jnp.where(on(leaf), leaf, jnp.zeros((), leaf.dtype)) for leaf in tangents)


def _many(
    point: _Update, rows: _Rows, tangents, live, is_loo: bool, is_kept: bool, total: int, own: int
) -> Tangents:
    """All tangents through the linear step without sources, then what the batch's units add."""
    num_units = tangents[0].shape[0]
    slots = jnp.where((rows.slots >= 0) & (rows.slots < num_units), rows.slots, num_units)
    slots = jnp.where(rows.weights != 0, slots, num_units)
    old = tuple(read_rows(leaf, slots) for leaf in point.tracked.split(tangents)[0])

    def ahead(tangent):
        dp, ds = point.split(tangent)
        return point.of_state(rows.hessian(dp), ds, dp)

    def block(stacks, live):
        new = jax.vmap(ahead)(_alive(stacks, live))
        return tuple(leaf.astype(stack.dtype) for leaf, stack in zip(new, stacks))

    tangents, old = in_blocks(block, tangents, live, old, total)
    sources = _sources(rows, slots, is_loo, is_kept)

    def add_part(tangents, part):
        slots, rest = part
        gradients = sources(*rest)
        more = jax.vmap(point.of_gradient)(gradients)
        return tuple(add_rows(leaf, slots, extra) for leaf, extra in zip(tangents, more))

    parts = slots, (rows.batch, rows.keys, old, rows.counted, rows.weights, _shares(rows, slots))
    return over_rows(add_part, tangents, parts, own, num_units)


def _shares(rows: _Rows, slots: Array) -> Array:
    """(B,): the weight of each row's unit in the batch, k."""
    same = slots[:, None] == slots[None, :]
    return jnp.sum(jnp.where(same, rows.weights, 0), axis=1)


def _sources(rows: _Rows, slots: Array, is_loo: bool, is_kept: bool):
    """What each row of the batch adds to dg of its unit, by (row, key, dp, w, weight, k)."""

    def one(row, key, dp, counted, weight, share):
        own = lambda p: rows.one(p, row, key)
        dp = tuple(x.astype(p.dtype) for x, p in zip(dp, rows.params))
        if is_loo:
            gradient, product = jax.jvp(own, (rows.params,), (dp,))
            gradient = tuple(g + h for g, h in zip(gradient, product))
        else:
            gradient = own(rows.params)
        mine = [jnp.where(counted != 0, counted * g, 0) for g in gradient]
        if not is_kept:
            return tuple(-g / rows.divisor for g in mine)
        rest = rows.divisor - share
        some_left = rest > 0
        everyone = [g + h for g, h in zip(rows.mean, rows.hessian(dp))]
        kept = everyone if is_loo else rows.mean
        safe = jnp.where(some_left, rest, 1.0)
        return tuple(
            jnp.where(
                some_left, (weight * k - g) / safe, -weight / jnp.where(share > 0, share, 1.0) * e
            )
            for k, g, e in zip(kept, mine, everyone)
        )

    axes = (0, None if rows.keys is None else 0, 0, 0, 0, 0)
    return _cpu.in_loops(jax.vmap(one, in_axes=axes))
