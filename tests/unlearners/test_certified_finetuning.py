"""`unlearners.certified_finetuning`: what its noise hides, for any model, and what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxunlearn import Budget, accounting, errors
from jaxunlearn.unlearners import Tuning, certified_finetuning
from jaxunlearn.unlearners.certified_finetuning._tuning import batches_of, host_move
from tests.conformance import cases

N, D = 10, 3
BUDGET = Budget(epsilon=1.0, delta=1e-5, max_forget=4)
CLIPPED = Tuning(learning_rate=0.1, start_radius=0.5, gradient_clip=0.3, l2=0.5)
MODEL = Tuning(learning_rate=0.1, model_radius=0.5)


def wiggly(w, batch):
    """Neither convex nor smooth: a kink for every row and a wave between them."""
    return jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]) + jnp.sin(5 * batch["x"] @ w))


@functools.cache
def trained(tuning=CLIPPED, num_steps=6, **options):
    """(unlearner, data, params, state) after three steps on all rows."""
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(N, D)).astype(np.float32),
        "y": rng.normal(size=N).astype(np.float32),
    }
    defaults = {"num_examples": N, "batch_size": 4, "budget": BUDGET, "key": jax.random.key(1)}
    unlearner = certified_finetuning(
        optax.adam(0.3), wiggly, tuning=tuning, num_steps=num_steps, **(defaults | options)
    )
    params = jnp.ones(D, jnp.float32)
    state, update = unlearner.init(params), jax.jit(unlearner.update)
    gradient = jax.jit(jax.grad(wiggly))
    for _ in range(3):
        updates, state = update(
            gradient(params, data), state, params, ids=np.arange(N, dtype=np.int32)
        )
        params = optax.apply_updates(params, updates)
    return unlearner, data, params, state


# --- the noise ---------------------------------------------------------------------------------


def test_mu_is_never_below_the_truth_on_1000_pairs_of_affine_fine_tunings():
    """Two starts on the ball and gradients that pull apart at the clip, or less."""
    rng = np.random.default_rng(1)
    looseness = []
    for _ in range(1000):
        rate, steps = rng.uniform(0.01, 0.5), int(rng.integers(1, 30))
        tuning = Tuning(rate, rng.uniform(0.0, 2.0), rng.uniform(0.01, 2.0), rng.uniform(0.0, 1.0))
        s, c = rng.uniform(0.1, 2.0), 1 - rate * tuning.l2
        apart, variance = 2 * tuning.start_radius * rng.uniform(0.5, 1.0), 0.0
        for _ in range(steps):
            apart = c * apart + 2 * rate * tuning.gradient_clip * rng.uniform(0.5, 1.0)
            variance = c * c * variance + s * s
        true = apart / math.sqrt(variance)
        stated = tuning.mu(steps, s, D)
        assert true <= stated
        looseness.append(true / stated)
    assert max(looseness) > 0.95
    assert min(looseness) > 0.45


def test_mu_is_the_golden_one_and_exact_but_for_the_grid():
    """C_0 = 0.01, C_1 = 10, rate 1e-4, l2 = 750, T = 100, noise 0.01: rho = 0.5132279."""
    golden = Tuning(1e-4, 0.01, 10.0, 750.0).mu(100, 0.01, 1)
    assert golden**2 / 2 == pytest.approx(0.5132279, rel=1e-4)
    flat = Tuning(0.01, 1.0, 1.0).mu(100, 0.1, 1)
    assert flat**2 / 2 == pytest.approx(8.0, rel=1e-4)
    assert golden**2 / 2 >= 0.51322785
    assert flat**2 / 2 >= 8.0


@pytest.mark.parametrize(
    ("renyi", "logged", "true"), [(0.1, 0.104, 1.76), (1.0, 1.004, 6.57), (10.0, 10.004, 28.4)]
)
def test_what_published_code_logs_as_epsilon_is_refused_for_the_noise_it_adds(renyi, logged, true):
    """Its variance for l2 > 0 makes alpha rho a Renyi curve with rho = `renyi`, at delta 1e-5."""
    tuning, steps = Tuning(0.1, 0.5, 0.3, 0.5), 20
    rho_of_unit = tuning.steps.mu_of_unit_noise(steps) ** 2 / 2
    stddev = math.sqrt(rho_of_unit / renyi)
    budget = lambda epsilon: Budget(epsilon=epsilon, delta=1e-5, max_forget=1)
    assert tuning.shift(steps, stddev, 1, budget(logged)) is None
    assert tuning.shift(steps, stddev, 1, budget(0.99 * true)) is None
    assert tuning.shift(steps, stddev, 1, budget(1.01 * true)) is not None


@pytest.mark.parametrize("tuning", [CLIPPED, MODEL], ids=["gradient", "model"])
def test_the_noise_is_the_least_that_certifies_to_a_thousandth(tuning):
    stddev = tuning.noise(6, D, BUDGET)
    assert tuning.shift(6, stddev, D, BUDGET) is not None
    assert tuning.shift(6, stddev * 0.999, D, BUDGET) is None


def test_model_clipping_covers_the_worst_chain_of_one_dimension():
    """Both models pinned to opposite ends before the noise: the last release is one Gaussian."""
    stddev, r = MODEL.noise(6, 1, BUDGET), MODEL.model_radius
    grid = np.linspace(-r, r, 401)
    kernel = lambda centre, at: scipy.stats.norm.pdf(at[:, None], centre[None], stddev)
    p, q = np.zeros(401), np.zeros(401)
    p[0], q[-1] = 1.0, 1.0
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    cell = np.diff(scipy.stats.norm.cdf((edges[:, None] - grid[None]) / stddev), axis=0)
    for _ in range(5):  # project what left the interval to its ends, then noise
        p, q = cell @ p, cell @ q
    at = np.linspace(-r - 9 * stddev, r + 9 * stddev, 4001)
    density = [kernel(grid, at) @ weights for weights in (p, q)]
    delta = np.sum(np.maximum(density[0] - math.e * density[1], 0)) * (at[1] - at[0])
    assert delta <= BUDGET.delta


# --- forget ------------------------------------------------------------------------------------


def test_a_step_of_any_gradient_parts_two_models_by_no_more_than_was_counted():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        x, y, g, h = rng.normal(size=(4, D)) * 10 ** rng.uniform(-3, 3, size=(4, 1))
        apart = np.linalg.norm(host_move(x, g, CLIPPED) - host_move(y, h, CLIPPED))
        most = 0.95 * np.linalg.norm(x - y) + 2 * 0.1 * 0.3
        assert apart <= most * (1 + 1e-12)
        for moved in (host_move(x, g, MODEL), host_move(y, h, MODEL)):
            assert np.linalg.norm(moved) <= 0.5 * (1 + 1e-12)


def test_the_end_has_the_spread_of_its_noise():
    """Rows of zeros have no gradient: T steps are noise alone. 100 releases, 300 squares."""
    unlearner, data, params, state = trained(entropy=cases.Entropy(b"spread"))
    zeros = {name: np.zeros_like(leaf) for name, leaf in data.items()}
    ends = [unlearner.forget(params, state, [2], data=zeros) for _ in range(100)]
    stddev = ends[0].info.measurements["noise_stddev"]
    spread = stddev * math.sqrt(sum(0.95 ** (2 * t) for t in range(6)))
    start = np.asarray(params, np.float64)
    centre = 0.95**6 * start * min(1.0, 0.5 / np.linalg.norm(start))
    whitened = (np.array([end.params for end in ends], np.float64) - centre) / spread
    assert 0.7 < (whitened**2).mean() < 1.4
    assert abs(whitened.mean()) < 0.25


@pytest.mark.parametrize("tuning", [CLIPPED, MODEL], ids=["gradient", "model"])
def test_the_certificate_states_what_was_run(tuning):
    unlearner, data, params, state = trained(tuning)
    result = unlearner.forget(params, state, [2, 5], data=data)
    certificate = result.info.certificate
    assert (certificate.guarantee, certificate.epsilon) == ("certified", 1.0)
    assert certificate.residuals["unlearning_steps"] == 6
    assert certificate.dimension == 6 * D
    assert certificate.noise.stddev == pytest.approx(tuning.noise(6, D, BUDGET), rel=1e-11)
    fresh = optax.adam(0.3).init(result.params)
    assert int(fresh[0].count) == int(result.opt_state.inner[0].count) == 0
    again = unlearner.forget(result.params, result.opt_state, [3], data=data)
    assert again.info.certificate.epsilon == 1.0


def test_batches_are_a_public_function_of_the_retain_set():
    ids = list(batches_of(np.array([0, 1, 4, 6, 7]), 2, 7, [1, 2]))
    assert [len(batch) for batch in ids] == [2] * 7
    first, second = np.concatenate(ids[:3]), np.concatenate(ids[3:6])
    assert sorted(first) == sorted(second) == [-1, 0, 1, 4, 6, 7]
    np.testing.assert_array_equal(ids, list(batches_of(np.array([0, 1, 4, 6, 7]), 2, 7, [1, 2])))


def test_a_loss_with_a_key_gets_one():
    _, data, params, state = trained()
    noisy = lambda w, batch, key: wiggly(w * jax.random.bernoulli(key, 0.5, w.shape), batch)
    keyed = certified_finetuning(
        optax.adam(0.3), noisy, num_examples=N, batch_size=4, budget=BUDGET, tuning=CLIPPED,
        num_steps=2, key=jax.random.key(1),
    )  # fmt: skip
    assert keyed.forget(params, state, [2], data=data).info.certificate is not None


# --- refusals ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_releases_nothing():
    _, data, params, state = trained()
    broken = lambda w, batch: jnp.mean(jnp.sqrt(0.0 * jnp.abs(batch["x"] @ w)))
    unlearner = certified_finetuning(
        optax.adam(0.3), broken, num_examples=N, batch_size=4, budget=BUDGET, tuning=CLIPPED,
        num_steps=2, key=jax.random.key(1),
    )  # fmt: skip
    with pytest.raises(errors.NonFiniteError, match="nothing was released"):
        unlearner.forget(params, state, [2], data=data)


def test_more_ids_than_were_declared_call_for_retraining():
    unlearner, data, params, state = trained()
    with pytest.raises(errors.BudgetExhaustedError, match="max_forget=4"):
        unlearner.forget(params, state, range(5), data=data)
    assert not unlearner.quote(params, state, range(5)).feasible


def test_nobody_left_to_fine_tune_on_is_refused_and_no_quote_says_otherwise():
    budget = Budget(epsilon=1.0, delta=1e-5, max_forget=N - 1)
    unlearner, data, params, _ = trained(budget=budget)
    zero = jnp.zeros_like(params)
    _, state = unlearner.update(
        zero, unlearner.init(params), params, ids=np.arange(2, dtype=np.int32)
    )
    with pytest.raises(errors.RetainSetEmptyError, match="retained row"):
        unlearner.forget(params, state, [0, 1], data=data)
    quote = unlearner.quote(params, state, [0, 1])
    assert not quote.feasible
    assert "retained row" in quote.reason


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": Tuning(learning_rate=0.0)},
        {"tuning": Tuning(learning_rate=1.0, l2=1.5)},
        {"tuning": Tuning(learning_rate=0.1, start_radius=-1.0)},
        {"tuning": Tuning(learning_rate=0.1, model_radius=-1.0)},
        {"tuning": MODEL, "num_steps": None},
        {"num_steps": 0},
        {"batch_size": 0},
        {"budget": Budget(epsilon=1.0, delta=1e-5, max_forget=N)},
    ],
)
def test_a_bad_configuration_is_refused_at_the_factory(options):
    with pytest.raises(ValueError, match="Expected"):
        trained.__wrapped__(**options)


def test_no_number_of_steps_takes_the_one_with_the_least_noise():
    unlearner, _, params, state = trained(Tuning(0.1, 1.0, 1.0), num_steps=None)
    assert unlearner.quote(params, state, [1]).num_steps == 10
    assert accounting.best_num_steps(Tuning(0.1, 1.0, 1.0).steps, max_steps=100) == 10
