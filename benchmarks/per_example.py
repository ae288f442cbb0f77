"""Per-example gradients against the plain batch gradient and against the usual ways.

python benchmarks/per_example.py [--repeats 30] [--out benchmarks/results/per_example_cpu.json]
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import optax
from _harness import compare, table, write_json
from optax import contrib

from jaxunlearn.kernels.per_example import per_example

CLIP = 1.0


def mlp_case(batch_size: int = 256):
    """MLP 784-512-512-10, ReLU, softmax cross-entropy."""
    widths = (784, 512, 512, 10)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = [
        {"w": jax.random.normal(next(keys), (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for m, n in itertools.pairwise(widths)
    ]

    def loss_fn(params, batch):
        h, labels = batch
        for layer in params[:-1]:
            h = jax.nn.relu(h @ layer["w"] + layer["b"])
        logits = h @ params[-1]["w"] + params[-1]["b"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    images = jax.random.normal(next(keys), (batch_size, 784))
    return loss_fn, params, (images, jax.random.randint(next(keys), (batch_size,), 0, 10))


def transformer_case(batch_size: int = 32, length: int = 64, width: int = 128):
    """One pre-norm block (four heads, feed-forward of four times the width), mean pooled."""
    keys = iter(jax.random.split(jax.random.key(1), 8))
    shapes = {"qkv": (width, 3 * width), "o": (width, width), "up": (width, 4 * width)}
    shapes |= {"down": (4 * width, width), "head": (width, 10)}
    params = {name: jax.random.normal(next(keys), s) * s[0] ** -0.5 for name, s in shapes.items()}
    params |= {"scale1": jnp.ones(width), "scale2": jnp.ones(width)}

    def normed(h, scale):
        centred = h - jnp.mean(h, -1, keepdims=True)
        return scale * centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)

    def attention(h, params):
        q, k, v = jnp.split((h @ params["qkv"]).reshape(*h.shape[:2], 4, -1), 3, axis=-1)
        scores = jnp.einsum("bthd,buhd->bhtu", q, k) * q.shape[-1] ** -0.5
        mixed = jnp.einsum("bhtu,buhd->bthd", jax.nn.softmax(scores), v)
        return mixed.reshape(*h.shape[:2], -1) @ params["o"]

    def loss_fn(params, batch):
        h, labels = batch
        h = h + attention(normed(h, params["scale1"]), params)
        h = h + jax.nn.gelu(normed(h, params["scale2"]) @ params["up"]) @ params["down"]
        logits = jnp.mean(h, axis=1) @ params["head"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    tokens = jax.random.normal(next(keys), (batch_size, length, width))
    return loss_fn, params, (tokens, jax.random.randint(next(keys), (batch_size,), 0, 10))


def per_row_gradients(loss_fn):
    """The usual way: vmap(grad), every leaf (B, *shape)."""

    def one(params, row):
        return jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: leaf[None], row))

    return jax.vmap(one, in_axes=(None, 0))


def materialised_norms(grads):
    """Norms of materialised per-example gradients."""
    squares = [
        jnp.sum(jnp.square(g).reshape(g.shape[0], -1), axis=1) for g in jax.tree.leaves(grads)
    ]
    return jnp.sqrt(sum(squares))


def vmap_clip_sum(loss_fn):
    """vmap(grad), norms, and the weighted sum as the contraction that XLA does best."""

    def clipped(params, batch):
        grads = per_row_gradients(loss_fn)(params, batch)
        scale = jnp.minimum(1, CLIP / materialised_norms(grads))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), grads)

    return clipped


def optax_clip_sum(loss_fn):
    """vmap(grad), then Optax's clipped mean of per-example gradients, without its noise."""
    transform = contrib.differentially_private_aggregate(CLIP, noise_multiplier=0.0, key=0)

    def clipped(params, batch):
        grads = per_row_gradients(loss_fn)(params, batch)
        return transform.update(grads, transform.init(params))[0]

    return clipped


def candidates(case) -> dict:
    """What is timed, each jitted as a whole but `eager`."""
    loss_fn, params, batch = case
    ours = per_example(loss_fn)
    functions = {
        "plain gradient": jax.jit(jax.grad(loss_fn)),
        "clipped_sum": jax.jit(lambda p, b: ours(p, b).clipped_sum(CLIP)),
        "clipped_sum, eager calls": lambda p, b: ours(p, b).clipped_sum(CLIP),
        "norms": jax.jit(lambda p, b: ours(p, b).norms()),
        "vmap(grad), clip, sum": jax.jit(vmap_clip_sum(loss_fn)),
        "vmap(grad) norms": jax.jit(
            lambda p, b: materialised_norms(per_row_gradients(loss_fn)(p, b))
        ),
        "vmap(grad), optax clip": jax.jit(optax_clip_sum(loss_fn)),
    }
    try:
        from jax_privacy import clipped_grad
    except ImportError as error:
        print(f"jax_privacy skipped: {error}.")
    else:
        peer = clipped_grad(loss_fn, l2_clip_norm=CLIP, batch_argnums=1, keep_batch_dim=True)
        functions["jax_privacy clipped_grad"] = jax.jit(peer)
    return {name: lambda f=f: f(params, batch) for name, f in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    cases = {
        "MLP 784-512-512-10, batch 256": mlp_case(),
        "transformer block d=128, T=64, batch 32": transformer_case(),
    }
    results = {}
    for name, case in cases.items():
        loss_fn, params, batch = case
        print(f"\n{name}\n{per_example(loss_fn)(params, batch).explain()}\n")
        results[name] = compare(candidates(case), baseline="plain gradient", repeats=args.repeats)
        print(table(results[name]))
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
