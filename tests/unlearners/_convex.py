"""Convex problems with their answers in NumPy float64, which uses nothing of the library."""

import numpy as np

from jaxunlearn import datasets
from tests.conformance import cases

GAMMA = 1 / (6 * np.sqrt(3))
"""The Lipschitz constant of the second derivative of the logistic loss."""


# --- least squares -----------------------------------------------------------------------------


def design(data, ids):
    """[1, x] in the order of the leaves of `cases.make_params`."""
    x = np.asarray(data["x"], np.float64)[ids]
    return np.hstack([np.ones((len(x), 1)), x])


def least_squares_minimiser(data, ids, l2) -> np.ndarray:
    """argmin of mean_i 0.5 (z_i'w - y_i)^2 + (l2 / 2) ||w||^2 over `ids`, in closed form."""
    z, y = design(data, ids), np.asarray(data["y"], np.float64)[ids]
    return np.linalg.solve(z.T @ z / len(z) + l2 * np.eye(z.shape[1]), z.T @ y / len(z))


def as_params(flat, like=None):
    """A flat vector (bias, matrix) as the suite's parameters."""
    like = cases.make_params() if like is None else like
    dtype = like["bias"].dtype
    return {
        "bias": np.asarray(flat[0], dtype),
        "deep": ((np.asarray(flat[1:], dtype).reshape(5, 1),), ()),
    }


# --- logistic regression -----------------------------------------------------------------------


def logistic_gradient(w, x, y, l2) -> np.ndarray:
    """Sum form: sum_i grad log(1 + exp(-y_i x_i'w)) + n l2 w, y in {-1, 1}."""
    margin = y * (x @ w)
    return -x.T @ (y / (1 + np.exp(margin))) + len(x) * l2 * w


def logistic_minimiser(x, y, l2) -> np.ndarray:
    """Newton's method to a gradient at rounding level."""
    w = np.zeros(x.shape[1])
    for _ in range(50):
        gradient = logistic_gradient(w, x, y, l2)
        s = 1 / (1 + np.exp(-x @ w))
        hessian = (x.T * (s * (1 - s))) @ x + len(x) * l2 * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    return w


def two_digits(dataset, limit=None) -> dict[str, np.ndarray]:
    """3 against 8: pixels minus a half, rows of length one, +1 for a 3."""
    rows = dataset[np.arange(len(dataset), dtype=np.int32)]
    chosen = np.flatnonzero(np.isin(rows["y"], [3, 8]))[:limit]
    x = np.asarray(rows["x"], np.float64)[chosen].reshape(len(chosen), -1) - 0.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.where(np.asarray(rows["y"])[chosen] == 3, 1.0, -1.0)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def small_digits() -> dict[str, np.ndarray]:
    return two_digits(datasets.digits(flatten=True).train)


# --- states ------------------------------------------------------------------------------------


def as_declared_by(unlearner, params, state):
    """The state as if this unlearner, of other budget or noise, had made it."""
    declaration = unlearner.init(params).record.declaration
    return state._replace(record=state.record._replace(declaration=declaration))
