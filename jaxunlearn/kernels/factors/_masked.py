"""Factors without the rows that are not finite."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
from jax import lax
from jaxtyping import Array, Bool

from jaxunlearn.kernels._meshes import local_params
from jaxunlearn.kernels._stable import size_of
from jaxunlearn.kernels.factors._protocol import Factor


def cleaned(
    factors: tuple[Factor, ...],
    is_clean: Bool[Array, ""],
    mask: Bool[Array, " b"],
    matrices: Mapping[int, Array] = MappingProxyType({}),
) -> tuple[Factor, ...]:
    """`factors` where `is_clean`; or with zeros in the rows where `mask` is false.

    Zero times a row that is not finite is NaN, so such rows must not stay. The loop runs once or
    not at all, in place: a branch, or a `where`, would copy every factor of a clean batch.

    Args:
      matrices: by the id of an array of a factor, the matrix that it is reshaped from: arrays of
        one matrix are masked once. XLA would copy what goes into the loop twice.
    """
    everything, treedef = jax.tree.flatten(factors)
    masked = jax.tree.leaves([factor.kept(mask) for factor in factors])
    # One number for each row costs nothing, and is masked where it is used.
    large = [k for k, x in enumerate(everything) if x.ndim > 1]
    leaves = [everything[k] for k in large]

    def whole(leaves):
        found = list(masked)
        for k, leaf in zip(large, leaves):
            found[k] = leaf
        return jax.tree.unflatten(treedef, found)

    bases = [matrices[id(x)] if id(x) in matrices else _matrix(x) for x in leaves]
    unique = list({id(base): base for base in bases}.values())
    places = [next(k for k, base in enumerate(unique) if base is mine) for mine in bases]

    def mask_rows(state):
        before = [state[1][k].reshape(leaf.shape) for k, leaf in zip(places, leaves)]
        kept = jax.tree.leaves([factor.kept(mask) for factor in whole(before)])
        after = list(state[1])
        for k, old, new in zip(places, before, [kept[place] for place in large]):
            if new is not old:  # an array may be masked in one factor and not in another
                after[k] = new.reshape(after[k].shape)
        return state[0] | True, after

    start = local_params((is_clean, unique), mask)
    unique = lax.while_loop(lambda state: ~state[0], mask_rows, start)[1]
    return whole([unique[k].reshape(leaf.shape) for k, leaf in zip(places, leaves)])


def _matrix(x: Array) -> Array:
    """At most two axes: XLA on CPU gives axes of length one a layout that it must copy out of."""
    return x if x.ndim <= 2 else x.reshape(x.shape[0], size_of(x.shape[1:]))
