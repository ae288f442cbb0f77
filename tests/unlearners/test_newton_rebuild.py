"""`unlearners.newton` with `rebuild`: the certified scope is the optimizer's state as well."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Budget, certificates, errors, kernels, records
from jaxunlearn.unlearners import newton
from tests.conformance import cases
from tests.conformance.cases import differing

L2, KEY = 0.5, jax.random.key(4)
REBUILD = records.Rebuild(key=KEY, batch_size=4, num_batches=3)
TX = optax.chain(
    optax.inject_hyperparams(optax.adamw)(0.1),
    optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 30)),
)


@functools.cache
def unlearner(rebuild=REBUILD, tx=TX):
    return newton(
        tx, cases.squared_error, num_examples=cases.NUM_EXAMPLES, l2=L2, noise_stddev=10.0,
        budget=Budget(epsilon=50.0, delta=1e-5, max_forget=8), rebuild=rebuild,
        entropy=cases.Entropy(),
    )  # fmt: skip


@functools.cache
def trained(seed: int, seen: tuple[int, ...]):
    """Seven steps over rows drawn from `seen`, from a start of their own."""
    rng = np.random.default_rng(seed)
    data, gradient = cases.make_data(), kernels.weighted_grad(cases.squared_error)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(), cases.make_params())
    state = unlearner().init(params)

    @jax.jit
    def step(params, state, rows, ids):
        grads = gradient(params, rows, jnp.ones(4))
        updates, state = unlearner().update(grads, state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    order = np.concatenate([rng.permutation(seen), rng.permutation(seen), rng.permutation(seen)])
    for ids in order[:28].reshape(7, 4).astype(np.int32):
        rows = jax.tree.map(lambda leaf, ids=ids: leaf[ids], data)
        params, state = step(params, state, rows, ids)
    return params, state


HISTORIES = {"one": (1, tuple(range(12)), [11]), "other": (2, (*range(11), 12), [12])}


def remade_from(params, settings=None):
    return records.rebuild(
        TX, cases.squared_error, params, cases.make_data(), range(11), num_steps=7, key=KEY,
        batch_size=4, num_batches=3, l2=L2, settings=settings,
    )  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES)
def test_the_state_is_the_rebuild_of_what_is_released_whatever_the_history(history):
    """Two runs from other starts, in other orders, over other rows to forget: one function of the
    released parameters gives both states, byte for byte."""
    seed, seen, forget = HISTORIES[history]
    params, state = trained(seed, seen)
    result = unlearner().forget(params, state, forget, data=cases.make_data())
    assert differing(result.opt_state.inner, remade_from(result.params)) == []


def test_nothing_of_the_state_handed_in_enters_the_released_one():
    params, state = trained(*HISTORIES["one"][:2])
    clean = unlearner().forget(params, state, [11], data=cases.make_data())
    spoilt = state._replace(
        inner=jax.tree.map(lambda leaf: leaf + (1000 if leaf.dtype.kind == "f" else 3), state.inner)
    )
    public = records.get_settings(state.inner)
    spoilt = spoilt._replace(inner=records.set_settings(spoilt.inner, public))
    dirty = unlearner().forget(params, spoilt, [11], data=cases.make_data())
    same = remade_from(dirty.params)
    assert differing(dirty.opt_state.inner, same) == []
    assert int(clean.opt_state.inner[0].count) == int(dirty.opt_state.inner[0].count) == 7


def test_a_rate_that_was_set_from_outside_stays_and_is_named_as_public():
    params, state = trained(*HISTORIES["one"][:2])
    settings = records.get_settings(state.inner)
    settings = {
        path: {**held, "learning_rate": jnp.float32(0.01)} for path, held in settings.items()
    }
    lowered = state._replace(inner=records.set_settings(state.inner, settings))
    result = unlearner().forget(params, lowered, [11], data=cases.make_data())
    inner = result.opt_state.inner
    assert float(inner[0].hyperparams["learning_rate"]) == np.float32(0.01)
    assert differing(inner, remade_from(result.params, settings)) == []
    assumed = {a.name: a.text for a in result.info.certificate.assumptions}
    assert "set from outside" in assumed["public rebuild"]


def test_the_certificate_says_full_state_and_what_it_takes_on_trust():
    params, state = trained(*HISTORIES["one"][:2])
    result = unlearner().forget(params, state, [11], data=cases.make_data())
    certificate = result.info.certificate
    assert (certificate.scope, certificate.guarantee) == ("full-state", "certified")
    rebuilt = next(a for a in certificate.assumptions if a.name == "public rebuild")
    assert rebuilt.status == "assumed"
    assert "number of updates" in rebuilt.text
    assert not any("optimizer state" in line for line in certificate.not_covered)
    verified = certificates.verify(
        certificate.to_json(), params_after=result.params, state_after=result.opt_state.inner,
        allow_injected_noise=True,
    )  # fmt: skip
    assert verified.ok


@pytest.mark.slow
def test_the_default_stays_scope_params_with_a_fresh_state():
    params, state = trained(*HISTORIES["one"][:2])
    result = unlearner(None).forget(params, state, [11], data=cases.make_data())
    assert result.info.certificate.scope == "params"
    assert any("optimizer state" in line for line in result.info.certificate.not_covered)
    assert differing(result.opt_state.inner, TX.init(result.params)) == []


@pytest.mark.slow
def test_training_and_a_second_deletion_go_on_from_the_rebuilt_state():
    params, state = trained(*HISTORIES["one"][:2])
    first = unlearner().forget(params, state, [11], data=cases.make_data())
    second = unlearner().forget(first.params, first.opt_state, [3], data=cases.make_data())
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = unlearner().update(zeros, second.opt_state, second.params, ids=np.zeros(4, np.int32))
    assert int(state.inner[0].count) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner))


def test_an_optimizer_that_cannot_be_rebuilt_is_refused_before_training():
    refused = unlearner(REBUILD, optax.contrib.schedule_free_sgd(0.1))
    with pytest.raises(errors.UnknownStateError, match="ScheduleFreeState"):
        refused.init(cases.make_params())
