"""Inner products and combinations of the pairs, leaf by leaf and without reshaping a leaf."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

HIGHEST = lax.Precision.HIGHEST
BLOCK = 8192  # floats of each row that are multiplied at a time on a CPU


def check_like(pairs: PyTree, vector: PyTree, name: str, lead: int = 0) -> None:
    """Refuse a tree that is not like the parameters, after `lead` leading axes."""
    got, expected = jax.tree.structure(vector), jax.tree.structure(pairs)
    shapes = [jnp.shape(leaf)[lead:] for leaf in jax.tree.leaves(vector)]
    wanted = [leaf.shape[2:] for leaf in jax.tree.leaves(pairs)]
    same: bool = got == expected  # type: ignore[operator]
    if not same or shapes != wanted:
        axes = "" if not lead else f", each after {lead} leading axis"
        raise ValueError(
            f"Expected {name} like the parameters of the memory, {expected} with shapes "
            f"{wanted}{axes}, got {got} with {shapes}."
        )


def contract(x: Array, y: Array, axes) -> Array:
    """`dot_general` over axes that may be sharded, explicitly too; the result is replicated."""
    sharding = None
    for operand in (x, y):
        given = jax.typeof(operand).sharding
        if any(name is not None for name in given.spec):
            rank = x.ndim + y.ndim - 2 * len(axes[0])
            sharding = NamedSharding(given.mesh, PartitionSpec(*(None,) * rank))
    dims = (axes, ((), ()))
    return lax.dot_general(x, y, dims, precision=HIGHEST, out_sharding=sharding)


def inner(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """<a, b> over all leaves."""
    axes = lambda x: (tuple(range(x.ndim)),) * 2
    return _add_up(jax.tree.map(lambda x, y: contract(x, y, axes(x)), a, b))


def row_products(pairs: PyTree, s: PyTree, y: PyTree) -> Float[Array, "m 2 2"]:
    """<pairs[i, a], (s, y)[b]>, one product at a time: a slot's place changes no bit of it."""

    def of_row(row):
        halves = (jax.tree.map(operator.itemgetter(half), row) for half in (0, 1))
        return jnp.stack([jnp.stack([inner(half, s), inner(half, y)]) for half in halves])

    return lax.map(of_row, pairs)


def against(pairs: PyTree, vector: PyTree) -> Float[Array, "m 2"]:
    """<pairs[i, a], vector>: one pass over the pairs."""

    def dot(leaf, v):
        axes = (tuple(range(2, leaf.ndim)), tuple(range(v.ndim)))
        return contract(leaf, v, axes)

    return _add_up(jax.tree.map(dot, pairs, vector))


def against_many(pairs: PyTree, vectors: PyTree) -> Float[Array, "m 2 r"]:
    """<pairs[i, a], vectors[j]>: one pass over both."""

    def dot(leaf, v):
        # Merging axes that may be sharded would gather them; but XLA on CPU transposes, that is
        # copies, an operand that it contracts over two axes.
        keep = () if _on_one_cpu() else leaf.shape[2:]
        rows = leaf.reshape(2 * leaf.shape[0], *(keep or (-1,)))
        v = v.reshape(v.shape[0], *(keep or (-1,)))
        blocked = _on_one_cpu() and v.shape[0] >= 8 and v.shape[1] >= 4 * BLOCK
        return (_blocked(rows, v) if blocked else _matmul(rows, v)).reshape(-1, 2, v.shape[0])

    return _add_up(jax.tree.map(dot, pairs, vectors))


def _matmul(rows: Array, v: Array) -> Array:
    """rows v', the much longer stack on the left: XLA on CPU is slow with it on the right."""
    axes = (tuple(range(1, v.ndim)),) * 2
    if v.shape[0] > 2 * rows.shape[0]:
        return contract(v, rows, axes).T
    return contract(rows, v, axes)


def _blocked(rows: Array, v: Array) -> Array:
    """The same, in blocks: XLA on CPU packs one operand whole, into memory fresh at each call."""

    def add(i, total):
        block = (lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 1) for x in (rows, v))
        return total + _matmul(*block)

    whole = rows.shape[1] // BLOCK
    rest = _matmul(rows[:, whole * BLOCK :], v[:, whole * BLOCK :])
    return lax.fori_loop(0, whole, add, rest)


def _on_one_cpu() -> bool:
    """Whether nothing can be sharded and XLA's CPU compiler is at work."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def combine(pairs: PyTree, coefficients: Float[Array, "m 2"], shift, vector: PyTree) -> PyTree:
    """shift v + sum_ia c_ia pairs[i, a]: one pass over the pairs."""

    def leaf_sum(leaf, v):
        c = coefficients.astype(leaf.dtype)
        total = lax.dot_general(c, leaf, (((0, 1), (0, 1)), ((), ())), precision=HIGHEST)
        return shift.astype(leaf.dtype) * v + total

    return jax.tree.map(leaf_sum, pairs, vector)


def combine_many(pairs: PyTree, coefficients: Float[Array, "m 2 r"], shift, vectors) -> PyTree:
    """shift v_j + sum_ia c_iaj pairs[i, a]: one pass over the pairs."""

    def leaf_sum(leaf, v):
        c = jnp.moveaxis(coefficients, 2, 0).astype(leaf.dtype)
        total = lax.dot_general(c, leaf, (((1, 2), (0, 1)), ((), ())), precision=HIGHEST)
        return shift.astype(leaf.dtype) * v + total

    return jax.tree.map(leaf_sum, pairs, vectors)


def _add_up(products: PyTree) -> Array:
    """The sum of one array a leaf, in the widest dtype among them."""
    return functools.reduce(jnp.add, jax.tree.leaves(products))
