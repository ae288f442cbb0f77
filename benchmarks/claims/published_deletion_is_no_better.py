"""Claim: on online L-BFGS neither the published deletion nor dropping the pair beats doing nothing.

Twenty steps after the row was used, ten pairs held: of the combined state error the published step
back leaves more than there was, dropping the row's own pair leaves all of it (the pair has left the
window), `memory_pair(mode="tangent")` at most 20 percent, mode="replay" nothing. Softmax regression
on digits.

python benchmarks/claims/published_deletion_is_no_better.py [--quick]    exits 1 where this fails.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _alignment import claimed
from _alignment import interventions as act

LAG = 20
WAYS = (act.PAPER_DELETION, act.DROP_PAIR, act.TANGENT_JOINT, act.REPLAY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three seeds")
    seeds = 3 if parser.parse_args().quick else claimed.SEEDS
    cell = claimed.cell("online L-BFGS", WAYS, (LAG,), seeds=seeds)
    left = {way: claimed.share(cell, way, LAG) for way in WAYS}
    fine = claimed.holds(act.PAPER_DELETION, left[act.PAPER_DELETION], at_least=1.0)
    fine &= claimed.holds(act.DROP_PAIR, left[act.DROP_PAIR], at_least=1.0)
    fine &= claimed.holds(act.TANGENT_JOINT, left[act.TANGENT_JOINT], at_most=0.2)
    fine &= claimed.holds(act.REPLAY, left[act.REPLAY], at_most=0.0)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
