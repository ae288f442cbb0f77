"""Steps inside a ball, in training and on the host."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import tree


def inside(updates, params, radius):
    """Updates that end inside the ball."""
    if radius == math.inf:
        return updates
    target = jax.tree.map(lambda p, u: p + u, params, updates)
    norm = jnp.sqrt(tree.vdot(target, target))
    scale = jnp.minimum(1.0, radius / jnp.maximum(norm, radius))
    return jax.tree.map(lambda t, p: (scale * t).astype(t.dtype) - p, target, params)


def projected(flat, radius):
    """A flat vector inside the ball."""
    norm = float(np.linalg.norm(flat))
    return flat if norm <= radius else flat * (radius / norm)


def widen(arrays):
    """Inexact leaves in float64, on the host."""
    wide = lambda leaf: np.asarray(leaf, np.float64) if tree.is_inexact(leaf) else np.asarray(leaf)
    return jax.tree.map(lambda leaf: wide(jax.device_get(leaf)), arrays)
