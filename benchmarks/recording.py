"""What training under `replay` costs beside the wrapped optimizer alone, per step.

python benchmarks/recording.py [--repeats 30] [--out benchmarks/results/recording_cpu.json]
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _harness import MIN_REPEATS, compare, table, write_json

from jaxunlearn import kernels, unlearners

NUM_EXAMPLES, MAX_STEPS, STEPS_A_CALL = 60_000, 20_000, 20


def loss_fn(params, batch):
    hidden = batch["x"]
    for weight, bias in params[:-1]:
        hidden = jax.nn.relu(hidden @ weight + bias)
    weight, bias = params[-1]
    logits = hidden @ weight + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def training(sizes: tuple[int, ...], batch_size: int):
    """Candidates that take `STEPS_A_CALL` donated steps with and without the record."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(batch_size, sizes[0])).astype(np.float32),
        "y": rng.integers(0, sizes[-1], batch_size).astype(np.int32),
    }
    gradient = kernels.weighted_grad(loss_fn)
    weights = jnp.ones(batch_size)

    def candidate(tx, with_ids):
        params = [
            (jnp.asarray(rng.normal(size=pair) / pair[0] ** 0.5, jnp.float32), jnp.zeros(pair[1]))
            for pair in itertools.pairwise(sizes)
        ]

        def step(params, state, ids):
            grads = gradient(params, batch, weights)
            extra = {"ids": ids} if with_ids else {}
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        held = [params, tx.init(params)]

        def run():
            for _ in range(STEPS_A_CALL):
                ids = rng.integers(0, NUM_EXAMPLES, batch_size).astype(np.int32)
                held[:] = step(*held, ids)
            return held[0]

        return run

    plain = optax.adamw(1e-3)
    recorded = unlearners.replay(
        plain, loss_fn, num_examples=NUM_EXAMPLES, batch_size=batch_size, max_steps=MAX_STEPS
    )
    return {"adamw": candidate(plain, False), "replay(adamw)": candidate(recorded, True)}


CASES = {
    "MLP 784-512-512-10, batch 256": ((784, 512, 512, 10), 256),
    "MLP 784-256-10, batch 64": ((784, 256, 10), 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="changes nothing: it takes seconds")
    options = parser.parse_args()
    results = {}
    for name, (sizes, batch_size) in CASES.items():
        results[name] = compare(
            training(sizes, batch_size), baseline="adamw", repeats=options.repeats
        )
        print(f"{name}, {STEPS_A_CALL} steps\n{table(results[name])}\n")
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
