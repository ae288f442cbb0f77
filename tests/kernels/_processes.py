"""One of two processes of a distributed run: a clipped sum over rows that live in both.

python tests/kernels/_processes.py COORDINATOR INDEX   prints how far it is from one device.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import kernels


def loss_fn(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def figures(w, x):
    grads = kernels.per_example(loss_fn)(w, x)
    product = kernels.hvp(loss_fn)(w, x, w)
    return grads.clipped_sum(0.05), grads.norms(), product


def main(coordinator, index):
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index))
    assert jax.process_count() == 2
    assert jax.device_count() == 4
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 5), (5, 3)))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def place(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

    everywhere = NamedSharding(mesh, P())
    got = jax.jit(figures, out_shardings=everywhere)(place(w, P()), place(x, P("data")))
    want = jax.jit(figures)(w, x)
    gaps = [float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(got, want)]
    print("gap", max(gaps))


if __name__ == "__main__":
    main(*sys.argv[1:])
