"""Sketches of per-example gradients: inner products with random directions, never held at once."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._meshes import placed_as_rows
from jaxunlearn.kernels._primitives import convolves
from jaxunlearn.kernels.factors import Dense, Factor, Outer, Shared, pack

if TYPE_CHECKING:
    from jaxunlearn.kernels.example_gradients import PerExampleGradients

DISTRIBUTIONS = ("rademacher", "gaussian")
STRUCTURES = ("full", "kronecker")

_CHUNK_FLOATS = 1 << 22


def check(key, num_directions: int, distribution: str, structure: str) -> None:
    """Refuse what would only fail deep inside."""
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key) or key.shape != ():
        raise ValueError("Expected one typed key: jax.random.key(seed).")
    if isinstance(num_directions, bool) or not isinstance(num_directions, int):
        raise ValueError(f"Expected an integer num_directions, got {num_directions!r}.")
    if num_directions < 1:
        raise ValueError(f"Expected num_directions={num_directions} >= 1.")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"Expected distribution in {DISTRIBUTIONS}, got {distribution!r}.")
    if structure not in STRUCTURES:
        raise ValueError(f"Expected structure in {STRUCTURES}, got {structure!r}.")


def directions(
    key: Key[Array, ""], first: Array, count: int, shape: tuple[int, ...], distribution: str
) -> Float[Array, "count *shape"]:
    """Directions first .. first + count - 1 of one leaf: each from a key of its own.

    A random word serves 32 signs, for generating them would cost more than the product.
    """
    size = _stable.size_of(shape)

    def one(j):
        own = jax.random.fold_in(key, j)
        if distribution == "gaussian":
            return jax.random.normal(own, shape, jnp.float32)
        words = jax.random.bits(own, (-(-size // 32),), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return (1 - 2 * bits.ravel()[:size].astype(jnp.float32)).reshape(shape)

    return jax.vmap(one)(first + jnp.arange(count, dtype=jnp.int32))


def halves(
    key: Key[Array, ""], first: Array, count: int, shape: tuple[int, ...], distribution: str
) -> tuple[Float[Array, "count m"], Float[Array, "count n"]]:
    """u and v of directions u v^T: over all axes but the last, and over the last."""
    sizes = _stable.size_of(shape[:-1]), shape[-1]
    u, v = (
        directions(jax.random.fold_in(key, side), first, count, (size,), distribution)
        for side, size in enumerate(sizes)
    )
    return u, v


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def project(
    grads: "PerExampleGradients",
    key: Key[Array, ""],
    num_directions: int,
    distribution: str,
    structure: str,
) -> Float[Array, "b k"]:
    """<g_i, r_j> / sqrt(k), leaf by leaf, a few directions at a time."""

    def projected(grads, key):
        return _project(grads, key, num_directions, distribution, structure)

    return placed_as_rows(projected, grads, key, batch=grads.losses)


def _project(grads, key, num_directions: int, distribution: str, structure: str):
    dtype = _stable.widened(grads.losses)
    total = jnp.zeros((grads.losses.shape[0], num_directions), dtype)
    for leaf, (factor, path) in enumerate(zip(grads.factors, grads.paths)):
        structured = structure == "kronecker" and len(path.shape) > 1
        draw = functools.partial(
            halves if structured else directions,
            jax.random.fold_in(key, leaf),
            shape=path.shape,
            distribution=distribution,
        )
        sides = _sides(factor, path.shape) if structured else None
        sketch = _sketch(_loopable(factor, path.shape), draw, num_directions, path.shape, sides)
        total += sketch.astype(dtype)
    return _stable.rows_where(grads.contributes, total / num_directions**0.5)


def _sketch(factor: Factor, draw, num_directions: int, shape, sides: Any) -> Float[Array, "b k"]:
    """<g_i, r_j> of one leaf."""
    num_examples = factor.size.shape[0]
    size = sum(sides[0].shape[-1:] + sides[1].shape[-1:]) if sides else _stable.size_of(shape)
    per_direction = max(1, size, num_examples * factor.floats)

    def products(first, count):
        drawn = draw(first=first, count=count)
        if not isinstance(drawn, tuple):
            return _products(factor, drawn)
        if sides:
            u, v = (_stable.contract("btm,km->btk", x, own) for x, own in zip(sides, drawn))
            return _stable.contract("btk,btk->kb", u, v)
        return _products(factor, (drawn[0][:, :, None] * drawn[1][:, None]).reshape(-1, *shape))

    chunk = max(1, min(num_directions, _CHUNK_FLOATS // per_direction))
    if chunk == num_directions:
        return products(jnp.int32(0), chunk).T
    num_chunks = -(-num_directions // chunk)
    firsts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
    parts = lax.map(lambda first: products(first, chunk), firsts)
    return parts.reshape(num_chunks * chunk, num_examples)[:num_directions].T


def _sides(factor: Factor, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """The factors over all axes but the last, and over the last, where they are split there."""
    if not isinstance(factor, Outer) or factor.left.shape[1] != 1 or len(shape) < 2:
        return None
    left, right = factor.left[:, 0], factor.right[:, 0]
    places: Any = np.arange(_stable.size_of(shape))
    packed = pack(places.reshape(shape), factor.steps)[0]
    matrix = places.reshape(-1, shape[-1])
    if np.array_equal(packed, matrix):
        return left, right
    return (right, left) if np.array_equal(packed, matrix.T) else None


def _loopable(factor: Factor, shape: tuple[int, ...]) -> Factor:
    """The factor, or the product where its `dot` convolves: XLA loops on CPU do that slowly."""
    if isinstance(factor, Outer | Dense | Shared):
        return factor
    trace = jax.make_jaxpr(lambda f, vector: f.dot(vector))(factor, jnp.zeros(shape))
    if not convolves(trace):
        return factor
    return Dense.of(factor.materialize())


def _products(factor: Factor, vectors: Float[Array, "k *shape"]) -> Float[Array, "k b"]:
    """<g_i, v_j> for a few vectors; the product of several tokens is formed once for all."""
    if not isinstance(factor, Outer) or factor.left.shape[2] == 1 or vectors.shape[0] == 1:
        return jax.vmap(factor.dot)(vectors)
    num_examples, _, _, m = factor.left.shape
    packed = jax.vmap(lambda vector: pack(vector, factor.steps))(vectors)
    per_row = num_examples * factor.left.shape[1] * factor.right.shape[-1]
    chunk = max(1, min(m, _CHUNK_FLOATS // max(1, per_row)))

    def rows(left, directions):
        product = _stable.contract("bstm,bstn->bsmn", left, factor.right)
        return _stable.contract("bsmn,ksmn->kb", product, directions)

    if chunk == m:
        return rows(factor.left, packed)
    num_chunks = -(-m // chunk)
    missing = num_chunks * chunk - m

    def chunks(x, axis):
        x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], num_chunks, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    operands = chunks(factor.left, 3), chunks(packed, 2)
    zero = jnp.zeros((vectors.shape[0], num_examples), factor.size.dtype)
    return lax.scan(lambda total, xs: (total + rows(*xs), None), zero, operands)[0]
