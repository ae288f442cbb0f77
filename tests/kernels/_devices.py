"""A program for a process with eight devices: kernels on a mesh against the same on one device.

python tests/kernels/_devices.py MESH CASE   prints {check: {"gap": ..., "specs": [...]}} as JSON.

MESH: "automatic" or "explicit" axes under jit, with parameters replicated, sharded as in FSDP, or
the batch over both axes; "manual" is the inside of shard_map with replicated parameters.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import kernels

NUM_ROWS = 16
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp(params, batch):
    h = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return jnp.mean((h @ params["v"] - batch["y"]) ** 2)


def tokens(params, batch):
    h = jnp.tanh(params["table"][batch["x"]] @ params["w"])
    h = h * params["scale"]
    return jnp.mean(((h @ params["v"]).mean(1) - batch["y"]) ** 2)


def images(params, batch):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        batch["x"], params["k"], (1, 1), "SAME", dimension_numbers=dims
    )
    return jnp.mean((jnp.tanh(h).mean((1, 2)) @ params["v"] - batch["y"]) ** 2)


CASES = {
    "mlp": (
        mlp,
        {"w": normal(6, 12), "b": normal(12), "v": normal(12, 4)},
        {"x": normal(NUM_ROWS, 6), "y": normal(NUM_ROWS, 4)},
    ),
    "tokens": (
        tokens,
        {"table": normal(10, 6), "w": normal(6, 8), "scale": normal(8), "v": normal(8, 4)},
        {"x": jnp.asarray(RNG.integers(0, 10, (NUM_ROWS, 3))), "y": normal(NUM_ROWS, 4)},
    ),
    "images": (
        images,
        {"k": normal(3, 3, 2, 8), "v": normal(8, 4)},
        {"x": normal(NUM_ROWS, 5, 5, 2), "y": normal(NUM_ROWS, 4)},
    ),
}


def of_rows(loss_fn, params, batch):
    """What has one entry, or one row, for each example."""
    grads = kernels.per_example(loss_fn)(params, batch)
    return {"norms": grads.norms(), "dot": grads.dot(params), "rows": grads.materialize()}


def of_params(loss_fn, params, batch, reduce=lambda x: x):
    """What is shaped like the parameters; `reduce` adds up what several devices have."""
    weights = jnp.full(batch["y"].shape[:1], 0.5)
    grads = kernels.per_example(loss_fn)(params, batch)
    gradient = kernels.weighted_grad(loss_fn)
    product = kernels.hvp(loss_fn)
    several = kernels.hvp_many(loss_fn)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    return reduce(
        {
            "sum": grads.sum(),
            "weighted sum": grads.sum(weights),
            "clipped sum": grads.clipped_sum(0.1),
            "weighted_grad": gradient(params, batch, weights, num_rows=NUM_ROWS),
            "hvp": product(params, batch, params, weights=weights, num_rows=NUM_ROWS),
            "hvp_many": several(params, batch, two, weights=weights, num_rows=NUM_ROWS),
        }
    )


def of_whole_batch(loss_fn, params, batch):
    """What needs every row at once."""
    grads = kernels.per_example(loss_fn)(params, batch)
    damped = kernels.hvp(loss_fn, damping=20.0)
    solution = kernels.cg(max_iterations=4)(lambda v: damped(params, batch, v), params)
    return {"gram": grads.gram(), "cg": solution.x}


def gaps(got, want):
    """{check: largest difference relative to the largest entry, and where the leaves live}."""
    found = {}
    for name, tree in got.items():
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(want[name]), strict=True)
        gap = max(float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in pairs)
        specs = [str(getattr(leaf.sharding, "spec", "")) for leaf in jax.tree.leaves(tree)]
        found[name] = {"gap": gap, "specs": specs}
    return found


def put(mesh, leaf, spec):
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def under_jit(kind, case):
    """Global arrays on a 4 x 2 mesh, in three placements."""
    loss_fn, params, batch = CASES[case]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    over_last = lambda leaf: P(*[None] * (leaf.ndim - 1), "fsdp")
    placements = {
        "replicated": (lambda leaf: P(), P("data")),
        "fsdp": (over_last, P("data")),
        "both axes": (lambda leaf: P(), P(("data", "fsdp"))),
    }
    found = {}
    functions = [functools.partial(f, loss_fn) for f in (of_rows, of_params, of_whole_batch)]
    everything = jax.jit(lambda p, b: {k: v for f in functions for k, v in f(p, b).items()})
    want = jax.tree.map(np.asarray, everything(params, batch))
    for name, (of_leaf, rows) in placements.items():
        on_mesh = functools.partial(put, mesh)
        placed = jax.tree.map(on_mesh, params, jax.tree.map(of_leaf, params))
        sharded = jax.tree.map(on_mesh, batch, dict.fromkeys(batch, rows))
        for check, figures in gaps(everything(placed, sharded), want).items():
            found[f"{name}: {check}"] = figures
    return found


def inside_shard_map(case):
    """Local rows and replicated parameters, the axes manual."""
    loss_fn, params, batch = CASES[case]
    mesh = jax.make_mesh((8,), ("data",))
    placed = jax.tree.map(lambda leaf: put(mesh, leaf, P()), params)
    sharded = jax.tree.map(lambda leaf: put(mesh, leaf, P("data")), batch)
    local = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")))
    add_up = functools.partial(jax.lax.psum, axis_name="data")
    rows = local(functools.partial(of_rows, loss_fn), out_specs=P("data"))
    sums = local(functools.partial(of_params, loss_fn, reduce=add_up), out_specs=P())
    both = lambda f, g: jax.jit(lambda p, b: {**f(p, b), **g(p, b)})
    want = both(functools.partial(of_rows, loss_fn), functools.partial(of_params, loss_fn))
    return gaps(both(rows, sums)(placed, sharded), jax.tree.map(np.asarray, want(params, batch)))


def main():
    mesh, case = sys.argv[1:]
    kinds = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
    found = under_jit(kinds[mesh], case) if mesh in kinds else inside_shard_map(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
