"""`unlearners.noisy_sgd`: how far rows moved the model, what the steps leave of it, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Budget, Status, accounting, errors, tree
from jaxunlearn.unlearners import noisy_sgd
from jaxunlearn.unlearners.noisy_sgd._plans import distance_of, mu_of
from tests.conformance import cases

N, D, B = 12, 3, 4
BUDGET = Budget(epsilon=1.0, delta=1e-5, max_forget=8)
OPTIONS = {
    "num_examples": N, "batch_size": B, "max_steps": 200, "l2": 0.5, "smoothness": 1.0,
    "gradient_clip": 1.0, "noise_stddev": 0.05, "budget": BUDGET, "key": jax.random.key(5),
}  # fmt: skip


def rows(seed=0):
    """Rows of length one and targets below one: gradients and curvature are then small."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return {"x": x.astype(np.float32), "y": rng.uniform(-0.4, 0.4, N).astype(np.float32)}


def squared_error(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def made(loss_fn=squared_error, **options):
    return noisy_sgd(loss_fn, **(OPTIONS | options))


@functools.cache
def trained(steps=9, scale=1.0, **options):
    """(unlearner, data, params, state) after `steps` cyclic steps; gradients times `scale`."""
    unlearner, data = made(**options), rows()
    params = jnp.zeros(D, jnp.float32)
    state = unlearner.init(params)
    gradient = jax.jit(jax.grad(squared_error))
    update = jax.jit(unlearner.update)
    for t in range(steps):
        ids = (np.arange(B) + B * (t % (N // B))).astype(np.int32)
        grads = scale * gradient(params, {name: leaf[ids] for name, leaf in data.items()})
        updates, state = update(grads, state, params, ids=ids)
        params = optax.apply_updates(params, updates)
    return unlearner, data, params, state


# --- the distance ------------------------------------------------------------------------------


def problems(rng, many=1000):
    """Random ridge problems, their batches and settings, all at once in NumPy float64."""
    x = rng.normal(size=(many, N, D))
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    return x, rng.uniform(-2, 2, (many, N)), rng.uniform(0.02, 0.9, many), rng.integers(0, N, many)


def clipped_run(x, y, l2, rate, clip, weights, steps_ids, start, noise):
    """Projected nothing, clipped everything: the end of each of many runs."""
    w = np.array(start)
    for ids, z in zip(steps_ids, noise):
        slope = np.einsum("pbd,pd->pb", x[:, ids], w) - y[:, ids]
        norm = np.maximum(np.abs(slope), clip)  # rows have length one
        slope = slope * clip / norm * weights[:, ids]
        grads = np.einsum("pb,pbd->pd", slope, x[:, ids]) / len(ids)
        w = w - rate[:, None] * (grads + l2[:, None] * w) + z
    return w


def test_the_distance_is_never_below_that_of_coupled_training_on_1000_problems():
    """Batches in random order; the same noise with and without a row."""
    rng = np.random.default_rng(1)
    x, y, l2, gone = problems(rng)
    many, clip = len(l2), 0.7
    rate = 1 / (1.0 + l2)
    steps_ids = [rng.permutation(N)[:B] for _ in range(10)]
    noise = 0.1 * rng.normal(size=(10, many, D))
    weights = np.ones((many, N))
    run = lambda w: clipped_run(x, y, l2, rate, clip, w, steps_ids, np.zeros((many, D)), noise)
    with_row = run(weights)
    weights[np.arange(many), gone] = 0.0
    true = np.linalg.norm(with_row - run(weights), axis=1)
    log, counts = np.array(steps_ids), np.full(10, B)
    stated = np.array(
        [distance_of(setting(l2[i], rate[i], clip), log, counts, [gone[i]]) for i in range(many)]
    )
    assert np.all(true <= stated)
    used = stated > 0
    assert np.median(true[used] / stated[used]) > 0.2  # and it is no empty bound
    assert np.all(true[~used] == 0)


def setting(l2, rate, clip, sigma=0.05, radius=math.inf):
    return accounting.NoisySGD(
        strong_convexity=l2, smoothness=1.0 + l2, gradient_clip=clip, noise_stddev=sigma,
        num_examples=N, batch_size=B, learning_rate=rate, radius=radius,
    )  # fmt: skip


def test_the_distance_is_attained_by_a_row_that_always_pulls_at_the_clip():
    one = setting(0.5, 0.5, 2.0)
    log = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
    apart = 0.0
    for ids in log:
        apart = 0.75 * apart + 0.5 * 2.0 * (0 in ids) / B
    stated = distance_of(one, log, np.full(3, B), [0])
    assert apart <= stated <= apart * (1 + 1e-9)


def test_cyclic_batches_for_ever_are_half_the_published_distance_of_a_replaced_row():
    one = setting(0.1, 0.5, 1.0)
    log = np.tile(np.arange(N).reshape(-1, B), (400, 1))
    last = np.arange(N - B, N)
    stated = distance_of(one, log, np.full(len(log), B), [last[0]])
    assert stated == pytest.approx(one.drift(1) / 2, rel=1e-9)


# --- the divergence ----------------------------------------------------------------------------


def test_mu_is_never_below_the_gaussian_divergence_on_1000_ridge_problems():
    """Steps on ridge are affine, so both laws are Gaussian, of one covariance."""
    rng = np.random.default_rng(2)
    looseness = []
    x, _, l2, _ = problems(rng)
    for p in range(1000):
        rate, count = rng.uniform(0.2, 1.0) / (1.0 + l2[p]), int(rng.integers(1, 12))
        gap = rng.normal(size=D) * rng.uniform(0.1, 2.0)
        one = setting(l2[p], rate, 1.0)
        stated = mu_of(one, float(np.linalg.norm(gap)), count, D)
        covariance = np.zeros((D, D))
        for t in range(count):
            batch = x[p, (np.arange(B) + B * t) % N]
            step = np.eye(D) - rate * (batch.T @ batch / B + l2[p] * np.eye(D))
            gap, covariance = step @ gap, step @ covariance @ step.T
            covariance += one.step_noise**2 * np.eye(D)
        true = math.sqrt(gap @ np.linalg.solve(covariance, gap))
        assert true <= stated
        looseness.append(true / stated)
    assert max(looseness) > 0.8
    assert np.median(looseness) > 0.02


def test_mu_is_exact_for_a_flat_loss_but_for_the_grid():
    one = setting(0.5, 0.5, 1.0)
    covariance = one.step_noise**2 * sum(0.75 ** (2 * t) for t in range(6))
    true = 0.3 * 0.75**6 / math.sqrt(covariance)
    assert true <= mu_of(one, 0.3, 6, D) <= true * (1 + 1e-4)


def test_the_settings_of_the_published_lists_give_their_first_entries():
    """sigma 0.03, full batch, lambda 1e-6 n: 2 epochs on MNIST, 3 on CIFAR-10."""
    for n, published in ((11264, 2), (9728, 3)):
        l2 = 1e-6 * n
        one = accounting.NoisySGD(
            strong_convexity=l2, smoothness=0.25 + l2, gradient_clip=1.0, noise_stddev=0.03,
            num_examples=n,
        )  # fmt: skip
        options = {"epsilon": 1.0, "delta": 1 / n, "request_sizes": [1]}
        assert accounting.noisy_sgd_epochs(one, paper_constants=True, **options) == [published]


@pytest.mark.parametrize(("paper", "steps"), [(True, 2), (False, 1)], ids=["published", "exact"])
def test_a_quote_asks_for_the_first_of_the_golden_epochs(paper, steps):
    """MNIST 3 against 8, n = 11264: the lists begin with 2 as published, with 1 as derived."""
    n = 11264
    unlearner = made(
        num_examples=n, batch_size=n, max_steps=50, l2=1e-6 * n, smoothness=0.25, noise_stddev=0.03,
        paper_constants=paper, budget=Budget(epsilon=1.0, delta=1 / n, max_forget=1),
    )  # fmt: skip
    w = jnp.zeros(D, jnp.float32)
    _, state = jax.jit(unlearner.update)(w, unlearner.init(w), w, ids=np.arange(n, dtype=np.int32))
    assert unlearner.quote(w, state, [0]).num_steps == steps


# --- forget ------------------------------------------------------------------------------------


def test_the_end_has_the_mean_and_the_covariance_of_the_retained_chain():
    """120 releases of one request: 360 squares, whose mean has a standard error of 7.5%."""
    unlearner, data, params, state = trained(entropy=cases.Entropy(b"law"))
    results = [unlearner.forget(params, state, [1, 6], data=data) for _ in range(120)]
    ends = np.array([result.params for result in results], np.float64)
    count = results[0].info.measurements["num_steps"]
    rate, l2, s = 1 / 1.5, 0.5, math.sqrt(2 / 1.5) * 0.05
    mean, covariance = np.asarray(params, np.float64), np.zeros((D, D))
    for t in range(count):
        ids = np.setdiff1d(np.arange(B) + B * (t % 3), [1, 6])
        x, y = data["x"][ids].astype(np.float64), data["y"][ids].astype(np.float64)
        step = np.eye(D) - rate * (x.T @ x / B + l2 * np.eye(D))
        mean, covariance = step @ mean + rate * x.T @ y / B, step @ covariance @ step.T
        covariance += s**2 * np.eye(D)
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), (ends - mean).T)
    assert np.abs(whitened.mean(axis=1)).max() < 4 / math.sqrt(120)
    spread = (whitened**2).mean()
    assert 0.7 < spread < 1.4
    for wrong in (2 / 3, 3 / 2):
        assert not 0.7 < spread * wrong**2 < 1.4


def test_requests_in_turn_carry_their_distance_and_one_batch_costs_no_more_steps():
    unlearner, data, params, state = trained()
    first = unlearner.forget(params, state, [1], data=data)
    measured = first.info.measurements
    assert measured["num_steps"] == unlearner.quote(params, state, [1]).num_steps
    shrunk = (2 / 3) ** measured["num_steps"]
    assert measured["left_distance"] == pytest.approx(measured["start_distance"] * shrunk, rel=1e-6)
    record = first.opt_state.record
    assert int(record.participation.num_steps) == 9 + measured["num_steps"]
    second = unlearner.forget(first.params, first.opt_state, [5], data=data).info.measurements
    alone = distance_of(
        setting(0.5, 1 / 1.5, 1.0), np.array(record.log.step_ids)[: 9 + measured["num_steps"]],
        np.full(9 + measured["num_steps"], B), [5],
    )  # fmt: skip
    assert second["start_distance"] == pytest.approx(alone + measured["left_distance"], rel=1e-5)
    both = unlearner.quote(params, state, [1, 5]).num_steps
    assert both <= measured["num_steps"] + second["num_steps"]


def test_the_certificate_states_steps_and_divergence_and_its_epsilon_follows_from_them():
    unlearner, data, params, state = trained()
    result = unlearner.forget(params, state, [1], data=data)
    certificate, measured = result.info.certificate, result.info.measurements
    assert (certificate.guarantee, certificate.scope) == ("certified", "full-state")
    assert certificate.residuals["unlearning_steps"] == measured["num_steps"]
    assert certificate.residuals["mu"] >= measured["mu"] * (1 - 1e-11)
    assert certificate.dimension == D * measured["num_steps"]
    least = accounting.gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=measured["mu"])
    assert least <= 1.0
    one = setting(0.5, 1 / 1.5, 1.0)
    fewer = mu_of(one, measured["start_distance"], measured["num_steps"] - 1, D)
    assert accounting.gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=fewer) > 1.0
    assert tree.same_bits(result.opt_state.inner, state.inner)


def test_a_projection_bounds_the_distance_and_holds_in_training_and_after():
    unlearner, data, params, state = trained(radius=0.05)
    assert float(jnp.linalg.norm(params)) <= 0.05 * (1 + 1e-6)
    result = unlearner.forget(params, state, list(range(8)), data=data)
    assert np.linalg.norm(np.asarray(result.params, np.float64)) <= 0.05 * (1 + 1e-6)
    assert result.info.measurements["start_distance"] <= 0.1


def test_all_rows_may_go():
    _, data, params, state = trained()
    unlearner = made(budget=Budget(epsilon=1.0, delta=1e-5, max_forget=N))
    assert np.all(np.isfinite(unlearner.forget(params, state, range(N), data=data).params))


# --- forget_step -------------------------------------------------------------------------------


def test_forget_step_poisons_parameters_that_are_not_finite():
    unlearner, data, params, state = trained()
    batch = {name: leaf[:B][None] for name, leaf in data.items()}
    ids, weights = np.arange(B, dtype=np.int32)[None], np.ones((1, B), np.float32)
    step = jax.jit(unlearner.forget_step)
    new_params, new_state, arrays = step(params * np.inf, state, batch, ids, weights)
    assert Status(int(arrays["status"])) & Status.NON_FINITE
    assert np.isnan(new_params).all()
    with pytest.raises(errors.TrainingRecordError, match="cannot be deleted from"):
        unlearner.forget(new_params, new_state, [7], data=data)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip": 1e-6}, {"l2": 5.0}, {"learning_rate": 0.1}, {"radius": 1e-9},
        {"noise_stddev": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_a_run_of_another_factory_is_refused(options):
    """The distance would be reckoned with the clip, the contraction or the ball of no step."""
    unlearner, data, params, state = trained()
    other = made(**options)
    with pytest.raises(errors.TrainingRecordError, match="of this unlearner"):
        other.forget(params, state, [1], data=data)
    with pytest.raises(errors.TrainingRecordError, match="of this unlearner"):
        other.forget(params, state, [], data=data)
    assert not other.quote(params, state, [1]).feasible
    zero = jnp.zeros_like(params)
    _, mixed = other.update(zero, state, params, ids=np.arange(B, dtype=np.int32))
    _, mixed = unlearner.update(zero, mixed, params, ids=np.arange(B, dtype=np.int32))
    for one in (unlearner, other):
        with pytest.raises(errors.TrainingRecordError, match="of this unlearner"):
            one.forget(params, mixed, [1], data=data)


def test_steps_of_another_factory_s_forget_step_are_refused():
    unlearner, data, params, state = trained()
    batch = {name: leaf[:B][None] for name, leaf in data.items()}
    ids, weights = np.arange(B, dtype=np.int32)[None], np.ones((1, B), np.float32)
    new_params, mixed, _ = made(l2=5.0).forget_step(params, state, batch, ids, weights)
    with pytest.raises(errors.TrainingRecordError, match="of this unlearner"):
        unlearner.forget(new_params, mixed, [1], data=data)
    new_params, same, _ = unlearner.forget_step(params, state, batch, ids, weights)
    assert unlearner.forget(new_params, same, [1], data=data).info.certificate is not None


def softmax_error(w, batch):
    """Three outputs; rows of length one: curvature at most a half."""
    labels = jnp.asarray(batch["y"] > 0, jnp.int32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, labels).mean()


@pytest.mark.parametrize("clip", [0.05, 2.0])
def test_clipping_that_is_active_on_several_outputs_is_refused_since_it_does_not_contract(clip):
    data, params = rows(), jnp.asarray(np.random.default_rng(3).normal(size=(D, 3)), jnp.float32)
    unlearner = made(softmax_error, smoothness=0.5, gradient_clip=clip, l2=0.01, max_steps=2000)
    state = unlearner.init(params)
    zero, ids = jnp.zeros_like(params), np.arange(B, dtype=np.int32)
    _, state = unlearner.update(zero, state, params, ids=ids)
    if clip > 1:  # above every gradient
        result = unlearner.forget(params, state, [1], data=data)
        assert result.info.certificate.guarantee == "certified"
        return
    row = lambda i: {name: leaf[i : i + 1].astype(np.float64) for name, leaf in data.items()}

    def slope(w):  # what a step subtracts for one row of unit weight, without L2
        g = jax.grad(softmax_error)(w, row(2))
        return g * clip / jnp.linalg.norm(g)

    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(params), jnp.float64)
        jacobian = np.asarray(jax.jacfwd(slope)(wide)).reshape(9, 9)
    step = np.eye(9) - (1 / 0.51) * (jacobian + 0.01 * np.eye(9))
    assert np.linalg.norm(step, 2) > 1 - 0.01 / 0.51 + 1e-6  # no contraction by c
    with pytest.raises(errors.SolverError, match="not symmetric"):
        unlearner.forget(params, state, [1], data=data)


def test_clipping_that_is_active_on_one_output_is_symmetric():
    unlearner, data, params, state = trained(gradient_clip=1e-3, scale=1e-3)
    result = unlearner.forget(params, state, [1], data=data)
    assert result.info.certificate.guarantee == "certified"


def test_every_request_has_its_loss_looked_at():
    """Also where a request before it had a first batch without a row, or other parameters."""
    _, data, params, state = trained()
    bent = lambda w, b: squared_error(w, b) + 4 * jnp.mean(jnp.maximum(jnp.sum(w) - 1.0, 0.0)) ** 2
    unlearner = made(bent)
    unlearner.forget(params, state, [1], data=data)
    with pytest.raises(ValueError, match="curvature of at most smoothness"):
        unlearner.forget(params + 9.0, state, [1], data=data)
    first_gone = made(lambda w, b: -squared_error(w, b))
    with pytest.raises(errors.SolverError, match="convex loss"):
        first_gone.forget(params, state, range(B), data=data)


def test_parameters_outside_the_ball_are_refused():
    unlearner, data, params, state = trained(radius=0.05)
    with pytest.raises(errors.WrongStateError, match="inside the ball"):
        unlearner.forget(params * (0.06 / jnp.linalg.norm(params)), state, [1], data=data)


def test_a_run_without_clipping_is_refused():
    unlearner, data, params, state = trained(scale=100.0)
    with pytest.raises(errors.TrainingRecordError, match="clipped to gradient_clip"):
        unlearner.forget(params, state, [1], data=data)
    assert not unlearner.quote(params, state, [1]).feasible


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (lambda w, b: 9 * squared_error(w, b), ValueError, "curvature of at most smoothness"),
        (lambda w, b: -squared_error(w, b), errors.SolverError, "convex loss"),
    ],
    ids=["smoothness", "convexity"],
)
def test_a_loss_that_contradicts_its_constants_is_refused(loss_fn, error, match):
    _, data, params, state = trained()
    with pytest.raises(error, match=match):
        made(loss_fn).forget(params, state, [1], data=data)


def test_more_steps_than_are_left_and_more_ids_than_were_declared_call_for_retraining():
    _, data, params, state = trained()
    unlearner = made(max_steps=12)
    with pytest.raises(errors.BudgetExhaustedError, match="at most 3 more steps"):
        unlearner.forget(params, state, [1], data=data)
    assert "Retrain" in unlearner.quote(params, state, [1]).reason
    with pytest.raises(errors.BudgetExhaustedError, match="max_forget=8"):
        unlearner.forget(params, state, list(range(9)), data=data)


@pytest.mark.parametrize(
    "options",
    [
        {"l2": 0.0},
        {"l2": 1e-18},
        {"smoothness": -1.0},
        {"gradient_clip": 0.0},
        {"noise_stddev": 0.0},
        {"learning_rate": 0.7},
        {"radius": 0.0},
        {"cycle": 0},
        {"batch_size": 5, "paper_constants": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_bad_configuration_is_refused_at_the_factory(options):
    with pytest.raises(ValueError, match="Expected"):
        made(**options)


def test_a_loss_with_a_key_is_refused():
    with pytest.raises(errors.LossSignatureError, match="convex"):
        made(lambda w, batch, key: squared_error(w, batch))
