"""Tangents of the training state against dense Jacobians and Hessians in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import kernels
from tests.kernels.test_devices import output_of, start

ROWS, FEATURES = 9, 3
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.05, eps=1e-3, eps_root=1e-6)),
}


def loss_fn(params, batch):
    z = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jax.nn.softplus(z) - batch["y"] * z)


def update_of(tx):
    def apply(grads, inner, params):
        updates, inner = tx.update(grads, inner, params)
        return optax.apply_updates(params, updates), inner

    return apply


def problem(tx, seed=0):
    """Parameters and an optimizer state that has taken a few steps, and one batch."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=FEATURES)), "b": jnp.asarray(rng.normal())}
    inner = tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        params, inner = update_of(tx)(grads, inner, params)
    batch = {
        "x": jnp.asarray(rng.normal(size=(ROWS, FEATURES))),
        "y": jnp.asarray(rng.integers(0, 2, ROWS).astype(float)),
    }
    return params, inner, batch


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in floats(tree)])


def unflat(vector, like):
    leaves, structure = jax.tree.flatten(like)
    at, filled = 0, []
    for leaf in leaves:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        size = leaf.size if is_float else 0
        filled.append(vector[at : at + size].reshape(leaf.shape) if is_float else leaf)
        at += size
    return jax.tree.unflatten(structure, filled)


@jax.jit
def dense_rows(params, batch):
    """Every row's gradient and Hessian, dense."""

    def row(p, one):
        return loss_fn(unflat(p, params), jax.tree.map(lambda leaf: leaf[None], one))

    p = flat(params)
    rows = lambda f: jax.vmap(f, in_axes=(None, 0))(p, batch)
    return rows(jax.grad(row)), rows(jax.hessian(row))


@functools.partial(jax.jit, static_argnums=0)
def dense_update(tx, params, inner, g):
    """The update's Jacobian in the gradient, and in the state."""
    num_params = flat(params).size

    def update(g, z):
        new = update_of(tx)(
            unflat(g, params), unflat(z[num_params:], inner), unflat(z[:num_params], params)
        )
        return flat(new)

    return jax.jacfwd(update, argnums=(0, 1))(g, jnp.concatenate([flat(params), flat(inner)]))


def dense_step(
    tx, params, inner, batch, weights, owners, tangents, *, recursion="leave_one_out", normalizer
):
    """The definition, unit by unit."""
    gradients, hessians = map(np.asarray, dense_rows(params, batch))
    total = weights.sum()
    actual = weights @ gradients / total
    by_g, by_z = map(np.asarray, dense_update(tx, params, inner, jnp.asarray(actual)))

    def one(unit, tangent):
        dp = tangent[: len(actual)]
        left = np.where(owners == unit, 0.0, weights)
        divisor = left.sum() if normalizer == "kept" else total
        dg = -actual
        if divisor:
            curving = left / divisor if recursion == "leave_one_out" else weights / total
            dg = left @ gradients / divisor - actual + np.tensordot(curving, hessians, 1) @ dp
        return by_g @ dg + by_z @ tangent

    return np.stack([one(unit, tangent) for unit, tangent in enumerate(tangents)])


def stacked_tangents(kernel, params, inner, num_units, seed=1):
    rng = np.random.default_rng(seed)
    stacks = kernel.init(params, inner, num_units=num_units)
    draw = lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape))
    return tuple(map(draw, stacks))


def rows_of(stacks):
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in stacks], axis=1)


@pytest.fixture(autouse=True)
def _double(x64):
    """Everything here is in float64."""


DEFINITIONS = [
    *((r, n, "adam", 3, {}) for r in ("leave_one_out", "paper") for n in ("batch", "kept")),
    *(
        (r, n, "adam", 7, {"units_at_once": 3, "microbatch_size": 2})
        for r in ("leave_one_out", "paper")
        for n in ("batch", "kept")
    ),
    ("leave_one_out", "kept", "momentum", 7, {}),
]


@pytest.mark.parametrize(
    ("recursion", "normalizer", "optimizer", "num_units", "options"), DEFINITIONS
)
def test_a_step_is_its_definition_by_dense_matrices(
    recursion, normalizer, optimizer, num_units, options
):
    tx = OPTIMIZERS[optimizer]
    params, inner, batch = problem(tx)
    # Units with several rows, rows of nobody, a row that weighs nothing.
    owners = np.array([0, 2, 0, -1, 1, 6 % num_units, -1, 1, 2])
    weights = np.array([1.0, 1, 1, 1, 1, 1, 1, 1, 0])
    kernel = kernels.state_tangents(
        loss_fn, update_of(tx), recursion=recursion, normalizer=normalizer, **options
    )
    tangents = stacked_tangents(kernel, params, inner, num_units)
    grads = jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: leaf[:-1], batch))
    new = jax.jit(kernel.step)(
        tangents, params, inner, grads, batch, jnp.asarray(weights), jnp.asarray(owners)
    )
    want = dense_step(
        tx, params, inner, batch, weights, owners, rows_of(tangents),
        recursion=recursion, normalizer=normalizer,
    )  # fmt: skip
    np.testing.assert_allclose(rows_of(new), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_units", [2, 6], ids=["few", "many"])
@pytest.mark.parametrize("recursion", ["leave_one_out", "paper"])
def test_a_batch_of_one_unit_alone_has_no_gradient_without_it_when_the_divisor_is_kept(
    num_units, recursion
):
    tx = OPTIMIZERS["momentum"]
    params, inner, batch = problem(tx)
    owners, weights = np.full(ROWS, 1), np.ones(ROWS)
    kernel = kernels.state_tangents(loss_fn, update_of(tx), normalizer="kept", recursion=recursion)
    tangents = stacked_tangents(kernel, params, inner, num_units)
    grads = jax.grad(loss_fn)(params, batch)
    step = jax.jit(kernel.step)
    new = step(tangents, params, inner, grads, batch, jnp.ones(ROWS), jnp.asarray(owners))
    old = rows_of(tangents)
    want = dense_step(
        tx, params, inner, batch, weights, owners, old, recursion=recursion, normalizer="kept"
    )
    np.testing.assert_allclose(rows_of(new), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_units", [3, 7], ids=["few", "many"])
@pytest.mark.parametrize("normalizer", ["batch", "kept"])
def test_rows_that_do_not_count_in_weighted_grad_do_not_count_here(num_units, normalizer):
    tx = OPTIMIZERS["momentum"]
    params, inner, batch = problem(tx)
    spoilt = batch | {"x": batch["x"].at[4].set(jnp.nan).at[8].set(jnp.inf)}
    harmless = batch | {"x": batch["x"].at[4].set(0.0), "y": batch["y"].at[4].set(0.5)}
    weights = jnp.asarray([1.0] * 8 + [0.0])  # row 4 stays in the divisor, row 8 is nobody
    owners = jnp.asarray([0, 1, 2, -1, 1, 0, 0, 2, 1])
    kernel = kernels.state_tangents(loss_fn, update_of(tx), normalizer=normalizer)
    tangents = stacked_tangents(kernel, params, inner, num_units)
    grads = kernels.weighted_grad(loss_fn)(params, spoilt, weights)
    step = jax.jit(functools.partial(kernel.step, tangents, params, inner, grads))
    new = step(spoilt, weights, owners)
    # A row of zero features has gradient s(b) - y and curvature s(b) (1 - s(b)), in b alone.
    flat_row = {"x": harmless["x"], "y": harmless["y"].at[4].set(jax.nn.sigmoid(params["b"]))}
    assert np.isfinite(rows_of(new)).all()
    by_hand = step(flat_row, weights, owners)
    curvature = jax.nn.sigmoid(params["b"]) * (1 - jax.nn.sigmoid(params["b"])) / 8
    gap = rows_of(new) - rows_of(by_hand)
    order = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)]
    b_at = 0 if order[0] == "['b']" else FEATURES
    others = [i for i in range(FEATURES + 1) if i != b_at]
    np.testing.assert_allclose(gap[:, others], 0, atol=1e-12)
    if normalizer == "batch":
        db = rows_of(tangents)[:, b_at]
        want = np.where(np.arange(len(db)) == 1, 0.0, db * curvature * 0.1 * 1.9)
        np.testing.assert_allclose(gap[:, b_at], want, rtol=1e-8, atol=1e-13)


def train(kernel, tx, params, batches, owners, live=None):
    """Tangents along a few steps, in one `lax.scan`."""

    def step(carry, part):
        params, inner, tangents = carry
        batch, slots = part
        grads = jax.grad(loss_fn)(params, batch)
        weights = jnp.ones(slots.shape)
        tangents = kernel.step(tangents, params, inner, grads, batch, weights, slots, live=live)
        return (*update_of(tx)(grads, inner, params), tangents), None

    inner = tx.init(params)
    start = params, inner, kernel.init(params, inner, num_units=12)
    return jax.lax.scan(step, start, (batches, owners))[0]


def series(steps=4):
    rng = np.random.default_rng(5)
    owners = np.stack([rng.permutation(12)[:ROWS] for _ in range(steps)])
    batches = {
        "x": jnp.asarray(rng.normal(size=(steps, ROWS, FEATURES))),
        "y": jnp.asarray(rng.integers(0, 2, (steps, ROWS)).astype(float)),
    }
    params = {"w": jnp.asarray(rng.normal(size=FEATURES)), "b": jnp.asarray(0.3)}
    return params, batches, jnp.asarray(owners)


def test_under_scan_it_is_the_same_as_step_by_step():
    tx = OPTIMIZERS["adam"]
    params, batches, owners = series()
    kernel = kernels.state_tangents(loss_fn, update_of(tx), units_at_once=5)
    *_, scanned = jax.jit(functools.partial(train, kernel, tx))(params, batches, owners)
    inner = tx.init(params)
    tangents = kernel.init(params, inner, num_units=12)
    step = jax.jit(kernel.step, donate_argnums=0)
    for t in range(4):
        batch = jax.tree.map(lambda leaf, t=t: leaf[t], batches)
        grads = jax.grad(loss_fn)(params, batch)
        tangents = step(tangents, params, inner, grads, batch, jnp.ones(ROWS), owners[t])
        params, inner = update_of(tx)(grads, inner, params)
    np.testing.assert_allclose(rows_of(scanned), rows_of(tangents), rtol=1e-10, atol=1e-15)


def test_tangents_of_units_that_are_not_live_become_zero():
    tx = OPTIMIZERS["adam"]
    params, inner, batch = problem(tx)
    kernel = kernels.state_tangents(loss_fn, update_of(tx), units_at_once=3)
    tangents = stacked_tangents(kernel, params, inner, 6)
    tangents = tuple(leaf.at[4].set(jnp.nan) for leaf in tangents)
    live = jnp.arange(6) != 4
    grads = jax.grad(loss_fn)(params, batch)
    slots = jnp.asarray([0, 1, 2, 3, 5, 0, 1, 2, 3])
    step = jax.jit(kernel.step)
    new = step(tangents, params, inner, grads, batch, jnp.ones(ROWS), slots, live=live)
    assert not rows_of(new)[4].any()
    assert np.isfinite(rows_of(new)).all()


def test_leaves_that_are_not_tracked_count_as_constants():
    tx = optax.adam(0.05, eps=1e-3, eps_root=1e-6)
    params, batches, owners = series()
    both = kernels.state_tangents(loss_fn, update_of(tx))
    only_w = kernels.state_tangents(loss_fn, update_of(tx), track_leaves={"w": True, "b": False})
    inner = tx.init(params)
    shapes = [leaf.shape[1:] for leaf in only_w.init(params, inner, num_units=5)]
    assert shapes == [(FEATURES,)] * 3  # w, and its two moments
    assert len(both.init(params, inner, num_units=5)) == 6
    *_, partial = jax.jit(functools.partial(train, only_w, tx))(params, batches, owners)
    # The same training with b as part of the data.
    bound = lambda p, batch: loss_fn({"w": p["w"], "b": params["b"]}, batch)
    kernel = kernels.state_tangents(bound, update_of(tx))
    frozen = {"w": params["w"]}
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    grads = jax.grad(bound)(frozen, first)
    inner = tx.init(frozen)
    want = kernel.step(
        kernel.init(frozen, inner, num_units=12), frozen, inner, grads, first,
        jnp.ones(ROWS), owners[0],
    )  # fmt: skip
    one = jax.tree.map(lambda leaf: leaf[:1], batches)
    *_, got = train(only_w, tx, params, one, owners[:1])
    np.testing.assert_allclose(rows_of(got), rows_of(want), rtol=1e-10, atol=1e-15)
    assert rows_of(partial).any()


def test_stored_in_bfloat16_it_is_the_same_to_three_digits():
    tx = OPTIMIZERS["momentum"]
    params, batches, owners = series()
    exact = train(kernels.state_tangents(loss_fn, update_of(tx)), tx, params, batches, owners)[2]
    kernel = kernels.state_tangents(loss_fn, update_of(tx), storage_dtype=jnp.bfloat16)
    coarse = train(kernel, tx, params, batches, owners)[2]
    assert {leaf.dtype for leaf in coarse} == {jnp.dtype(jnp.bfloat16)}
    gap = np.linalg.norm(rows_of(coarse).astype(float) - rows_of(exact))
    assert gap < 0.01 * np.linalg.norm(rows_of(exact))


def test_in_the_hosts_memory_it_is_the_same():
    tx = OPTIMIZERS["adam"]
    params, batches, owners = series()
    for at_once in (5, None):
        near, far = (
            kernels.state_tangents(
                loss_fn, update_of(tx), units_at_once=at_once, microbatch_size=4, offload=offload
            )
            for offload in (None, "host")
        )
        want = jax.jit(functools.partial(train, near, tx))(params, batches, owners)[2]
        got = jax.jit(functools.partial(train, far, tx))(params, batches, owners)[2]
        assert {leaf.sharding.memory_kind for leaf in got} == {"pinned_host"}
        np.testing.assert_allclose(rows_of(got), rows_of(want), rtol=1e-10, atol=1e-15)
        slots, amounts = jnp.asarray([3]), jnp.ones(1)
        moved = jax.jit(far.add)(params, tx.init(params), got, slots, amounts)
        other = near.add(params, tx.init(params), want, slots, amounts)
        np.testing.assert_allclose(flat(moved), flat(other), rtol=1e-10)


def test_add_is_a_sum_over_slots_and_leaves_integers_alone():
    tx = OPTIMIZERS["adam"]
    params, inner, _ = problem(tx)
    kernel = kernels.state_tangents(loss_fn, update_of(tx))
    tangents = stacked_tangents(kernel, params, inner, 6)
    slots, amounts = jnp.asarray([4, -1, 1, 99]), jnp.asarray([1.0, 1.0, 0.5, 1.0])
    new_params, new_inner = jax.jit(kernel.add)(params, inner, tangents, slots, amounts)
    old = jnp.concatenate([flat(params), flat(inner)])
    want = old + rows_of(tangents)[4] + 0.5 * rows_of(tangents)[1]
    np.testing.assert_allclose(jnp.concatenate([flat(new_params), flat(new_inner)]), want)
    counts = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.int32]
    assert counts(new_inner) == counts(inner)


def test_a_donated_stack_is_written_in_place():
    tx = optax.adam(0.05, eps_root=1e-6)
    params = {"w": jnp.zeros(400), "b": jnp.zeros(())}
    batch = {"x": jnp.ones((8, 400)), "y": jnp.ones(8)}
    kernel = kernels.state_tangents(loss_fn, update_of(tx), units_at_once=50)
    inner = tx.init(params)
    tangents = kernel.init(params, inner, num_units=2000)
    operands = tangents, params, inner, params, batch, jnp.ones(8), jnp.arange(8)
    compiled = jax.jit(kernel.step, donate_argnums=0).lower(*operands).compile()
    size = sum(leaf.nbytes for leaf in tangents)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.2 * size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recursion": "forwards"}, "recursion"),
        ({"normalizer": "mean"}, "normalizer"),
        ({"offload": "disk"}, "offload"),
        ({"units_at_once": 0}, "units_at_once"),
        ({"microbatch_size": 2.0}, "microbatch_size"),
    ],
)
def test_options_are_checked_at_the_factory(options, match):
    with pytest.raises(ValueError, match=match):
        kernels.state_tangents(loss_fn, update_of(optax.sgd(0.1)), **options)


def test_tracking_nothing_is_refused():
    kernel = kernels.state_tangents(loss_fn, update_of(optax.sgd(0.1)), track_leaves=False)
    with pytest.raises(ValueError, match="track_leaves"):
        kernel.init({"w": jnp.zeros(2), "b": jnp.zeros(())}, (), num_units=2)


def test_sharded_over_units_on_eight_devices_it_is_that_of_one():
    found = json.loads(output_of(start("_tangent_devices.py", devices=8)))
    assert found["gap"] < 5e-6
    assert found["spec"] == "units"
    assert found["all_gathers_of_stacks"] == 0
