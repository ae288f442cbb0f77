"""`unlearners.newton`: where the step lands, what bounds it, and what a release may cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxunlearn import Budget, Status, accounting, certificates, errors, kernels, tree
from jaxunlearn.records import unpack_float64
from jaxunlearn.unlearners import newton
from tests.conformance import cases
from tests.unlearners import _convex as convex

L2, BUDGET = 0.5, Budget(epsilon=1.0, delta=1e-4, max_forget=400)
IDS = np.arange(cases.NUM_SEEN)


def logistic_loss(w, batch):
    """Mean logistic loss of a linear model without bias, labels in {-1, 1}."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def features(batch):
    return batch["x"]


def observed(unlearner, params, num_examples):
    """The state of a run that has seen every id; the parameters stay as given."""
    update = jax.jit(unlearner.update)
    ids = np.arange(num_examples, dtype=np.int32)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return update(zeros, unlearner.init(params), params, ids=ids)[1]


def iterate(state):
    """The un-noised float64 iterate of the record."""
    return unpack_float64(state.record.iterate_words)


# --- least squares: the closed form ------------------------------------------------------------


def quadratic(tx=None, loss_fn=cases.squared_error, **options):
    """A newton unlearner for least squares."""
    tx = optax.sgd(0.1) if tx is None else tx
    defaults = {"num_examples": cases.NUM_SEEN, "l2": L2, "budget": BUDGET, "noise_stddev": 50.0}
    return newton(tx, loss_fn, **(defaults | options))


SOLVERS = {
    "cg": kernels.cg(tol=1e-14, max_iterations=50),
    "cholesky": kernels.cholesky(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("forget", [[3], [0, 5, 12]], ids=str)
def test_forget_step_is_the_closed_form_on_a_quadratic(x64, solver, forget):
    data = jax.tree.map(lambda leaf: leaf[: cases.NUM_SEEN].astype(np.float64), cases.make_data())
    unlearner = quadratic(solver=SOLVERS[solver])
    params = jax.tree.map(
        jnp.asarray, convex.as_params(convex.least_squares_minimiser(data, IDS, L2), _wide())
    )
    state = observed(unlearner, params, cases.NUM_SEEN)
    weights = (~np.isin(IDS, forget)).astype(np.float64)
    moved, _, arrays = jax.jit(unlearner.forget_step)(
        params, state, data, IDS.astype(np.int32), weights
    )
    kept = np.setdiff1d(IDS, forget)
    expected = convex.least_squares_minimiser(data, kept, L2)
    assert np.linalg.norm(tree.flatten(moved) - expected) < 1e-10 * np.linalg.norm(expected)
    assert int(arrays["status"]) == Status.OK


def _wide():
    return cases.make_params(jnp.float64)


@pytest.mark.parametrize("requests", [[[3, 5]], [[5], [3, 7], [0]]], ids=str)
def test_the_iterate_of_forget_is_the_closed_form_on_a_quadratic(x64, requests):
    data = cases.make_data()
    unlearner = quadratic(solver=SOLVERS["cg"])
    params = jax.tree.map(
        jnp.asarray, convex.as_params(convex.least_squares_minimiser(data, IDS, L2), _wide())
    )
    state = observed(unlearner, params, cases.NUM_SEEN)
    gone = []
    for ids in requests:
        params, state, _ = unlearner.forget(params, state, ids, data=data)
        gone += ids
        expected = convex.least_squares_minimiser(data, np.setdiff1d(IDS, gone), L2)
        assert np.linalg.norm(iterate(state) - expected) < 1e-10 * np.linalg.norm(expected)


def test_two_steps_reach_the_closed_form_from_parameters_that_were_never_trained():
    data, params = cases.make_data(), cases.make_params()
    unlearner = quadratic(solver=SOLVERS["cg"], num_steps=2)
    result = unlearner.forget(
        params, observed(unlearner, params, cases.NUM_SEEN), [3, 5], data=data
    )
    expected = convex.least_squares_minimiser(data, np.setdiff1d(IDS, [3, 5]), L2)
    assert np.linalg.norm(iterate(result.opt_state) - expected) < 1e-10 * np.linalg.norm(expected)


def test_hessian_products_in_microbatches_land_in_the_same_place():
    unlearner, data, params, state = tiny()
    whole = unlearner.forget(params, state, [3], data=data)
    parts = quadratic(microbatch_size=5).forget(params, state, [3], data=data)
    np.testing.assert_allclose(iterate(parts.opt_state), iterate(whole.opt_state), rtol=1e-7)


# --- the residual bound ------------------------------------------------------------------------


@functools.cache
def digits():
    data = convex.small_digits()
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    return data, x, y, convex.logistic_minimiser(x, y, 1e-2)


def removal(data, l2, tx=None, **options):
    """A newton unlearner on 3 against 8, with the linear model's bound unless told otherwise."""
    tx = optax.sgd(0.1) if tx is None else tx
    model = accounting.LinearModel(features, convex.GAMMA)
    defaults = {"l2": l2, "budget": BUDGET, "noise_stddev": 10.0, "linear_model": model}
    return newton(tx, logistic_loss, num_examples=len(data["y"]), **(defaults | options))


def sequence(unlearner, data, params, state, order, l2):
    """Removes one row after another; yields the measurements and the true residual of each."""
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    kept = np.ones(len(y), bool)
    for i in order:
        params, state, info = unlearner.forget(params, state, [i], data=data)
        kept[i] = False
        truth = np.linalg.norm(convex.logistic_gradient(iterate(state), x[kept], y[kept], l2))
        yield info, truth


def assert_bounded(steps, within=5.0):
    """The bound is above the truth every time, and within a factor in the median."""
    ratios = []
    for info, truth in steps:
        figures = info.measurements
        assert figures["residual_bound"] >= truth
        assert figures["true_residual"] == pytest.approx(truth, rel=1e-6, abs=1e-12)
        terms = [figures[f"bound_{name}"] for name in ("solver", "curvature", "start")]
        assert sum(terms) == pytest.approx(figures["residual_bound"], rel=1e-12)
        assert min(terms) > 0
        assert set(info.certificate.residuals) == {"solver", "curvature", "start"}
        ratios.append(figures["residual_bound"] / truth)
    assert np.median(ratios) <= within
    return ratios


@functools.cache
def removed_digits():
    """40 removals, one after another, from parameters in float32 near the minimiser."""
    data, _, _, minimiser = digits()
    unlearner = removal(data, 1e-2)
    params = jnp.asarray(minimiser, jnp.float32)
    state = observed(unlearner, params, len(data["y"]))
    order = np.random.default_rng(0).permutation(len(data["y"]))[:40]
    return list(sequence(unlearner, data, params, state, order, 1e-2))


def test_the_bound_is_above_the_true_residual_and_within_five_times_of_it():
    ratios = assert_bounded(removed_digits())
    assert len(ratios) == 40


def test_the_third_term_of_the_first_bound_is_the_residual_of_training():
    _, x, y, minimiser = digits()
    start = np.asarray(minimiser, np.float32).astype(np.float64)
    truth = np.linalg.norm(convex.logistic_gradient(start, x, y, 1e-2))
    figures = removed_digits()[0][0].measurements
    assert figures["start_residual"] == pytest.approx(truth, rel=1e-6)
    assert figures["bound_start"] >= truth
    later = removed_digits()[1][0].measurements
    assert later["start_residual"] == pytest.approx(figures["true_residual"], rel=1e-6)


def test_the_distance_bound_is_above_the_distance_to_the_retained_minimiser():
    data, x, y, minimiser = digits()
    unlearner = removal(data, 1e-2)
    params = jnp.asarray(minimiser, jnp.float32)
    ids = np.arange(0, 60, 3)
    result = unlearner.forget(params, observed(unlearner, params, len(y)), ids, data=data)
    kept = np.setdiff1d(np.arange(len(y)), ids)
    target = convex.logistic_minimiser(x[kept], y[kept], 1e-2)
    distance = np.linalg.norm(iterate(result.opt_state) - target)
    assert result.info.measurements["distance_bound"] >= distance
    assert result.info.certificate.sensitivity.value >= distance
    assert np.linalg.norm(minimiser - target) > 100 * distance


BAD_SOLVERS = {
    "one-iteration": kernels.cg(max_iterations=1),
    "does-nothing": lambda matvec, rhs: kernels.Solution(
        jax.tree.map(jnp.zeros_like, rhs), jnp.inf, jnp.int32(0), jnp.bool_(False)
    ),
    "wrong-sign": lambda matvec, rhs: kernels.Solution(
        jax.tree.map(jnp.negative, rhs), jnp.float64(0), jnp.int32(0), jnp.bool_(False)
    ),
}


@pytest.mark.parametrize("solver", BAD_SOLVERS)
@pytest.mark.parametrize("linear", [True, False], ids=["linear-model", "evaluated"])
def test_any_solver_is_certified_however_bad(solver, linear):
    data, _, y, minimiser = digits()
    model = {} if linear else {"linear_model": None}
    unlearner = removal(data, 1e-2, solver=BAD_SOLVERS[solver], **model)
    params = jnp.asarray(minimiser, jnp.float32)
    state = observed(unlearner, params, len(y))
    order = [5, 17, 29]
    kept = np.ones(len(y), bool)
    steps = sequence(unlearner, data, params, state, order, 1e-2)
    for i, (info, truth) in zip(order, steps, strict=True):
        kept[i] = False
        assert truth > 1e-3
        assert info.measurements["residual_bound"] >= truth
        assert info.measurements["distance_bound"] >= truth / (kept.sum() * 1e-2)


def test_the_bound_as_printed_is_above_the_default_one():
    data, _, y, minimiser = digits()
    params = jnp.asarray(minimiser, jnp.float32)
    bounds = {}
    for name, printed in (("default", False), ("printed", True)):
        model = accounting.LinearModel(features, convex.GAMMA, paper_bound=printed)
        unlearner = removal(data, 1e-2, linear_model=model)
        state = observed(unlearner, params, len(y))
        info = unlearner.forget(params, state, [5, 9], data=data).info
        bounds[name] = info.measurements
    assert bounds["printed"]["bound_curvature"] > bounds["default"]["bound_curvature"]
    assert bounds["printed"]["residual_bound"] > bounds["default"]["residual_bound"]
    assert bounds["default"]["residual_bound"] >= bounds["default"]["true_residual"]


def test_the_printed_bound_is_above_the_truth_for_rows_beyond_norm_one():
    y = np.where(np.arange(60) < 53, 1.0, -1.0)
    data = {"x": np.full((60, 1), 50.0, np.float32), "y": y.astype(np.float32)}
    minimiser = convex.logistic_minimiser(data["x"].astype(np.float64), y, 1e-2)
    model = accounting.LinearModel(features, convex.GAMMA, paper_bound=True)
    budget = Budget(epsilon=1.0, delta=1e-5, max_forget=20)
    unlearner = removal(data, 1e-2, linear_model=model, budget=budget, noise_stddev=1e6)
    params = jnp.asarray(minimiser, jnp.float32)
    state = observed(unlearner, params, len(y))
    figures = unlearner.forget(params, state, [3], data=data).info.measurements
    assert figures["true_residual"] <= figures["residual_bound"]


@pytest.mark.slow
@pytest.mark.data
def test_200_removals_from_mnist_stay_below_a_bound_within_five_times_of_the_truth(data_root):
    from jaxunlearn import datasets

    l2 = 1e-3
    data = convex.two_digits(datasets.mnist(flatten=True).train)
    solver = kernels.cg(tol=1e-6, max_iterations=300)
    unlearner = removal(data, l2, tx=optax.lbfgs(), solver=solver)
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    params, state = _train_lbfgs(unlearner, data, l2)
    start = np.linalg.norm(convex.logistic_gradient(np.asarray(params, np.float64), x, y, l2))
    assert 1e-4 < start < 1e-1
    order = np.random.default_rng(0).permutation(len(y))[:200]
    steps = list(sequence(unlearner, data, params, state, order, l2))
    ratios = assert_bounded(steps)
    assert len(ratios) == 200
    assert steps[0][0].measurements["start_residual"] == pytest.approx(start, rel=1e-6)
    assert steps[-1][0].measurements["budget_spent"] < 1


def _train_lbfgs(unlearner, data, l2, num_steps=60):
    """Full-batch L-BFGS inside the unlearner, as a user would train."""
    loss_fn = lambda w: logistic_loss(w, data)
    ids = np.arange(len(data["y"]), dtype=np.int32)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = unlearner.update(
            grads, state, params, ids=ids, value=value, grad=grads, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(data["x"].shape[1])
    state = unlearner.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


# --- constants of the papers -------------------------------------------------------------------


def test_sekharis_constant_as_printed_and_as_derived():
    sizes = {"num_forgotten": 10, "num_retained": 9990, "l2": 0.1}
    figures = {"lipschitz": 1.0, "hessian_lipschitz": 0.5}
    printed = accounting.newton_distance(**sizes, **figures, as_printed=True)
    derived = accounting.newton_distance(**sizes, **figures)
    assert printed == pytest.approx(1.0e-3, rel=1e-12)
    assert derived == pytest.approx(0.5 * 10**2 / (2 * 0.1**3 * 9990**2), rel=1e-12)
    assert derived < printed
    # A WorstCase states L without the L2 term, which at the minimiser is as large again.
    assert accounting.WorstCase(0.5, 0.5).distance(0.1, 10, 9990) == pytest.approx(derived)
    assert accounting.WorstCase(0.5, 0.5, as_printed=True).distance(0.1, 10, 9990) == pytest.approx(
        printed
    )


@pytest.mark.parametrize("off", [0.0, 0.3, -0.3])
def test_the_worst_case_covers_a_removed_row_that_the_l2_term_doubles(off):
    """Rows that all but a few pull one way: the L2 share of delta is as large as the loss's."""
    num_rows, num_forgotten, hessian_lipschitz, l2 = 100, 5, 0.02, 0.1
    slopes = np.full(num_rows, -0.9)
    slopes[:num_forgotten] = 0.9
    centre = -slopes.mean() / l2

    def bend(t):
        t = jnp.clip(t, 0, 3.0)
        return hessian_lipschitz * t**3 / 6

    loss_fn = lambda w, batch: jnp.mean(batch * w + bend(w - centre))
    unlearner = newton(
        optax.sgd(0.1), loss_fn, num_examples=num_rows, l2=l2, noise_stddev=0.1,
        budget=Budget(epsilon=1e4, delta=1e-5, max_forget=num_forgotten),
        worst_case=accounting.WorstCase(1.0, hessian_lipschitz), solver=kernels.cholesky(),
    )  # fmt: skip
    params = jnp.float32(centre + off)
    _, state = unlearner.update(
        jnp.zeros(()), unlearner.init(params), params, ids=jnp.arange(num_rows)
    )
    result = unlearner.forget(params, state, range(num_forgotten), data=slopes)
    grid = np.linspace(centre - 5, centre + 5, 2_000_001)
    kept = slopes[num_forgotten:].mean()
    gradient = kept + hessian_lipschitz * np.clip(grid - centre, 0, 3.0) ** 2 / 2 + l2 * grid
    minimiser = grid[np.argmin(np.abs(gradient))]
    truth = abs(unpack_float64(result.opt_state.record.iterate_words)[0] - minimiser)
    assert truth > 0.02
    assert result.info.measurements["distance_bound"] >= truth


def test_a_loss_that_leaves_float64_is_refused():
    data, _, _, minimiser = digits()
    narrow = lambda w, batch: jnp.mean(
        jax.nn.softplus(-batch["y"] * (batch["x"] @ w).astype(jnp.float32))
    )
    unlearner = newton(
        optax.sgd(0.1), narrow, num_examples=len(data["y"]), l2=1e-2,
        budget=Budget(epsilon=1.0, delta=1e-4, max_forget=5),
    )  # fmt: skip
    params = jnp.asarray(minimiser, jnp.float32)
    state = observed(unlearner, params, len(data["y"]))
    with pytest.raises(errors.LossSignatureError, match="float64"):
        unlearner.forget(params, state, [1], data=data)


@pytest.mark.parametrize("as_printed", [False, True])
def test_the_worst_case_is_above_the_distance_to_the_retained_minimiser(as_printed):
    data, x, y, minimiser = digits()
    constants = accounting.WorstCase(1.0, convex.GAMMA, as_printed=as_printed)
    unlearner = removal(data, 1e-2, linear_model=None, worst_case=constants, noise_stddev=1e4)
    params = jnp.asarray(minimiser, jnp.float32)
    ids = [1, 2, 3]
    result = unlearner.forget(params, observed(unlearner, params, len(y)), ids, data=data)
    kept = np.setdiff1d(np.arange(len(y)), ids)
    target = convex.logistic_minimiser(x[kept], y[kept], 1e-2)
    figures = result.info.measurements
    assert figures["distance_bound"] >= np.linalg.norm(iterate(result.opt_state) - target)
    assert figures["distance_bound"] >= constants.distance(1e-2, 3, len(kept))
    assert {"bound_newton_error", "bound_start", "bound_solver"} <= set(figures)
    certificate = result.info.certificate
    assert certificate.sensitivity.status == "assumed"
    assert any(a.name == "loss constants" for a in certificate.assumptions)


def test_without_a_noise_the_worst_case_calibrates_one_that_fits_the_budget():
    budget = Budget(epsilon=1.0, delta=1e-4, max_forget=3)
    constants = accounting.WorstCase(2.0, 0.01)
    unlearner = quadratic(budget=budget, worst_case=constants, noise_stddev=None)
    data = cases.make_data()
    params = convex.as_params(convex.least_squares_minimiser(data, IDS, L2))
    params = jax.tree.map(jnp.asarray, params)
    state = observed(unlearner, params, cases.NUM_SEEN)
    one, three = (unlearner.forget(params, state, ids, data=data) for ids in ([3], [3, 5, 7]))
    stddev = one.info.measurements["noise_stddev"]
    assert stddev == three.info.measurements["noise_stddev"]
    least = constants.distance(L2, 3, cases.NUM_SEEN - 3)
    assert stddev >= accounting.certified_noise(
        epsilon=1.0, delta=1e-4, sensitivity=least, dimension=6
    )
    assert 0 < one.info.measurements["budget_spent"] < three.info.measurements["budget_spent"] <= 1


# --- where a later request starts --------------------------------------------------------------


@functools.cache
def tiny():
    """A least-squares run at its minimiser: unlearner, data, params, state."""
    unlearner = quadratic()
    data = cases.make_data()
    params = jax.tree.map(
        jnp.asarray, convex.as_params(convex.least_squares_minimiser(data, IDS, L2))
    )
    return unlearner, data, params, observed(unlearner, params, cases.NUM_SEEN)


def residual_at(flat, gone):
    """||grad L_D|| in sum form at a flat vector, D the rows not in `gone`."""
    kept = np.setdiff1d(IDS, gone)
    data = cases.make_data()
    z, y = convex.design(data, kept), data["y"][kept].astype(np.float64)
    return np.linalg.norm(z.T @ (z @ flat - y) + len(kept) * L2 * flat)


def test_a_second_request_starts_from_the_iterate_without_noise():
    unlearner, data, params, state = tiny()
    first = unlearner.forget(params, state, [3], data=data)
    second = unlearner.forget(first.params, first.opt_state, [5], data=data)
    released = tree.flatten(first.params)
    assert np.linalg.norm(released - iterate(first.opt_state)) > 1
    assert second.info.measurements["start_residual"] < 1e-4
    assert residual_at(released, [3]) > 1


def test_parameters_changed_after_a_release_are_started_from_and_their_residual_is_charged():
    unlearner, data, params, state = tiny()
    first = unlearner.forget(params, state, [3], data=data)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, params)
    second = unlearner.forget(moved, first.opt_state, [5], data=data)
    truth = residual_at(tree.flatten(moved), [3])
    assert truth > 0.1
    assert second.info.measurements["start_residual"] == pytest.approx(truth, rel=1e-6)
    assert second.info.measurements["residual_bound"] >= residual_at(
        iterate(second.opt_state), [3, 5]
    )


def test_parameters_before_any_release_are_started_from():
    unlearner, data, params, state = tiny()
    moved = jax.tree.map(lambda leaf: leaf + 0.01, params)
    info = unlearner.forget(moved, state, [5], data=data).info
    assert info.measurements["start_residual"] == pytest.approx(
        residual_at(tree.flatten(moved), []), rel=1e-6
    )


# --- the budget --------------------------------------------------------------------------------


def test_a_distance_beyond_the_budget_means_retrain_and_nothing_changes():
    unlearner = quadratic(noise_stddev=1e-9)
    _, data, params, state = tiny()
    state = convex.as_declared_by(unlearner, params, state)
    before = cases.bits((params, state))
    with pytest.raises(errors.BudgetExhaustedError, match="retrain"):
        unlearner.forget(params, state, [3], data=data)
    assert cases.bits((params, state)) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_releases_stop_before_the_budget_is_overspent():
    unlearner = quadratic(noise_stddev=3e-7)
    _, data, params, state = tiny()
    state = convex.as_declared_by(unlearner, params, state)
    spent, refusal = [0.0], None
    for i in range(cases.NUM_SEEN - 1):
        try:
            params, state, info = unlearner.forget(params, state, [i], data=data)
        except errors.BudgetExhaustedError as error:
            refusal = str(error)
            break
        spent.append(info.measurements["budget_spent"])
    assert "what is left of the budget" in refusal
    assert 2 < len(spent) < cases.NUM_SEEN
    assert all(a < b <= 1 for a, b in itertools.pairwise(spent))
    assert int(state.record.spent_units) <= accounting.BUDGET_UNITS


def test_max_forget_counts_ids_over_all_requests():
    unlearner = quadratic(budget=Budget(epsilon=1.0, delta=1e-4, max_forget=3))
    _, data, params, state = tiny()
    state = convex.as_declared_by(unlearner, params, state)
    params, state, _ = unlearner.forget(params, state, [3, 5], data=data)
    before = cases.bits((params, state))
    with pytest.raises(errors.BudgetExhaustedError, match="max_forget=3"):
        unlearner.forget(params, state, [0, 7], data=data)
    assert not unlearner.quote(params, state, [0, 7]).feasible
    assert cases.bits((params, state)) == before
    unlearner.forget(params, state, [0], data=data)


def test_every_release_is_composed_into_the_certificate():
    unlearner = quadratic(noise_stddev=5.0)
    _, data, params, state = tiny()
    state = convex.as_declared_by(unlearner, params, state)
    priors = []
    for i, ids in enumerate([[3], [5, 7], [0]]):
        params, state, info = unlearner.forget(params, state, ids, data=data)
        certificate = info.certificate
        priors.append(certificate.prior_mu)
        assert certificate.releases_covered == i + 1 == int(state.record.num_releases)
        assert (certificate.epsilon, certificate.delta) == (BUDGET.epsilon, BUDGET.delta)
        verification = certificates.verify(
            certificate, params_after=params, state_after=state.inner, ids=ids,
            salt=info.commitment_salt,
        )  # fmt: skip
        assert verification.ok, str(verification)
    assert priors[0] == 0 < priors[1] < priors[2]


def test_forgetting_the_whole_retain_set_is_refused():
    unlearner, data, params, state = tiny()
    with pytest.raises(errors.RetainSetEmptyError, match="nothing left to fit"):
        unlearner.forget(params, state, IDS, data=data)


def test_a_quote_states_the_budget_and_the_number_of_ids():
    unlearner, _, params, state = tiny()
    quote = unlearner.quote(params, state, [3, 5])
    assert (quote.guarantee, quote.epsilon, quote.delta) == ("certified", 1.0, 1e-4)
    assert (quote.num_forgotten, quote.feasible, quote.retrain_gradients) == (2, True, 1)


# --- noise -------------------------------------------------------------------------------------


def wide_loss(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


@functools.cache
def drawn_noise():
    """The noise of four releases of 400 parameters, in units of the certified stddev."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(6, 400)).astype(np.float32) / 20, "y": np.ones(6, np.float32)}
    budget = Budget(epsilon=30.0, delta=1e-4, max_forget=4)
    unlearner = newton(
        optax.sgd(0.1), wide_loss, num_examples=6, l2=1.0, budget=budget, noise_stddev=2.0,
        entropy=cases.Entropy(b"noise"),
    )  # fmt: skip
    params = jnp.zeros(400)
    state, noise = observed(unlearner, params, 6), []
    for i in range(4):
        params, state, info = unlearner.forget(params, state, [i], data=data)
        drawn = np.asarray(params, np.float64) - iterate(state)
        noise.append(drawn / info.certificate.noise.stddev)
    return np.stack(noise)


ALPHA = 1e-6


def is_accepted(noise) -> bool:
    """Two-sided chi-square test of unit variance at level ALPHA."""
    low, high = scipy.stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], noise.size)
    return low < np.sum(noise**2) < high


def power(scale) -> float:
    """Probability that noise of this scale is rejected."""
    low, high = scipy.stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 1600) / scale**2
    return scipy.stats.chi2.cdf(low, 1600) + scipy.stats.chi2.sf(high, 1600)


def test_released_noise_has_the_certified_scale_and_two_thirds_or_three_halves_would_not_pass():
    noise = drawn_noise()
    assert noise.size == 1600
    assert is_accepted(noise)
    for scale in (2 / 3, 3 / 2):
        assert power(scale) > 1 - 1e-6
        assert not is_accepted(scale * noise)


def test_released_noise_is_normal_and_fresh_in_every_release():
    noise = drawn_noise()
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > ALPHA
    correlations = np.corrcoef(noise)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4.9 / np.sqrt(400)


def test_the_noise_comes_from_the_entropy_and_from_nothing_else():
    _, data, params, state = tiny()
    counted = []

    def source(size):
        counted.append(size)
        return np.random.default_rng(len(counted)).bytes(size)

    first = quadratic(entropy=source).forget(params, state, [3], data=data)
    drawn = sum(counted)
    counted.clear()
    again = quadratic(entropy=source).forget(params, state, [3], data=data)
    assert cases.differing(first[:2], again[:2]) == []
    assert drawn == sum(counted) > 0
    assert first.info.certificate.noise.rng == "injected"
    assert not certificates.verify(first.info.certificate).ok
    assert certificates.verify(first.info.certificate, allow_injected_noise=True).ok


def test_the_operating_systems_entropy_is_the_default_and_differs_each_time():
    unlearner, data, params, state = tiny()
    first, again = (unlearner.forget(params, state, [3], data=data) for _ in range(2))
    assert np.array_equal(iterate(first.opt_state), iterate(again.opt_state))
    assert cases.differing(first.params, again.params)
    assert first.info.certificate.noise.rng == "os-entropy"


def test_an_entropy_source_that_fails_releases_nothing():
    _, data, params, state = tiny()

    def source(size):
        raise OSError("no entropy")

    before = cases.bits((params, state))
    with pytest.raises(OSError, match="no entropy"):
        quadratic(entropy=source).forget(params, state, [3], data=data)
    with pytest.raises(ValueError, match="entropy source"):
        quadratic(entropy=lambda size: b"").forget(params, state, [3], data=data)
    assert cases.bits((params, state)) == before


# --- what comes out ----------------------------------------------------------------------------


def test_the_released_state_is_a_fresh_one_of_the_released_parameters():
    tx = optax.adam(0.1)
    _, data, params, _ = tiny()
    unlearner = quadratic(tx=tx)
    result = unlearner.forget(params, observed(unlearner, params, cases.NUM_SEEN), [3], data=data)
    assert cases.differing(result.opt_state.inner, tx.init(result.params)) == []
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype(np.float32)}
    certificate = result.info.certificate
    assert (certificate.scope, certificate.target) == ("params", "minimiser")
    assert certificate.guarantee == "certified"
    assert any("optimizer state" in line for line in certificate.not_covered)


def test_the_certificate_survives_json():
    unlearner, data, params, state = tiny()
    certificate = unlearner.forget(params, state, [3], data=data).info.certificate
    assert certificates.Certificate.from_json(certificate.to_json()) == certificate


def test_update_adds_the_penalty_to_the_gradient():
    unlearner, _, params, _ = tiny()
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(unlearner.update)(grads, unlearner.init(params), params)
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        np.testing.assert_allclose(update, -0.1 * (1 + L2 * leaf), rtol=1e-6)


def test_a_row_that_is_not_finite_is_counted_and_moves_nothing():
    unlearner, data, params, state = tiny()
    landed = []
    for content in (np.nan, np.inf):
        bad = jax.tree.map(np.array, data)
        bad["x"][6, 2] = content
        result = unlearner.forget(params, state, [3], data=bad)
        landed.append(iterate(result.opt_state))
        assert result.info.measurements["num_non_finite_rows"] == 1
    assert np.array_equal(landed[0], landed[1])
    assert np.isfinite(landed[0]).all()
    assert (
        unlearner.forget(params, state, [3], data=data).info.measurements["num_non_finite_rows"]
        == 0
    )


# --- what is refused ---------------------------------------------------------------------------


def test_a_loss_that_is_not_convex_is_refused_and_nothing_changes():
    concave = lambda params, batch: -10.0 * cases.squared_error(params, batch)
    _, data, params, state = tiny()
    unlearner = quadratic(loss_fn=concave)
    before = cases.bits((params, state))
    with pytest.raises(errors.SolverError, match="convex"):
        unlearner.forget(params, state, [3], data=data)
    assert cases.bits((params, state)) == before


def test_a_loss_with_a_key_is_refused():
    with pytest.raises(errors.LossSignatureError, match="a minimiser has no key"):
        quadratic(loss_fn=lambda params, batch, key: 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"l2": 0.0},
        {"l2": -1.0},
        {"l2": float("nan")},
        {"noise_stddev": 0.0},
        {"num_steps": 0},
        {
            "worst_case": accounting.WorstCase(1.0, 1.0),
            "linear_model": accounting.LinearModel(features, 1.0),
        },
        {"linear_model": accounting.LinearModel(features, 1.0), "num_steps": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_a_bad_option_is_refused_before_any_training(options):
    with pytest.raises(ValueError, match="Expected"):
        quadratic(**options)


def test_a_state_keeps_to_the_budget_and_noise_of_its_init():
    data, _, y, minimiser = digits()
    params = jnp.asarray(minimiser, jnp.float32)
    state = observed(removal(data, 1e-2), params, len(y))
    other = Budget(epsilon=0.05, delta=BUDGET.delta, max_forget=BUDGET.max_forget)
    for changed in ({"noise_stddev": 20.0}, {"budget": other}):
        with pytest.raises(errors.WrongStateError, match="declared otherwise"):
            removal(data, 1e-2, **changed).forget(params, state, [3], data=data)
