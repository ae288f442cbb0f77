"""A program for a process with eight devices: tangents sharded over units against one device.

python tests/kernels/_tangent_devices.py    prints {"gap": ..., "spec": ..., ...} as JSON.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import kernels

UNITS, BATCH, STEPS = 48, 16, 5


def loss_fn(params, batch):
    h = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((h @ params["v"] - batch["y"]) ** 2)


def main():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": normal(6, 5), "v": normal(5, 2)}
    data = {"x": normal(STEPS, BATCH, 6), "y": normal(STEPS, BATCH, 2)}
    slots = jnp.asarray(np.stack([rng.permutation(UNITS)[:BATCH] for _ in range(STEPS)]))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01, eps=1e-3, eps_root=1e-8))

    def apply(grads, inner, params):
        updates, inner = tx.update(grads, inner, params)
        return optax.apply_updates(params, updates), inner

    kernel = kernels.state_tangents(loss_fn, apply, units_at_once=2, microbatch_size=8)

    def step(params, inner, tangents, batch, slots):
        grads = jax.grad(loss_fn)(params, batch)
        tangents = kernel.step(tangents, params, inner, grads, batch, jnp.ones(BATCH), slots)
        return *apply(grads, inner, params), tangents

    step = jax.jit(step, donate_argnums=2)

    def run(everywhere, over_units):
        place = lambda tree, where: jax.tree.map(lambda x: jax.device_put(x, where), tree)
        state = place((params, tx.init(params)), everywhere)
        tangents = kernel.init(params, state[1], num_units=UNITS)
        state = *state, place(tangents, over_units)
        rows = place((data, slots), everywhere)
        first = jax.tree.map(lambda leaf: leaf[0], rows)
        text = step.lower(*state, *first).compile().as_text()
        for t in range(STEPS):
            state = step(*state, *jax.tree.map(lambda leaf, t=t: leaf[t], rows))
        return state[2], text

    alone = SingleDeviceSharding(jax.devices()[0])
    want, _ = run(alone, alone)
    mesh = jax.make_mesh((8,), ("units",))
    got, text = run(NamedSharding(mesh, P()), NamedSharding(mesh, P("units")))
    gap = max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b)))
        for a, b in zip(got, want)
    )
    whole = re.findall(rf"f32\[{UNITS},[0-9,]+\][^=\n]* all-gather", text)
    print(
        json.dumps(
            {
                "gap": gap,
                "spec": got[0].sharding.spec[0],
                "all_gathers_of_stacks": len(whole),
            }
        )
    )


if __name__ == "__main__":
    main()
