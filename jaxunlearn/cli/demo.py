"""`jaxunlearn demo`: train on real data, forget rows, and compare with a model that never saw them.

Two ends of the field: a network trained with AdamW under exact replay, and logistic regression
under a certified Newton step.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import adapters, datasets, errors, kernels, tree, unlearners
from jaxunlearn.cli import report
from jaxunlearn.progress import progress
from jaxunlearn.types import Budget

MAX_ROWS = 4000
BATCH_SIZE = 64
NUM_STEPS = 480
HIDDEN = 128
L2 = 0.01
BUDGET = Budget(epsilon=1.0, delta=1e-5, max_forget=500)
NOISE_STDDEV = 0.001


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows as the demo uses them: flat features, integer labels, and which ids to forget."""

    name: str
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int
    forget: np.ndarray
    seed: int
    show: bool | None

    @property
    def retain(self) -> np.ndarray:
        """Ids that stay."""
        return np.setdiff1d(np.arange(len(self.x)), self.forget)

    @property
    def data(self) -> dict[str, np.ndarray]:
        """The rows by id."""
        return {"x": self.x, "y": self.y}

    def accuracies(self, logits) -> dict[str, float]:
        """Share of correct answers on forget, retain and test rows."""
        right = lambda x, y: float(np.mean(np.argmax(logits(x), axis=-1) == y))
        return {
            "forget": right(self.x[self.forget], self.y[self.forget]),
            "retain": right(self.x[self.retain], self.y[self.retain]),
            "test": right(self.test_x, self.test_y),
        }

    def losses(self, logits) -> dict[str, np.ndarray]:
        """Cross-entropy of each forget row and of each test row."""
        each = optax.softmax_cross_entropy_with_integer_labels
        return {
            "forget": np.asarray(each(logits(self.x[self.forget]), self.y[self.forget])),
            "test": np.asarray(each(logits(self.test_x), self.test_y)),
        }


def run(*, dataset: str, num_forget: int, seed: int, out: str, quiet: bool) -> int:
    """The whole demo; writes report.json, certificates and report.png into `out`."""
    folder = pathlib.Path(out)
    task = load(dataset, num_forget, seed, show=False if quiet else None)
    begun = time.perf_counter()
    results = [replay_a_network(task), remove_from_logistic_regression(task)]
    seconds = time.perf_counter() - begun
    paths = report.write(folder, task, results, seconds)
    if not quiet:
        report.show(task, results, paths, seconds)
    return 0


def load(dataset: str, num_forget: int, seed: int, show: bool | None) -> Task:
    """A classification task of at most `MAX_ROWS` training rows, features in [-1, 1] or so."""
    if dataset.endswith(".npz"):
        split = datasets.npz(dataset)
    elif dataset in datasets.names():
        split = datasets.load(dataset)
    else:
        raise errors.UsageError(
            f"Expected --dataset to be one of {', '.join(datasets.names())}, or a file.npz in the "
            f"MNIST layout, got {dataset!r}."
        )
    if split.train.num_classes is None:
        raise errors.UsageError(f"Expected a data set with classes, {dataset} has none.")
    train = split.train.take(min(MAX_ROWS, len(split.train)))
    test = split.test.take(min(MAX_ROWS, len(split.test)))
    if not 0 < num_forget < len(train) // 2:
        raise errors.UsageError(
            f"Expected --forget between 1 and {len(train) // 2 - 1}, got {num_forget}."
        )
    rows = [part[np.arange(len(part))] for part in (train, test)]
    flat = [np.reshape(r["x"], (len(r["x"]), -1)).astype(np.float32) for r in rows]
    labels = [np.asarray(r["y"], np.int32) for r in rows]
    forget = np.random.default_rng(seed).choice(len(train), num_forget, replace=False)
    return Task(
        dataset, flat[0], labels[0], flat[1], labels[1],
        split.train.num_classes, np.sort(forget), seed, show,
    )  # fmt: skip


def replay_a_network(task: Task) -> dict[str, Any]:
    """A Flax NNX network, AdamW, exact replay; the oracle is an independent second training."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(task.x.shape[1], HIDDEN, rngs=rngs)
            self.out = nnx.Linear(HIDDEN, task.num_classes, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    def loss(model, batch):
        logits = model(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def build():
        model = Network(rngs=nnx.Rngs(task.seed))
        loss_fn = adapters.nnx.loss_fn(model, loss)
        schedule = optax.cosine_decay_schedule(3e-3, NUM_STEPS)
        tx = unlearners.replay(
            optax.adamw(schedule), loss_fn, num_examples=len(task.x), batch_size=BATCH_SIZE,
            max_steps=NUM_STEPS, verify="report", progress=task.show,
        )  # fmt: skip
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param), kernels.weighted_grad(loss_fn)

    order = _batches(len(task.x), task.seed)

    def train(label, dropped):
        model, optimizer, gradient = build()
        flat = lambda: np.concatenate([np.ravel(p) for p in jax.tree.leaves(nnx.state(model))])

        @nnx.jit
        def step(model, optimizer, batch, ids, num_rows):
            weights = (ids >= 0).astype(jnp.float32)
            params = adapters.nnx.params(model, optimizer)
            grads = gradient(params, batch, weights, num_rows=num_rows)
            optimizer.update(model, grads, ids=ids)

        path, begun = [flat()], time.perf_counter()
        with progress(label, NUM_STEPS, show=task.show) as advance:
            for number, batch_ids in enumerate(order):
                ids = np.where(np.isin(batch_ids, dropped), -1, batch_ids).astype(np.int32)
                kept = (ids >= 0)[:, None]
                batch = {
                    "x": np.where(kept, task.x[ids], 0),
                    "y": np.where(ids >= 0, task.y[ids], 0),
                }
                step(model, optimizer, batch, ids, np.sum(batch_ids >= 0))
                if number == 0:  # the step is compiled: time the others
                    jax.block_until_ready(nnx.state(model))
                    begun = time.perf_counter()
                if number % 8 == 7:
                    path.append(flat())
                advance(1)
        jax.block_until_ready(nnx.state(model))
        return model, optimizer, np.array(path), time.perf_counter() - begun

    model, optimizer, path, _ = train("training a network with AdamW", [])
    oracle, oracle_optimizer, oracle_path, retrain_seconds = train(
        "training the oracle", task.forget
    )
    target = (nnx.state(oracle), adapters.nnx.released(oracle_optimizer))
    gaps = lambda: {
        "params": tree.relative_distance(nnx.state(model), target[0]),
        "state": tree.relative_distance(adapters.nnx.released(optimizer), target[1]),
    }
    before = _facts(task, model)
    distance_before = gaps()
    arrays = nnx.as_pure((adapters.nnx.params(model, optimizer), optimizer.opt_state))
    first = optimizer.tx.forget(*arrays, task.forget, data=task.data)  # compiles; changes nothing
    info = adapters.nnx.forget(model, optimizer, task.forget, data=task.data)
    return {
        "name": "network, AdamW, replay",
        "info": info,
        "distance_before": distance_before,
        "distance_after": gaps(),
        "models": {"before": before, "after": _facts(task, model), "oracle": _facts(task, oracle)},
        "first_forget_seconds": first.info.seconds,
        "forget_seconds": info.seconds,
        "retrain_seconds": retrain_seconds,
        "paths": {
            "trained": path,
            "oracle": oracle_path,
            "replayed_from": info.measurements["first_step"],
        },
    }


def remove_from_logistic_regression(task: Task) -> dict[str, Any]:
    """Logistic regression to a small gradient norm, then one certified Newton step."""
    with_bias = lambda x: np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
    data = {"x": with_bias(task.x), "y": task.y}

    def loss_fn(params, batch):
        logits = batch["x"] @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    unlearner = unlearners.newton(
        optax.lbfgs(), loss_fn, num_examples=len(task.x), l2=L2, budget=BUDGET,
        noise_stddev=NOISE_STDDEV, num_steps=4, progress=task.show,
    )  # fmt: skip
    start = {"w": jnp.zeros((data["x"].shape[1], task.num_classes))}
    params, state, _ = _minimise(unlearner, loss_fn, start, data, np.arange(len(task.x)), task)
    oracle, _, retrain_seconds = _minimise(unlearner, loss_fn, start, data, task.retain, task)
    logits_of = lambda p: lambda x: with_bias(np.asarray(x)) @ p["w"]
    first = unlearner.forget(params, state, task.forget, data=data)  # compiles; changes nothing
    result = unlearner.forget(params, state, task.forget, data=data)
    gap = lambda p: {"params": tree.relative_distance(p, oracle), "state": None}
    return {
        "name": "logistic regression, Newton",
        "info": result.info,
        "distance_before": gap(params),
        "distance_after": gap(result.params),
        "models": {
            "before": _facts(task, logits_of(params)),
            "after": _facts(task, logits_of(result.params)),
            "oracle": _facts(task, logits_of(oracle)),
        },
        "first_forget_seconds": first.info.seconds,
        "forget_seconds": result.info.seconds,
        "retrain_seconds": retrain_seconds,
    }


def _minimise(unlearner, loss_fn, params, data, ids, task, max_steps=200, tolerance=3e-6):
    """Full-batch L-BFGS to a small gradient of the regularised objective over `ids`."""
    batch = {name: jnp.asarray(leaf[ids]) for name, leaf in data.items()}
    ids = jnp.asarray(ids, jnp.int32)

    @jax.jit
    def step(params, state):
        value_fn = lambda p: loss_fn(p, batch)
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = unlearner.update(
            grads, state, params, ids=ids, value=value, grad=grads, value_fn=value_fn
        )
        norm = optax.tree.norm(jax.tree.map(lambda g, p: g + L2 * p, grads, params))
        return optax.apply_updates(params, updates), state, norm

    state, begun = unlearner.init(params), time.perf_counter()
    with progress("fitting logistic regression", max_steps, show=task.show) as advance:
        for number in range(max_steps):
            params, state, norm = step(params, state)
            if number == 0:  # the step is compiled: time the others
                jax.block_until_ready(params)
                begun = time.perf_counter()
            advance(1)
            if float(norm) < tolerance:
                advance(max_steps - number - 1)
                break
    return params, state, time.perf_counter() - begun


def _batches(num_rows: int, seed: int) -> np.ndarray:
    """Shuffled epochs as (NUM_STEPS, BATCH_SIZE) ids; the last batch of an epoch is padded."""
    rng = np.random.default_rng(seed)
    width = -(-num_rows // BATCH_SIZE) * BATCH_SIZE
    epochs: list[np.ndarray] = []
    while sum(len(epoch) for epoch in epochs) < NUM_STEPS:
        padded = np.concatenate([rng.permutation(num_rows), np.full(width - num_rows, -1)])
        epochs.append(padded.reshape(-1, BATCH_SIZE))
    return np.concatenate(epochs)[:NUM_STEPS].astype(np.int32)


def _facts(task: Task, logits) -> dict[str, Any]:
    return {**task.accuracies(logits), "losses": task.losses(logits)}
