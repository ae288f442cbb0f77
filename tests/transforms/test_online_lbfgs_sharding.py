"""Online L-BFGS with parameters and rows on eight devices, against one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxunlearn import transforms

def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)

rng = np.random.default_rng(0)
start = {"w": rng.normal(size=(8, 32)).astype("f") / 3, "v": rng.normal(size=32).astype("f") / 6}
data = {"x": rng.normal(size=(10, 16, 8)).astype("f"), "y": rng.normal(size=(10, 16)).astype("f")}
tx = transforms.online_lbfgs(loss_fn, learning_rate=0.1, memory_size=4, owners_per_pair=16,
                             admission=transforms.prudente_souza(), l2=0.01)

def step(params, state, rows, ids):
    updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params, batch=rows, ids=ids)
    return optax.apply_updates(params, updates), state

step = jax.jit(step, donate_argnums=(0, 1))

def train(params, place_rows):
    state = tx.init(params)
    for t in range(10):
        rows = place_rows(jax.tree.map(lambda leaf: leaf[t], data))
        params, state = step(params, state, rows, np.arange(16, dtype=np.int32) + 16 * t)
    return params, state

one, one_state = train(jax.tree.map(jnp.asarray, start), lambda rows: rows)
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
place_rows = lambda rows: jax.tree.map(lambda leaf: put(leaf, "x"), rows)
many, state = train({"w": put(start["w"], None, "x"), "v": put(start["v"], "x")}, place_rows)
for name in one:
    np.testing.assert_allclose(many[name], one[name], rtol=5e-6, atol=5e-6)
assert state.curvature.pairs["w"].sharding.spec == P(None, None, None, "x")
np.testing.assert_array_equal(state.curvature.pair_owners, one_state.curvature.pair_owners)
print("well")
"""


@pytest.mark.slow
def test_eight_devices_equal_one_and_pairs_are_sharded_like_the_parameters():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | flags | paths,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "well"
