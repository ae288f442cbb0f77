"""recollect refuses a run that is not the recorded one, and a state that no run reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import errors, kernels, unlearners

NUM_ROWS, BATCH = 24, 6


def loss_fn(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_ROWS, 3)).astype(np.float32)
    return {"x": x, "y": (3 * x.sum(1)).astype(np.float32)}


DATA = make_data()
STEPS = np.concatenate([np.random.default_rng(e).permutation(NUM_ROWS) for e in range(3)])
STEPS = STEPS.reshape(-1, BATCH).astype(np.int32)


def make(tx=None, **options):
    return unlearners.recollect(
        tx or optax.sgd(0.05), loss_fn, num_examples=NUM_ROWS, batch_size=BATCH, max_steps=20,
        progress=False, **options,
    )  # fmt: skip


def train(unlearner, change=lambda grads: grads):
    gradient = kernels.weighted_grad(loss_fn)
    params = jnp.zeros(3)
    state = unlearner.init(params)

    @jax.jit
    def step(params, state, rows, ids):
        grads = change(gradient(params, rows, jnp.ones(BATCH)))
        updates, state = unlearner.update(grads, state, params, batch=rows, ids=ids)
        return optax.apply_updates(params, updates), state

    for ids in STEPS:
        params, state = step(params, state, {k: v[ids] for k, v in DATA.items()}, ids)
    return params, state


def clipped(grads):
    return grads * jnp.minimum(1.0, 0.1 / jnp.linalg.norm(grads))


@pytest.mark.parametrize("options", [{"if_rough": "replay"}, {"joint": True}], ids=str)
def test_a_run_whose_gradients_were_changed_before_update_is_refused(options):
    unlearner = make(**options)
    params, state = train(unlearner, clipped)
    with pytest.raises(errors.VerificationError, match="relative distance"):
        unlearner.forget(params, state, [3], data=DATA)
    with pytest.raises(errors.VerificationError, match="relative distance"):
        unlearner.refresh(params, state, data=DATA)


def test_a_small_late_step_with_another_gradient_is_refused():
    """Its share of all gradients is below the tolerance; that of its own step is not."""

    def stopped(grads):
        return jnp.where(jnp.linalg.norm(grads) < 0.1, 0.0, grads)

    unlearner = make(optax.sgd(0.5), verify_tolerance=0.02, num_probes=0)
    params, state = train(unlearner, stopped)
    assert 0 < state.record.along.gradient_gap < 0.02
    with pytest.raises(errors.VerificationError, match="worst step"):
        unlearner.forget(params, state, [3])
    params, state = train(unlearner)
    assert unlearner.forget(params, state, [3]).info.num_forgotten == 1
    assert state.record.along.step_gap < 1e-4


def test_the_same_run_is_served_where_verification_is_off():
    unlearner = make(verify="off", rough_above=1e9)
    params, state = train(unlearner, clipped)
    assert unlearner.forget(params, state, [3], data=DATA).info.num_forgotten == 1


def test_parameters_of_another_run_do_not_refresh():
    unlearner = make()
    params, state = train(unlearner)
    with pytest.raises(errors.VerificationError, match="replay to the given state"):
        unlearner.refresh(params + 100.0, state, data=DATA)


def test_a_state_that_no_run_reaches_is_refused():
    """A second moment moved below zero turns the next update into NaN."""
    unlearner = make(optax.rmsprop(0.01, eps=1e-6), rough_above=1e9, num_probes=0)
    params, state = train(unlearner)
    tangents = tuple(jnp.full_like(leaf, -100.0) for leaf in state.record.along.tangents)
    along = state.record.along._replace(tangents=tangents)
    state = state._replace(record=state.record._replace(along=along))
    with pytest.raises(errors.NonFiniteError, match="negative second moment"):
        unlearner.forget(params, state, [3])


def status_of_linearity(result):
    return {a.name: a.status for a in result.info.certificate.assumptions}["linearity"]


@pytest.mark.parametrize("options", [{}, {"joint": True}], ids=str)
def test_one_unit_is_measured_and_several_together_or_in_turn_are_not(options):
    unlearner = make(rough_above=1e9, **options)
    params, state = train(unlearner)
    one = unlearner.forget(params, state, [3], data=DATA)
    two = unlearner.forget(params, state, [3, 4], data=DATA)
    in_turn = unlearner.forget(one.params, one.opt_state, [4], data=DATA)
    found = [status_of_linearity(result) for result in (one, two, in_turn)]
    assert found == ["measured", "assumed", "assumed"]
    if not options:
        refreshed = unlearner.refresh(one.params, one.opt_state, data=DATA)
        again = unlearner.forget(*refreshed, [4], data=DATA)
        assert status_of_linearity(again) == "measured"


def fidelity_of(certificate):
    return next(a for a in certificate.assumptions if a.name == "replay fidelity")


def test_training_again_without_verification_is_not_called_exact_nor_compared():
    unlearner = make(verify="off", if_rough="replay", rough_above=1e-9)
    params, state = train(unlearner, lambda grads: 0.1 * grads)
    certificate = unlearner.forget(params, state, [3], data=DATA).info.certificate
    assert certificate.guarantee == unlearner.quote(params, state, [3]).guarantee == "heuristic"
    assert "not verified" in fidelity_of(certificate).text
    assert "compared" not in fidelity_of(certificate).text


@pytest.mark.parametrize("joint", [False, True])
def test_training_again_says_what_was_compared(joint):
    unlearner = make(if_rough="replay", rough_above=1e-9, joint=joint)
    params, state = train(unlearner)
    first = unlearner.forget(params, state, [3], data=DATA)
    later = unlearner.forget(first.params, first.opt_state, [4], data=DATA)
    found = [fidelity_of(result.info.certificate) for result in (first, later)]
    assert [a.status for a in found] == (["measured", "assumed"] if joint else ["assumed"] * 2)
    assert ["gradients of training" in a.text for a in found] == [not joint] * 2
    assert first.info.certificate.guarantee == "exact"


@pytest.mark.parametrize("options", [{"joint": True}, {"if_rough": "replay"}], ids=str)
def test_forgetting_nothing_is_quoted_at_nothing(options):
    unlearner = make(rough_above=1e-9, **options)
    params, state = train(unlearner)
    quote = unlearner.quote(params, state, [])
    assert (quote.feasible, quote.reason) == (True, "")
    assert (quote.num_gradients, quote.num_steps, quote.memory_bytes) == (0, 0, 0)
    assert unlearner.quote(params, state, [3]).num_gradients > 0


def test_tangents_are_stored_as_floats_only():
    with pytest.raises(ValueError, match="floating storage_dtype"):
        make(storage_dtype=jnp.int32)
