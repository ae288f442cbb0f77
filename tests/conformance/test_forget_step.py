"""`forget_step`, the pure part of `forget`: it jits, scans, vmaps, and poisons what failed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Status, errors
from tests.conformance import cases
from tests.conformance.cases import avals, differing, trained

each_method = cases.each(lambda case: case.crossed)
each = cases.each()
compiled = {}


def forget_step(case):
    """The method's `forget_step`, jitted once a session."""
    step = trained(case.name).problem.unlearner.forget_step
    return compiled.setdefault(case.name, jax.jit(step))


def operands(case, forget):
    return case.operands(trained(case.name), forget)


def inexact_leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def exploding(case):
    """Operands with one row whose loss is finite and whose gradient is not."""
    spoilt = int(cases.ids_of_step(0)[0])
    forget = [spoilt, 5] if case.differentiates == "gone" else [3, 5]
    params, state, rows, ids, weights = operands(case, forget)
    rows = jax.tree.map(np.array, rows)
    rows["x"][ids == spoilt] = 1e22
    params = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
    return params, case.spread(params, state), rows, ids, weights


def assert_close(a, b, tolerance=1e-4):
    for x, y in zip(inexact_leaves(a), inexact_leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@each
def test_it_keeps_shape_dtype_and_weak_type_of_every_leaf(case):
    params, state, *rest = operands(case, [3, 5])
    new_params, new_state, _ = forget_step(case)(params, state, *rest)
    assert avals(new_params) == avals(params)
    assert avals(new_state) == avals(state)


@pytest.mark.parametrize("pair", cases.CROSSED, ids="-".join)
def test_it_keeps_the_avals_of_every_optimizers_state(pair):
    run = trained(*pair)
    params, state, *rest = run.problem.case.operands(run, [3, 5])
    shaped = jax.eval_shape(run.problem.unlearner.forget_step, params, state, *rest)
    assert avals(shaped[0]) == avals(params)
    assert avals(shaped[1]) == avals(state)


@each
def test_it_is_forget_without_validation_and_noise(case):
    run = trained(case.name)
    params, _, arrays = forget_step(case)(*operands(case, [3, 5]))
    assert int(arrays["status"]) == Status.OK
    assert_close(params, case.before_noise(run.forgotten), 1e-5)


@each
def test_weight_zero_hides_the_content_of_a_row(case):
    params, state, rows, ids, weights = operands(case, [3, 5])
    spoilt = jax.tree.map(np.array, rows)
    spoilt["x"][weights == 0] = np.nan
    spoilt["y"][weights == 0] = 1e30
    result = forget_step(case)(params, state, spoilt, ids, weights)
    if case.exact:
        assert differing(result[:2], forget_step(case)(params, state, rows, ids, weights)[:2]) == []


@each_method
def test_it_scans_over_requests(case):
    requests = [[3, 5], [0, 7], [11, 1]]
    params, state, *_ = operands(case, [])
    many = [operands(case, forget)[2:] for forget in requests]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
    step = trained(case.name).problem.unlearner.forget_step

    def body(carry, request):
        new_params, _, arrays = step(params, state, *request)
        return carry + 1, (new_params, arrays["status"])

    count, (swept, status) = jax.jit(lambda requests: jax.lax.scan(body, 0, requests))(stacked)
    assert int(count) == 3
    assert status.tolist() == [0, 0, 0]
    for i, request in enumerate(many):
        alone, _, _ = forget_step(case)(params, state, *request)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], swept), alone)


@each_method
def test_it_vmaps_over_requests(case):
    requests = [[3, 5], [0, 7], [11, 1]]
    params, state, *_ = operands(case, [])
    many = [operands(case, forget)[2:] for forget in requests]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
    step = trained(case.name).problem.unlearner.forget_step
    mapped = jax.jit(jax.vmap(lambda *request: step(params, state, *request)[0]))(*stacked)
    for i, request in enumerate(many):
        alone, _, _ = forget_step(case)(params, state, *request)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone)


@each_method
def test_it_survives_donation_under_the_callers_jit(case):
    params, state, *rest = jax.tree.map(jnp.array, operands(case, [3, 5]))
    expected = forget_step(case)(params, state, *rest)
    copies = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, state))
    step = trained(case.name).problem.unlearner.forget_step
    result = jax.jit(step, donate_argnums=(0, 1))(*copies, *rest)
    assert_close(result[0], expected[0])
    assert avals(result[1]) == avals(state)


each_that_can_fail = cases.each(lambda case: case.differentiates is not None)


@each_that_can_fail
def test_failure_poisons_params_and_inner_state_instead_of_serving_them(case):
    new_params, new_state, arrays = forget_step(case)(*exploding(case))
    status = Status(int(arrays["status"]))
    assert status & (Status.NON_FINITE | Status.SOLVER_FAILED)
    assert Status(int(new_state.record.participation.status)) == status
    poisoned = inexact_leaves((new_params, new_state.inner))
    assert all(np.isnan(leaf).all() for leaf in poisoned)
    assert len(poisoned) > len(jax.tree.leaves(new_params))


@each_that_can_fail
def test_forget_refuses_a_poisoned_state(case):
    run = trained(case.name)
    new_params, new_state, _ = forget_step(case)(*exploding(case))
    with pytest.raises(errors.TrainingRecordError, match="cannot be deleted from"):
        run.problem.forget(new_params, new_state, [7])
