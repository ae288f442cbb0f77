"""Facts of the ecosystem that the library is built around. If one changes, so can the library."""

import copy
import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import records, tree, unlearners
from jaxunlearn.types import Unlearner, UnlearnerState

PARAMS = {"w": jnp.ones(4), "b": jnp.zeros(())}


# --- T1, T11: several devices, in a process of their own ----------------------------------------

MULTI_DEVICE = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxunlearn import kernels

assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
w = jnp.asarray(rng.normal(size=3), jnp.float32)
x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
weights = jnp.asarray([1, 0, 1, 1, 1, 0, 1, 1], jnp.float32)
loss_fn = lambda w, x: jnp.mean(jnp.sin(x @ w))
rows = jax.vmap(jax.grad(lambda w, row: jnp.sin(row @ w)), in_axes=(None, 0))
gradient = kernels.weighted_grad(loss_fn)
true_rows, true_grad = rows(w, x), gradient(w, x, weights, num_rows=8)
gap = lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
shard = lambda f, **kw: jax.jit(jax.shard_map(f, mesh=mesh, **kw))
rows_specs = dict(in_specs=(P(), P("data")), out_specs=P("data"))
grad_specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P())
varying = lambda w: jax.lax.pcast(w, "data", to="varying")
local = lambda w, x, s: gradient(w, x, s, num_rows=8)
total = lambda g: jax.lax.psum(g, "data")
found = {
    "rows_raw": gap(shard(rows, **rows_specs)(w, x), true_rows),
    "rows_pcast": gap(shard(lambda w, x: rows(varying(w), x), **rows_specs)(w, x), true_rows),
    "rows_unchecked": gap(shard(rows, check_vma=False, **rows_specs)(w, x), true_rows),
    "ours_pcast": gap(
        shard(lambda w, x, s: total(local(varying(w), x, s)), **grad_specs)(w, x, weights),
        true_grad,
    ),
    "ours_unchecked": gap(
        shard(lambda w, x, s: total(local(w, x, s)), check_vma=False, **grad_specs)(w, x, weights),
        true_grad,
    ),
}
found["ours_raw"] = gap(
    shard(lambda w, x, s: total(local(w, x, s)), **grad_specs)(w, x, weights), true_grad
)
product = lambda w, x, s: kernels.hvp(loss_fn)(w, x, 2.0 * w, weights=s, num_rows=8)
found["hvp_raw"] = gap(
    shard(lambda w, x, s: total(product(w, x, s)), **grad_specs)(w, x, weights),
    product(w, x, weights),
)
parts = lambda w, x: kernels.per_example(loss_fn)(w, x).materialize()
found["per_example_raw"] = gap(shard(parts, **rows_specs)(w, x), true_rows)
placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, weights)]
found["rows_jit_sharded"] = gap(jax.jit(rows)(w, placed[0]), true_rows)
found["ours_jit_sharded"] = gap(jax.jit(local)(w, *placed), true_grad)
dims = ("NHWC", "HWIO", "NHWC")
convolve = lambda k, row: jax.lax.conv_general_dilated(
    row[None], k, (1, 1), "SAME", dimension_numbers=dims
)
pixels = jnp.asarray(rng.normal(size=(8, 4, 4, 2)), jnp.float32)
kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 3)), jnp.float32)
of_pixels = jax.vmap(jax.grad(lambda k, row: jnp.sum(jnp.tanh(convolve(k, row)))), (None, 0))
placed_pixels = jax.device_put(pixels, NamedSharding(mesh, P("data")))
found["convolution_jit_sharded"] = gap(
    jax.jit(of_pixels)(kernel, placed_pixels), of_pixels(kernel, pixels)
)
explicit = jax.make_mesh((2,), ("data",))
found["default_axis_type"] = str(explicit.axis_types[0])
twice = lambda a: 2 * a
try:
    jax.shard_map(twice, mesh=explicit, in_specs=P("data"), out_specs=P("data"))(x)
    found["unplaced"] = "accepted"
except Exception as error:
    found["unplaced"] = type(error).__name__
where = jax.device_put(x, NamedSharding(explicit, P("data")))
got = jax.shard_map(twice, mesh=explicit, in_specs=P("data"), out_specs=P("data"))(where)
found["placed"] = gap(got, 2 * x)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_devices():
    """What the script found in a process with two CPU devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", MULTI_DEVICE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_t1_per_example_gradients_of_replicated_params_are_summed_across_devices(two_devices):
    assert two_devices["rows_raw"] > 0.1


@pytest.mark.parametrize("way", ["rows_pcast", "rows_unchecked", "rows_jit_sharded"])
def test_t1_a_cast_or_no_check_or_plain_jit_is_right(two_devices, way):
    assert two_devices[way] < 1e-6


def test_t1_vmap_grad_of_a_convolution_over_sharded_rows_is_wrong_under_plain_jit_too(two_devices):
    """XLA partitions a convolution grouped by example as if the groups were one."""
    assert two_devices["convolution_jit_sharded"] > 0.1


@pytest.mark.parametrize("way", ["ours_pcast", "ours_unchecked", "ours_jit_sharded"])
def test_t1_weighted_grad_is_right_under_a_cast_or_no_check_or_plain_jit(two_devices, way):
    assert two_devices[way] < 1e-6


@pytest.mark.parametrize("way", ["ours_raw", "hvp_raw"])
def test_t1_our_kernels_are_of_the_local_rows_without_a_cast_too(two_devices, way):
    assert two_devices[way] < 1e-6


def test_t2_per_example_gradients_are_of_the_local_rows_without_a_cast_too(two_devices):
    """Summed across devices, a clipped gradient would be longer than its clip norm."""
    assert two_devices["per_example_raw"] < 1e-6


def test_t11_explicit_axes_refuse_arrays_that_were_not_placed(two_devices):
    assert two_devices["default_axis_type"].endswith("Explicit")
    assert two_devices["unplaced"] == "ValueError"
    assert two_devices["placed"] == 0.0


# --- T6: extra arguments, and who loses them ----------------------------------------------------


class ThreeFields(NamedTuple):
    """The shape that suggests itself, and that Optax accepts."""

    init: object
    update: object
    forget: object


def listener(make):
    """A transform of some shape, and the extra arguments that have reached it."""
    heard = []

    def update(updates, state, params=None, **extra):
        heard.append(sorted(extra))
        return updates, state

    return make(lambda params: optax.EmptyState(), update), heard


def as_unlearner(init, update):
    nothing = lambda *args, **kwargs: None
    return Unlearner(init, update, nothing, nothing, nothing)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.scale(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("one", optax.scale(1.0)), ("two", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition({"x": tx}, {"w": "x", "b": "x"}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def ids_through(tx):
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    if isinstance(tx, optax.GradientTransformation):
        tx = optax.with_extra_args_support(tx)
    tx.update(updates, tx.init(PARAMS), PARAMS, ids=jnp.array([1]))


@pytest.mark.parametrize("name", WRAPPERS)
def test_t6_a_three_field_tuple_silently_loses_extra_arguments(name):
    tx, heard = listener(lambda init, update: ThreeFields(init, update, None))
    ids_through(WRAPPERS[name](tx))
    assert heard
    assert ["ids"] not in heard


@pytest.mark.parametrize(
    "remake",
    [
        lambda u: u,
        copy.copy,
        copy.deepcopy,
        lambda u: u._replace(),
        lambda u: u._make(u._asdict().values()),
    ],
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_t6_an_unlearner_hears_them_through_every_wrapper_and_copy(name, remake):
    tx, heard = listener(as_unlearner)
    ids_through(WRAPPERS[name](remake(tx)))
    assert heard
    assert all(names == ["ids"] for names in heard)


def test_t6_multi_steps_as_a_transformation_loses_them_whatever_it_wraps():
    tx, heard = listener(as_unlearner)
    ids_through(optax.MultiSteps(tx, 1).gradient_transformation())
    assert heard
    assert ["ids"] not in heard


# --- T7: saving and restoring -------------------------------------------------------------------


def square(params, batch):
    return jnp.mean((batch @ params["w"] + params["b"]) ** 2)


def unlearner_of(tx=None):
    return unlearners.replay(
        tx or optax.adam(0.1), square, verify="off", num_examples=10, batch_size=4, max_steps=6
    )


def trained(unlearner):
    state = unlearner.init(PARAMS)
    params = PARAMS
    for t in range(3):
        grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
        updates, state = unlearner.update(grads, state, params, ids=jnp.arange(t, t + 4))
        params = optax.apply_updates(params, updates)
    return params, state


def test_t7_orbax_keeps_the_types_of_a_state_when_it_is_given_a_target(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    unlearner = unlearner_of()
    saved = trained(unlearner)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        target = (PARAMS, unlearner.init(PARAMS))
        restored = checkpointer.restore(tmp_path / "state", target)
        bare = checkpointer.restore(tmp_path / "state")
    assert isinstance(restored[1], UnlearnerState)
    assert isinstance(restored[1].record, unlearners.ReplayRecord)
    assert tree.same_bits(restored, saved)
    assert not isinstance(bare[1], UnlearnerState)
    data = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    first, second = (unlearner.forget(*state, [2], data=data) for state in (saved, restored))
    assert tree.same_bits(first[:2], second[:2])


def test_t7_a_field_more_is_refused_by_orbax_rather_than_ignored(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"a": jnp.ones(2)})
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="b"):
            checkpointer.restore(tmp_path / "state", {"a": jnp.ones(2), "b": jnp.ones(2)})


# --- T8: optax.lbfgs ----------------------------------------------------------------------------


def test_t8_lbfgs_keeps_23_numbers_a_parameter_and_so_does_each_checkpoint():
    params = {"w": jnp.ones(10_000)}
    inner = optax.lbfgs(memory_size=10).init(params)
    assert round(tree.num_parameters(inner) / 10_000) == 23
    slots = records.num_slots(params, inner, num_checkpoints=16, max_bytes=3 * 24 * 40_000)
    assert slots == 2


def test_t8_lbfgs_of_half_precision_parameters_has_a_half_precision_history():
    inner = optax.lbfgs().init({"w": jnp.ones(3, jnp.bfloat16)})
    assert inner[0].diff_params_memory["w"].dtype == jnp.bfloat16


def test_t8_lbfgs_takes_a_pair_of_negative_curvature():
    tx = optax.scale_by_lbfgs(memory_size=2)
    state = tx.init(jnp.array([0.0]))
    _, state = tx.update(jnp.array([1.0]), state, jnp.array([0.0]))
    _, state = tx.update(jnp.array([0.5]), state, jnp.array([1.0]))  # s = 1, y = -0.5
    updates, _ = tx.update(jnp.array([0.4]), state, jnp.array([1.1]))
    assert float(jnp.min(state.weights_memory)) < 0
    assert float(updates[0]) < 0  # a preconditioner that is not positive: uphill


# --- T10: what a compiled program says of itself ------------------------------------------------


def test_t10_memory_analysis_tells_arguments_outputs_and_aliases():
    step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    memory = step.lower(jnp.zeros(1000)).compile().memory_analysis()
    assert memory.argument_size_in_bytes == 4000
    assert memory.output_size_in_bytes == 4000
    assert memory.alias_size_in_bytes == 4000


def test_t10_under_donation_an_update_allocates_no_second_record():
    params = {"w": jnp.ones(1000)}
    unlearner = unlearners.replay(
        optax.adam(0.1), square, num_examples=100_000, batch_size=4, max_steps=5000
    )
    state = unlearner.init(params)
    step = lambda state, params, grads, ids: unlearner.update(grads, state, params, ids=ids)
    compiled = jax.jit(step, donate_argnums=0).lower(state, params, params, jnp.arange(4)).compile()
    memory = compiled.memory_analysis()
    record = tree.num_bytes(state.record)
    assert record > 100_000
    assert memory.alias_size_in_bytes >= record
    assert memory.temp_size_in_bytes < record / 2
