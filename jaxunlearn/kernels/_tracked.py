"""Which leaves of a training state (params, inner) carry tangents, and how to take and put them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxunlearn.tree import is_inexact
from jaxunlearn.types import Params

TrackLeaves = Any
"""A tree of booleans, a prefix of the parameters, or a function from them to one; None: all."""


@dataclasses.dataclass(frozen=True)
class Tracked:
    """One flag for each leaf of the parameters, and for each leaf of the optimizer state."""

    in_params: tuple[bool, ...]
    in_inner: tuple[bool, ...]

    @classmethod
    def of(cls, params: Params, inner: PyTree, track_leaves: TrackLeaves = None) -> "Tracked":
        """Float leaves of `track_leaves`, and of the state those that do not belong to others.

        A leaf of the state belongs to the parameter whose path ends its own, at the same shape: so
        Optax keeps moments. Integers and typed keys have no tangent.
        """
        mask: Any = track_leaves(params) if callable(track_leaves) else track_leaves
        wanted = jax.tree.map(lambda _: True, params)
        if mask is not None:
            wanted = jax.tree.broadcast(mask, params)
        flags = [bool(flag) for flag in jax.tree.leaves(wanted)]
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        owners = list(zip(paths, shapes, flags, strict=True))
        in_inner = [
            is_inexact(leaf) and _owned_flag(path, jnp.shape(leaf), owners)
            for path, leaf in jax.tree_util.tree_leaves_with_path(inner)
        ]
        in_params = [
            flag and is_inexact(leaf)
            for flag, leaf in zip(flags, jax.tree.leaves(params), strict=True)
        ]
        if not any(in_params):
            raise ValueError("Expected track_leaves to choose a float leaf of params, got none.")
        return cls(tuple(in_params), tuple(in_inner))

    def take(self, params: Params, inner: PyTree) -> tuple[Array, ...]:
        """The tracked leaves of both, those of the parameters first."""
        return (*self.take_params(params), *self.take_inner(inner))

    def take_params(self, params: Params) -> tuple[Array, ...]:
        """The tracked leaves of the parameters, or of a gradient."""
        return _take(self.in_params, params)

    def take_inner(self, inner: PyTree) -> tuple[Array, ...]:
        """The tracked leaves of the optimizer state."""
        return _take(self.in_inner, inner)

    def put_params(self, params: Params, leaves: Sequence[Array]) -> Params:
        """`params` with its tracked leaves replaced."""
        return _put(self.in_params, params, leaves)

    def put_inner(self, inner: PyTree, leaves: Sequence[Array]) -> PyTree:
        """`inner` with its tracked leaves replaced."""
        return _put(self.in_inner, inner, leaves)

    def split(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Leaves as `take` gives them: (those of the parameters, those of the state)."""
        count = sum(self.in_params)
        return tuple(leaves[:count]), tuple(leaves[count:])


def _owned_flag(path, shape, owners) -> bool:
    """The flag of the parameter that a leaf of the state belongs to; True where it has none."""
    belongs = [
        (len(own), flag)
        for own, own_shape, flag in owners
        if own_shape == shape and tuple(path[len(path) - len(own) :]) == tuple(own)
    ]
    return max(belongs)[1] if belongs else True


def _take(flags, tree) -> tuple[Array, ...]:
    leaves = jax.tree.leaves(tree)
    return tuple(jnp.asarray(leaf) for flag, leaf in zip(flags, leaves, strict=True) if flag)


def _put(flags, tree, leaves):
    new, structure = iter(leaves), jax.tree.structure(tree)
    kept = jax.tree.leaves(tree)
    filled = [next(new) if flag else leaf for flag, leaf in zip(flags, kept, strict=True)]
    return jax.tree.unflatten(structure, filled)
