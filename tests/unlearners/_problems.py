"""Small networks on real images, trained by the library's gradient and by code that owes it none.

`train` logs and donates as a user would. `train_plainly` is the independent judge: a Python loop
over `jax.grad` of the mean over the rows that are left, scaled by kept / scheduled, which never
reads a forgotten row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import Unlearner, datasets, kernels, unlearners
from tests import oracles

BATCH, NUM_ROWS, STEPS = 16, 60, 10
FORGET = [5, 37]


def init_mlp(rng, shape, dtype):
    size = int(np.prod(shape))
    return _draw(rng, dtype, hidden=(size, 12), bias=(12,), out=(12, 10), shift=(10,))


def mlp(params, x):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["hidden"] + params["bias"])
    return hidden @ params["out"] + params["shift"]


def init_cnn(rng, shape, dtype):
    cells = int(np.prod([(side - 1) // 2 for side in shape[:2]]))
    return _draw(rng, dtype, kernel=(3, 3, shape[2], 3), bias=(3,), out=(3 * cells, 10))


def cnn(params, x):
    maps = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    maps = jax.nn.softplus(maps + params["bias"])
    return maps.reshape(len(x), -1) @ params["out"]


def _draw(rng, dtype, **shapes):
    scale = lambda shape: 1.0 / np.sqrt(np.prod(shape[:-1]))
    return {
        name: jnp.asarray(rng.normal(size=shape) * scale(shape), dtype)
        for name, shape in shapes.items()
    }


def cross_entropy(apply):
    """The mean cross entropy of `apply(params, x)`."""

    def loss_fn(params, batch):
        logits = apply(params, batch["x"].astype(jax.tree.leaves(params)[0].dtype))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))

    return loss_fn


MODELS = {"mlp": (init_mlp, cross_entropy(mlp)), "cnn": (init_cnn, cross_entropy(cnn))}
OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, 3, STEPS)),
    "clipped-adam": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01)),
}


def images(dataset: str) -> dict[str, np.ndarray]:
    """The first rows of a data set, as arrays; MNIST and CIFAR-10 need JAXUNLEARN_DATA."""
    rows = getattr(datasets, dataset)().train[np.arange(NUM_ROWS, dtype=np.int32)]
    return {"x": np.asarray(rows["x"]), "y": np.asarray(rows["y"])}


def ids_of_step(step: int) -> np.ndarray:
    """Four fixed batches of 16, 16, 16 and 12 rows, in a new order every epoch."""
    batches = np.concatenate([np.arange(NUM_ROWS), np.full(4, -1)]).reshape(4, BATCH)
    order = np.random.default_rng(100 + step // 4).permutation(4)
    return batches[order[step % 4]].astype(np.int32)


@dataclasses.dataclass
class Run:
    """A network trained under `replay`, and all that training it took."""

    unlearner: Unlearner
    tx: optax.GradientTransformation
    loss_fn: Callable
    data: Any
    init: Any
    params: Any
    state: Any


@functools.cache
def trained_network(dataset: str, model: str, optimizer: str, dtype=jnp.float32) -> Run:
    """STEPS steps under `replay`; call it under `jax.enable_x64` for float64."""
    data = images(dataset)
    init_fn, loss_fn = MODELS[model]
    init = init_fn(np.random.default_rng(3), data["x"].shape[1:], dtype)
    tx = OPTIMIZERS[optimizer]()
    unlearner = unlearners.replay(
        tx, loss_fn, num_examples=NUM_ROWS, batch_size=BATCH, max_steps=STEPS, num_checkpoints=4
    )
    params, state = train(unlearner, loss_fn, init, data)
    return Run(unlearner, tx, loss_fn, data, init, params, state)


def train(unlearner, loss_fn, init, data, *, steps=range(STEPS), ids_of=ids_of_step):
    """Ordinary training with the library's gradient, donated; padding rows hold garbage."""
    gradient = kernels.weighted_grad(loss_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows, ids):
        grads = gradient(params, rows, ids >= 0)
        updates, state = unlearner.update(grads, state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), init)
    state = unlearner.init(params)
    for t in steps:
        rows = jax.tree.map(lambda leaf, t=t: leaf[np.maximum(ids_of(t), 0)], data)
        params, state = step(params, state, rows, ids_of(t))
    return params, state


def train_plainly(tx, loss_fn, init, data, forget, *, steps=range(STEPS), ids_of=ids_of_step):
    """The judge: it holds only the rows that are left, and knows nothing of the library."""
    gradient, update = jax.jit(jax.grad(loss_fn)), jax.jit(tx.update)
    params, state = init, tx.init(init)
    for t in steps:
        scheduled = [i for i in ids_of(t) if i >= 0]
        kept = [i for i in scheduled if i not in forget]
        grads = gradient(params, {name: leaf[kept] for name, leaf in data.items()})
        grads = jax.tree.map(lambda g, k=kept, s=scheduled: g * (len(k) / len(s)), grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def one_ulp_away(params, seed: int = 0):
    """Every entry of every leaf at a neighbouring float."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(oracles.ulp_neighbour(rng, leaf)), params)


def relative_gap(a, b) -> float:
    """||a - b|| / ||b|| over the inexact leaves of two trees, in float64."""
    inexact = lambda tree: [
        np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if x.dtype.kind == "f"
    ]
    return oracles.relative_gap(inexact(a), inexact(b))
