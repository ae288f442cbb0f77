"""Sharded parameters keep their sharding through a memory, and no pair is gathered."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxunlearn.kernels import lbfgs

SPECS = {"w": P(None, "x"), "v": P("x", None), "b": P(None)}
SHAPES = {"w": (16, 64), "v": (32, 6), "b": (5,)}
rng = np.random.default_rng(0)
steps = [{n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(6)]
changes = [jax.tree.map(lambda a: 2 * a + 0.1 * a**3, s) for s in steps]
push = jax.jit(lbfgs.push, donate_argnums=0)
programs = {f: jax.jit(getattr(lbfgs, f)) for f in ("inverse_product", "inverse_product_many",
            "product_many", "drop", "operator_distance", "correct")}

def fill(place):
    memory = lbfgs.init(place({n: np.zeros(s, np.float32) for n, s in SHAPES.items()}), 4)
    for s, y in zip(steps, changes):
        memory, admitted = push(memory, place(s), place(y))
        assert bool(admitted)
    return memory

plain = fill(lambda t: t)
want = programs["inverse_product"](plain, steps[0])
spec = lambda leaf, lead: (*leaf.sharding.spec, None, None, None, None)[: leaf.ndim][lead:]
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda t: {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in t.items()}
    memory, v = fill(place), place(steps[0])
    many = {n: jnp.stack([x, x, x]) for n, x in v.items()}
    found = programs["inverse_product"](memory, v)
    for n in SHAPES:
        assert spec(memory.pairs[n], 2) == spec(found[n], 0) == tuple(SPECS[n]), (kind, n)
        assert np.allclose(found[n], want[n], rtol=1e-4, atol=1e-5), (kind, n)
    operands = {"inverse_product": (v,), "inverse_product_many": (many,), "product_many": (many,),
                "drop": (jnp.zeros(4, bool),), "operator_distance": (memory,), "correct": (0, v)}
    for f, more in operands.items():
        text = programs[f].lower(memory, *more).compile().as_text()
        assert not any(c in text for c in ("all-gather(", "all-to-all(", "collective-permute(")), f
print("well")
"""


@pytest.mark.slow
def test_pairs_are_sharded_like_the_parameters_and_nothing_is_gathered():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | flags,
    )
    assert result.stdout.strip() == "well", result.stderr
