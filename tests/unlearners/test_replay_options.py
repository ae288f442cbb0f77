"""The options of `unlearners.replay`: verification, keys, L2, segments, certificates, quotes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import certificates, errors, kernels, records, unlearners
from tests.conformance import cases
from tests.conformance.cases import PLAIN, REPLAY, differing, make_problem, trained
from tests.unlearners import _problems as problems

REPLAY_CASE = next(case for case in cases.CASES if case.name == "replay")


@functools.cache
def run():
    return trained("replay")


def other(inside=PLAIN, **options):
    """The suite's problem with other options; its forget works on the shared trained state."""
    return make_problem(REPLAY_CASE, inside, **options)


# --- verification ------------------------------------------------------------------------------


def test_a_bitwise_verification_is_certified_as_measured():
    result = other(verify="bitwise").forget(run().params, run().state, [3, 5])
    assert differing(result[:2], run().forgotten[:2]) == []
    assert result.info.measurements["verified"] == "bitwise"
    fidelity = result.info.certificate.assumptions[0]
    assert (fidelity.name, fidelity.status) == ("replay fidelity", "measured")
    assert "bit for bit" in fidelity.text


def test_without_verification_fidelity_is_assumed():
    info = other(verify="off").forget(run().params, run().state, [3, 5]).info
    fidelity = info.certificate.assumptions[0]
    assert (fidelity.name, fidelity.status) == ("replay fidelity", "assumed")
    assert info.measurements["verified"] == "no"


def test_the_default_verifies():
    assert run().forgotten.info.measurements["verified"] == "bitwise"


def test_a_difference_below_the_tolerance_is_reported():
    nearly = jax.tree.map(lambda leaf: leaf * (1 + 2e-6), run().params)
    result = other(verify="report").forget(nearly, run().state, [3, 5])
    distance = result.info.measurements["replay_distance"]
    assert 1e-7 < distance < 1e-5
    certificate = result.info.certificate
    assert certificate.residuals["replay_distance"] >= distance
    assert "rounding" in certificate.why_no_epsilon
    assert certificate.assumptions[0].status == "measured"


@pytest.mark.parametrize("verify", ["report", "bitwise"])
@pytest.mark.parametrize("what", ["params", "state", "data"])
def test_tampering_between_training_and_forget_is_refused(verify, what):
    params, state, data = run().params, run().state, run().problem.data
    if what == "params":
        params = params | {"bias": params["bias"] + 0.01}
    if what == "state":
        state = state._replace(inner=jax.tree.map(lambda leaf: leaf * 2, state.inner))
    if what == "data":
        data = data | {"y": data["y"] + 0.1}
    before = cases.bits((params, state))
    with pytest.raises(errors.VerificationError, match="changed outside update"):
        other(verify=verify).forget(params, state, [3, 5], data=data)
    assert cases.bits((params, state)) == before


def test_bitwise_refuses_a_single_ulp():
    params = run().params | {"bias": jnp.nextafter(run().params["bias"], jnp.float32(9))}
    with pytest.raises(errors.VerificationError, match="bit for bit"):
        other(verify="bitwise").forget(params, run().state, [3, 5])


def test_a_refusal_names_the_extra_arguments_that_a_replay_cannot_know():
    def update(updates, state, params=None, *, moon_phase=0.0, **extra):
        return jax.tree.map(lambda g: -0.1 * (1 + moon_phase) * g, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    problem = other(tx=tx, extra={"moon_phase": jnp.float32(0.5)}, verify="report")
    params, state = problem.train()
    with pytest.raises(errors.VerificationError, match="moon_phase"):
        problem.forget(params, state, [3])


def test_gradients_of_other_code_are_within_the_reported_tolerance():
    problem = other(verify="report")

    @jax.jit
    def step(params, state, rows, ids):
        kept = ids >= 0
        loss = lambda p: (
            jnp.sum(jnp.where(kept, kernels.row_losses(problem.loss_fn)(p, rows), 0.0))
            / jnp.sum(kept)
        )
        updates, state = problem.unlearner.update(jax.grad(loss)(params), state, params, ids=ids)
        return optax.apply_updates(params, updates), state

    params, state = problem.start()
    for t in range(cases.STEPS):
        params, state = step(params, state, *problem.batch(cases.ids_of_step(t)))
    result = problem.forget(params, state, [3, 5])
    assert result.info.measurements["verified"] in ("bitwise", "within tolerance")
    assert result.info.measurements["replay_distance"] < 1e-5


# --- hyperparameters from outside ---------------------------------------------------------------


def test_a_learning_rate_set_in_the_loop_is_the_one_that_is_replayed():
    this = trained("replay", "hyperparams_set_in_chain")
    params = this.problem.params
    for t in range(cases.STEPS):
        ids = cases.ids_of_step(t)
        kept = [i for i in ids if i >= 0 and i not in (3, 5)]
        rows = {name: leaf[kept] for name, leaf in this.problem.data.items()}
        grads = jax.grad(cases.squared_error)(params, rows)
        scale, rate = len(kept) / np.sum(ids >= 0), 0.1 / (1 + t)
        params = jax.tree.map(
            lambda p, g, s=scale, r=rate: p - r * jnp.clip(g * s, -1, 1), params, grads
        )
    for mine, theirs in zip(jax.tree.leaves(this.forgotten.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# --- keys --------------------------------------------------------------------------------------


def dropout_loss(params, batch, key):
    """Squared error of a linear model whose inputs are dropped at random."""
    kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return cases.squared_error(params, batch | {"x": jnp.where(kept, 2.0 * batch["x"], 0.0)})


@functools.cache
def keyed_run():
    unlearner = unlearners.replay(
        optax.adam(0.05), dropout_loss, num_examples=cases.NUM_EXAMPLES, **REPLAY
    )
    gradient = kernels.weighted_grad(dropout_loss)

    @jax.jit
    def step(params, state, rows, ids, key):
        keys = kernels.example_keys(key, ids)
        grads = gradient(params, rows, ids >= 0, keys=keys)
        updates, state = unlearner.update(grads, state, params, ids=ids, key=key)
        return optax.apply_updates(params, updates), state

    data, params = cases.make_data(), cases.make_params()
    state = unlearner.init(params)
    for t in range(cases.STEPS):
        ids = cases.ids_of_step(t)
        rows = jax.tree.map(lambda leaf, ids=ids: leaf[np.maximum(ids, 0)], data)
        params, state = step(params, state, rows, ids, jax.random.key(100 + t))
    return unlearner, params, state


def test_a_loss_with_dropout_replays_its_keys_bitwise():
    unlearner, params, state = keyed_run()
    data = cases.make_data()
    result = unlearner.forget(params, state, [3, 5], data=data)
    judge = records.oracle(
        optax.adam(0.05), dropout_loss, cases.make_params(),
        log=state.record.log, data=data, forget=[3, 5],
    )  # fmt: skip
    assert differing(judge, (result.params, result.opt_state.inner)) == []


def test_dropping_a_row_shifts_no_other_rows_dropout():
    unlearner, params, state = keyed_run()
    data = cases.make_data()
    result = unlearner.forget(params, state, [3, 5], data=data)
    tx, params = optax.adam(0.05), cases.make_params()
    inner = tx.init(params)
    one_row = jax.jit(jax.grad(dropout_loss))
    for t in range(cases.STEPS):
        ids = [int(i) for i in cases.ids_of_step(t) if i >= 0]
        num_rows = len(ids)
        total = jax.tree.map(jnp.zeros_like, params)
        for i in ids:
            if i not in (3, 5):
                row = {name: leaf[i : i + 1] for name, leaf in data.items()}
                key = jax.random.fold_in(jax.random.key(100 + t), i)
                total = jax.tree.map(jnp.add, total, one_row(params, row, key))
        updates, inner = tx.update(jax.tree.map(lambda g, n=num_rows: g / n, total), inner, params)
        params = optax.apply_updates(params, updates)
    for mine, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_loss_with_a_key_refuses_an_update_without_one():
    unlearner, params, state = keyed_run()
    with pytest.raises(ValueError, match="key=step_key"):
        unlearner.update(params, state, params, ids=np.array([0], np.int32))


# --- batches -----------------------------------------------------------------------------------


def test_a_smaller_last_batch_divides_by_its_own_size():
    problem = other()
    small = jax.jit(
        lambda p, s, rows, ids: problem.unlearner.update(
            kernels.weighted_grad(problem.loss_fn)(p, rows, ids >= 0), s, p, ids=ids
        )
    )
    params, state = problem.train(2)
    ids = np.array([7, 12], np.int32)
    updates, state = small(params, state, *problem.batch(ids))
    params = optax.apply_updates(params, updates)
    assert state.record.log.step_ids[2].tolist() == [7, 12, -1, -1]
    assert int(state.record.log.step_num_rows[2]) == 2
    result = problem.forget(params, state, [7])
    batches = [cases.ids_of_step(0), cases.ids_of_step(1), ids]
    judge, _ = problems.train_plainly(
        problem.tx, cases.squared_error, problem.params, problem.data, [7],
        steps=range(3), ids_of=lambda t: batches[t],
    )  # fmt: skip
    for mine, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(judge)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_more_rows_than_batch_size_are_refused_when_update_is_traced():
    params, state = run().params, run().state
    with pytest.raises(ValueError, match="at most batch_size=4 ids, got 5"):
        run().problem.unlearner.update(params, state, params, ids=np.arange(5, dtype=np.int32))


def test_an_update_that_is_not_finite_goes_through_and_is_counted():
    problem = other(tx=optax.sgd(0.0))
    params, state = problem.start()
    update = jax.jit(problem.unlearner.update)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    _, state = update(params, state, params, ids=np.array([0, 1, 2, 4], np.int32))
    updates, state = update(bad, state, params, ids=np.array([3, 5, 6, 7], np.int32))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(updates))
    assert state.record.log.step_non_finite[:3].tolist() == [False, True, False]
    result = problem.forget(params, state, [3])
    assert not result.opt_state.record.log.step_non_finite.any()


# --- L2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_l2_is_added_by_update_where_the_mask_is_true(masked):
    mask = {"bias": False, "deep": ((True,), ())} if masked else None
    problem = other(tx=optax.sgd(0.1), l2=0.3, l2_mask=mask)
    params, state = problem.train(3)
    result = problem.forget(params, state, [3])
    on = {"bias": not masked, "deep": ((True,), ())}
    judge = problem.params
    for t in range(3):
        ids = cases.ids_of_step(t)
        kept = [i for i in ids if i >= 0 and i != 3]
        rows = {name: leaf[kept] for name, leaf in problem.data.items()}
        grads = jax.grad(cases.squared_error)(judge, rows)
        scale = len(kept) / np.sum(ids >= 0)
        judge = jax.tree.map(
            lambda p, g, o, s=scale: p - 0.1 * (s * g + 0.3 * p * o), judge, grads, on
        )
    for mine, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(judge)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# --- segments ----------------------------------------------------------------------------------


def test_longer_segments_agree_up_to_rounding():
    result = other(segment_length=8).forget(run().params, run().state, [3, 5])
    for mine, theirs in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(run().forgotten.params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert cases.avals(result.opt_state) == cases.avals(run().state)


# --- certificates and quotes -------------------------------------------------------------------


def test_the_certificate_promises_the_full_state_exactly_and_no_epsilon():
    certificate = run().forgotten.info.certificate
    assert certificate.guarantee == "exact"
    assert certificate.scope == "full-state"
    assert certificate.target == "counterfactual"
    assert certificate.method == "replay"
    assert (certificate.epsilon, certificate.delta, certificate.noise) == (None, None, None)
    assert certificate.why_no_epsilon
    assert certificate.not_covered
    assert {a.status for a in certificate.assumptions} <= {"proven", "measured", "assumed"}


def test_the_certificate_verifies_against_the_trees_and_ids_it_speaks_of():
    info = run().forgotten.info
    speaks_of = {
        "params_before": run().params,
        "state_before": run().state.inner,
        "params_after": run().forgotten.params,
        "state_after": run().forgotten.opt_state.inner,
        "ids": [5, 3],
        "salt": info.commitment_salt,
    }
    verification = certificates.verify(info.certificate, **speaks_of)
    outcomes = {check.name: check.outcome for check in verification.checks}
    assert verification.ok
    assert {outcomes[name] for name in [*list(speaks_of)[:4], "forget set"]} == {"ok"}
    for name in list(speaks_of)[:4]:
        swapped = speaks_of | {
            name: speaks_of[
                name.replace("before", "AFTER").replace("after", "before").replace("AFTER", "after")
            ]
        }
        assert not certificates.verify(info.certificate, **swapped).ok
    assert not certificates.verify(info.certificate, **(speaks_of | {"ids": [3]})).ok


def test_the_certificate_survives_json_and_shows_no_id():
    certificate = run().forgotten.info.certificate
    assert certificates.Certificate.from_json(certificate.to_json()) == certificate
    assert "[3, 5]" not in certificate.to_json()


@pytest.mark.parametrize("ids", [[3, 5], [12], [0]], ids=str)
@pytest.mark.parametrize("verify", ["off", "report"])
def test_a_quote_is_what_then_happens(ids, verify):
    problem = other(verify=verify)
    quote = problem.unlearner.quote(run().params, run().state, ids)
    result = problem.forget(run().params, run().state, ids)
    replayed = result.info.measurements["replayed_steps"]
    assert quote.feasible
    assert quote.num_steps == replayed
    assert quote.num_gradients == replayed * (1 if verify == "off" else 2)
    assert quote.retrain_gradients == cases.STEPS
    assert quote.num_forgotten == len(ids)
    assert (quote.epsilon, quote.guarantee) == (None, "exact")
    assert quote.seconds is None
    again = problem.unlearner.quote(run().params, run().state, ids)
    assert again.seconds > 0


def test_a_quote_for_nothing_costs_nothing():
    quote = run().problem.unlearner.quote(run().params, run().state, [])
    assert (quote.num_steps, quote.num_gradients, quote.memory_bytes) == (0, 0, 0)


# --- what the factory refuses ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"max_steps": True},
        {"num_checkpoints": 0},
        {"segment_length": 0},
        {"normalizer": "mean"},
        {"verify": "yes"},
        {"num_examples": 0},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_before_any_training(options):
    arguments = {"num_examples": 4, **REPLAY} | options
    with pytest.raises(ValueError, match="Expected"):
        unlearners.replay(optax.sgd(0.1), cases.squared_error, **arguments).init(
            cases.make_params()
        )
