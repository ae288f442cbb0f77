"""`records.rebuild`: an optimizer state from released parameters and the retain set alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import audits, datasets, errors, kernels, records, transforms, tree
from jaxunlearn.kernels import lbfgs
from tests.compiled_once import compiled_once
from tests.conformance import cases
from tests.conformance.cases import avals, differing
from tests.unlearners import _convex as convex

__all__ = ["compiled_once"]  # a fixture: programs are compiled once a file
KEY = jax.random.key(5)
DATA = cases.make_data()
RETAINED = np.setdiff1d(np.arange(13), [3, 5])
L2 = 0.5
B1, B2, STEPS = 0.9, 0.99, 7


def remade(tx, *, params=None, data=DATA, ids=RETAINED, loss_fn=cases.squared_error, **options):
    """`rebuild` on the conformance problem."""
    params = cases.make_params() if params is None else params
    options = {"num_steps": STEPS, "key": KEY, "batch_size": 4, "num_batches": 3} | options
    return records.rebuild(tx, loss_fn, params, data, ids, **options)


class Spy:
    """Rows by id; remembers what was read, and has no row but those allowed."""

    def __init__(self, allowed):
        self.allowed, self.read = {int(i) for i in allowed}, []

    def __getitem__(self, ids):
        assert set(ids.tolist()) <= self.allowed, "a row outside the retain set was read"
        self.read += ids.tolist()
        return jax.tree.map(lambda leaf: leaf[ids], DATA)


def gradient(flat, ids, l2=0.0):
    """The mean gradient of least squares in NumPy float64, (bias, matrix)."""
    z, y = convex.design(DATA, ids), np.asarray(DATA["y"], np.float64)[ids]
    return z.T @ (z @ flat - y) / len(z) + l2 * flat


def hessian(ids, l2):
    z = convex.design(DATA, ids)
    return z.T @ z / len(z) + l2 * np.eye(6)


def flat_params():
    return tree.flatten(cases.make_params())


# --- averages ---------------------------------------------------------------------------------


def test_moments_are_those_of_an_optimizer_of_num_steps_steps_at_held_parameters():
    spy = Spy(RETAINED)
    state = remade(optax.scale_by_adam(B1, B2), data=spy, l2=L2)
    batches = np.array_split(np.array(spy.read), 3)  # 11 rows in batches of four at most
    assert sorted(spy.read) == RETAINED.tolist()
    g = np.array([gradient(flat_params(), batch, L2) for batch in batches])
    mean, square = (1 - B1**STEPS) * np.mean(g, 0), (1 - B2**STEPS) * np.mean(g**2, 0)
    np.testing.assert_allclose(tree.flatten(state.mu), mean, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(tree.flatten(state.nu), square, rtol=2e-5, atol=1e-7)


def test_bias_correction_by_the_public_counter_gives_the_retained_gradient():
    whole = {"batch_size": 11, "num_batches": 1, "num_steps": 3}
    state = remade(optax.chain(optax.clip(1e6), optax.scale_by_adam(B1, B2)), **whole)[1]
    g = gradient(flat_params(), RETAINED)
    assert int(state.count) == 3
    np.testing.assert_allclose(tree.flatten(state.mu) / (1 - B1**3), g, rtol=2e-5)
    np.testing.assert_allclose(tree.flatten(state.nu) / (1 - B2**3), g**2, rtol=2e-5)


@pytest.mark.slow
def test_what_stands_before_an_average_changes_what_it_is_fed():
    whole = {"batch_size": 11, "num_batches": 1, "num_steps": 2}
    state = remade(optax.chain(optax.clip(0.01), optax.trace(0.5)), **whole)[1]
    expected = 1.5 * np.clip(gradient(flat_params(), RETAINED), -0.01, 0.01)
    np.testing.assert_allclose(tree.flatten(state.trace), expected, rtol=1e-5)


@pytest.mark.slow
def test_an_accumulator_between_two_steps_holds_the_mean_gradient():
    tx = optax.MultiSteps(optax.trace(0.5), 4).gradient_transformation()
    spy = Spy(RETAINED)
    state = remade(tx, data=spy)
    batches = np.array_split(np.array(spy.read), 3)
    mean = np.mean([gradient(flat_params(), batch) for batch in batches], axis=0)
    assert (int(state.gradient_step), int(state.mini_step)) == (1, 3)
    np.testing.assert_allclose(tree.flatten(state.inner_opt_state.trace), mean, rtol=1e-5)
    np.testing.assert_allclose(tree.flatten(state.acc_grads), mean, rtol=1e-5)


@pytest.mark.slow
def test_the_penalty_is_left_out_where_the_mask_says_so():
    mask = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 0, params)
    options = {"batch_size": 11, "num_batches": 1, "num_steps": 1, "l2": L2, "l2_mask": mask}
    state = remade(optax.trace(0.0), **options)
    penalty = L2 * flat_params() * np.array([0, 1, 1, 1, 1, 1])
    expected = gradient(flat_params(), RETAINED) + penalty
    np.testing.assert_allclose(tree.flatten(state.trace), expected, rtol=1e-5)


NESTED = ["chain"]
REST = [inside.name for inside in cases.INSIDE if inside.name not in [*NESTED, "momentum"]]


@pytest.mark.parametrize(
    "name", NESTED + [pytest.param(name, marks=pytest.mark.slow) for name in REST]
)
def test_counters_schedules_and_keys_stand_where_num_steps_updates_leave_them(name):
    """Every leaf but those that gradients enter, against a run on gradients of zero."""
    tx = next(inside for inside in cases.INSIDE if inside.name == name).make()
    params = cases.make_params()
    state = remade(tx, params=params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optax.with_extra_args_support(tx).update)
    plain = tx.init(params)
    for _ in range(STEPS if name != "lbfgs" else 0):
        plain = update(zeros, plain, params)[1]
    assert avals(state) == avals(plain)
    public = [path for path, dtype in _dtypes(state) if "float" not in dtype]
    public += [path for path, _ in _dtypes(state) if ".hyperparams" in path]
    if name == "lbfgs":
        assert int(state[0].count) == STEPS
    else:
        assert public
        assert not set(public) & set(differing(state, plain))


def _dtypes(tree):
    return [
        (jax.tree_util.keystr(path), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.slow
def test_no_step_leaves_the_state_fresh():
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.1))
    assert differing(remade(tx, num_steps=0), tx.init(cases.make_params())) == []


def test_settings_from_outside_are_public_and_are_put_back():
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9))
    settings = records.get_settings(tx.init(cases.make_params()))
    settings = {
        path: {**found, "learning_rate": jnp.float32(0.025)} for path, found in settings.items()
    }
    state = remade(tx, settings=settings)
    assert float(state[0].hyperparams["learning_rate"]) == np.float32(0.025)


@pytest.mark.slow
def test_a_loss_with_a_key_gets_one_for_every_row():
    def noisy(params, batch, key):
        return cases.squared_error(params, batch) + jax.random.uniform(key) * params["bias"]

    first, again = (remade(optax.trace(0.9), loss_fn=noisy) for _ in range(2))
    assert differing(first, again) == []
    assert differing(first, remade(optax.trace(0.9), loss_fn=noisy, key=jax.random.key(6)))


# --- a pure function of its arguments -----------------------------------------------------------


def test_two_histories_give_the_same_bytes():
    """Other rows to forget, in other values or missing altogether; other ids order; other calls
    before: nothing but the arguments enters."""
    tx = optax.adamw(optax.cosine_decay_schedule(0.1, 20))
    other = jax.tree.map(np.array, DATA)
    other["x"][[3, 5, 13]] = np.nan
    other["y"][[3, 5, 13]] = 1e30
    again = records.make_rebuild(
        tx, cases.squared_error, records.Rebuild(key=KEY, batch_size=4, num_batches=3),
        records.Penalty(None),
    ).again  # fmt: skip
    elsewhere = jax.tree.map(lambda leaf: leaf + 1, cases.make_params())
    again(elsewhere, records.RowReader(DATA), np.arange(13), num_steps=4)
    states = [
        remade(tx),
        remade(tx, data=other),
        remade(tx, data=Spy(RETAINED)),
        remade(tx, ids=RETAINED[::-1]),
        again(cases.make_params(), records.RowReader(other), RETAINED, num_steps=STEPS),
    ]
    assert all(differing(state, states[0]) == [] for state in states)


@pytest.mark.parametrize("change", ["num_steps", "ids", "params", "key"])
def test_every_argument_counts(change):
    tx = optax.scale_by_adam()
    changed = {
        "num_steps": {"num_steps": STEPS + 1},
        "ids": {"ids": RETAINED[1:]},
        "params": {"params": jax.tree.map(lambda leaf: leaf + 1, cases.make_params())},
        "key": {"key": jax.random.key(6)},
    }
    assert differing(remade(tx), remade(tx, **changed[change]))


@pytest.mark.slow
def test_one_program_serves_all_requests():
    again = records.make_rebuild(
        optax.adam(0.1), cases.squared_error, records.Rebuild(key=KEY, batch_size=4, num_batches=3),
        records.Penalty(None),
    ).again  # fmt: skip
    reader = records.RowReader(DATA)
    again(cases.make_params(), reader, RETAINED, num_steps=9)
    with cases.compilations() as compiled:
        again(cases.make_params(), reader, RETAINED[2:], num_steps=5)
        again(cases.make_params(), reader, RETAINED[:3], num_steps=6)
    assert compiled == []


# --- curvature ----------------------------------------------------------------------------------

WHOLE = {"batch_size": 11, "num_batches": 1, "l2": L2}


def test_an_optax_lbfgs_with_room_for_all_directions_takes_the_newton_step_next():
    tx = optax.scale_by_lbfgs(memory_size=6)
    state = remade(tx, num_steps=9, **WHOLE)
    g = gradient(flat_params(), RETAINED, L2)
    step, after = tx.update(tree.unflatten(g, cases.make_params()), state, cases.make_params())
    newton = np.linalg.solve(hessian(RETAINED, L2), g)
    np.testing.assert_allclose(tree.flatten(step), newton, rtol=2e-3, atol=2e-4)
    assert int(after.count) == 10


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2, 4, 9])
def test_an_optax_lbfgs_memory_holds_as_many_pairs_as_steps_have_made(num_steps):
    state = remade(optax.scale_by_lbfgs(memory_size=3), num_steps=num_steps, **WHOLE)
    held = np.flatnonzero(np.asarray(state.weights_memory))
    written = [t % 3 for t in range(num_steps - 1)][-3:]  # the slots optax has written by then
    assert sorted(held) == sorted(set(written))
    newest = (num_steps - 1) % 3  # where the next step writes
    assert (num_steps >= 4) or newest not in held
    h = hessian(RETAINED, L2)
    for slot in held:
        s, y = (
            tree.flatten(jax.tree.map(lambda leaf, i=slot: leaf[i], memory))
            for memory in (state.diff_params_memory, state.diff_updates_memory)
        )
        np.testing.assert_allclose(y, h @ s, rtol=1e-4, atol=1e-5)
        assert np.isclose(float(state.weights_memory[slot]), 1 / (s @ y), rtol=1e-4)


@pytest.mark.slow
def test_a_masked_lbfgs_gets_the_curvature_of_its_own_block():
    tx = optax.masked(
        optax.scale_by_lbfgs(memory_size=5),
        lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 0, params),
    )
    state = remade(tx, num_steps=9, **WHOLE)
    g = gradient(flat_params(), RETAINED, L2)
    step, _ = tx.update(tree.unflatten(g, cases.make_params()), state, cases.make_params())
    block = np.linalg.solve(hessian(RETAINED, L2)[1:, 1:], g[1:])
    np.testing.assert_allclose(tree.flatten(step), np.r_[g[0], block], rtol=2e-3, atol=2e-4)


class OnlineState(NamedTuple):
    """A transform of the library's own kind: a memory and a counter."""

    steps: Any
    memory: lbfgs.LBFGSMemory


@pytest.mark.slow
def test_a_memory_of_the_kernels_is_found_inside_any_state():
    def update(updates, state, params=None):
        memory, _ = lbfgs.push(state.memory, updates, updates)
        return updates, OnlineState(state.steps + 1, memory)

    tx = optax.GradientTransformation(
        lambda params: OnlineState(jnp.zeros((), jnp.int32), lbfgs.init(params, 6)), update
    )
    state = remade(tx, num_steps=9, **WHOLE)
    v = np.arange(6.0)
    found = lbfgs.inverse_product(state.memory, tree.unflatten(v, cases.make_params()))
    expected = np.linalg.solve(hessian(RETAINED, L2), v)
    np.testing.assert_allclose(tree.flatten(found), expected, rtol=5e-3, atol=5e-4)
    assert (int(state.steps), int(state.memory.push_clock)) == (9, 9)
    assert sorted(np.asarray(state.memory.pair_clocks)) == [3, 4, 5, 6, 7, 8]
    assert np.all(np.asarray(state.memory.pair_owners) == -1)


@pytest.mark.slow
def test_online_lbfgs_of_the_library_is_known():
    state = remade(
        transforms.online_lbfgs(cases.squared_error, memory_size=6), num_steps=9, **WHOLE
    )
    g = gradient(flat_params(), RETAINED, L2)
    found = lbfgs.inverse_product(state.curvature, tree.unflatten(g, cases.make_params()))
    expected = np.linalg.solve(hessian(RETAINED, L2), g)
    np.testing.assert_allclose(tree.flatten(found), expected, rtol=5e-3, atol=5e-4)
    assert int(state.num_online_steps) == 9
    assert np.isclose(float(state.gradient_square_sum), 9 * g @ g, rtol=1e-4)


@pytest.mark.slow
def test_without_positive_curvature_a_memory_starts_afresh():
    concave = lambda params, batch: -cases.squared_error(params, batch)
    tx = optax.scale_by_lbfgs(memory_size=3)
    state = remade(tx, loss_fn=concave)
    assert differing(state, tx.init(cases.make_params())) == []


@pytest.mark.slow
def test_at_negative_curvature_no_later_pair_is_taken():
    """The first directions are convex ones; no pair has s'y <= 0."""

    def saddle(w, batch):
        return jnp.mean(batch) * (2 * w[0] ** 2 + w[1] ** 2 - 0.5 * w[2] ** 2)

    state = records.rebuild(
        optax.scale_by_lbfgs(memory_size=4), saddle, jnp.array([1.0, 1.0, 0.5]),
        np.ones(4, np.float32), range(4), num_steps=9, key=KEY,
    )  # fmt: skip
    weights = np.asarray(state.weights_memory)
    assert np.all(weights >= 0)
    assert 0 < np.count_nonzero(weights) + 1 < 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# --- refusals -----------------------------------------------------------------------------------


class SlowState(NamedTuple):
    slow: Any


def slow():
    update = lambda updates, state, params=None: (updates, SlowState(updates))
    return optax.GradientTransformation(SlowState, update)


REFUSED = {
    "rprop": (optax.scale_by_rprop(0.1), "ScaleByRpropState"),
    "schedule_free": (optax.contrib.schedule_free_sgd(0.1), "ScheduleFreeState"),
    "prodigy": (optax.chain(optax.clip(1.0), optax.contrib.prodigy()), "ProdigyState"),
    "own": (optax.chain(slow(), optax.trace(0.9)), "SlowState"),
    "after": (optax.chain(optax.scale_by_lbfgs(), optax.trace(0.9)), "TraceState.*LBFGS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_part_that_no_rule_knows_is_refused_by_name_before_any_row_is_read(kind):
    tx, name = REFUSED[kind]
    with pytest.raises(errors.UnknownStateError, match=name):
        remade(tx, data=Spy([]))


def test_a_rebuild_keeps_the_rules_that_it_was_made_with_and_names_them(monkeypatch):
    monkeypatch.setattr(records.rules, "_RULES", dict(records.rules._LIBRARY))
    given = {}
    before = records.Rebuild(key=KEY, batch_size=4, num_batches=3, rules=given)
    records.register_state(SlowState, records.as_driven)
    driven = records.Rebuild(key=KEY, batch_size=4, num_batches=3)
    make = lambda options: records.make_rebuild(
        slow(), cases.squared_error, options, records.Penalty(None)
    )
    early, late = make(before), make(driven)
    records.register_state(SlowState, records.as_fresh)
    given[SlowState] = records.as_fresh
    with pytest.raises(errors.UnknownStateError, match="SlowState"):
        early.check(cases.make_params())
    params = cases.make_params()
    state = late.again(params, records.RowReader(DATA), RETAINED, num_steps=1)
    assert differing(state.slow, params)
    assert "rules of its own" not in before.assumption
    assert "(SlowState: as_driven)" in driven.assumption


@pytest.mark.slow
def test_a_rule_may_be_given_or_registered(monkeypatch):
    monkeypatch.setattr(records.rules, "_RULES", dict(records.rules._LIBRARY))
    tx = optax.chain(optax.trace(0.9), slow())
    kept = remade(tx, rules={SlowState: records.as_driven})[1].slow
    assert differing(kept, cases.make_params())
    fresh = remade(tx, rules={SlowState: records.as_fresh})[1].slow
    assert differing(fresh, cases.make_params()) == []
    halved = lambda driven, fresh, context: SlowState(
        jax.tree.map(lambda leaf: leaf / context.num_steps, fresh.slow)
    )
    records.register_state(SlowState, halved)
    assert differing(remade(tx)[1].slow, fresh)
    assert differing(remade(tx, rules={SlowState: records.as_fresh})[1].slow, fresh) == []
    after = optax.chain(optax.scale_by_lbfgs(), optax.ema(0.9))
    state = remade(after, rules={optax.EmaState: records.as_fresh})
    assert int(state[1].count) == 0


@pytest.mark.slow
def test_parts_side_by_side_do_not_feed_each_other():
    labels = lambda params: jax.tree.map(lambda p: "a" if jnp.ndim(p) else "b", params)
    tx = optax.partition({"a": optax.scale_by_lbfgs(), "b": optax.trace(0.9)}, labels)
    assert int(remade(tx).inner_states["a"].inner_state.count) == STEPS


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ids": []}, errors.RetainSetEmptyError, "at least one retained row"),
        ({"ids": [-1, 2]}, errors.IdRangeError, "padding"),
        ({"data": None}, errors.MissingDataError, "data="),
        ({"num_steps": -1}, ValueError, "num_steps=-1"),
        ({"num_steps": 1.5}, ValueError, "num_steps=1.5"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "typed key"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_makes_no_sense_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        remade(optax.trace(0.9), **options)


@pytest.mark.slow
def test_counts_inside_multi_steps_are_those_of_the_steps_that_were_made():
    tx = optax.MultiSteps(optax.scale_by_lbfgs(memory_size=3), 2).gradient_transformation()
    state = remade(tx, num_steps=9)
    assert (int(state.inner_opt_state.count), int(state.mini_step)) == (4, 1)


@pytest.mark.slow
def test_the_hessian_products_are_those_of_the_sampled_rows():
    """A guard of the oracle here: `hessian` is the library's Hessian too."""
    rows = jax.tree.map(lambda leaf: leaf[RETAINED], DATA)
    v = cases.make_params()
    product = jax.jit(kernels.hvp(cases.squared_error))(cases.make_params(), rows, v)
    np.testing.assert_allclose(
        tree.flatten(product), hessian(RETAINED, 0.0) @ tree.flatten(v), rtol=1e-5
    )


@pytest.mark.slow
def test_the_next_step_of_rmsprop_is_five_times_nearer_than_from_a_fresh_state():
    """Softmax regression on digits, parameters those of the run without fifty rows."""
    train, test = datasets.digits(flatten=True)
    rng, ids = np.random.default_rng(0), np.arange(1000)
    data = {name: np.asarray(leaf) for name, leaf in train[ids].items()}
    loss = lambda w, batch: optax.softmax_cross_entropy_with_integer_labels(
        batch["x"] @ w, batch["y"]
    ).mean()
    steps = np.concatenate([rng.permutation(1000)[:992].reshape(31, 32) for _ in range(10)])
    forget = rng.choice(1000, 50, replace=False)
    tx = optax.rmsprop(1e-2)
    params, ideal = records.oracle(
        tx, loss, jnp.zeros((64, 10)), log=records.log_of(steps), data=data, forget=forget, l2=0.01
    )
    again = records.rebuild(
        tx, loss, params, data, np.setdiff1d(ids, forget), num_steps=len(steps), key=KEY,
        batch_size=32, l2=0.01,
    )  # fmt: skip
    held_out = [test[np.arange(i, i + 64)] for i in (0, 64, 128)]
    measure = audits.make_state_alignment(tx, loss, batches=held_out, l2=0.01, key=KEY)
    error = lambda state: measure((params, state), (params, ideal)).update_error.value
    assert error(again) < 0.2 * error(tx.init(params))
