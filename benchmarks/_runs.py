"""Recorded trainings that the claims share: models, optimizers and data."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import datasets, kernels, unlearners

BATCH_SIZE = 50


def optimizers(num_steps: int):
    """The three optimizers of the claims."""
    return {
        "sgd, momentum": optax.sgd(0.05, momentum=0.9),
        "adamw, schedule": optax.adamw(optax.cosine_decay_schedule(2e-3, num_steps)),
        "clip, adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3)),
    }


def mlp(shape, num_classes):
    """Parameters and logits of a small MLP on flattened rows."""
    size = int(np.prod(shape))
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"w": jax.random.normal(k1, (size, 64)) / size**0.5, "b": jnp.zeros(64)},
        "out": {"w": jax.random.normal(k2, (64, num_classes)) / 8.0, "b": jnp.zeros(num_classes)},
    }

    def logits(params, x):
        x = x.reshape(x.shape[0], -1)
        hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    return params, logits


def cnn(shape, num_classes):
    """Parameters and logits of two strided convolutions and a dense layer."""
    channels = shape[2] if len(shape) == 3 else 1
    k1, k2, k3 = jax.random.split(jax.random.key(1), 3)
    size = -(-shape[0] // 4) * -(-shape[1] // 4) * 16
    params = {
        "first": jax.random.normal(k1, (3, 3, channels, 8)) / (3 * channels**0.5),
        "second": jax.random.normal(k2, (3, 3, 8, 16)) / 9.0,
        "out": jax.random.normal(k3, (size, num_classes)) / size**0.5,
    }

    def logits(params, x):
        x = x.reshape(x.shape[0], shape[0], shape[1], channels)
        for name in ("first", "second"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.reshape(x.shape[0], -1) @ params["out"]

    return params, logits


MODELS = {"MLP": mlp, "CNN": cnn}


def sources(num_rows: int):
    """Digits always; MNIST and CIFAR-10 where JAXUNLEARN_DATA has them."""
    found = {"digits": datasets.digits().train.take(num_rows)}
    if os.environ.get("JAXUNLEARN_DATA"):
        found["mnist"] = datasets.mnist().train.take(num_rows)
        found["cifar10"] = datasets.cifar10().train.take(num_rows)
    else:
        print("JAXUNLEARN_DATA is not set: digits only")
    return found


def train(source, model, tx, num_steps, *, seed=0, **options):
    """Train with `weighted_grad` under replay; returns what a claim needs to delete and compare."""
    ids = np.arange(len(source))
    data = {name: np.asarray(leaf) for name, leaf in source[ids].items()}
    start, logits = model(data["x"].shape[1:], source.num_classes)

    def loss_fn(params, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["y"]
        )
        return each.mean()

    unlearner = unlearners.replay(
        tx, loss_fn, num_examples=len(source), batch_size=BATCH_SIZE, max_steps=num_steps,
        progress=False, **options,
    )  # fmt: skip
    gradient = kernels.weighted_grad(loss_fn)

    def step(params, state, batch, ids):
        grads = gradient(params, batch, jnp.ones(BATCH_SIZE))
        updates, state = unlearner.update(grads, state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step)
    params, state = start, unlearner.init(start)
    rng = np.random.default_rng(seed)
    epochs = -(-num_steps * BATCH_SIZE // len(source))
    order = np.concatenate([rng.permutation(len(source)) for _ in range(epochs)])
    for batch_ids in order[: num_steps * BATCH_SIZE].reshape(num_steps, BATCH_SIZE):
        batch = {name: leaf[batch_ids] for name, leaf in data.items()}
        params, state = step(params, state, batch, batch_ids.astype(np.int32))
    return unlearner, loss_fn, start, params, state, data
