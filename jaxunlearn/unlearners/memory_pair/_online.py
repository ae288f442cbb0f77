"""One online step of a recorded run, and the same step of the run without some rows, linearised."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from jaxunlearn import kernels, tree
from jaxunlearn.records import (
    Penalty,
    Segment,
    StepFlags,
    loop_over_steps,
    wrapped_update,
)
from jaxunlearn.types import LossFn, Params


class Twins(NamedTuple):
    """A recorded run and what first order says of the same run without some rows.

    params, inner: the recorded run's.
    other_params, other_inner: the other's.
    quiet_steps: how many steps in a row, up to now, the two had the same parameters to rounding.
    """

    params: Params
    inner: PyTree
    other_params: Params
    other_inner: PyTree
    quiet_steps: Int[Array, ""]


def twins_of(params: Params, inner: PyTree) -> Twins:
    """Both runs at the same state, before the first of those rows."""
    return Twins(params, inner, params, inner, jnp.zeros((), jnp.int32))


def make_online_step(
    tx: optax.GradientTransformationExtraArgs, loss_fn: LossFn, *, normalizer: str
):
    """A function (params, inner, row) -> (params, inner, flags); `row` is a `Segment` of one step.

    `tx.update` gets `batch`, `ids`, `weights`, `num_rows` and `key`, as in training. A step that
    had rows and keeps none is not taken: the event is not in the stream at all, so that counters
    and accumulators stand still as well.
    """
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    update = wrapped_update(tx, Penalty(None))
    options_of = _options_of(loss_fn, normalizer)

    def take(params, inner, row: Segment):
        num_rows, keys, key = options_of(row, row.weights)
        grads, info = gradient(params, row.rows, row.weights, num_rows=num_rows, keys=keys)
        updates, inner = update(
            grads, inner, params,
            batch=row.rows, ids=row.ids, weights=row.weights, num_rows=num_rows, key=key,
        )  # fmt: skip
        flags = StepFlags(~tree.all_finite(grads), info.num_non_finite)
        return optax.apply_updates(params, updates), inner, flags

    def step(params, inner, row: Segment):
        nothing = StepFlags(jnp.zeros((), bool), jnp.zeros((), jnp.int32))
        skip = lambda params, inner, row: (params, inner, nothing)
        return jax.lax.cond(is_emptied(row, row.weights), skip, take, params, inner, row)

    return step


def make_twin_step(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: LossFn,
    *,
    normalizer: str,
    rounding_units: float = 32.0,
):
    """A function (twins, row, kept) -> twins: one step of both runs; `kept`: weights (b,).

    `quiet_steps` counts steps after which the parameters differed by no more than `rounding_units`
    times the coarsest rounding unit of their dtypes, relative to their norm.

    The other run steps with its own state and its own `tx`, every comparison re-taken; only its
    gradients are first-order, g(w) + H(w) (w' - w) over the kept rows, at both ends of the step.
    So it is exact where the loss is quadratic, a row that is alone in its step leaves altogether,
    and a pair that is made of nothing but that row is never formed. (A tangent of the whole step
    cannot do that: as the weight of a lone row falls to zero, s s'/s'y of its pair grows beyond all
    bounds.)
    """
    step = make_online_step(tx, loss_fn, normalizer=normalizer)
    gradient = kernels.weighted_grad(loss_fn)
    update = wrapped_update(tx, Penalty(None))
    options_of = _options_of(loss_fn, normalizer)

    def expanded(row, kept, around):
        """The kept rows' gradient to first order around a point of the recorded run."""
        num_rows, keys, _ = options_of(row, kept)
        at = lambda p: gradient(p, row.rows, kept, num_rows=num_rows, keys=keys)

        def value(p):
            g, change = jax.jvp(at, (around,), (jax.tree.map(jnp.subtract, p, around),))
            return jax.tree.map(jnp.add, g, change)

        return value

    def other_step(twins, row, kept, reached):
        params, inner = twins.other_params, twins.other_inner
        grads = expanded(row, kept, twins.params)(params)
        after = expanded(row, kept, reached)
        # A function whose gradient is `after`: what the transform asks for.
        value_fn = lambda p: tree.vdot(jax.lax.stop_gradient(after(p)), p)
        updates, inner = update(
            grads, inner, params,
            ids=jnp.where(kept != 0, row.ids, -1), weights=kept, value_fn=value_fn, grad=grads,
        )  # fmt: skip
        return optax.apply_updates(params, updates), inner

    def twin_step(twins: Twins, row: Segment, kept: Array) -> Twins:
        reached, inner, _ = step(twins.params, twins.inner, row)
        other_params, other_inner = jax.lax.cond(
            is_emptied(row, kept),
            lambda: (twins.other_params, twins.other_inner),
            lambda: other_step(twins, row, kept, reached),
        )
        units = [jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(reached)]
        close = relative_gap(other_params, reached) <= rounding_units * float(max(units))
        quiet = jnp.where(close, twins.quiet_steps + 1, 0)
        return Twins(reached, inner, other_params, other_inner, quiet)

    return twin_step


def make_twin_segment(twin_step):
    """`twin_step` for `run_log`: `params` are `Twins`, `inner` the ids to leave, -1 for nobody."""

    def step(twins, ids, row: Segment):
        leaves = jnp.any(row.ids[:, None] == jnp.where(ids >= 0, ids, -2), axis=1)
        twins = twin_step(twins, row, jnp.where(leaves, 0, row.weights))
        return twins, ids, StepFlags(jnp.zeros((), bool), jnp.zeros((), jnp.int32))

    return loop_over_steps(step)


def relative_gap(a: Params, b: Params) -> Array:
    """||a - b|| / ||b||, traced; 0 where both vanish."""
    difference = jax.tree.map(jnp.subtract, a, b)
    gap, size = jnp.sqrt(tree.vdot(difference, difference)), jnp.sqrt(tree.vdot(b, b))
    return jnp.where(gap > 0, gap / jnp.where(size > 0, size, 1), 0)


def is_emptied(row: Segment, weights: Array) -> Bool[Array, ""]:
    """Whether a step had rows and keeps none."""
    return (row.num_rows > 0) & ~jnp.any(weights != 0)


def _options_of(loss_fn: LossFn, normalizer: str) -> Any:
    """(row, weights) -> (divisor, keys of the rows, key of the step)."""
    keyed = kernels.takes_key(loss_fn)

    def options(row: Segment, weights):
        scheduled = normalizer == "batch"
        num_rows = row.num_rows if scheduled else jnp.sum(weights != 0, dtype=jnp.int32)
        if not keyed:
            return num_rows, None, None
        key = jax.random.wrap_key_data(row.keys)
        return num_rows, kernels.example_keys(key, row.ids), key

    return options
