"""Claim: replay leaves all four measures of state alignment at zero, at every lag.

SGD, momentum, Nesterov, Adam, AdamW with a schedule, RMSProp, online L-BFGS (`memory_pair`) and an
online Newton step; softmax regression on digits, rows used 1, 20 and 100 steps ago.

python benchmarks/claims/state_replay_is_aligned.py [--quick]    exits 1 where this does not hold.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _alignment import claimed
from _alignment import interventions as act
from _alignment.cells import MEASURES
from _alignment.optimizers import OPTIMIZERS

LAGS = (1, 20, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three optimizers")
    quick = parser.parse_args().quick
    names = ("momentum", "Adam, eps 1e-8", "online L-BFGS") if quick else OPTIMIZERS
    fine = True
    for name in names:
        cell = claimed.cell(name, (act.REPLAY,), LAGS, seeds=2)
        for lag in LAGS:
            left, rest = cell.errors[act.REPLAY][lag], cell.errors[act.NOTHING][lag]
            worst = max(left[m].high for m in MEASURES)
            before = max(rest[m].median for m in MEASURES)
            fine &= claimed.holds(f"{name}, lag {lag}, from {before:.1e}", worst, at_most=0.0)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
