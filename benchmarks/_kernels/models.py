"""The models, once in JAX and once in PyTorch: the same parameters, the same batch.

A `Model` knows its loss in JAX and how to build its twin. Parameters are a list of (weight, bias),
in the order of the twin's `parameters()`; `to_torch` turns one layout into the other, so that a
peer's result can be compared with ours before anything is timed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

NUM_CLASSES = 10
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Model:
    """Shapes of the layers, the logits in JAX, and the same module in PyTorch."""

    name: str
    input_shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    logits: Callable[[Any, jax.Array], jax.Array]
    torch_module: Callable[[Any], Any]

    def loss_fn(self, params, batch):
        """Mean cross-entropy."""
        images, labels = batch
        logits = self.logits(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def params(self):
        """He-scaled weights and small biases; a 1-d shape is a norm's (scale, bias)."""
        keys = iter(jax.random.split(jax.random.key(1), 2 * len(self.shapes)))
        pairs = []
        for shape in self.shapes:
            if len(shape) == 1:
                weight = 1 + 0.1 * jax.random.normal(next(keys), shape)
            else:
                scale = (2 / np.prod(shape[:-1])) ** 0.5
                weight = scale * jax.random.normal(next(keys), shape)
            pairs.append((weight, 0.1 * jax.random.normal(next(keys), shape[-1:])))
        return pairs

    def batch(self, batch_size: int):
        """Normal inputs and random labels."""
        k1, k2 = jax.random.split(jax.random.key(2))
        images = jax.random.normal(k1, (batch_size, *self.input_shape))
        return images, jax.random.randint(k2, (batch_size,), 0, NUM_CLASSES)

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.params)))


def to_torch(params) -> list[np.ndarray]:
    """A tree like the parameters, as arrays in PyTorch's layout; extra leading axes stay."""
    return [np.asarray(leaf).transpose(_axes(np.ndim(leaf))) for leaf in jax.tree.leaves(params)]


def _axes(ndim: int) -> tuple[int, ...]:
    """Transposition of a weight: (in, out) to (out, in), HWIO to OIHW."""
    return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def stack_to_torch(params) -> list[np.ndarray]:
    """`to_torch` for a stack of trees."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return [leaf.transpose(0, *(1 + a for a in _axes(leaf.ndim - 1))) for leaf in leaves]


def images_to_torch(images) -> np.ndarray:
    """NHWC to NCHW; anything else as it is."""
    images = np.asarray(images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if images.ndim == 4 else images.copy()


# Dense networks.


def _dense_logits(params, h):
    for weight, bias in params[:-1]:
        h = jax.nn.relu(h @ weight + bias)
    weight, bias = params[-1]
    return h @ weight + bias


def _dense_torch(widths, torch):
    layers = []
    for m, n in itertools.pairwise(widths):
        layers += [torch.nn.Linear(m, n), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def dense(*widths: int) -> Model:
    """ReLU network; two widths are logistic regression."""
    name = "logistic" if len(widths) == 2 else "MLP"
    return Model(
        f"{name} {'-'.join(map(str, widths))}",
        (widths[0],),
        tuple(itertools.pairwise(widths)),
        _dense_logits,
        functools.partial(_dense_torch, widths),
    )


# A convolutional network: 3x3, the first with stride 1 and the others with 2, mean, dense.

_CHANNELS = (3, 32, 64, 128, 256)


def _conv_logits(params, h):
    for layer, (weight, bias) in enumerate(params[:-1]):
        strides = (1, 1) if layer == 0 else (2, 2)
        h = jax.lax.conv_general_dilated(
            h, weight, strides, ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(h + bias)
    weight, bias = params[-1]
    return jnp.mean(h, axis=(1, 2)) @ weight + bias


def _conv_torch(torch):
    nn = torch.nn
    layers = []
    for layer, (m, n) in enumerate(itertools.pairwise(_CHANNELS)):
        layers += [nn.Conv2d(m, n, 3, 1 if layer == 0 else 2, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_CHANNELS[-1], NUM_CLASSES)
    )


def convolutional() -> Model:
    """Four 3x3 convolutions on 32x32x3, 0.4 million parameters."""
    shapes = tuple((3, 3, m, n) for m, n in itertools.pairwise(_CHANNELS))
    shapes = (*shapes, (_CHANNELS[-1], NUM_CLASSES))
    return Model("CNN 32x32x3", (32, 32, 3), shapes, _conv_logits, _conv_torch)


# A transformer block: pre-norm, four heads, feed-forward of four times the width, mean, dense.


def _layer_norm(h, scale, bias):
    centred = h - jnp.mean(h, -1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    return scale * (centred * jax.lax.rsqrt(variance + 1e-5)) + bias


def _block_logits(params, h):
    norm1, (qkv_w, qkv_b), (out_w, out_b), norm2, (up_w, up_b), (down_w, down_b), head = params
    x = _layer_norm(h, *norm1) @ qkv_w + qkv_b
    q, k, v = jnp.split(x.reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("bthd,buhd->bhtu", q, k) * q.shape[-1] ** -0.5
    mixed = jnp.einsum("bhtu,buhd->bthd", jax.nn.softmax(scores), v)
    h = h + mixed.reshape(h.shape) @ out_w + out_b
    hidden = jax.nn.gelu(_layer_norm(h, *norm2) @ up_w + up_b)
    h = h + hidden @ down_w + down_b
    return jnp.mean(h, axis=1) @ head[0] + head[1]


def _block_torch(width, torch):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
            self.out, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.head = nn.Linear(width, NUM_CLASSES)

        def forward(self, h):
            x = self.qkv(self.norm1(h))
            q, k, v = x.reshape(*x.shape[:2], HEADS, -1).chunk(3, dim=-1)
            scores = torch.einsum("bthd,buhd->bhtu", q, k) * q.shape[-1] ** -0.5
            mixed = torch.einsum("bhtu,buhd->bthd", scores.softmax(-1), v)
            h = h + self.out(mixed.reshape(h.shape))
            hidden = nn.functional.gelu(self.up(self.norm2(h)), approximate="tanh")
            return self.head((h + self.down(hidden)).mean(1))

    return Block()


def transformer(width: int = 128, length: int = 64) -> Model:
    """One block; a row is a sequence."""
    norm = (width,)
    shapes = (
        norm, (width, 3 * width), (width, width), norm, (width, 4 * width), (4 * width, width),
        (width, NUM_CLASSES),
    )  # fmt: skip
    return Model(
        f"transformer d={width} T={length}",
        (length, width),
        shapes,
        _block_logits,
        functools.partial(_block_torch, width),
    )
