"""`transforms.online_lbfgs` against the same recursion in NumPy float64, and as an optimizer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import kernels, transforms, unlearners
from jaxunlearn.kernels import lbfgs

DIM, BATCH, STEPS, MEMORY = 5, 4, 24, 3


def loss_fn(params, batch):
    return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * (batch["x"] @ params["w"] + params["b"])))


def make_data(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(STEPS, BATCH, DIM))
    y = np.sign(x @ rng.normal(size=DIM) + 0.5 * rng.normal(size=(STEPS, BATCH)))
    return {"x": x.astype(dtype), "y": y.astype(dtype)}


def start(dtype=jnp.float64):
    return {"b": jnp.zeros((), dtype), "w": jnp.zeros(DIM, dtype)}


def train(tx, data, params, *, clip=None):
    """The whole stream under one scan; parameters after every step."""
    ids = np.arange(STEPS * BATCH, dtype=np.int32).reshape(STEPS, BATCH)

    def step(carry, operand):
        params, state = carry
        rows, ids = operand
        grads = jax.grad(loss_fn)(params, rows)
        if clip is not None:
            grads = jax.tree.map(lambda g: jnp.clip(g, -clip, clip), grads)
        updates, state = tx.update(grads, state, params, batch=rows, ids=ids)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda p, d: jax.lax.scan(step, (p, tx.init(p)), d))
    (params, state), path = run(params, (data, ids))
    return params, state, path


def flat(params):
    return np.concatenate([np.ravel(params["b"]), np.ravel(params["w"])])


class Reference:
    """Online L-BFGS by a dense inverse, updated with each pair: (I - rho s y') H (I - rho y s')."""

    def __init__(self, rate_of, admit, l2=0.0, clip=None):
        self.rate_of, self.admit, self.l2, self.clip = rate_of, admit, l2, clip
        self.w, self.pairs, self.square_sum = np.zeros(DIM + 1), [], 0.0
        self.owners, self.count = [], 0

    def gradient(self, w, x, y):
        z = np.hstack([np.ones((len(x), 1)), x])
        return -z.T @ (y / (1 + np.exp(y * (z @ w)))) / len(x)

    def inverse(self):
        if not self.pairs:
            return np.eye(DIM + 1)
        s, y = self.pairs[-1]
        h = np.eye(DIM + 1) * (s @ y) / (y @ y)
        for s, y in self.pairs:
            v = np.eye(DIM + 1) - np.outer(y, s) / (s @ y)
            h = v.T @ h @ v + np.outer(s, s) / (s @ y)
        return h

    def step(self, x, y, owner):
        first = self.gradient(self.w, x, y)
        g = first if self.clip is None else np.clip(first, -self.clip, self.clip)
        first, g = first + self.l2 * self.w, g + self.l2 * self.w
        self.square_sum += g @ g
        rate = self.rate_of(self.count, self.square_sum)
        self.count += 1
        reached = self.w - rate * self.inverse() @ g
        s = reached - self.w
        pair = self.admit(s, self.gradient(reached, x, y) + self.l2 * reached - first, first)
        if pair is not None:
            self.pairs = [*self.pairs, pair][-MEMORY:]
            self.owners = [*self.owners, owner][-MEMORY:]
        self.w = reached


def any_positive(s, y, g):
    return (s, y) if s @ y > 1e-8 * np.linalg.norm(s) * np.linalg.norm(y) else None


def shifted(s, y, g):
    return s, y + (0.1 * np.linalg.norm(g) + max(0.0, -(s @ y) / (s @ s))) * s


def damped(s, y, g):
    y = y + max(0.0, 0.05 - (s @ y) / (s @ s)) * s
    return (s, y) if s @ y > max(1e-10, 1e-8 * (s @ s)) else None


RUNS = {
    "constant": ({"learning_rate": 0.5, "l2": 0.1}, lambda t, s: 0.5, any_positive, 0.1),
    "inverse_time": (
        {"learning_rate": transforms.inverse_time(2.0), "admission": transforms.prudente_souza()},
        lambda t, s: 1 / (2.0 * (t + 1)), shifted, 0.0,
    ),
    "adaptive": (
        {"learning_rate": transforms.AdaptiveRate(0.3, 0.4), "l2": 0.2,
         "admission": transforms.levenberg_damped(0.05)},
        lambda t, s: min(0.4, 0.3 / math.sqrt(s)), damped, 0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [n if n == "adaptive" else pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
)
def test_equals_the_recursion_with_a_dense_inverse(name, x64):
    options, rate_of, admit, l2 = RUNS[name]
    data = make_data()
    tx = transforms.online_lbfgs(loss_fn, memory_size=MEMORY, owners_per_pair=BATCH, **options)
    _, state, path = train(tx, data, start())
    reference = Reference(rate_of, admit, l2)
    for t in range(STEPS):
        owner = list(range(t * BATCH, (t + 1) * BATCH))
        reference.step(data["x"][t], data["y"][t], owner)
        reached = np.concatenate([[path["b"][t]], path["w"][t]])
        np.testing.assert_allclose(reached, reference.w, rtol=0, atol=1e-11)
    assert int(state.num_online_steps) == STEPS
    np.testing.assert_allclose(state.gradient_square_sum, reference.square_sum, rtol=1e-12)
    oldest = int(state.curvature.next_slot) - int(state.curvature.num_pairs)
    order = (oldest + np.arange(MEMORY)) % MEMORY
    assert np.asarray(state.curvature.pair_owners)[order].tolist() == reference.owners


def test_the_pair_is_made_on_the_batch_whatever_came_in(x64):
    data, clip = make_data(), 0.05
    tx = transforms.online_lbfgs(loss_fn, memory_size=MEMORY, learning_rate=0.5, owners_per_pair=4)
    params, _, _ = train(tx, data, start(), clip=clip)
    reference = Reference(lambda t, s: 0.5, any_positive, clip=clip)
    for t in range(STEPS):
        reference.step(data["x"][t], data["y"][t], t)
    np.testing.assert_allclose(flat(params), reference.w, atol=1e-11)
    mixed = transforms.online_lbfgs(
        loss_fn, memory_size=MEMORY, learning_rate=0.5, owners_per_pair=4, incoming="gradient"
    )
    assert np.abs(flat(train(mixed, data, start(), clip=clip)[0]) - reference.w).max() > 1e-3


@pytest.mark.slow
def test_a_promised_gradient_saves_one_and_changes_nothing(x64):
    data = make_data()
    options = {"memory_size": MEMORY, "owners_per_pair": BATCH, "l2": 0.1}
    runs = [
        train(transforms.online_lbfgs(loss_fn, incoming=incoming, **options), data, start())[0]
        for incoming in ("any", "gradient")
    ]
    np.testing.assert_allclose(flat(runs[0]), flat(runs[1]), atol=1e-13)


@pytest.mark.slow
def test_value_fn_stands_for_the_batch():
    data = make_data(dtype=np.float32)
    rows = jax.tree.map(lambda leaf: leaf[0], data)
    tx = transforms.online_lbfgs(loss_fn, memory_size=MEMORY)
    params = jax.tree.map(lambda leaf: leaf + 0.1, start(jnp.float32))
    grads = jax.grad(loss_fn)(params, rows)
    state = tx.init(params)

    @jax.jit
    def both(grads, state, params, rows):
        value_fn = lambda p: loss_fn(p, rows)
        return (
            tx.update(grads, state, params, batch=rows),
            tx.update(grads, state, params, value_fn=value_fn, grad=grads),
        )

    a, b = both(grads, state, params, rows)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    assert int(a[1].curvature.num_pairs) == 1


def test_it_chains_takes_a_schedule_and_keeps_every_aval_under_donation():
    data = make_data(dtype=np.float32)
    schedule = optax.cosine_decay_schedule(0.5, STEPS)
    tx = optax.chain(
        optax.clip_by_global_norm(0.3),
        transforms.online_lbfgs(
            loss_fn, memory_size=MEMORY, learning_rate=schedule, owners_per_pair=BATCH
        ),
    )
    params = start(jnp.float32)
    state = tx.init(params)
    avals = lambda s: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)]
    before = avals(state)

    @jax.jit
    def loss_after(params):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), data))

    def step(params, state, rows, ids):
        updates, state = tx.update(
            jax.grad(loss_fn)(params, rows), state, params, batch=rows, ids=ids
        )
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    first = float(loss_after(params))
    for t in range(STEPS):
        rows = jax.tree.map(lambda leaf, t=t: leaf[t], data)
        params, state = step(params, state, rows, np.arange(4, dtype=np.int32))
    assert avals(state) == before
    assert float(loss_after(params)) < 0.7 * first
    assert step._cache_size() == 1


@pytest.mark.slow
def test_bfloat16_parameters_have_float32_pairs_of_the_move_that_was_made():
    rows = jax.tree.map(lambda leaf: leaf[0], make_data(dtype=np.float32))
    params = start(jnp.bfloat16)
    tx = transforms.online_lbfgs(loss_fn, memory_size=MEMORY, learning_rate=0.37)
    grads = jax.grad(loss_fn)(params, rows)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=rows)
    moved = optax.apply_updates(params, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.curvature.pairs)} == {np.dtype(np.float32)}
    made = np.asarray(moved["w"], np.float32) - np.asarray(params["w"], np.float32)
    np.testing.assert_array_equal(state.curvature.pairs["w"][0, 0], made)


@pytest.mark.slow
def test_max_norm_is_kept_and_the_pair_knows_the_shorter_move():
    rows = jax.tree.map(lambda leaf: leaf[0], make_data(dtype=np.float32))
    params = start(jnp.float32)
    grads = jax.grad(loss_fn)(params, rows)
    states = {}
    for move in ("realised", "step"):
        tx = transforms.online_lbfgs(loss_fn, learning_rate=50.0, max_norm=2.0, move=move)
        update = jax.jit(tx.update)
        updates, states[move] = update(grads, tx.init(params), params, batch=rows)
        np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-6)
    lengths = {move: float(s.curvature.pair_gram[0, 0, 0, 0]) ** 0.5 for move, s in states.items()}
    np.testing.assert_allclose(lengths["realised"], 2.0, rtol=1e-5)
    assert lengths["step"] > 2.5


@pytest.mark.slow
def test_ids_of_weight_zero_own_nothing():
    rows = jax.tree.map(lambda leaf: leaf[0], make_data(dtype=np.float32))
    params = jax.tree.map(lambda leaf: leaf + 0.1, start(jnp.float32))
    tx = transforms.online_lbfgs(loss_fn, owners_per_pair=4)
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    grads = kernels.weighted_grad(loss_fn)(params, rows, weights)
    _, state = jax.jit(tx.update)(
        grads, tx.init(params), params, batch=rows, ids=np.array([7, 8, -1, 9]), weights=weights
    )
    assert state.curvature.pair_owners[0].tolist() == [7, -1, -1, 9]


@pytest.mark.slow
def test_inside_replay_it_is_deleted_from_exactly():
    data = make_data(dtype=np.float32)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), data)
    tx = transforms.online_lbfgs(memory_size=MEMORY, learning_rate=0.3)
    unlearner = unlearners.replay(
        tx, loss_fn, num_examples=STEPS * BATCH, batch_size=BATCH, max_steps=STEPS, l2=0.05
    )
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)

    @jax.jit
    def step(params, state, rows, ids):
        weights = (ids >= 0).astype(jnp.float32)
        grads, info = gradient(params, rows, weights)
        updates, state = unlearner.update(
            grads, state, params, ids=ids, value=info.value, grad=grads,
            value_fn=lambda p: value(p, rows, weights),
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    params = start(jnp.float32)
    state = unlearner.init(params)
    for t in range(12):
        ids = np.arange(t * BATCH, (t + 1) * BATCH, dtype=np.int32)
        params, state = step(params, state, jax.tree.map(lambda x, i=ids: x[i], rows), ids)
    result = unlearner.forget(params, state, [9, 30], data=rows)
    from jaxunlearn import oracle

    target = oracle(
        tx, loss_fn, start(jnp.float32), log=state.record.log, data=rows, forget=[9, 30], l2=0.05
    )
    for x, y in zip(
        jax.tree.leaves((result.params, result.opt_state.inner)),
        jax.tree.leaves(target),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


# --- admission -----------------------------------------------------------------------------------


@jax.jit
def smallest_eigenvalue_left(steps, changes, gone):
    """Of H, after pairs of these owners (their index) were pushed and the `gone` ones dropped."""
    rule = transforms.prudente_souza()

    def push(memory, pair):
        s, y, owner = pair
        return lbfgs.push(memory, s, y, owner=owner, gradient_norm=1.0, admission=rule)

    memory, admitted = jax.lax.scan(
        push, lbfgs.init(jnp.zeros(4), 5), (steps, changes, jnp.arange(5))
    )
    left = lbfgs.drop(memory, lbfgs.owned(memory, gone))
    return lbfgs.eigenvalue_range(left)[0], jnp.all(admitted)


@given(seed=st.integers(0, 2**32 - 1))
def test_prudente_souza_keeps_every_subset_of_pairs_positive_definite(seed):
    rng = np.random.default_rng(seed)
    steps, changes = rng.normal(size=(2, 5, 4)).astype(np.float32)
    changes *= -np.sign(np.sum(steps * changes, axis=1))[:, None]  # negative curvature throughout
    gone = np.where(rng.random(5) < 0.5, np.arange(5), -1)
    low, admitted = smallest_eigenvalue_left(steps, changes, gone)
    assert bool(admitted)
    assert float(low) > 0


@given(seed=st.integers(0, 2**32 - 1))
def test_levenberg_damping_lifts_the_curvature_to_the_threshold_and_no_further(seed):
    rng = np.random.default_rng(seed)
    s, y = rng.normal(size=(2, 6)).astype(np.float32)
    lifted, admitted = transforms.levenberg_damped(0.25)(None, jnp.array(s), jnp.array(y), None)
    assert bool(admitted)
    quotient = float(s @ y) / float(s @ s)
    np.testing.assert_allclose(lifted, y + max(0.0, 0.25 - quotient) * s, rtol=1e-4, atol=1e-5)


def test_relative_curvature_does_not_let_negative_curvature_in():
    rule = transforms.relative_curvature()
    s = jnp.array([1.0, 0.0])
    assert not bool(rule(None, s, jnp.array([-1.0, 0.0]), None)[1])
    assert bool(rule(None, s, jnp.array([1.0, 5.0]), None)[1])


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0},
        {"learning_rate": transforms.AdaptiveRate(-1.0)},
        {"l2": -1.0},
        {"incoming": "clipped"},
        {"move": "guessed"},
        {"scale_range": (2.0, 1.0)},
        {"max_norm": 0.0},
        {"memory_size": 0},
    ],
)
def test_a_bad_option_is_refused(options):
    with pytest.raises(ValueError, match="Expected"):
        transforms.online_lbfgs(loss_fn, **options).init(start(jnp.float32))


def test_a_step_without_rows_to_make_the_pair_on_is_refused():
    params = start(jnp.float32)
    tx = transforms.online_lbfgs(loss_fn)
    with pytest.raises(ValueError, match="Expected batch="):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="Expected params"):
        tx.update(params, tx.init(params), batch={})
    rows = jax.tree.map(lambda leaf: leaf[0], make_data(dtype=np.float32))
    with pytest.raises(ValueError, match="owners_per_pair=1"):
        tx.update(params, tx.init(params), params, batch=rows, ids=np.arange(4))
