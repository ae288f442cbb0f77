"""Claim: two deletions in a row equal one of both, and no leaf but the seen and forgotten bits
depends on a forgotten row.

The second half trains twice, with different contents of the row that is then forgotten, and
compares every leaf of what is left.

python benchmarks/claims/nothing_is_left.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from _runs import MODELS, optimizers, sources, train

from jaxunlearn import tree

NUM_ROWS, NUM_STEPS, FIRST, SECOND = 500, 40, (7, 99), (42, 123)


class Altered:
    """A data set in which one row was somebody else's."""

    def __init__(self, source, row):
        self._source, self._row = source, row
        self.num_classes = source.num_classes

    def __len__(self):
        return len(self._source)

    def __getitem__(self, ids):
        batch = {name: np.array(leaf) for name, leaf in self._source[ids].items()}
        batch["x"][np.asarray(ids) == self._row] = 0.5
        return batch


def main() -> int:
    holds = True
    source = sources(NUM_ROWS)["digits"]
    for tx_name, tx in optimizers(NUM_STEPS).items():
        unlearner, _, _, params, state, data = train(source, MODELS["MLP"], tx, NUM_STEPS)
        one = unlearner.forget(params, state, FIRST, data=data)
        two = unlearner.forget(one.params, one.opt_state, SECOND, data=data)
        both = unlearner.forget(params, state, FIRST + SECOND, data=data)
        in_a_row = tree.same_bits(two[:2], both[:2])
        row = FIRST[0]
        other, _, _, other_params, other_state, other_data = train(
            Altered(source, row), MODELS["MLP"], tx, NUM_STEPS
        )
        differed = not tree.same_bits(params, other_params)
        left = unlearner.forget(params, state, [row], data=data)
        other_left = other.forget(other_params, other_state, [row], data=other_data)
        nothing = tree.same_bits(left[:2], other_left[:2])
        uses = int(np.sum(np.asarray(jax.device_get(left.opt_state.record.log.step_ids)) == row))
        print(
            f"{tx_name:16} in a row {in_a_row}; runs differed {differed}, after forgetting equal "
            f"{nothing}; uses left in the log {uses}"
        )
        holds &= in_a_row and differed and nothing and uses == 0
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
