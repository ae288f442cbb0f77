"""Claim: on an MLP 784-512-512-10, batch 256, clipping every example's gradient costs at most 1.3
times the plain batch gradient, and is at least 30 times faster than vmap(grad), clip and sum.

python benchmarks/claims/per_example_is_fast.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _harness import compare, table
from per_example import candidates, mlp_case

MAX_COST, MIN_SPEEDUP, REPEATS = 1.3, 30.0, 60


def main() -> int:
    every = candidates(mlp_case())
    plain, ours, usual = "plain gradient", "clipped_sum", "vmap(grad), clip, sum"
    cost = compare({name: every[name] for name in (plain, ours)}, baseline=plain, repeats=REPEATS)
    speedup = compare({name: every[name] for name in (ours, usual)}, baseline=ours)
    print(f"{table(cost)}\n\n{table(speedup)}")
    holds = cost[ours]["ratio"] <= MAX_COST and speedup[usual]["ratio"] >= MIN_SPEEDUP
    print(f"\nat most {MAX_COST} plain gradients and {MIN_SPEEDUP} times faster: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
