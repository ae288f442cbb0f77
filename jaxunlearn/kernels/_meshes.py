"""Meshes whose axes are explicit: inside a kernel the partitioner places what is computed.

With explicit axes JAX asks every contraction, gather and reshape of a sharded axis where its result
is to live. A kernel's own steps, and the loss it differentiates, are not written that way; what it
returns is: rows as the batch, parameters as the parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import PyTree


def specs_of(tree: PyTree) -> PyTree:
    """Where each leaf lives, as `PartitionSpec`: to ask for a result that lives there too."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def row_specs(tree: PyTree, batch: PyTree) -> PyTree:
    """Specs that place the first axis as long as the batch like the batch's rows."""
    first = jax.tree.leaves(batch)[0]
    num_rows, spec = jnp.shape(first)[0], jax.typeof(first).sharding.spec
    rows = spec[0] if len(spec) else None

    def place(leaf):
        axes = [axis for axis, length in enumerate(leaf.shape) if length == num_rows]
        return PartitionSpec(*[None] * axes[0], rows) if axes else PartitionSpec()

    return jax.tree.map(place, tree)


def placed_as_rows(function: Callable[..., Any], *operands: PyTree, batch: PyTree) -> Any:
    """`function(*operands)` in automatic axes, its rows placed like those of `batch`.

    Everything is replicated where `batch` is None.
    """

    def specs():
        shapes = shapes_of(function, *operands)
        everywhere = lambda leaf: PartitionSpec()
        return jax.tree.map(everywhere, shapes) if batch is None else row_specs(shapes, batch)

    return in_automatic_axes(function, *operands, specs=specs)


def shapes_of(function: Callable[..., Any], *operands: PyTree) -> PyTree:
    """`jax.eval_shape` on no mesh."""
    bare = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(function, *jax.tree.map(bare, operands))


def in_automatic_axes(
    function: Callable[..., PyTree], *operands: PyTree, specs: Callable[[], PyTree]
) -> Any:
    """`function(*operands)`, with explicit mesh axes made automatic inside and `specs()` outside.

    specs: gives the `PartitionSpec` of every output; asked for only where a mesh is explicit.
    """
    mesh = _explicit_mesh(operands)
    if mesh is None:
        return function(*operands)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in types if kind == AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh):
        inside = jax.sharding.auto_axes(function, axes=axes, out_sharding=specs())
        return inside(*operands)


def _explicit_mesh(operands: PyTree):
    """The abstract mesh of the first operand that lives on one with an explicit axis, or None."""
    for leaf in jax.tree.leaves(operands):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def local_params(params: PyTree, rows: PyTree) -> PyTree:
    """`params` varying over the mesh axes that `rows` vary over.

    Inside `shard_map` JAX would sum the gradient of replicated parameters over the devices unasked.
    """
    axes_of = lambda leaf: jax.typeof(leaf).manual_axis_type.varying
    axes = frozenset().union(*map(axes_of, jax.tree.leaves(rows)))

    def cast(leaf):
        missing = tuple(sorted(axes - axes_of(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, params)
