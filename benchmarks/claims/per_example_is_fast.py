"""Claim: on an MLP 784-512-512-10, batch 256, clipping every example's gradient costs at most 1.3
times the plain batch gradient, and is at least 30 times faster than vmap(grad), clip and sum.

python benchmarks/claims/per_example_is_fast.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from _harness import compare, table
from _kernels import ours, peers_jax
from _kernels.models import dense

MAX_COST, MIN_SPEEDUP, REPEATS, CLIP = 1.3, 30.0, 60, 1.0
PLAIN, OURS, USUAL = "plain gradient", "clipped_sum", "vmap(grad), clip, sum"


def candidates() -> dict:
    """Each jitted as a whole."""
    model = dense(784, 512, 512, 10)
    params, batch = model.params(), model.batch(256)
    functions = {
        PLAIN: jax.grad(model.loss_fn),
        OURS: ours.clipped_sum(model.loss_fn, CLIP),
        USUAL: peers_jax.vmap_clip_sum(model.loss_fn, CLIP),
    }
    return {name: peers_jax.bound(jax.jit(f), params, batch) for name, f in functions.items()}


def main() -> int:
    every = candidates()
    cost = compare({name: every[name] for name in (PLAIN, OURS)}, baseline=PLAIN, repeats=REPEATS)
    speedup = compare({name: every[name] for name in (OURS, USUAL)}, baseline=OURS)
    print(f"{table(cost)}\n\n{table(speedup)}")
    holds = cost[OURS]["ratio"] <= MAX_COST and speedup[USUAL]["ratio"] >= MIN_SPEEDUP
    print(f"\nat most {MAX_COST} plain gradients and {MIN_SPEEDUP} times faster: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
