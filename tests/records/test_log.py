"""The step log: one row a step, and hyperparameters that were set from outside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import tree
from jaxunlearn.records import get_settings, init_log, log_of, set_settings, without, write_step

PARAMS = {"a": {"w": jnp.ones(3)}, "b": jnp.ones(2)}


def write(log, step, ids, **changes):
    row = {"ids": ids, "key": None, "settings": log.step_settings, "non_finite": jnp.array(False)}
    row["settings"] = jax.tree.map(lambda leaf: leaf[0], log.step_settings)
    return write_step(log, step, **(row | changes))


def test_a_step_is_written_where_it_belongs():
    log = init_log(3, 4, has_key=False, inner=())
    log = write(log, 0, jnp.array([5, 2, 9, 1]))
    log = write(log, 1, jnp.array([7, -1]), non_finite=jnp.array(True))
    assert log.step_ids.tolist() == [[5, 2, 9, 1], [7, -1, -1, -1], [-1] * 4]
    assert log.step_num_rows.tolist() == [4, 1, -1]
    assert log.step_non_finite.tolist() == [False, True, False]
    assert log.step_keys.size > 0  # Orbax refuses to save a leaf of size zero


def test_a_step_without_ids_counts_as_taken_with_no_row():
    log = write(init_log(2, 3, has_key=False, inner=()), 0, None)
    assert log.step_num_rows.tolist() == [0, -1]


@pytest.mark.parametrize("step", [3, 4, 1000])
def test_a_step_beyond_the_end_is_dropped(step):
    full = init_log(3, 2, has_key=True, inner=())
    for i in range(3):
        full = write(full, i, jnp.array([i, i + 1]), key=jax.random.key(i))
    assert tree.same_bits(write(full, jnp.int32(step), jnp.array([8, 9])), full)
    keyed = write(full, jnp.int32(step), jnp.array([8, 9]), key=jax.random.key(9))
    assert tree.same_bits(keyed, full)


def test_the_words_of_the_key_are_kept():
    log = init_log(2, 1, has_key=True, inner=())
    log = write(log, 1, jnp.array([0]), key=jax.random.key(42))
    assert np.array_equal(log.step_keys[1], jax.random.key_data(jax.random.key(42)))
    restored = jax.random.wrap_key_data(log.step_keys[1])
    assert restored == jax.random.key(42)


def test_a_key_is_not_kept_where_the_loss_takes_none():
    log = init_log(2, 1, has_key=False, inner=())
    assert tree.same_bits(
        write(log, 0, jnp.array([0]), key=jax.random.key(42)).step_keys, log.step_keys
    )


def test_it_updates_in_place_under_donation():
    donated = jax.jit(write, donate_argnums=0)
    log = donated(init_log(5000, 16, has_key=False, inner=()), 0, jnp.arange(16))
    where = log.step_ids.unsafe_buffer_pointer()
    for step in range(1, 4):
        log = donated(log, step, jnp.arange(16))
    assert log.step_ids.unsafe_buffer_pointer() == where


def injected(rate=0.1):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def clipped_sgd(learning_rate, max_norm):
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.sgd(learning_rate))


@optax.inject_hyperparams
def outer(scale):
    """An injected transform around another injected transform."""
    return optax.chain(injected(0.3), optax.scale(scale))


LABELS = {"a": "x", "b": "y"}
NESTED = {
    "bare": lambda: injected(),
    "two settings": lambda: optax.inject_hyperparams(clipped_sgd)(learning_rate=0.1, max_norm=1.0),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), injected(), optax.scale(1.0)),
    "named_chain": lambda: optax.named_chain(("one", injected()), ("two", injected(0.2))),
    "masked": lambda: optax.masked(injected(), {"a": True, "b": False}),
    "partition": lambda: optax.partition({"x": injected(0.1), "y": injected(0.2)}, LABELS),
    "MultiSteps": lambda: optax.MultiSteps(injected(), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(injected(), 3),
    "injected in injected": lambda: outer(scale=0.5),
}


def poke(state):
    """The state with every hyperparameter changed, as a user would set it from outside."""
    is_injected = lambda node: hasattr(node, "hyperparams")

    def change(node):
        if not is_injected(node):
            return node
        changed = {name: value + 1.0 for name, value in node.hyperparams.items()}
        inner = jax.tree.map(change, node.inner_state, is_leaf=is_injected)
        return node._replace(hyperparams=changed, inner_state=inner)

    return jax.tree.map(change, state, is_leaf=is_injected)


@pytest.mark.parametrize("name", NESTED)
def test_settings_are_found_wherever_they_are_nested_and_put_back(name):
    state = optax.with_extra_args_support(NESTED[name]()).init(PARAMS)
    poked = poke(state)
    assert not tree.same_bits(poked, state)
    before, after = get_settings(state), get_settings(poked)
    assert jax.tree.leaves(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isclose(new, old + 1.0)
    assert tree.same_bits(set_settings(state, after), poked)
    assert tree.same_bits(set_settings(poked, before), state)


@pytest.mark.parametrize("name", NESTED)
def test_settings_are_logged_step_by_step(name):
    state = optax.with_extra_args_support(NESTED[name]()).init(PARAMS)
    log = init_log(3, 1, has_key=False, inner=state)
    log = write(log, 0, jnp.array([0]), settings=get_settings(state))
    log = write(log, 1, jnp.array([0]), settings=get_settings(poke(state)))
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], log.step_settings)
    assert tree.same_bits(at(0), get_settings(state))
    assert tree.same_bits(at(1), get_settings(poke(state)))


def test_two_injected_transforms_do_not_share_an_entry():
    state = NESTED["named_chain"]().init(PARAMS)
    rates = sorted(float(v["learning_rate"]) for v in get_settings(state).values())
    assert np.allclose(rates, [0.1, 0.2])


@pytest.mark.parametrize("make", [lambda: optax.adam(0.1), lambda: optax.lbfgs()])
def test_a_transform_without_settings_has_none(make):
    state = optax.with_extra_args_support(make()).init(PARAMS)
    assert get_settings(state) == {}
    assert set_settings(state, {}) is state


def test_a_log_can_be_written_from_plain_arrays():
    keys = jax.random.split(jax.random.key(0), 2)
    log = log_of([[1, 2, -1], [3, -1, -1]], keys=keys)
    assert log.step_num_rows.tolist() == [2, 1]
    assert np.array_equal(log.step_keys, jax.random.key_data(keys))
    assert log_of([[1, -1]], num_rows=[2]).step_num_rows.tolist() == [2]


def test_without_overwrites_the_ids_and_leaves_the_counts():
    log = log_of([[1, 2, -1], [3, 1, 1]])
    kept = without(log, np.array([1, 7], np.int32))
    assert kept.step_ids.tolist() == [[-1, 2, -1], [3, -1, -1]]
    assert kept.step_num_rows.tolist() == [2, 3]
    assert log.step_ids.tolist() == [[1, 2, -1], [3, 1, 1]]


def test_avals_stay_as_they_are():
    avals = lambda t: jax.tree.map(lambda leaf: (leaf.aval, leaf.weak_type), t)
    state = injected().init(PARAMS)
    start = init_log(3, 2, has_key=True, inner=state)
    row = functools.partial(write, start, jnp.int32(1), settings=get_settings(state))
    assert avals(row(jnp.array([1, 2]), key=jax.random.key(0))) == avals(start)
