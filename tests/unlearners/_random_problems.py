"""A thousand random logistic problems at once, with their answers in NumPy float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_PROBLEMS, NUM_ROWS, DIMENSION = 1000, 30, 3


class Problems(NamedTuple):
    """Leading axis: the problem.

    x, y: rows of norm at most 1 and labels +-1.  kept: 1 for a retained row, 0 for one to forget.
    l2: of each problem.  start: near its minimiser on all rows, at most `off` from it.
    target: its minimiser on the retained rows.
    """

    x: np.ndarray
    y: np.ndarray
    kept: np.ndarray
    l2: np.ndarray
    start: np.ndarray
    target: np.ndarray


def logistic_loss(w, batch):
    """Mean logistic loss of a linear model without bias, labels in {-1, 1}."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def minimisers(x, y, kept, l2, shift=0.0) -> np.ndarray:
    """argmin of the kept rows' summed loss with (num kept l2 / 2) ||w||^2 + shift'w."""
    count = kept.sum(1)
    w = np.zeros((len(x), x.shape[2]))
    for _ in range(60):
        margin = np.einsum("pnd,pd->pn", x, w)
        slope = -kept * y / (1 + np.exp(y * margin))
        gradient = np.einsum("pn,pnd->pd", slope, x) + (count * l2)[:, None] * w + shift
        sigmoid = 1 / (1 + np.exp(-margin))
        weight = kept * sigmoid * (1 - sigmoid)
        hessian = np.einsum("pn,pnd,pne->pde", weight, x, x)
        hessian += (count * l2)[:, None, None] * np.eye(x.shape[2])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.linalg.norm(step, axis=1, keepdims=True)
        w = w - step / np.maximum(1.0, size)
    return w


@functools.cache
def draw(seed: int = 0, *, off: float = 1e-3) -> Problems:
    """Clusters that lean one way and rows to forget that lean the other, l2 from 0.003 to 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(NUM_PROBLEMS, NUM_ROWS, DIMENSION))
    x += 2 * rng.normal(size=(NUM_PROBLEMS, 1, DIMENSION))
    x /= np.maximum(1.0, np.linalg.norm(x, axis=2, keepdims=True))
    y = np.where(rng.random((NUM_PROBLEMS, NUM_ROWS)) < rng.random((NUM_PROBLEMS, 1)), 1.0, -1.0)
    num_forget = rng.integers(1, 11, NUM_PROBLEMS)
    kept = (np.arange(NUM_ROWS) >= num_forget[:, None]).astype(np.float64)
    y = np.where((kept == 0) & (rng.random((NUM_PROBLEMS, 1)) < 0.5), 1.0, y)
    l2 = 10.0 ** rng.uniform(-2.5, 0, NUM_PROBLEMS)
    whole = minimisers(x, y, np.ones_like(kept), l2)
    target = minimisers(x, y, kept, l2)
    scale = off * rng.random((NUM_PROBLEMS, 1)) * (rng.random((NUM_PROBLEMS, 1)) < 0.5)
    return Problems(x, y, kept, l2, whole + scale * rng.normal(size=whole.shape), target)
