"""Slow, obvious references in NumPy float64. Imports nothing of the library.

A model is a dict of arrays. `weights` has one entry a row; `num_rows` is the divisor.
"""

import math

import numpy as np


def relative_gap(a, b) -> float:
    """||a - b|| / ||b|| over all leaves of two (nested) dicts, sequences or arrays."""
    a, b = flat(a), flat(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    gap, scale = np.linalg.norm(a - b), np.linalg.norm(b)
    return float(gap / scale) if scale > 0 else float(gap)


def flat(tree) -> np.ndarray:
    """All numbers of a nested container in one float64 vector, dicts by sorted key."""
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    if isinstance(tree, list | tuple):
        return np.concatenate([flat(leaf) for leaf in tree]) if tree else np.zeros(0)
    return np.asarray(tree, np.float64).ravel()


# --- losses, one row at a time ----------------------------------------------------------------


def linear_row(params, x, y):
    """Loss and gradient of 0.5 (x.w + b - y)^2."""
    error = x @ params["w"] + params["b"] - y
    return 0.5 * error**2, {"w": error * x, "b": error}


def logistic_row(params, x, y):
    """Loss and gradient of log(1 + exp(z)) - y z with z = x.w + b, y in {0, 1}."""
    z = x @ params["w"] + params["b"]
    error = 1.0 / (1.0 + math.exp(-z)) - y
    return math.log1p(math.exp(-abs(z))) + max(z, 0.0) - y * z, {"w": error * x, "b": error}


def softmax_row(params, x, y):
    """Loss and gradient of the cross entropy of softmax(x W + b) against class y."""
    z = x @ params["w"] + params["b"]
    p = np.exp(z - z.max())
    p = p / p.sum()
    error = p.copy()
    error[y] -= 1.0
    return -math.log(p[y]), {"w": np.outer(x, error), "b": error}


def weighted_gradient(row, params, x, y, weights, num_rows):
    """sum_i w_i grad_i / num_rows by a loop; rows of weight zero are not even looked at."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    total = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for i in range(len(weights)):
        if weights[i] != 0 and num_rows != 0:
            _, gradient = row(params, np.asarray(x[i], np.float64), y[i])
            for name in total:
                total[name] = total[name] + weights[i] * gradient[name] / num_rows
    return total


def weighted_value(row, params, x, y, weights, num_rows):
    """sum_i w_i loss_i / num_rows by a loop."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    terms = [
        weights[i] * row(params, np.asarray(x[i], np.float64), y[i])[0]
        for i in range(len(weights))
        if weights[i] != 0
    ]
    return sum(terms) / num_rows if num_rows else 0.0


def logistic_hessian(params, x, weights, num_rows):
    """sum_i w_i s_i (1 - s_i) [x_i; 1][x_i; 1]' / num_rows, ordered (b, w) as `flat` does."""
    x = np.asarray(x, np.float64)
    hessian = np.zeros((x.shape[1] + 1, x.shape[1] + 1))
    for i in range(len(x)):
        z = x[i] @ np.asarray(params["w"], np.float64) + float(params["b"])
        s = 1.0 / (1.0 + math.exp(-z))
        row = np.concatenate([[1.0], x[i]])
        hessian += weights[i] * s * (1 - s) * np.outer(row, row) / num_rows
    return hessian


# --- linear algebra ---------------------------------------------------------------------------


def spd_matrix(rng, size: int, condition: float = 100.0) -> np.ndarray:
    """A symmetric positive definite matrix with eigenvalues from 1 to `condition`."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (q * np.geomspace(1.0, condition, size)) @ q.T


def conjugate_gradients(matrix, rhs, iterations: int) -> np.ndarray:
    """The textbook recurrence for a fixed number of iterations."""
    x = np.zeros_like(rhs)
    residual, direction = rhs.copy(), rhs.copy()
    for _ in range(iterations):
        product = matrix @ direction
        alpha = (residual @ residual) / (direction @ product)
        x = x + alpha * direction
        new = residual - alpha * product
        direction = new + (new @ new) / (residual @ residual) * direction
        residual = new
    return x


# --- training loops ---------------------------------------------------------------------------


def train(row, params, x, y, batches, forget, optimizer, *, normalizer="batch", l2=0.0):
    """Plain training that never looks at a row of `forget`.

    batches: lists of ids, -1 for padding. optimizer: `momentum(...)` or `adam(...)`.
    normalizer: "batch" divides by the rows a step was scheduled with, "kept" by those left.
    """
    params = {name: np.array(leaf, np.float64) for name, leaf in params.items()}
    memory = {}
    for ids in batches:
        scheduled = [i for i in ids if i >= 0]
        kept = [i for i in scheduled if i not in forget]
        divisor = len(scheduled) if normalizer == "batch" else len(kept)
        gradient = weighted_gradient(row, params, x[kept], y[kept], np.ones(len(kept)), divisor)
        gradient = {name: gradient[name] + l2 * params[name] for name in params}
        params, memory = optimizer(params, gradient, memory)
    return params, memory


def momentum(learning_rate, decay=0.9):
    """v <- decay v + g;  p <- p - learning_rate v."""

    def step(params, gradient, memory):
        velocity = memory.get("velocity", dict.fromkeys(params, 0.0))
        velocity = {name: decay * velocity[name] + gradient[name] for name in params}
        params = {name: params[name] - learning_rate * velocity[name] for name in params}
        return params, {"velocity": velocity}

    return step


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma and Ba, algorithm 1."""

    def step(params, gradient, memory):
        zeros = dict.fromkeys(params, 0.0)
        count = memory.get("count", 0) + 1
        m, v = memory.get("m", zeros), memory.get("v", zeros)
        m = {name: b1 * m[name] + (1 - b1) * gradient[name] for name in params}
        v = {name: b2 * v[name] + (1 - b2) * gradient[name] ** 2 for name in params}
        params = {
            name: params[name]
            - learning_rate
            * (m[name] / (1 - b1**count))
            / (np.sqrt(v[name] / (1 - b2**count)) + eps)
            for name in params
        }
        return params, {"count": count, "m": m, "v": v}

    return step


# --- bookkeeping ------------------------------------------------------------------------------


def has_bit(words, i: int) -> bool:
    """Whether bit i % 32 of word i // 32 is set."""
    return int(words[i // 32]) >> (i % 32) & 1 == 1


def ulp_neighbour(rng, array) -> np.ndarray:
    """The array with every entry moved to a neighbouring float, up or down at random."""
    array = np.asarray(array)
    towards = np.where(rng.integers(0, 2, array.shape) == 1, np.inf, -np.inf).astype(array.dtype)
    return np.nextafter(array, towards).astype(array.dtype)


class SlowCheckpoints:
    """The two rules in plain Python: an even half, a logarithmic half.

    The even half holds the multiples of an interval, which doubles when a further multiple does
    not fit. Cell l of the other half holds the last candidate whose number is an odd multiple of
    2**l; the last cell takes all higher levels.
    """

    def __init__(self, slots: int, every: int):
        self.num_even = max(1, slots - slots // 2)
        self.num_recent = slots - self.num_even
        self.every = self.interval = every
        self.even: set[int] = set()
        self.recent: dict[int, int] = {}

    def meet(self, step: int) -> None:
        if step % self.every:
            return
        if step % self.interval == 0:
            if len(self.even) == self.num_even:
                self.interval *= 2
                self.even = {s for s in self.even if s % self.interval == 0}
            if step % self.interval == 0 and len(self.even) < self.num_even:
                self.even.add(step)
                return
        if self.num_recent:
            number, level = step // self.every, 0
            while number and number % 2 == 0:
                number, level = number // 2, level + 1
            self.recent[min(level, self.num_recent - 1)] = step

    def held(self) -> set[int]:
        """Steps that must be there (slots about to be overwritten may hold more)."""
        return self.even | set(self.recent.values())
