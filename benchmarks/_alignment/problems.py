"""Streams of labelled rows, in which a row's lag is how many steps ago it was last used.

Which step uses which ids is the same for every seed, so that one compiled program serves them all;
the seed says which rows the ids are, and where the parameters start. All of it in float64.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

from jaxunlearn import datasets

HELD_OUT, HELD_OUT_ROWS = 3, 64
HIDDEN, TURN = 32, 180.0
"""Hidden units of the MLP; degrees by which the drifting digits turn from first to last step."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """rows: leaves with a leading axis of ids. held_out: batches never used, the
    same for every seed."""

    rows: dict[str, np.ndarray]
    held_out: list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A data set and a loss.

    draw(seed, num_rows, batch_size) -> `Stream`; start(seed) -> params; loss is a key of LOSSES.
    epochs: how often a row is used; in a stream, once.
    """

    data: str
    loss: str
    batch_size: int
    l2: float
    draw: Callable[[int, int, int], Stream]
    start: Callable[[int], Any]
    loss_fn: Callable[..., jax.Array]
    epochs: int

    @property
    def name(self) -> str:
        again = f", {self.epochs} epochs" if self.epochs > 1 else ""
        return f"{self.loss}, {self.data}{again}"

    def schedule(self, num_steps: int) -> np.ndarray:
        """The ids of every step, (num_steps, batch_size): each epoch in an order of its own."""
        num_ids = num_steps * self.batch_size // self.epochs
        rng = np.random.default_rng(0)
        orders = [rng.permutation(num_ids) if t else np.arange(num_ids) for t in range(self.epochs)]
        return np.concatenate(orders).astype(np.int32).reshape(num_steps, self.batch_size)


def squared(params, batch):
    """Half the squared distance of linear scores to the label's unit vector."""
    targets = jax.nn.one_hot(batch["y"], params["b"].shape[0], dtype=params["b"].dtype)
    scores = batch["x"] @ params["w"] + params["b"]
    return 0.5 * jnp.mean(jnp.sum((scores - targets) ** 2, axis=-1))


def logistic(params, batch):
    """Softmax regression."""
    return _cross_entropy(batch["x"] @ params["w"] + params["b"], batch["y"])


def network(params, batch):
    """One hidden layer of tanh."""
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"])
    return _cross_entropy(hidden @ params["out"]["w"] + params["out"]["b"], batch["y"])


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOSSES = {"ridge": squared, "logistic": logistic, "MLP": network}
L2 = {"ridge": 1e-2, "logistic": 1e-2, "MLP": 1e-3}


def _linear_start(width: int, classes: int, seed: int):
    rng = np.random.default_rng((seed, 1))
    return {
        "w": jnp.asarray(0.01 * rng.normal(size=(width, classes))),
        "b": jnp.zeros(classes),
    }


def _network_start(width: int, classes: int, seed: int):
    rng = np.random.default_rng((seed, 2))
    layer = lambda rows, columns: {
        "w": jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5),
        "b": jnp.zeros(columns),
    }
    return {"hidden": layer(width, HIDDEN), "out": layer(HIDDEN, classes)}


@functools.cache
def _arrays(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Training and test rows in float64, and the number of classes."""
    if name == "rotating digits":
        name = "digits"
    split = {
        "digits": lambda: datasets.digits(flatten=True),
        "MNIST": lambda: datasets.mnist(),
        "Adult": datasets.adult,
    }[name]()

    def read(part, limit):
        rows = part[np.arange(min(limit, len(part)))]
        x = np.asarray(rows["x"], np.float64)
        if name == "MNIST":  # 14 by 14, by means of four
            x = x.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(x), -1)
        return x, np.asarray(rows["y"], np.int32)

    return *read(split.train, 20_000), *read(split.test, 1_000), split.train.num_classes


def _draw(name: str, seed: int, num_rows: int, batch_size: int) -> Stream:
    x, y, x_test, y_test, _ = _arrays(name)
    rng = np.random.default_rng((seed, 0))
    turns = name == "rotating digits"
    order = rng.permutation(len(x))
    if turns:
        order = np.resize(order, num_rows)  # a row comes again, turned further: another row
    if len(order) < num_rows:
        raise ValueError(f"Expected at most {len(order)} rows of {name}, got {num_rows}.")
    order = order[:num_rows]
    rows = {"x": x[order], "y": y[order]}
    test = np.random.default_rng(0).permutation(len(x_test))[: HELD_OUT * HELD_OUT_ROWS]
    held = {"x": x_test[test], "y": y_test[test]}
    if turns:
        rows["x"] = _turned(rows["x"], num_rows // batch_size)
        held["x"] = _rotate(held["x"], TURN)
    parts = [{k: v[i::HELD_OUT][:HELD_OUT_ROWS] for k, v in held.items()} for i in range(HELD_OUT)]
    return Stream(rows, parts)


def _turned(x: np.ndarray, num_steps: int) -> np.ndarray:
    """Each step's rows turned a little further."""
    steps = np.array_split(x, num_steps)
    return np.concatenate([_rotate(s, TURN * t / num_steps) for t, s in enumerate(steps)])


def _rotate(x: np.ndarray, degrees: float) -> np.ndarray:
    images = x.reshape(-1, 8, 8)
    turned = scipy.ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1)
    return turned.reshape(len(x), -1)


def problem(loss: str, data: str, epochs: int = 1) -> Problem:
    """By name. Rows of a step: three of the digits, of which there are few; eight of the others."""
    x, *_, classes = _arrays(data)
    start = _network_start if loss == "MLP" else _linear_start
    return Problem(
        data=data,
        loss=loss,
        batch_size=3 if data == "digits" else 8,
        l2=L2[loss],
        draw=functools.partial(_draw, data),
        start=functools.partial(start, x.shape[1], classes),
        loss_fn=LOSSES[loss],
        epochs=epochs,
    )


def is_here(data: str) -> bool:
    """Whether the data set can be read: all but the digits need JAXUNLEARN_DATA."""
    return "digits" in data or bool(os.environ.get("JAXUNLEARN_DATA"))
