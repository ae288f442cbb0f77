"""What `PerExampleGradients` computes, jitted; the class checks the arguments and documents."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._checks import is_traced
from jaxunlearn.kernels._meshes import in_automatic_axes, placed_as_rows
from jaxunlearn.kernels.factors import Product
from jaxunlearn.types import Params

if TYPE_CHECKING:
    from jaxunlearn.kernels.example_gradients import PerExampleGradients

Groups = tuple[int, ...]
"""For each leaf, the number of the layer it belongs to."""


def margin(dtype) -> float:
    """What a clip norm is lowered by: a division and two products round by less than 4 u."""
    return 1 - 8 * _stable.unit_roundoff(dtype)


def known(name: str, value) -> float | None:
    """The one number that `value` is, of Python's, NumPy's or JAX's; None where it is traced.

    Refuses what is not one number, and a known one that is not >= 0.
    """
    if jnp.shape(value) != ():
        raise ValueError(f"Expected {name} to be one number, got shape {jnp.shape(value)}.")
    if is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return None
    number = float(value)
    if not number >= 0:
        raise ValueError(f"Expected {name}={value} >= 0.")
    return number


def lowered(name: str, value, dtype) -> Any:
    """A number >= 0 in `dtype`, rounded towards zero: a clip norm, or what is added to a norm.

    A traced one below zero counts as zero, which no contribution exceeds; NaN stays NaN.
    """
    number = known(name, value)
    if number is None:
        return jnp.maximum(value, 0)
    rounded = np.asarray(number, dtype)
    exceeds = float(rounded) > number  # in float64: NumPy would round the number first
    return np.nextafter(rounded, np.zeros_like(rounded)) if exceeds else rounded


def one_group(grads: "PerExampleGradients") -> Groups:
    """All leaves together."""
    return (0,) * len(grads.factors)


@functools.partial(jax.jit, static_argnums=1)
def norms_and_uppers(grads: "PerExampleGradients", groups: Groups) -> tuple[tuple, tuple]:
    """For each layer the norms, and upper bounds on them in exact arithmetic; (B,) each."""
    return placed_as_rows(lambda g: _norms_and_uppers(g, groups), grads, batch=grads.losses)


def _norms_and_uppers(grads: "PerExampleGradients", groups: Groups) -> tuple[tuple, tuple]:
    num_rows = grads.losses.shape[0]
    found = [factor.norms() for factor in grads.factors]
    norms, uppers = [], []
    for group in range(max(groups, default=0) + 1):
        members = [pair for pair, own in zip(found, groups) if own == group]
        norm, upper = (
            _stable.joint_norm([pair[k] for pair in members], num_rows) for k in range(2)
        )
        roundoff = _stable.unit_roundoff(norm.dtype)
        upper = upper * (1 + (len(members) + 2 * _stable.SLACK) * roundoff)
        norms.append(_stable.rows_where(grads.contributes, norm))
        uppers.append(_stable.rows_where(grads.contributes, upper))
    return tuple(norms), tuple(uppers)


@functools.partial(jax.jit, static_argnums=1)
def bounds(grads: "PerExampleGradients", groups: Groups) -> tuple[tuple, tuple]:
    """For each layer what scales are made of: upper bounds, (B,), and `Limits`.

    The norm that w_i times a layer's gradient has as a sum adds it up exceeds w_i `upper` by at
    most the reach: by what has become too small to be a normal number on the way, and is zero. With
    a weight of one it does not exceed `upper`.
    """
    return placed_as_rows(lambda g: _bounds(g, groups), grads, batch=grads.losses)


def _bounds(grads: "PerExampleGradients", groups: Groups) -> tuple[tuple, tuple]:
    _, uppers = _norms_and_uppers(grads, groups)
    raised, limits = [], []
    for group, upper in enumerate(uppers):
        members = [factor for factor, own in zip(grads.factors, groups) if own == group]
        floor = sum(factor.floor for factor in members)
        sizes = (factor.size.astype(upper.dtype) for factor in members)
        start = _stable.Limits.plain(functools.reduce(jnp.maximum, sizes, upper), floor)
        own = functools.reduce(_stable.Limits.also, (f.limits for f in members), start)
        # Twice: for what the bound has lost, and for what the sum does.
        is_zero = functools.reduce(
            jnp.logical_and, (factor.size == 0 for factor in members), ~grads.contributes | True
        )
        raised.append(jnp.where(is_zero | ~grads.contributes, 0, upper + 2 * floor))
        limits.append(
            _stable.Limits(
                jnp.where(grads.contributes, own.reach, 0),
                jnp.where(grads.contributes, own.largest, jnp.inf),
            )
        )
    return tuple(raised), tuple(limits)


@jax.jit
def hidden(grads: "PerExampleGradients") -> Float[Array, " b"]:
    """What the rounding of products can have hidden of the norms of what they are products of."""
    return placed_as_rows(_hidden, grads, batch=grads.losses)


def _hidden(grads: "PerExampleGradients") -> Float[Array, " b"]:
    own = [factor.hidden for factor in grads.factors if isinstance(factor, Product)]
    total = _stable.joint_norm(own, grads.losses.shape[0])
    margin = 1 + (len(own) + 2 * _stable.SLACK) * _stable.unit_roundoff(total.dtype)
    return _stable.rows_where(grads.contributes, total * margin)


@functools.partial(jax.jit, static_argnums=(2, 3))
def weighted_sum(grads: "PerExampleGradients", weights: tuple | None, groups: Groups, dtype):
    """sum_i w_i g_i, leaf by leaf, with the weights of the layer the leaf belongs to.

    A row that does not count has the weight zero, and its factors are finite or zero.
    """

    def summed(grads, weights):
        return _weighted_sum(grads, weights, groups, dtype)

    return in_automatic_axes(summed, grads, weights, specs=lambda: _param_specs(grads))


def _param_specs(grads: "PerExampleGradients") -> PyTree:
    """Where the parameters live."""
    return jax.tree.unflatten(grads.treedef, grads.specs)


def _weighted_sum(grads: "PerExampleGradients", weights: tuple | None, groups: Groups, dtype):
    if weights is not None or grads.is_padding is not None:
        ones = jnp.ones(grads.losses.shape, _stable.widened(grads.losses))
        weights = (ones,) if weights is None else weights
        weights = tuple(_settled(grads.contributes, w) for w in weights)
    leaves = _leaf_sums(grads.factors, weights, groups)
    dtypes = [dtype or own for own in grads.dtypes]
    return jax.tree.unflatten(grads.treedef, [x.astype(d) for x, d in zip(leaves, dtypes)])


def _settled(contributes, weights):
    """The weights, zero in the rows that do not count, worked out once.

    XLA on CPU works out what is not dear again for each element that it multiplies, barrier or
    none. A division is dear.
    """
    one = jnp.where(contributes, 1, jnp.inf).astype(weights.dtype)
    return jnp.where(contributes, weights, 0) / one


def _leaf_sums(factors, weights, groups: Groups) -> list[Array]:
    """The sums of all leaves, before they are cast."""
    if weights is None:
        return [factor.sum(None) for factor in factors]
    return [factor.sum(weights[group]) for factor, group in zip(factors, groups)]


NO_LIMITS = _stable.Limits(0.0, float("inf"))
"""Of numbers that no weight takes out of the range."""


def clip_scales(
    upper: Array, clip, *, limits=NO_LIMITS, rescale: bool = False, divisor: float = 1.0
) -> Array:
    """min(1, C / upper), over C where `rescale`, over `divisor`; (B,).

    Times a number that is at most `upper`, and the reach more, never more than C, or 1, over the
    divisor. The reach is beyond the last digit of C but in rows of extreme magnitudes.
    """
    reach = limits.reach
    if rescale:
        larger = jnp.maximum(upper, clip)
        left = jnp.maximum(1 - reach * divisor, 0)
        scales = left / jnp.where(larger > 0, larger, jnp.inf)
    else:
        left = jnp.maximum(clip - reach * divisor, 0)
        fits = upper <= (clip if divisor == 1 else left)
        scales = jnp.where(fits, 1, left * margin(upper.dtype) / jnp.where(fits, 1, upper))
    if rescale or divisor != 1:
        scales = scales * (margin(upper.dtype) / divisor)
    return _in_range(scales, limits.largest, upper.dtype)


def _in_range(scales: Array, largest, dtype) -> Array:
    """Scales as normal numbers: one too small to be normal is rounded by more than u, and is zero.

    Devices differ in whether they keep subnormal numbers; CPU does not.
    """
    limits = jnp.finfo(dtype)
    scales = jnp.minimum(scales, largest)
    scales = jnp.where(scales < limits.tiny, 0, jnp.minimum(scales, limits.max))
    return scales.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def scaled_sum(grads: "PerExampleGradients", groups: Groups, operands, scales: Callable, dtype):
    """sum_i s_i g_i, where `scales(upper, *operands)` gives each layer's s from its bounds."""

    def summed(grads, operands):
        return _scaled_sum(grads, groups, operands, scales, dtype)

    return in_automatic_axes(summed, grads, operands, specs=lambda: _param_specs(grads))


def _scaled_sum(grads: "PerExampleGradients", groups: Groups, operands, scales: Callable, dtype):
    uppers, limits = bounds(grads, groups)
    weights = tuple(
        lax.optimization_barrier(scales(upper, *own, limits=limit))
        for upper, limit, own in zip(uppers, limits, operands)
    )
    return weighted_sum(grads, weights, groups, dtype)


def automatic_scales(upper: Array, clip, gamma, *, limits=NO_LIMITS) -> Array:
    """C / (upper + gamma), a little less; zero where both are."""
    total = upper + gamma
    scales = margin(upper.dtype) * jnp.maximum(clip - limits.reach, 0)
    scales = scales / jnp.where(total == 0, jnp.inf, total)
    return _in_range(scales, limits.largest, upper.dtype)


@jax.jit
def dots(grads: "PerExampleGradients", leaves: list[Array]) -> Float[Array, " b"]:
    """<g_i, vector>, leaf by leaf."""
    return placed_as_rows(_dots, grads, leaves, batch=grads.losses)


def _dots(grads: "PerExampleGradients", leaves: list[Array]) -> Float[Array, " b"]:
    start = jnp.zeros(grads.losses.shape, _stable.widened(grads.losses))
    each = [factor.dot(jnp.asarray(leaf)) for factor, leaf in zip(grads.factors, leaves)]
    return _stable.rows_where(grads.contributes, sum(each, start=start))


@jax.jit
def gram(grads: "PerExampleGradients", other) -> Float[Array, "b c"]:
    """<g_i, h_j>, leaf by leaf; a row that does not count meets no other row on the way."""
    return placed_as_rows(_gram, grads, other, batch=grads.losses)


def _gram(grads: "PerExampleGradients", other) -> Float[Array, "b c"]:
    second = grads if other is None else other
    dtype = _stable.widened(grads.losses, second.losses)
    total = jnp.zeros((*grads.losses.shape, *second.losses.shape), dtype)
    if not total.size:
        return total
    for k, factor in enumerate(grads.factors):
        total += factor.gram() if other is None else factor.gram(other.factors[k])
    return jnp.where(grads.contributes[:, None] & second.contributes[None, :], total, 0)


@jax.jit
def materialize(grads: "PerExampleGradients") -> PyTree:
    """(B, *shape), leaf by leaf, in the parameters' dtypes."""
    return placed_as_rows(_materialize, grads, batch=grads.losses)


def _materialize(grads: "PerExampleGradients") -> PyTree:
    leaves = [
        _stable.rows_where(grads.contributes, factor.materialize()).astype(dtype)
        for factor, dtype in zip(grads.factors, grads.dtypes)
    ]
    return jax.tree.unflatten(grads.treedef, leaves)


def layers_of(grads: "PerExampleGradients", layer_of) -> tuple[Groups, list[str]]:
    """Each leaf's layer, by number, and the layers' names in the order they appear."""
    names = _parents(grads.treedef) if layer_of is None else None
    names = names or [layer_of(path.leaf) for path in grads.paths]
    layers = list(dict.fromkeys(names))
    return tuple(layers.index(name) for name in names), layers


def _parents(treedef) -> list[str]:
    """The names of the leaves without their last key: one for a layer's weight and its bias."""
    numbered = jax.tree.unflatten(treedef, list(range(treedef.num_leaves)))
    paths = [list(path) for path, _ in jax.tree_util.tree_leaves_with_path(numbered)]
    for path in paths:
        if path and getattr(path[-1], "name", None) == "value":  # an NNX variable around an array
            path.pop()
    return [f"params{jax.tree_util.keystr(tuple(path[:-1]))}" for path in paths]


def layer_clip_norms(grads, l2_clip_norm, layer_of) -> tuple[Groups, list]:
    """Each leaf's layer and each layer's clip norm, from one number, a dict or a pytree prefix."""
    groups, layers = layers_of(grads, layer_of)
    if isinstance(l2_clip_norm, dict) and set(l2_clip_norm) == set(layers):
        return groups, [l2_clip_norm[layer] for layer in layers]
    if jax.tree_util.all_leaves([l2_clip_norm]):
        return groups, [_share(l2_clip_norm, max(1, len(layers)))] * len(layers)
    return _by_prefix(grads, l2_clip_norm, layers)


def _share(l2_clip_norm, num_layers: int):
    """C / sqrt(k): the norms of k layers then come to at most C together."""
    number = known("l2_clip_norm", l2_clip_norm)
    if number is not None:
        return number / num_layers**0.5 * (1 - 2.0**-50)
    dtype = jnp.promote_types(jnp.result_type(l2_clip_norm), jnp.float32)
    return jnp.asarray(l2_clip_norm, dtype) * (margin(dtype) / num_layers**0.5)


def _by_prefix(grads, prefix: PyTree, layers: list[str]) -> tuple[Groups, list]:
    """One layer for each leaf of a pytree that the parameters' structure begins with."""
    structure: Any
    norms, structure = jax.tree.flatten(prefix)
    params: Params = jax.tree.unflatten(grads.treedef, list(range(grads.treedef.num_leaves)))
    try:
        below = structure.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "Expected l2_clip_norm to be one number, a dict with a number for each of the layers "
            f"{layers}, or a pytree that the parameters' structure begins with: {error}"
        ) from error
    groups = {leaf: k for k, part in enumerate(below) for leaf in jax.tree.leaves(part)}
    return tuple(groups[leaf] for leaf in range(len(grads.factors))), norms
