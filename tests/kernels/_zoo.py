"""Architectures for the tests of factored per-example gradients, by name.

`ZOO[name]()` gives (loss_fn, params, batch, paths): paths is what `explain()` has to say, a set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

NUM_ROWS = 4
ZOO = {}


def entry(name, paths):
    """Enter a function () -> (loss_fn, params, batch)."""

    def enter(make):
        ZOO[name] = lambda: (*make(), set(paths.split()))
        return make

    return enter


def simple(name, paths, loss_fn, shapes, batch):
    """Enter a loss with parameters of some shapes, drawn from a normal distribution."""

    def make():
        leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        params = [
            normal(k, *shape) / np.sqrt(max(1, shape[0] if shape else 1))
            for k, shape in enumerate(leaves)
        ]
        return loss_fn, jax.tree.unflatten(treedef, params), batch()

    entry(name, paths)(make)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(*shape):
    return lambda: normal(77, NUM_ROWS, *shape)


def ids(bound, *shape):
    return lambda: jnp.asarray(np.random.default_rng(5).integers(0, bound, (NUM_ROWS, *shape)))


def squared(outputs, targets=0.1):
    return jnp.mean((outputs - targets) ** 2)


def conv(x, kernel, *, stride=1, padding="SAME", dilation=1, lhs_dilation=1, groups=1):
    num = kernel.ndim - 2
    spatial = "DHW"[-num:]
    each = lambda value: (value,) * num
    return lax.conv_general_dilated(
        x, kernel, each(stride), padding, lhs_dilation=each(lhs_dilation),
        rhs_dilation=each(dilation), feature_group_count=groups,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )  # fmt: skip


# Dense weights, in every orientation.
simple("linear", "factored", lambda w, x: squared(jnp.tanh(x @ w)), (7, 5), floats(7))
simple("linear, transposed", "factored", lambda w, x: squared(jnp.tanh(x @ w.T)), (5, 7), floats(7))
simple(
    "matrix-vector under vmap", "factored",
    lambda w, x: squared(jax.vmap(lambda row: jnp.tanh(w @ row))(x)), (5, 7), floats(7),
)  # fmt: skip
simple(
    "multiply and sum", "factored",
    lambda w, x: squared(jnp.tanh(jnp.sum(x[:, :, None] * w, axis=1))), (9, 8), floats(9),
)  # fmt: skip
simple(
    "mlp", "factored vector",
    lambda p, x: squared(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]),
    {"w": (7, 6), "b": (6,), "v": (6, 3), "c": (3,)}, floats(7),
)  # fmt: skip
simple("sequence", "factored", lambda w, x: squared(jnp.tanh(x @ w)), (16, 20), floats(3, 16))
simple("long sequence", "product", lambda w, x: squared(jnp.tanh(x @ w)), (4, 3), floats(20, 4))
simple(
    "two free axes of tokens", "factored",
    lambda w, x: squared(jnp.tanh(jnp.einsum("bxyd,de->bxye", x, w))), (20, 30), floats(2, 2, 20),
)  # fmt: skip
simple(
    "dense to heads", "factored",
    lambda w, x: squared(jnp.tanh(jnp.einsum("btd,dhe->bthe", x, w))), (16, 4, 5), floats(3, 16),
)  # fmt: skip
simple(
    "heads to dense", "factored",
    lambda w, x: squared(jnp.tanh(jnp.einsum("bthe,hed->btd", x, w))), (4, 5, 16), floats(2, 4, 5),
)  # fmt: skip
simple(
    "a weight per head", "factored",
    lambda w, x: squared(jnp.tanh(jnp.einsum("bthd,hde->bthe", x, w))), (2, 16, 18),
    floats(3, 2, 16),
)  # fmt: skip
simple(
    "bilinear", "factored",
    lambda w, x: squared(jnp.tanh(jnp.einsum("bi,ijk,bj->bk", x, w, x))), (5, 5, 3), floats(5),
)  # fmt: skip
simple(
    "scaled and negated", "factored",
    lambda w, x: squared(jnp.tanh(x @ (-w / 3)) - jnp.cos(x @ (w * 0.2))), (30, 20), floats(30),
)  # fmt: skip
simple(
    "low-rank update", "factored",
    lambda p, x: squared(jnp.tanh(x @ (p["w"] + 0.5 * p["a"] @ p["b"]))),
    {"w": (20, 30), "a": (20, 2), "b": (2, 30)}, floats(20),
)  # fmt: skip
simple(
    "one-hot matmul", "factored",
    lambda w, x: squared(jnp.tanh(jax.nn.one_hot(x, 11, dtype=w.dtype) @ w)), (11, 9), ids(11, 2),
)  # fmt: skip

simple(
    "inputs in bfloat16", "factored",
    lambda w, x: squared(jnp.tanh(x.astype(jnp.bfloat16) @ w)), (7, 5), floats(7),
)  # fmt: skip

# Convolutions.
simple("convolution", "product", lambda w, x: squared(jnp.tanh(conv(x, w))), (3, 3, 2, 4),
       floats(6, 5, 2))  # fmt: skip
simple("convolution of many channels", "factored", lambda w, x: squared(jnp.tanh(conv(x, w))),
       (3, 3, 8, 12), floats(3, 2, 8))  # fmt: skip
simple("convolution, taps", "factored", lambda w, x: squared(jnp.tanh(conv(x, w, padding="VALID"))),
       (9, 3, 4), floats(13, 3))  # fmt: skip
simple("strided convolution", "factored", lambda w, x: squared(jnp.tanh(conv(x, w, stride=2))),
       (3, 3, 8, 12), floats(5, 4, 8))  # fmt: skip
simple("dilated convolution", "product", lambda w, x: squared(jnp.tanh(conv(x, w, dilation=2))),
       (3, 2, 2, 4), floats(6, 5, 2))  # fmt: skip
simple("cropping convolution", "product",
       lambda w, x: squared(jnp.tanh(conv(x, w, stride=2, padding=((-1, 0), (1, -1))))),
       (3, 3, 2, 4), floats(8, 7, 2))  # fmt: skip
simple("convolution with holes in the input", "factored",
       lambda w, x: squared(jnp.tanh(conv(x, w, lhs_dilation=2, padding=((1, 2), (2, 1))))),
       (3, 3, 8, 32), floats(2, 3, 8))  # fmt: skip
simple("transposed convolution", "factored",
       lambda w, x: squared(jnp.tanh(lax.conv_transpose(x, w, (2, 2), "SAME"))),
       (3, 3, 16, 32), floats(2, 2, 32 - 16))  # fmt: skip
simple("grouped convolution", "factored", lambda w, x: squared(jnp.tanh(conv(x, w, groups=2))),
       (3, 3, 8, 20), floats(2, 3, 16))  # fmt: skip
simple("depthwise convolution", "product", lambda w, x: squared(jnp.tanh(conv(x, w, groups=4))),
       (3, 3, 1, 8), floats(5, 4, 4))  # fmt: skip
simple("convolution in one dimension", "product", lambda w, x: squared(jnp.tanh(conv(x, w))),
       (5, 3, 4), floats(11, 3))  # fmt: skip
simple("convolution in three dimensions", "factored",
       lambda w, x: squared(jnp.tanh(conv(x, w, stride=2))), (2, 3, 2, 4, 6),
       floats(3, 4, 3, 4))  # fmt: skip
simple("pointwise convolution", "factored", lambda w, x: squared(jnp.tanh(conv(x, w))),
       (1, 1, 8, 20), floats(2, 2, 8))  # fmt: skip
simple("channels first", "factored",
       lambda w, x: squared(jnp.tanh(lax.conv_general_dilated(x, w, (1, 1), "SAME"))),
       (20, 8, 3, 3), floats(8, 2, 3))  # fmt: skip
simple("frames of a film", "factored",
       lambda w, x: squared(jnp.tanh(conv(x.reshape(-1, 2, 3, 8), w))), (3, 3, 8, 20),
       floats(2, 2, 3, 8))  # fmt: skip
simple("an ensemble of convolutions", "factored",
       lambda w, x: squared(jnp.tanh(jax.vmap(conv, (1, 0))(x, w))), (2, 3, 3, 8, 20),
       floats(2, 2, 2, 8))  # fmt: skip
simple("convolution used twice", "factored",
       lambda w, x: squared(conv(jnp.tanh(conv(x, w)), w)), (3, 3, 12, 12),
       floats(2, 2, 12))  # fmt: skip
simple("convolution at two scales", "factored",
       lambda w, x: squared(conv(x, w)) + squared(jnp.tanh(conv(x[:, ::2], w))), (3, 3, 8, 20),
       floats(2, 2, 8))  # fmt: skip

# Tables.
simple("embedding", "factored", lambda w, x: squared(jnp.tanh(w[x])), (11, 4), ids(11, 6))
simple("one id", "factored", lambda w, x: squared(jnp.tanh(w[x])), (11, 4), ids(11))
simple("ids outside the table", "factored",
       lambda w, x: squared(jnp.tanh(jnp.take(w, x - 2, axis=0, mode="fill", fill_value=0))),
       (11, 4), ids(15, 6))  # fmt: skip
simple("clipped ids along another axis", "factored",
       lambda w, x: squared(jnp.tanh(jnp.take(w, x, axis=1, mode="clip"))), (4, 11),
       ids(15, 6))  # fmt: skip
simple("a table of two indices", "factored",
       lambda w, x: squared(jnp.tanh(w[x[:, 0], x[:, 1]])), (5, 6, 4), ids(5, 2))  # fmt: skip
simple("more ids than rows", "product", lambda w, x: squared(jnp.tanh(w[x])), (5, 4), ids(5, 9))
simple("two lookups", "factored", lambda w, x: squared(jnp.tanh(w[x[:, :3]]) * w[x[:, 3:]]),
       (11, 4), ids(11, 6))  # fmt: skip
simple("positions by slice", "vector", lambda w, x: squared(jnp.tanh(x + w[:3])), (9, 4),
       floats(3, 4))  # fmt: skip
simple("positions by lookup", "factored",
       lambda w, x: squared(jnp.tanh(x + w[jnp.arange(3)])), (9, 4), floats(3, 4))  # fmt: skip

# Several uses of one parameter.
simple("weight used twice", "factored", lambda w, x: squared(jnp.tanh(jnp.tanh(x @ w) @ w)), (9, 9),
       floats(9))  # fmt: skip
simple("weight and its transpose", "factored", lambda w, x: squared(jnp.tanh(x @ w) @ w.T),
       (20, 16), floats(20))  # fmt: skip
simple("embedding tied to the output", "factored",
       lambda w, x: squared(jnp.tanh(w[x]) @ w.T), (30, 20), ids(30, 3))  # fmt: skip
simple("weight decay inside the loss", "factored",
       lambda w, x: squared(jnp.tanh(x @ w)) + 0.5 * jnp.sum(w**2), (20, 16),
       floats(20))  # fmt: skip
simple("layers of one array", "factored",
       lambda w, x: squared(jnp.tanh(jnp.tanh(x @ w[0]) @ w[2])), (3, 9, 9), floats(9))  # fmt: skip
simple("a vector and a matrix of one array", "product",
       lambda w, x: squared(jnp.tanh(x @ w[:4] + x @ jnp.sin(w[:4]))), (6, 3),
       floats(4))  # fmt: skip


# Loops.
def rnn(p, x):
    step = lambda h, row: (jnp.tanh(h @ p["w"] + row @ p["u"] + p["b"]), None)
    return squared(lax.scan(step, 0 * x[:, 0], x.swapaxes(0, 1))[0])


def stack(body, *, remat=False):
    body = jax.checkpoint(body) if remat else body
    return lambda p, x: squared(lax.scan(lambda h, w: (body(h, w), None), x, p)[0])


def dense_layer(h, w):
    return jnp.tanh(h @ w)


simple("scan over layers", "factored", stack(dense_layer), (3, 8, 8), floats(8))
simple("scan over layers of tokens", "factored vector",
       stack(lambda h, p: jnp.tanh(h @ p["w"] + p["b"])), {"w": (3, 16, 16), "b": (3, 16)},
       floats(2, 16))  # fmt: skip
simple("scan with remat", "factored", stack(dense_layer, remat=True), (3, 8, 8), floats(8))
simple("scan in a scan", "factored", lambda w, x: squared(lax.scan(
    lambda h, ws: (lax.scan(lambda g, v: (dense_layer(g, v), None), h, ws)[0], None), x, w)[0]),
    (2, 3, 8, 8), floats(8))  # fmt: skip
simple("scan of convolutions", "factored", stack(lambda h, w: jnp.tanh(conv(h, w))),
       (2, 3, 3, 8, 8), floats(2, 2, 8))  # fmt: skip
simple("recurrent network", "factored vector", rnn, {"w": (16, 16), "u": (16, 16), "b": (16,)},
       floats(3, 16))  # fmt: skip
simple("scan over layers with a shared weight", "factored",
       lambda p, x: squared(lax.scan(lambda h, w: (jnp.tanh(h @ w @ p["c"]), None), x, p["s"])[0]),
       {"s": (3, 16, 16), "c": (16, 16)}, floats(16))  # fmt: skip
simple("scan of tables", "factored", lambda w, x: squared(lax.scan(
    lambda h, t: (jnp.tanh(h + t[x].sum(1)), None), jnp.zeros((x.shape[0], 4), w.dtype), w)[0]),
    (3, 11, 4), ids(11, 2))  # fmt: skip
simple("recurrent lookups", "factored", lambda w, x: squared(lax.scan(
    lambda h, i: (jnp.tanh(h + w[i]), None), jnp.zeros((x.shape[0], 4), w.dtype), x.T)[0]),
    (11, 4), ids(11, 3))  # fmt: skip
simple("fori loop", "factored",
       lambda w, x: squared(lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), x)), (16, 16),
       floats(16))  # fmt: skip
simple("while loop forward, cond", "materialised",
       lambda w, x: squared(lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: jnp.sin(x @ w))),
       (16, 12), floats(16))  # fmt: skip


# Other transformations.
@jax.custom_jvp
def gate(x):
    return jnp.maximum(x, 0.1 * x)


gate.defjvp(lambda primals, tangents: (gate(*primals), tangents[0] * (0.5 + 0 * primals[0])))


@jax.custom_vjp
def clip_backward(x):
    return jnp.sin(x)


clip_backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x) * 0.5,))

simple("custom_jvp", "factored", lambda w, x: squared(gate(x @ w)), (9, 8), floats(9))
simple("custom_vjp", "factored", lambda w, x: squared(clip_backward(x @ w)), (9, 8), floats(9))
simple("jit and remat", "factored", lambda w, x: squared(
    jax.checkpoint(lambda h: jnp.tanh(jax.jit(jnp.matmul)(h, w)))(jnp.tanh(x))), (9, 8),
    floats(9))  # fmt: skip
simple("layer norm", "vector", lambda p, x: squared(
    (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1) * p["s"] + p["b"], x**2),
    {"s": (8,), "b": (8,)}, floats(3, 8))  # fmt: skip
simple("scalar", "vector", lambda a, x: squared(a * x, 1.0), (), floats())
simple("sorted weights", "materialised",
       lambda w, x: squared(jnp.tanh(x @ jnp.sort(w, axis=0))), (9, 8), floats(9))  # fmt: skip
simple("a parameter that is not used", "factored shared",
       lambda p, x: squared(x @ p["w"]) + jnp.sum(p["u"] ** 3), {"w": (9, 8), "u": (3, 2)},
       floats(9))  # fmt: skip


# Libraries.
def linen(name, paths, build, batch):
    """Enter a Linen module, initialised outside the loss."""

    def make():
        nn = pytest.importorskip("flax.linen")
        model, rows = build(nn), batch()
        params = jax.jit(model.init)(jax.random.key(0), rows)
        return (lambda p, x: squared(model.apply(p, x))), params, rows

    entry(f"Linen: {name}", paths)(make)


def nnx(name, paths, build, batch):
    """Enter an NNX module, split into graph and parameters."""

    def make():
        module = pytest.importorskip("flax.nnx")
        graph, params = module.split(build(module, module.Rngs(0)), module.Param)
        return (lambda p, x: squared(module.merge(graph, p)(x))), params, batch()

    entry(f"NNX: {name}", paths)(make)


def equinox(name, paths, build, batch, call=lambda module, row: module(row)):
    """Enter an Equinox module of one row, its arrays partitioned off."""

    def make():
        eqx = pytest.importorskip("equinox")
        params, rest = eqx.partition(build(eqx, jax.random.key(0)), eqx.is_inexact_array)
        loss_fn = lambda p, x: squared(jax.vmap(lambda row: call(eqx.combine(p, rest), row))(x))
        return loss_fn, params, batch()

    entry(f"Equinox: {name}", paths)(make)


linen("mlp with layer norm", "factored vector product",
      lambda nn: nn.Sequential([nn.Dense(20), nn.LayerNorm(), nn.relu, nn.Dense(3)]),
      floats(3, 12))  # fmt: skip
linen("cnn with group norm", "product vector factored",
      lambda nn: nn.Sequential([nn.Conv(8, (3, 3)), nn.GroupNorm(2), nn.relu,
                                nn.Conv(16, (3, 3), strides=4), lambda x: x.mean((1, 2)),
                                nn.Dense(5)]), floats(6, 6, 3))  # fmt: skip
linen(
    "multi-head attention",
    "factored vector",
    lambda nn: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16),
    floats(3, 16),
)
linen(
    "DenseGeneral over two axes",
    "factored vector",
    lambda nn: nn.DenseGeneral((4, 5), axis=(-2, -1)),
    floats(2, 4, 6),
)
linen(
    "embedding with RMS norm",
    "factored vector product",
    lambda nn: nn.Sequential([nn.Embed(11, 6), nn.RMSNorm(), nn.Dense(4)]),
    ids(11, 3),
)


def lstm(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            start = jnp.zeros((x.shape[0], 12), x.dtype)
            return nn.RNN(nn.LSTMCell(12))(x, initial_carry=(start, start))

    return Net()


linen("LSTM", "product vector", lstm, floats(3, 10))


def scanned_linen(nn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return h + nn.Dense(16)(nn.LayerNorm()(h)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0},
                              split_rngs={"params": True}, length=3)  # fmt: skip
            return scanned()(x, None)[0]

    return Stack()


linen("nn.scan over remat blocks", "factored vector", scanned_linen, floats(2, 16))
nnx("mlp", "factored vector",
    lambda nn, rngs: nn.Sequential(nn.Linear(12, 20, rngs=rngs), nn.relu,
                                   nn.Linear(20, 3, rngs=rngs)), floats(12))  # fmt: skip
nnx("convolutions", "product vector factored",
    lambda nn, rngs: nn.Sequential(nn.Conv(3, 8, (3, 3), rngs=rngs), nn.relu,
                                   nn.Conv(8, 16, (3, 3), strides=4, rngs=rngs)),
    floats(6, 6, 3))  # fmt: skip
nnx(
    "attention",
    "factored vector",
    lambda nn, rngs: nn.MultiHeadAttention(2, 16, decode=False, rngs=rngs),
    floats(3, 16),
)


def attending(nn, rngs):
    embed = nn.Embed(30, 20, rngs=rngs)
    embed.dtype = None  # that of the table, whatever it becomes
    return nn.Sequential(embed, jnp.tanh, embed.attend)


nnx("embedding attending", "factored", attending, ids(30, 3))
nnx("layer norm and low rank", "factored vector",
    lambda nn, rngs: nn.Sequential(nn.LayerNorm(12, rngs=rngs), nn.LoRA(12, 2, 8, rngs=rngs)),
    floats(12))  # fmt: skip
equinox("mlp", "factored vector", lambda eqx, key: eqx.nn.MLP(6, 3, 8, 1, key=key), floats(6))
equinox("convolution", "product vector",
        lambda eqx, key: eqx.nn.Conv2d(2, 4, 3, key=key), floats(2, 6, 5))  # fmt: skip
equinox(
    "recurrent cell",
    "factored vector",
    lambda eqx, key: eqx.nn.GRUCell(9, 8, key=key),
    floats(9),
    lambda cell, row: cell(row, jnp.ones(8)),
)
