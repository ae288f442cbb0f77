"""Claim: with perfect weights and the old memory, most of the next update's error is still there.

Of the error of the next update that doing nothing leaves, five steps after the row was used: at
least 80 percent with an oracle's weights and the memory as it was, at most 30 percent with an
oracle's memory and the weights as they were. Momentum and Adam, softmax regression on digits.

python benchmarks/claims/weights_are_not_enough.py [--quick]    exits 1 where this does not hold.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _alignment import claimed
from _alignment import interventions as act

LAG = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="momentum alone")
    names = ("momentum", "Adam, eps 1e-3")
    fine = True
    for name in names[:1] if parser.parse_args().quick else names:
        cell = claimed.cell(name, (act.PARAMETERS, act.MEMORY), (LAG,))
        left = lambda half, cell=cell: claimed.share(cell, half, LAG, "direction")
        fine &= claimed.holds(f"{name}, weights alone", left(act.PARAMETERS), at_least=0.8)
        fine &= claimed.holds(f"{name}, memory alone", left(act.MEMORY), at_most=0.3)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
