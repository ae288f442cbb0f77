"""One of two processes of a distributed run: a clipped sum over rows that live in both.

python tests/kernels/_processes.py COORDINATOR INDEX   prints how far it is from one device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import kernels

rng = np.random.default_rng(0)
x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 5), (5, 3)))
loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
everywhere = NamedSharding(mesh, P())


def place(array, spec):
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def figures(w, x):
    grads = kernels.per_example(loss_fn)(w, x)
    product = kernels.hvp(loss_fn)(w, x, w)
    return grads.clipped_sum(0.05), grads.norms(), product


assert jax.process_count() == 2
assert jax.device_count() == 4
got = jax.jit(figures, out_shardings=everywhere)(place(w, P()), place(x, P("data")))
want = jax.jit(figures)(w, x)
gaps = [float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(got, want)]
print("gap", max(gaps))
