"""Claim: the optimizer state that `newton(rebuild=...)` releases is a function of the released
parameters, the retained rows and public figures, byte for byte.

Two runs share their retained rows and nothing else: other starts, other orders, other rows to
forget. The state of each is remade from its released parameters with the *other* run's data, in
which the rows that the first one forgot are garbage.

python benchmarks/claims/rebuild_sees_nothing_else.py    exits 1 where this does not hold.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import Budget, datasets, kernels, records, tree, unlearners

NUM_RETAINED, NUM_ROWS, NUM_STEPS, BATCH, L2 = 200, 210, 30, 20, 0.1
KEY = jax.random.key(2)
FORGET = {"first": np.arange(200, 205), "second": np.arange(205, 210)}
OPTIMIZERS = {
    "adamw, schedule": optax.adamw(optax.cosine_decay_schedule(0.05, NUM_STEPS)),
    "clipped rmsprop": optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.01)),
    "l-bfgs": optax.lbfgs(memory_size=5),
}


def loss_fn(w, batch):
    logits = batch["x"] @ w
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def data_of(side: str):
    """Digits; the rows that the other side forgets are garbage here."""
    rows = datasets.digits(flatten=True)[0][np.arange(NUM_ROWS)]
    data = {name: np.array(leaf) for name, leaf in rows.items()}
    for other, ids in FORGET.items():
        if other != side:
            data["x"][ids] = 1e6
    return data


def released(tx, side: str):
    """Parameters and state after training on the retained rows and those of one side."""
    data = data_of(side)
    method = unlearners.newton(
        tx, loss_fn, num_examples=NUM_ROWS, l2=L2, noise_stddev=1.0,
        budget=Budget(epsilon=50.0, delta=1e-5, max_forget=5),
        rebuild=records.Rebuild(key=KEY, batch_size=BATCH), num_steps=2,
    )  # fmt: skip
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)

    @jax.jit
    def step(params, state, rows, ids):
        ones = jnp.ones(BATCH)
        grads, info = gradient(params, rows, ones)
        extra = {"value": info.value, "grad": grads, "value_fn": lambda p: value(p, rows, ones)}
        updates, state = method.update(grads, state, params, ids=ids, **extra)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(len(side))
    order = np.concatenate([rng.permutation(NUM_RETAINED) for _ in range(3)])
    params = jnp.asarray(rng.normal(size=(64, 10)) * 0.1, jnp.float32)
    state = method.init(params)
    for t in range(NUM_STEPS):
        chosen = np.concatenate([FORGET[side], order[15 * t : 15 * t + 15]]).astype(np.int32)
        rows = {name: leaf[chosen] for name, leaf in data.items()}
        params, state = step(params, state, rows, chosen)
    result = method.forget(params, state, FORGET[side], data=data)
    return result.params, result.opt_state.inner, result.info.certificate.scope


def main() -> int:
    holds = True
    for name, tx in OPTIMIZERS.items():
        sides = list(FORGET)
        for side, other in zip(sides, reversed(sides)):
            params, inner, scope = released(tx, side)
            again = records.rebuild(
                tx, loss_fn, params, data_of(other), np.arange(NUM_RETAINED), num_steps=NUM_STEPS,
                key=KEY, batch_size=BATCH, l2=L2,
            )  # fmt: skip
            same = tree.same_bits(inner, again)
            print(f"{name:16} {side:7} scope {scope}; same bytes from the other history {same}")
            holds &= same and scope == "full-state"
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
