"""Claim: a training step under `replay(adamw)` costs at most 1.2 times a step of `adamw`, on an MLP
784-512-512-10 at batch 256.

python benchmarks/claims/recording_is_cheap.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _harness import compare, table
from recording import CASES, training

MAX_COST, CASE = 1.2, "MLP 784-512-512-10, batch 256"


def main() -> int:
    results = compare(training(*CASES[CASE]), baseline="adamw")
    print(f"{CASE}\n{table(results)}\n")
    holds = results["replay(adamw)"]["ratio"] <= MAX_COST
    print(f"at most {MAX_COST} times the wrapped optimizer: {holds}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
