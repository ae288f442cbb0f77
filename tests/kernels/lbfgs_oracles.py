"""BFGS as matrices, in NumPy float64, and pairs to try it on. Imports nothing of the library."""

import numpy as np

SHAPES = {"b": (), "w": (3, 2), "z": (5,)}
DIMENSION = 12


def pairs(seed, count, *, dimension=DIMENSION, dtype=np.float32):
    """`count` pairs of a well-conditioned quadratic, as stored: (count, d) steps and changes."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dimension, dimension)) / np.sqrt(dimension)
    steps = rng.normal(size=(count, dimension)) * np.exp(rng.normal(size=(count, 1)))
    changes = steps @ (root @ root.T + np.eye(dimension))
    return steps.astype(dtype), changes.astype(dtype)


def bfgs(steps, changes, gamma=None):
    """(B, H) after the pairs, oldest first, from B_0 = I / gamma; by the two rank-two updates."""
    steps, changes = np.asarray(steps, np.float64), np.asarray(changes, np.float64)
    dimension = steps.shape[1]
    if gamma is None:
        last = (steps[-1], changes[-1]) if len(steps) else (np.ones(1), np.ones(1))
        gamma = last[0] @ last[1] / (last[1] @ last[1])
    b, h = np.eye(dimension) / gamma, np.eye(dimension) * gamma
    for s, y in zip(steps, changes):
        b = b - np.outer(b @ s, b @ s) / (s @ b @ s) + np.outer(y, y) / (s @ y)
        v = np.eye(dimension) - np.outer(y, s) / (s @ y)
        h = v.T @ h @ v + np.outer(s, s) / (s @ y)
    return b, h


def split(vectors):
    """Vectors (..., 12) as trees of the shapes above."""
    lead, trees, start = np.shape(vectors)[:-1], {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        trees[name] = np.asarray(vectors)[..., start : start + size].reshape(lead + shape)
        start += size
    return trees


def join(trees, lead=0):
    """The inverse of `split`, in float64; `lead` leading axes."""
    leaves = [np.asarray(trees[name], np.float64) for name in SHAPES]
    return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], axis=-1)
