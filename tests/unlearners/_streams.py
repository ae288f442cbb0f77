"""One small stream for the tests of `memory_pair`: logistic rows in pairs, and its unlearners."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import kernels, transforms, unlearners
from jaxunlearn.unlearners import Event, EventKind

DIM, WIDTH, INSERTS, EVENTS = 4, 2, 24, 32
NUM_EXAMPLES = INSERTS * WIDTH
INSERT, DELETE, PREDICT, NOTHING = EventKind


def logistic(params, batch):
    return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * (batch["x"] @ params["w"])))


def squared(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def make_data(dtype=np.float32, num_rows=NUM_EXAMPLES, dim=DIM, seed=0):
    """Rows by id."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, dim))
    y = np.sign(x @ rng.normal(size=dim) + 0.5 * rng.normal(size=num_rows))
    return {"x": x.astype(dtype), "y": y.astype(dtype)}


def start(dtype=jnp.float32, dim=DIM):
    return {"w": jnp.zeros(dim, dtype)}


def options(**changes):
    return {
        "num_examples": NUM_EXAMPLES, "max_steps": INSERTS + 2, "batch_size": WIDTH, "l2": 0.1,
        "learning_rate": 0.2, "memory_size": 4, "num_checkpoints": 4,
        "admission": transforms.prudente_souza(),
    } | changes  # fmt: skip


@functools.cache
def unlearner(mode="replay", loss_fn=logistic, **changes):
    return unlearners.memory_pair(loss_fn, **options(mode=mode, **changes))


@functools.cache
def compiled(mode="replay", loss_fn=logistic, **changes):
    """The jitted run of a stream, from a fresh start; (state, outputs)."""
    made = unlearner(mode, loss_fn, **changes)

    def run(params, events):
        first = jax.tree.map(lambda leaf: leaf[0], events)
        return made.stream.run(made.stream.init(params, first), events)

    return jax.jit(run)


def events_of(script, data, width=WIDTH):
    """Events from (kind, ids) pairs, padded with NOTHING to EVENTS."""
    script = [*script, *[(NOTHING, [])] * (EVENTS - len(script))]
    ids = np.full((len(script), width), -1, np.int32)
    for row, (_, wanted) in zip(ids, script):
        row[: len(wanted)] = wanted
    kinds = np.array([int(kind) for kind, _ in script], np.int32)
    shown = np.isin(kinds, [INSERT, PREDICT])
    picked = np.clip(ids, 0, len(data["y"]) - 1)
    rows = jax.tree.map(lambda leaf: leaf[picked], data)
    hide = lambda leaf: np.where(shown.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)
    return Event(kinds, ids, jax.tree.map(lambda leaf: hide(leaf).astype(leaf.dtype), rows))


def inserts(num=INSERTS):
    return [(INSERT, [WIDTH * t, WIDTH * t + 1]) for t in range(num)]


def without(script, ids):
    """The same script as if those ids had never come; a step left empty becomes no event."""
    left = []
    for kind, wanted in script:
        if kind == DELETE:
            left.append((NOTHING, []))
            continue
        kept = [-1 if i in ids else i for i in wanted]
        left.append((kind, kept) if any(i >= 0 for i in kept) else (NOTHING, []))
    return left


def train(made, data, ids_of_steps, params):
    """A training loop over `update`, as a user would write it."""
    gradient = kernels.weighted_grad(made.loss_fn)
    step = _steps(made.unlearner, gradient)
    state = made.unlearner.init(params)
    for ids in ids_of_steps:
        ids = np.asarray(ids, np.int32)
        rows = jax.tree.map(lambda leaf, i=ids: leaf[np.maximum(i, 0)], data)
        params, state = step(params, state, rows, ids)
    return params, state


class Made:
    """An unlearner and its loss."""

    def __init__(self, mode="replay", loss_fn=logistic, **changes):
        self.loss_fn, self.unlearner = loss_fn, unlearner(mode, loss_fn, **changes)


_COMPILED = {}


def _steps(unlearner, gradient):
    """One compiled training step an unlearner."""
    if id(unlearner) not in _COMPILED:

        def step(params, state, rows, ids):
            weights = (ids >= 0).astype(jnp.float32)
            grads = gradient(params, rows, weights, num_rows=jnp.sum(ids >= 0, dtype=jnp.int32))
            updates, state = unlearner.update(grads, state, params, batch=rows, ids=ids)
            return optax.apply_updates(params, updates), state

        _COMPILED[id(unlearner)] = unlearner, jax.jit(step)
    return _COMPILED[id(unlearner)][1]


def golden(name) -> pathlib.Path:
    """A file of JAXUNLEARN_GOLDEN, or of golden/ next to JAXUNLEARN_DATA; else a skip."""
    root = os.environ.get("JAXUNLEARN_GOLDEN")
    if not root and os.environ.get("JAXUNLEARN_DATA"):
        root = str(pathlib.Path(os.environ["JAXUNLEARN_DATA"]).parent / "golden")
    path = pathlib.Path(root or "nowhere") / name
    if not path.is_file():
        pytest.skip(f"needs {name} in JAXUNLEARN_GOLDEN")
    return path
