"""Claim: after `replay`, parameters and every leaf of optimizer state are bitwise the oracle's.

SGD with momentum, AdamW with a schedule, clipped Adam; MLP and CNN; digits, and MNIST and CIFAR-10
where JAXUNLEARN_DATA has them.

python benchmarks/claims/replay_is_bitwise.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _runs import MODELS, optimizers, sources, train

from jaxunlearn import oracle, released, tree

NUM_ROWS, NUM_STEPS, FORGET = 1000, 60, (3, 14, 159, 265, 358, 979)


def main() -> int:
    holds = True
    for source_name, source in sources(NUM_ROWS).items():
        for model_name, model in MODELS.items():
            for tx_name, tx in optimizers(NUM_STEPS).items():
                unlearner, loss_fn, start, params, state, data = train(
                    source, model, tx, NUM_STEPS, verify="bitwise"
                )
                result = unlearner.forget(params, state, FORGET, data=data)
                target = oracle(
                    tx, loss_fn, start, log=state.record.log, data=data, forget=FORGET, show=False
                )
                same = tree.same_bits((result.params, released(result.opt_state)), target)
                moved = tree.relative_distance(params, target[0])
                print(
                    f"{source_name:8} {model_name} {tx_name:16} bitwise {same}, moved {moved:.1e}"
                )
                holds &= same and moved > 0
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
