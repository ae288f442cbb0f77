"""A program for a process with eight devices: solvers on a mesh against the same on one device.

python tests/kernels/_sharded_solves.py MESH   prints {solver: {"gap": ..., "specs": [...]}}.

MESH: "automatic" or "explicit" axes under jit, with parameters and right-hand sides sharded as in
FSDP, or "manual", the inside of shard_map with replicated ones. Rows are sharded in each.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxunlearn import kernels
from jaxunlearn.kernels import lbfgs, solves
from tests.kernels._devices import CASES, NUM_ROWS, gaps, put

DAMPING, STEPS = 5.0, 5
LOSS, PARAMS, BATCH = CASES["mlp"]
KEY = jax.random.key(0)
SIDES = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.cos(leaf)]), PARAMS)
first = functools.partial(jax.tree.map, lambda leaf: leaf[0])


def solutions(params, batch, sides, total=lambda x: x):
    """Every solver's x; `total` adds up what several devices have."""
    products = kernels.ggn_vp_many(lambda p, b: jnp.tanh(b["x"] @ p["w"] + p["b"]) @ p["v"], square)

    def many(vectors):
        sums = total(products(params, batch, vectors, num_rows=NUM_ROWS))
        return jax.tree.map(lambda s, v: s + DAMPING * v, sums, vectors)

    def one(vector):
        return first(many(jax.tree.map(lambda leaf: leaf[None], vector)))

    side = first(sides)
    limit = {"max_iterations": STEPS, "tol": 1e-6, "loop": "device"}
    memory = lbfgs.init(params, 2)
    memory, _ = lbfgs.push(memory, side, one(side))
    by_pairs = functools.partial(lbfgs.inverse_product, memory)
    sketch = solves.nystrom(one, side, rank=3, key=KEY)
    by_sketch = sketch.preconditioner(DAMPING)
    return {
        "cg": solves.cg(**limit)(one, side).x,
        "cg many": solves.cg(many=True, **limit)(many, sides).x,
        "cg lbfgs": solves.cg(preconditioner=by_pairs, **limit)(one, side).x,
        "block cg": solves.block_cg(**limit)(many, sides).x,
        "minres": solves.minres(**limit)(one, side).x,
        "cholesky": solves.cholesky()(one, side).x,
        "neumann": solves.neumann(step=0.1, **limit)(one, side).x,
        "neumann measured": solves.neumann(key=KEY, num_power_iterations=4, **limit)(one, side).x,
        "cg nystrom": solves.cg(preconditioner=by_sketch, **limit)(one, side).x,
        "nystrom vectors": jax.tree.map(jnp.abs, sketch.vectors),
        "nystrom product": sketch.product(side),
        "nystrom solver": sketch.solver(DAMPING, many=True)(many, sides).x,
    }


def square(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def with_rows(params, batch, sides):
    """Those that see every row or every parameter at once."""
    grads = kernels.per_example(LOSS)(params, batch)
    return {
        "woodbury": solves.woodbury(damping=1.0)(grads, first(sides)).x,
        "woodbury many": solves.woodbury(damping=1.0, many=True)(grads, sides).x,
    }


def everything(params, batch, sides):
    return solutions(params, batch, sides) | with_rows(params, batch, sides)


def under_jit(kind):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    over_last = lambda leaf: put(mesh, leaf, P(*[None] * (leaf.ndim - 1), "fsdp"))
    params, sides = jax.tree.map(over_last, (PARAMS, SIDES))
    batch = jax.tree.map(lambda leaf: put(mesh, leaf, P("data")), BATCH)
    return gaps(jax.jit(everything)(params, batch, sides), expected(everything))


def inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",))
    params, sides = jax.tree.map(lambda leaf: put(mesh, leaf, P()), (PARAMS, SIDES))
    batch = jax.tree.map(lambda leaf: put(mesh, leaf, P("data")), BATCH)
    add_up = functools.partial(jax.lax.psum, axis_name="data")
    local = functools.partial(solutions, total=add_up)
    local = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    return gaps(jax.jit(local)(params, batch, sides), expected(solutions))


def expected(function):
    return jax.tree.map(np.asarray, jax.jit(function)(PARAMS, BATCH, SIDES))


def main():
    kinds = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
    mesh = sys.argv[1]
    sys.stdout.write(json.dumps(under_jit(kinds[mesh]) if mesh in kinds else inside_shard_map()))


if __name__ == "__main__":
    main()
