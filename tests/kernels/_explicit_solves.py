"""A program for a process with two devices: solvers on explicit axes, eager and jitted.

Prints {solver: residual or gap, relative} as JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn.kernels import per_example
from jaxunlearn.kernels.solves import block_cg, cg, cholesky, minres, woodbury


def main():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    jax.set_mesh(mesh)
    put = lambda x, *spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*spec)))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    scale = put(np.linspace(1.0, 3.0, 4, dtype=np.float32), "data")
    tree = lambda *lead: {
        "a": put(draw(*lead, 4), *[None] * len(lead), "data"),
        "b": put(draw(*lead, 3, 4), *[None] * len(lead), None, "data"),
    }
    matvec = lambda v: jax.tree.map(lambda leaf: scale * leaf, v)
    one, many = tree(), tree(2)
    rows, rhs, sides = put(draw(6, 3), "data"), jnp.asarray(draw(3)), jnp.asarray(draw(2, 3))
    gradients = lambda x: per_example(lambda w, x: jnp.mean(jnp.tanh(x @ w)))(jnp.ones(3), x)
    preconditioned = block_cg(preconditioner=lambda v: jax.tree.map(lambda x: 2 * x, v))
    calls = {
        "cg": lambda one, many, x: cg()(matvec, one),
        "block_cg": lambda one, many, x: block_cg()(matvec, many),
        "block_cg preconditioned": lambda one, many, x: preconditioned(matvec, many),
        "minres": lambda one, many, x: minres()(matvec, one),
        "cholesky": lambda one, many, x: cholesky()(matvec, one),
        "cholesky many": lambda one, many, x: cholesky(many=True)(matvec, many),
        "woodbury": lambda one, many, x: woodbury(damping=0.5)(gradients(x), rhs),
        "woodbury many": lambda one, many, x: woodbury(damping=0.5, many=True)(gradients(x), sides),
    }
    found = {}
    for name, call in calls.items():
        for how, function in (("eager", call), ("jit", jax.jit(call))):
            solution = function(one, many, rows)
            found[f"{name}, {how}"] = float(np.max(solution.residual_norm))
            leaf = jax.tree.leaves(solution.x)[0]
            sharded = "data" in str(jax.typeof(leaf).sharding.spec)
            if sharded != (not name.startswith("woodbury")):
                found[f"{name}, {how}"] = float("nan")
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
