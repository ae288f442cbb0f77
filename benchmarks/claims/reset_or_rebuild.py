"""Claim: beside corrected weights a reset is nearer for momentum and L-BFGS, a rebuild for Adam.

Both carry nothing of the row, and both end further from the run without it than doing nothing; with
an oracle's weights, twenty steps after the row was used. `fixed_path` is nearer than either, and
further than doing nothing as well. Softmax regression on digits.

python benchmarks/claims/reset_or_rebuild.py [--quick]    exits 1 where this does not hold.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _alignment import claimed
from _alignment import interventions as act

LAG = 20
RESET_WINS = {"momentum": True, "Adam, eps 1e-8": False, "online L-BFGS": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="momentum and Adam")
    names = list(RESET_WINS)[:2] if parser.parse_args().quick else list(RESET_WINS)
    ways = (act.PARAMETERS_RESET, act.PARAMETERS_REBUILT, act.FIXED_PATH)
    fine = True
    for name in names:
        cell = claimed.cell(name, ways, (LAG,))
        reset, rebuilt, path = (claimed.share(cell, way, LAG) for way in ways)
        fine &= claimed.holds(f"{name}, reset", reset, at_least=1.0)
        fine &= claimed.holds(f"{name}, rebuilt", rebuilt, at_least=1.0)
        nearer, further = (reset, rebuilt) if RESET_WINS[name] else (rebuilt, reset)
        which = "reset over rebuilt" if RESET_WINS[name] else "rebuilt over reset"
        fine &= claimed.holds(f"{name}, {which}", nearer / further, at_most=1.0)
        fine &= claimed.holds(f"{name}, fixed path over reset", path / reset, at_most=1.0)
        if name != "online L-BFGS":
            fine &= claimed.holds(f"{name}, fixed path", path, at_least=1.0)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
