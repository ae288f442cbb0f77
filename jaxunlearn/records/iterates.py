"""A float64 iterate inside a record of 32-bit leaves, so that it survives without x64."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, PyTree, UInt8, UInt32

from jaxunlearn import errors, kernels, tree


def pack_float64(flat: Float64[np.ndarray, "p"]) -> UInt32[Array, "p 2"]:
    """The bits of a float64 vector as pairs of words, low word first."""
    return jnp.asarray(np.ascontiguousarray(flat, "<f8").view("<u4").reshape(-1, 2))


def unpack_float64(words: UInt32[Array, "p 2"]) -> Float64[np.ndarray, "p"]:
    """The inverse of `pack_float64`, on the host."""
    return np.ascontiguousarray(jax.device_get(words), "<u4").view("<f8").ravel()


def widen(arrays: PyTree) -> PyTree:
    """Inexact leaves in float64; call it under `jax.enable_x64(True)`."""

    def wide(leaf):
        return jnp.asarray(leaf, jnp.float64) if tree.is_inexact(leaf) else jnp.asarray(leaf)

    return jax.tree.map(wide, arrays)


def last_iterate(
    params: PyTree, words: UInt32[Array, "p 2"], release_digest: UInt8[Array, "32"]
) -> PyTree:
    """The un-noised float64 iterate where `params` are the last release, else `params` themselves.

    release_digest: of the parameters last released; that of nothing where there was no release.
    """
    if tree.digest_bytes(params) == np.asarray(release_digest).tobytes():
        return tree.split(unpack_float64(words), params)
    return params


def noisy_params(values: Float64[np.ndarray, "p"], params: PyTree) -> PyTree:
    """Noisy values in the shapes and types of `params`: post-processing, at no cost.

    Raises:
      NonFiniteError: one does not fit its type; a function of the noisy values alone.
    """
    with np.errstate(over="ignore"):
        released = tree.unflatten(values, params)
    if not bool(tree.all_finite(released)):
        raise errors.NonFiniteError(
            "Expected noisy values that the parameters' types can hold; nothing was released. Use "
            "a wider type."
        )
    return released


def check_solution(solution: kernels.Solution, moved: PyTree) -> None:
    """Refuse a solve that met negative curvature, and parameters that are not finite.

    Raises:
      SolverError, NonFiniteError.
    """
    if bool(solution.negative_curvature):
        raise errors.SolverError(
            "Expected a convex loss, met negative curvature in the retained Hessian. Raise l2, "
            "make the loss convex, or use unlearners.replay."
        )
    if not bool(tree.all_finite(moved)):
        raise errors.NonFiniteError("The Newton step is not finite; nothing was released.")
