"""Pytrees as vectors and as bytes: what several packages need and Optax does not offer."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, PyTree


def is_inexact(leaf: Array) -> bool:
    """Whether a leaf holds floating or complex numbers (typed keys and integers do not)."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def key_free(leaf: Array) -> Array:
    """A typed key's words; any other leaf unchanged."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def num_bytes(tree: PyTree) -> int:
    """Bytes that the leaves of `tree` occupy; works on `jax.ShapeDtypeStruct` leaves too."""

    def leaf_bytes(leaf):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return int(np.prod(jnp.shape(leaf), dtype=np.int64)) * jnp.result_type(leaf).itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def num_parameters(tree: PyTree) -> int:
    """Total number of scalars in `tree`."""
    return sum(int(np.prod(jnp.shape(leaf), dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def flatten(tree: PyTree) -> Float64[np.ndarray, "p"]:
    """All leaves of `tree` in one float64 vector, in tree order, on the host."""
    leaves = [np.ravel(jax.device_get(leaf)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.asarray(leaf, np.float64) for leaf in leaves])


def split(flat: Float64[np.ndarray, "p"], like: PyTree) -> PyTree:
    """A flat vector as float64 NumPy leaves shaped like `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = np.split(np.asarray(flat), ends)
    shaped = [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def unflatten(flat: Float64[np.ndarray, "p"], like: PyTree) -> PyTree:
    """A flat vector in the shapes, dtypes and weak types of `like`."""
    cast = jax.tree.map(
        lambda part, leaf: jnp.asarray(part, jnp.result_type(leaf)), split(flat, like), like
    )
    return match_weak_types(cast, like)


def copy(tree: PyTree) -> PyTree:
    """A deep copy, so that donating one tree does not delete the other's buffers."""

    def duplicate(leaf):
        # JAX may still be reading a NumPy array when jnp.array returns, so it is copied here.
        own = np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
        return jnp.array(own, copy=True)

    return jax.tree.map(duplicate, tree)


def match_weak_types(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the weak types of `like`, so that a compiled function is not traced again."""

    def match(leaf, template):
        weak = getattr(template, "weak_type", False) and not getattr(leaf, "weak_type", False)
        return template.at[...].set(leaf) if weak else leaf

    return jax.tree.map(match, tree, like)


def poison(tree: PyTree, failed: Bool[Array, ""]) -> PyTree:
    """`tree` with NaN in every inexact leaf where `failed`, so that it cannot be served."""

    def spoil(leaf):
        return jnp.where(failed, jnp.full_like(leaf, jnp.nan), leaf) if is_inexact(leaf) else leaf

    return jax.tree.map(spoil, tree)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every inexact leaf of `tree` is finite throughout."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def vdot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product over all leaves, accumulated in float32 or wider at highest precision."""

    def leaf_dot(x, y):
        wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        if not jax.typeof(x).sharding.mesh.empty:  # explicit axes: no reshape, no contraction
            return jnp.sum(jnp.asarray(x, wide) * jnp.asarray(y, wide))
        x, y = jnp.ravel(x).astype(wide), jnp.ravel(y).astype(wide)
        return jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)

    dots = jax.tree.leaves(jax.tree.map(leaf_dot, a, b))
    return functools.reduce(jnp.add, dots) if dots else jnp.zeros((), jnp.float32)


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees agree in structure, dtype, shape and every bit (NaN equals NaN)."""
    same_structure: bool = jax.tree.structure(a) == jax.tree.structure(b)  # type: ignore[operator]
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return same_structure and all(_leaf_bytes(x) == _leaf_bytes(y) for x, y in pairs)


def relative_distance(a: PyTree, b: PyTree) -> float:
    """||a - b||_2 / ||b||_2 over the inexact leaves, in float64 on the host.

    Zero for equal trees; `inf` where `b` vanishes and `a` does not, or where they differ in NaNs.
    """
    pairs = [
        (np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if is_inexact(x)
    ]
    gap = float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs)))
    scale = float(np.sqrt(sum(np.sum(y**2) for _, y in pairs)))
    if gap == 0.0:
        return 0.0
    return gap / scale if scale > 0 and np.isfinite(gap) else float("inf")


def digest(tree: PyTree) -> str:
    """SHA-256 of a tree's structure, dtypes, shapes and bytes, as "sha256:<hex>".

    Independent of device and of container class: a leaf is named by its path, so the digest of
    parameters is the same before and after they are saved and loaded.

    >>> import numpy as np
    >>> digest({"w": np.zeros(2, np.float32)}) == digest({"w": jnp.zeros(2)})
    True
    """
    sha = hashlib.sha256(b"jaxunlearn/tree/v1")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path).encode()
        header, content = _leaf_content(leaf)
        sha.update(len(name).to_bytes(8, "little") + name)
        sha.update((len(header) + content.nbytes).to_bytes(8, "little") + header)
        sha.update(content.data)  # the array's own memory: large ones are not copied
    return f"sha256:{sha.hexdigest()}"


def digest_bytes(tree: PyTree) -> bytes:
    """The 32 bytes of `digest`."""
    return bytes.fromhex(digest(tree).removeprefix("sha256:"))


def on_host(tree: PyTree) -> PyTree:
    """The leaves as NumPy arrays that no donation and no assignment changes any more.

    Views where JAX keeps its arrays in the host's memory, copies elsewhere and of NumPy arrays.
    """

    def fetched(leaf):
        array = jax.device_get(key_free(leaf))
        return array if isinstance(leaf, jax.Array) else np.array(array)

    return jax.tree.map(fetched, tree)


def _leaf_content(leaf) -> tuple[bytes, np.ndarray]:
    """A leaf's dtype and shape, and its little-endian bytes."""
    array = np.asarray(jax.device_get(key_free(leaf)))
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    header = f"{array.dtype.name}{array.shape}".encode()
    return header, np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _leaf_bytes(leaf) -> bytes:
    """A leaf's dtype, shape and little-endian bytes."""
    header, content = _leaf_content(leaf)
    return header + content.tobytes()
