"""Claim: on ridge regression leave-one-out tangents are exact over epochs; the paper's are not.

Momentum, four epochs: of the combined state error at most 1e-8 is left by `recollect` and by its
joint form, and more than 1e-3 with recursion="paper".

python benchmarks/claims/first_order_on_quadratics.py [--quick]    exits 1 where this fails.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _alignment import claimed
from _alignment import interventions as act

LAG, EPOCHS = 5, 4
FORMS = (act.TANGENT_PAPER, act.TANGENT_LOO, act.TANGENT_JOINT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="changes nothing: it takes seconds")
    parser.parse_args()
    cell = claimed.cell("momentum", FORMS, (LAG,), loss="ridge", epochs=EPOCHS, seeds=3)
    left = {form: claimed.share(cell, form, LAG) for form in FORMS}
    fine = claimed.holds(act.TANGENT_PAPER, left[act.TANGENT_PAPER], at_least=1e-3)
    for form in FORMS[1:]:
        fine &= claimed.holds(form, left[form], at_most=1e-8)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
