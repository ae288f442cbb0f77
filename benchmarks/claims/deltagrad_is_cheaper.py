"""Claim: DeltaGrad comes within a tenth of the do-nothing distance of retraining, in less time.

Logistic regression by SGD in the paper's setting: MNIST, batches of 16384, 0.1 percent of the rows
deleted, period 5, burn-in 20. Deletion and retraining run interleaved, both compiled before, both
reading the same arrays. Without JAXUNLEARN_DATA it is digits with batches of 512, where a gradient
costs less than the bookkeeping: then only the distance is claimed.

Printed beside it, without a claim: momentum and its state, with and without exact steps at the end,
and smaller batches, whose Hessians differ more from one to the next (on MNIST with batches of 4096,
0.18 of the do-nothing distance was left after 60 steps).

python benchmarks/claims/deltagrad_is_cheaper.py    exits 1 where this does not hold.
"""

import argparse
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import datasets, kernels, records, unlearners

L2, REPEATS = 1e-4, 5
OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "momentum": lambda: optax.sgd(0.05, momentum=0.9)}


def source():
    """Rows in [0, 1], labels, and the large batch."""
    if os.environ.get("JAXUNLEARN_DATA"):
        name, size, rows = "MNIST", 16384, datasets.mnist(flatten=True).train
    else:
        name, size, rows = "digits", 512, datasets.digits(flatten=True).train
    table = rows[np.arange(len(rows))]
    return name, size, {"x": np.asarray(table["x"]), "y": np.asarray(table["y"])}


def loss_fn(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train(tx, data, size, num_steps, **options):
    """The unlearner, the start, and the state after `num_steps` steps of reshuffled epochs."""
    count = len(data["y"])
    unlearner = unlearners.deltagrad(
        tx, loss_fn, num_examples=count, batch_size=size, max_steps=num_steps, l2=L2,
        period=5, burn_in=20, progress=False, **options,
    )  # fmt: skip
    gradient, rng = kernels.weighted_grad(loss_fn), np.random.default_rng(0)

    @jax.jit
    def step(params, state, rows, ids):
        grads = gradient(params, rows, jnp.ones(size))
        updates, state = unlearner.update(grads, state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    start = {"w": jnp.zeros((data["x"].shape[1], 10)), "b": jnp.zeros(10)}
    params, state = start, unlearner.init(start)
    order = [rng.permutation(count)[: count // size * size].reshape(-1, size)]
    while sum(map(len, order)) < num_steps:
        order.append(rng.permutation(count)[: count // size * size].reshape(-1, size))
    for ids in np.concatenate(order)[:num_steps].astype(np.int32):
        rows = jax.tree.map(lambda leaf, ids=ids: leaf[ids], data)
        params, state = step(params, state, rows, ids)
    return unlearner, start, params, state


def norm(a, b):
    """||a - b|| over all floating leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in pairs if x.dtype.kind == "f"))


def measure(tx_name, data, size, num_steps, repeats, **options):
    """Distances relative to doing nothing, seconds relative to retraining, interleaved."""
    tx = OPTIMIZERS[tx_name]()
    unlearner, start, params, state = train(tx, data, size, num_steps, **options)
    seen = records.seen_ids(state.record.participation)
    ids = np.random.default_rng(1).choice(seen, max(1, len(seen) // 1000), replace=False)
    # The very program that `records.oracle` runs, compiled once instead of in every call.
    run = jax.jit(records.make_segment(tx, loss_fn, normalizer="kept", penalty=records.Penalty(L2)))
    log, reader = records.without(state.record.log, ids), records.RowReader(data)

    def retrain():
        return records.run_log(
            run, start, tx.init(start), log, reader, start=0, stop=num_steps,
            segment_length=records.default_segment_length(), show=False,
        )[:2]  # fmt: skip

    def forget():
        return unlearner.forget(params, state, ids, data=data)

    target, result = retrain(), forget()
    ratios, seconds = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(forget()[:2])
        middle = time.perf_counter()
        jax.block_until_ready(retrain())
        seconds.append(time.perf_counter() - middle)
        ratios.append((middle - begun) / seconds[-1])
    inner = norm(state.inner, target[1])
    return {
        "params": norm(result.params, target[0]) / norm(params, target[0]),
        "state": norm(result.opt_state.inner, target[1]) / inner if inner else float("nan"),
        "seconds": float(np.median(ratios)),
        "worst": max(ratios),
        "retraining": float(np.median(seconds)),
        "forgotten": len(ids),
        **result.info.measurements,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    quick = parser.parse_args().quick
    name, size, data = source()
    num_steps, repeats = (60, 3) if quick else (80, REPEATS)
    print(f"{name}, {len(data['y'])} rows; distances relative to doing nothing")
    holds = True
    cases = [("sgd", size, {}), ("momentum", size, {}), ("momentum", size, {"settle": 20})]
    for tx_name, batch, options in [*cases, ("sgd", size // 8, {})]:
        found = measure(tx_name, data, batch, num_steps, repeats, **options)
        print(
            f"{tx_name:9} batch {batch:5} settle {options.get('settle', 0):2}: "
            f"{found['forgotten']} rows, params {found['params']:.4f}, state {found['state']:.3f}, "
            f"exact steps {found['exact_steps']} of {num_steps}, "
            f"correction mismatch {found['correction_mismatch']:.2f}, seconds / retraining "
            f"{found['seconds']:.2f} (worst {found['worst']:.2f}, of {found['retraining']:.2f} s)",
            flush=True,
        )
        if tx_name == "sgd" and batch == size:
            holds &= found["params"] <= 0.1 and (found["seconds"] < 1 or name == "digits")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
