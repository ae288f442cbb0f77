"""Claim: more deletions fit before a retrain than under Corollary 1 as published.

MNIST 3 against 8, lambda 1e-3, sigma 10, epsilon 1, delta 1e-4, single removals in one random
order, where JAXUNLEARN_DATA has it; digits 3 against 8 elsewhere. As published: gamma 1/4, exact
Newton steps, residuals that add up, against sigma epsilon / sqrt(2 ln(1.5 / delta)). Ours: the
bound and the budget that `unlearners.certified_removal` has by default. Where a budget is not
exhausted by the removals that are run, what it would take is extrapolated, and said to be.

python benchmarks/claims/more_deletions_before_a_retrain.py    exits 1 where this does not hold.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from jaxunlearn import Budget, accounting, datasets, kernels, records, unlearners
from jaxunlearn.progress import progress

L2, NOISE_STDDEV = 1e-3, 10.0
LIPSCHITZ = accounting.LossConstants.logistic(lambda batch: batch["x"]).hessian_lipschitz
BUDGET = Budget(epsilon=1.0, delta=1e-4, max_forget=100)
ALLOWED = accounting.removal_budget(
    noise_stddev=NOISE_STDDEV, epsilon=BUDGET.epsilon, delta=BUDGET.delta, paper_constants=True
)
MAX_REMOVALS, OURS, TAKEN, NORM_EVERY = 800, 100, 4, 50


def task():
    """Rows of norm one and labels -1 and 1, in float64."""
    use_mnist = bool(os.environ.get("JAXUNLEARN_DATA"))
    source = (datasets.mnist if use_mnist else datasets.digits)(flatten=True).train
    rows = source[np.arange(len(source))]
    keep = np.isin(rows["y"], (3, 8))
    x = np.asarray(rows["x"][keep], np.float64) - 0.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, np.where(rows["y"][keep] == 3, 1.0, -1.0)


def slopes(w, x, y):
    return -y / (1 + np.exp(y * (x @ w)))


def curvatures(w, x):
    s = 1 / (1 + np.exp(-(x @ w)))
    return s * (1 - s)


def perturbed_minimiser(x, y, b):
    """Newton's method on the sum-form objective with b'w, and the factor of its last Hessian."""
    w = np.zeros(x.shape[1])
    for _ in range(60):
        gradient = x.T @ slopes(w, x, y) + len(y) * L2 * w + b
        hessian = (x.T * curvatures(w, x)) @ x + len(y) * L2 * np.eye(len(w))
        factor = scipy.linalg.cho_factor(hessian)
        step = scipy.linalg.cho_solve(factor, gradient)
        w = w - step / max(1.0, np.linalg.norm(step))
        if np.linalg.norm(gradient) < 1e-9:
            return w, factor
    raise RuntimeError("training did not converge")


def solve(x, curvature, l2, factor, wanted, tolerance):
    """CG for H v = wanted, preconditioned by a factor of the Hessian before any removal."""
    product = lambda v: x.T @ (curvature * (x @ v)) + l2 * v
    v = np.zeros_like(wanted)
    residual = wanted.copy()
    z = scipy.linalg.cho_solve(factor, residual)
    direction, inner = z, residual @ z
    while np.linalg.norm(residual) > tolerance:
        image = product(direction)
        rate = inner / (direction @ image)
        v, residual = v + rate * direction, residual - rate * image
        z = scipy.linalg.cho_solve(factor, residual)
        inner, before = residual @ z, inner
        direction = z + (inner / before) * direction
    return v


def sequence(x, y, w, b, factor, order, published):
    """Residual bounds of single removals, one after another, and the last true residual."""
    gram, bounds, alive = x.T @ x, [], np.ones(len(y))
    with progress("as published" if published else "ours", len(order)) as advance:
        for count, i in enumerate(order):
            if count % NORM_EVERY == 0:  # a norm of more rows is no smaller
                norm = accounting.spectral_norm_bound(gram, num_rows=len(y))
            alive[i] = 0.0
            gram -= np.outer(x[i], x[i])
            l2 = L2 * alive.sum()
            curvature = alive * curvatures(w, x)
            if published:
                wanted = slopes(w, x[i : i + 1], y[i : i + 1])[0] * x[i] + L2 * w
            else:
                wanted = -(x.T @ (alive * slopes(w, x, y)) + l2 * w + b)
            tolerance = 1e-4 * np.linalg.norm(wanted) if published else 1e-6
            v = solve(x, curvature, l2, factor, wanted, tolerance)
            shown = alive * (x @ v)
            if published:
                bounds.append(norm / 4 * np.linalg.norm(v) * np.linalg.norm(shown))
            else:
                gap = x.T @ (curvature * shown) + l2 * v - wanted
                remainder = LIPSCHITZ / 2 * norm * np.linalg.norm(shown**2)
                bounds.append(np.linalg.norm(gap) + remainder)
            w = w + v
            advance(1)
            if published and sum(bounds) > ALLOWED:
                break
    left = x.T @ (alive * slopes(w, x, y)) + l2 * w + b
    return np.array(bounds), float(np.linalg.norm(left))


def loss_fn(w, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def through_the_library(x, y, order):
    """The same removals by the unlearner itself: its bounds, budget and seconds per removal."""
    unlearner = unlearners.certified_removal(
        optax.sgd(0.0), loss_fn, num_examples=len(y), l2=L2, budget=BUDGET,
        noise_stddev=NOISE_STDDEV, progress=False, solver=kernels.cg(tol=1e-8, max_iterations=500),
        linear_model=accounting.LinearModel(lambda batch: batch["x"], LIPSCHITZ),
    )  # fmt: skip
    data = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    state = unlearner.init(jnp.zeros(x.shape[1]))
    b = records.unpack_float64(state.record.perturbation_words)
    begun = time.perf_counter()
    w, factor = perturbed_minimiser(data["x"].astype(np.float64), y, b)
    training = time.perf_counter() - begun
    params, ids = jnp.asarray(w, jnp.float32), np.arange(len(y), dtype=np.int32)
    state = unlearner.update(jnp.zeros_like(params), state, params, ids=ids)[1]
    bounds, spent = [], []
    for row in order:
        begun = time.perf_counter()
        params, state, info = unlearner.forget(params, state, [int(row)], data=data)
        spent.append(time.perf_counter() - begun)
        bounds.append(info.measurements["residual_bound"])
    return w, b, factor, training, bounds, float(np.median(spent[1:])), info.measurements


def main() -> int:
    x, y = task()
    order = np.random.default_rng(0).permutation(len(y))[: min(MAX_REMOVALS, len(y) // 3)]
    w, b, factor, training, taken, seconds, figures = through_the_library(x, y, order[:TAKEN])
    allowed = ALLOWED
    ours_allowed = figures["residual_budget"]
    published, _ = sequence(x, y, w, b, factor, order, published=True)
    ours, truth = sequence(x, y, w, b, factor, order[:OURS], published=False)
    summed = np.cumsum(published)
    supported = int(np.searchsorted(summed, allowed, side="right"))
    exhausted = supported < len(published)
    by_rate = supported if exhausted else int(allowed / published.mean())
    as_sum = min(int(ours_allowed / ours.mean()), len(y) - 1)
    agree = np.allclose(taken, ours[: len(taken)], rtol=0.1)
    how = "exhausted after" if exhausted else "would be exhausted, by its mean, after"
    print(
        f"{len(y)} rows, single removals. Corollary 1 as published: {allowed:.4f} is {how} "
        f"{by_rate}. Ours, of {ours_allowed:.4f}: over {len(ours)} removals the largest bound is "
        f"{ours.max():.2e}, the last {ours[-1]:.2e}, the true residual {truth:.2e}; nothing is "
        f"carried over, and even added up the bounds would last {as_sum} removals. A removal takes "
        f"{seconds:.2f} s, retraining {training:.2f} s (Newton, float64)."
    )
    holds = ours.max() < ours_allowed and ours[-1] >= truth and as_sum > by_rate and agree
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
