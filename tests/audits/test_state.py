"""`audits.state_alignment`: four distances of a training state to its counterfactual."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxunlearn import UnlearnerState, audits, transforms
from jaxunlearn.audits.pairs import curvature_of
from jaxunlearn.kernels import lbfgs
from tests.compiled_once import compiled_once

__all__ = ["compiled_once"]  # a fixture: programs are compiled once a file
KEY = jax.random.key(0)
SIZE = 12


def loss_fn(params, batch):
    """Least squares; the parameters are two leaves."""
    predicted = batch["x"] @ jnp.concatenate([params["a"], params["b"]])
    return 0.5 * jnp.mean((predicted - batch["y"]) ** 2)


def draw_batches(seed=0, count=3):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(8, SIZE)), "y": rng.normal(size=8)} for _ in range(count)]


BATCHES = draw_batches()


def as_params(flat):
    return {"a": jnp.asarray(flat[:5]), "b": jnp.asarray(flat[5:])}


def trained(tx, seed, steps=6):
    """(params, state) of a few full-batch steps."""
    rng = np.random.default_rng(seed)
    params = as_params(rng.normal(size=SIZE))
    state, update = tx.init(params), jax.jit(tx.update)
    for batch in draw_batches(seed, steps):
        updates, state = update(jax.grad(loss_fn)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def flat(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])]).astype(np.float64)


def gradient(w, batch):
    return batch["x"].T @ (batch["x"] @ w - batch["y"]) / len(batch["y"])


def dense_inverse(pairs, size, scale=None):
    """H by the textbook's dense update, from gamma of the newest pair."""
    s, y = pairs[-1]
    inverse = ((s @ y) / (y @ y) if scale is None else scale) * np.eye(size)
    for s, y in pairs:
        left = np.eye(size) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


def draw_pairs(seed, count):
    """Pairs of a positive definite matrix, as a run on a quadratic would make them."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    hessian = root @ root.T + np.eye(SIZE)
    return [(s, hessian @ s) for s in rng.normal(size=(count, SIZE))]


def online(pairs, slots):
    """The state of `online_lbfgs` with these pairs."""
    memory = lbfgs.init(as_params(np.zeros(SIZE)), slots)
    push = jax.jit(lbfgs.push)
    for s, y in pairs:
        memory, _ = push(memory, as_params(s), as_params(y))
    return (
        transforms.online_lbfgs(loss_fn).init(as_params(np.zeros(SIZE)))._replace(curvature=memory)
    )


def last_point(pairs):
    """Parameters and gradient that `optax_memory` leaves for the next step to make a pair of."""
    return sum(s for s, _ in pairs), sum(y for _, y in pairs)


def finished(pairs, w, g, slots):
    """The pairs that Optax has when it takes the step at w: the waiting one among them."""
    last, before = last_point(pairs)
    return [*pairs, (w - last, g - before)][-slots:]


# --- L-BFGS -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kernels", "optax"])
def test_an_lbfgs_state_acts_as_its_dense_inverse_hessian_and_its_norm_is_exact(x64, kind):
    one, other = draw_pairs(1, 6), draw_pairs(2, 6)
    make = {"kernels": online, "optax": optax_memory}[kind]
    states = [(as_params(np.zeros(SIZE) + 1), make(pairs, 4)) for pairs in (one, other)]
    online_tx = transforms.online_lbfgs(None, learning_rate=0.1, memory_size=4)
    tx = {"kernels": online_tx, "optax": optax.scale_by_lbfgs(memory_size=4)}[kind]
    measured = audits.state_alignment(
        *states, tx=tx, loss_fn=loss_fn, batches=BATCHES, key=KEY, num_probes=5, probe_scale=1.0
    )
    h, ideal = (dense_inverse(pairs[-4:], SIZE) for pairs in (one, other))
    assert measured.operator == "inverse Hessian"
    exact = np.linalg.norm(h - ideal, 2) / np.linalg.norm(ideal, 2)
    assert np.isclose(measured.memory_norm_error, exact, rtol=1e-6)
    w, moves = np.ones(SIZE), []
    for v in (gradient(w, batch) for batch in BATCHES):
        held = [pairs[-4:] for pairs in (one, other)]
        if kind == "optax":
            held = [finished(pairs, w, v, 4) for pairs in (one, other)]
        moves.append([dense_inverse(pairs, SIZE) @ v for pairs in held])
    gaps = [np.linalg.norm(u - v) / np.linalg.norm(v) for u, v in moves]
    assert np.isclose(measured.update_error.value, np.mean(gaps), rtol=1e-6)
    cosines = [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in moves]
    assert np.isclose(measured.update_cosine.value, np.mean(cosines), rtol=1e-6)
    assert measured.parameter_error == measured.carry_error == 0.0
    waiting = ("['params']['a']", "['params']['b']", "['updates']['a']", "['updates']['b']")
    assert measured.unread == (waiting if kind == "optax" else ())


def optax_memory(pairs, slots):
    """The state that `scale_by_lbfgs` has when these pairs have come."""
    tx = optax.scale_by_lbfgs(memory_size=slots)
    w, g = np.zeros(SIZE), np.zeros(SIZE)
    state, update = tx.init(as_params(w)), jax.jit(tx.update)
    _, state = update(as_params(g), state, as_params(w))
    for s, y in pairs:
        w, g = w + s, g + y
        _, state = update(as_params(g), state, as_params(w))
    return state


def test_a_step_size_that_went_wrong_shows_in_the_update_and_is_named(x64):
    """AdaptiveRate: the sum of squared gradients a million times as large, the same pairs."""
    tx = transforms.online_lbfgs(loss_fn, learning_rate=transforms.AdaptiveRate(1.0))
    good = online(draw_pairs(1, 3), 4)._replace(gradient_square_sum=jnp.float64(1e3))
    spoilt = good._replace(gradient_square_sum=jnp.float64(1e9), num_online_steps=jnp.int32(500))
    w = as_params(np.ones(SIZE))
    measured = audits.state_alignment(
        (w, spoilt), (w, good), tx=tx, loss_fn=loss_fn, batches=BATCHES, key=KEY, num_probes=2
    )
    assert measured.memory_error.value == measured.state_error == 0.0  # H is the same
    assert np.isclose(measured.update_error.value, 1 - 1e-3, rtol=1e-3)
    assert measured.unread == (".gradient_square_sum", ".num_online_steps")


def test_momentum_before_an_lbfgs_memory_is_carried_and_named(x64):
    tx = optax.chain(optax.trace(0.9), optax.scale_by_lbfgs(memory_size=4))
    memory = optax_memory(draw_pairs(1, 3), 4)
    trace = optax.TraceState(as_params(np.ones(SIZE)))
    spoilt = optax.TraceState(as_params(np.ones(SIZE) + 100))
    w = as_params(np.ones(SIZE))
    measured = audits.state_alignment(
        (w, (spoilt, memory)), (w, (trace, memory)), tx=tx, key=KEY, num_probes=2
    )
    assert measured.memory_error.value == 0.0
    assert measured.carry_error > 0.1
    assert measured.unread == ("[0].trace['a']", "[0].trace['b']")


def test_an_inverse_hessian_may_start_from_another_scale(x64):
    one, other = draw_pairs(1, 3), draw_pairs(2, 3)
    states = [(as_params(np.ones(SIZE)), optax_memory(pairs, 4)) for pairs in (one, other)]
    measured = audits.state_alignment(
        *states, tx=optax.scale_by_lbfgs(4, scale_init_precond=False), key=KEY, num_probes=2,
        initial_scale=lambda gamma: 1.0,
    )  # fmt: skip
    h, ideal = (dense_inverse(pairs, SIZE, scale=1.0) for pairs in (one, other))
    exact = np.linalg.norm(h - ideal, 2) / np.linalg.norm(ideal, 2)
    assert np.isclose(measured.memory_norm_error, exact, rtol=1e-6)


@pytest.mark.slow
def test_a_search_along_the_line_gets_what_it_asks_for():
    tx = optax.lbfgs(memory_size=2)
    w = as_params(np.ones(SIZE))
    fresh = tx.init(w)
    held = (optax_memory(draw_pairs(1, 3), 2), *fresh[1:])
    measured = audits.state_alignment(
        (w, held), (w, fresh), tx=tx, loss_fn=loss_fn, batches=BATCHES, key=KEY, num_probes=2
    )
    assert 0 < measured.update_error.value < np.inf
    assert measured.carry_error == 0.0


@pytest.mark.slow
def test_probes_of_an_lbfgs_state_agree_with_the_dense_matrices_on_average(x64):
    one, other = draw_pairs(1, 3), draw_pairs(2, 3)
    states = [(as_params(np.ones(SIZE)), online(pairs, 4)) for pairs in (one, other)]
    tx = transforms.online_lbfgs(None, memory_size=4)
    measured = audits.state_alignment(*states, tx=tx, key=KEY, num_probes=400)
    h, ideal = (dense_inverse(pairs, SIZE) for pairs in (one, other))
    v = np.random.default_rng(7).normal(size=(20000, SIZE))
    truth = np.mean(np.linalg.norm(v @ (h - ideal), axis=1) / np.linalg.norm(v @ ideal, axis=1))
    assert measured.memory_error.low < truth < measured.memory_error.high
    assert measured.memory_error.high - measured.memory_error.low < 0.2 * truth


def test_equal_memories_are_at_distance_zero_and_so_are_two_of_one_operator(x64):
    state = online(draw_pairs(1, 6), 4)
    # The same pairs in other slots.
    packed = state._replace(curvature=jax.jit(lbfgs.drop)(state.curvature, jnp.zeros(4, bool)))
    w, tx = as_params(np.ones(SIZE)), transforms.online_lbfgs(None, memory_size=4)
    for other in (state, packed):
        measured = audits.state_alignment((w, state), (w, other), tx=tx, key=KEY)
        assert measured.memory_error.value == measured.memory_norm_error == 0.0
        assert measured.state_error == 0.0
        assert measured.unread == ()


def test_a_pair_of_negative_curvature_acts_as_in_optax_and_has_no_norm(x64):
    pairs = [*draw_pairs(1, 2), (np.eye(SIZE)[0], -np.eye(SIZE)[0] + 0.1)]
    w, other = as_params(np.ones(SIZE)), optax_memory(draw_pairs(2, 3), 4)
    state = optax_memory(pairs, 4)
    measured = audits.state_alignment(
        (w, state),
        (w, other),
        tx=optax.scale_by_lbfgs(4),
        key=KEY,
    )
    assert measured.memory_norm_error is None
    h, ideal = dense_inverse(pairs, SIZE), dense_inverse(draw_pairs(2, 3), SIZE)
    for inverse, held in ((h, state), (ideal, other)):
        found = curvature_of(held)(np.eye(SIZE))
        np.testing.assert_allclose(found, inverse, rtol=1e-6, atol=1e-9)


# --- any other optimizer ------------------------------------------------------------------------


def test_momentum_errors_are_those_of_the_carry(x64):
    tx = optax.sgd(0.1, momentum=0.9)
    actual, ideal = trained(tx, 1), trained(tx, 2)
    measured = audits.state_alignment(
        actual, ideal, tx=tx, loss_fn=loss_fn, batches=BATCHES, key=KEY, weights=(1.0, 4.0)
    )
    carry, other = (flat(state[0].trace) for _, state in (actual, ideal))
    w, v = flat(actual[0]), flat(ideal[0])
    assert np.isclose(measured.parameter_error, np.linalg.norm(w - v) / np.linalg.norm(v))
    assert np.isclose(measured.carry_error, np.linalg.norm(carry - other) / np.linalg.norm(other))
    moves = [
        (0.9 * carry + gradient(w, batch), 0.9 * other + gradient(v, batch)) for batch in BATCHES
    ]
    gaps = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in moves]
    assert np.isclose(measured.update_error.value, np.mean(gaps))
    quantile = scipy.stats.t.ppf(0.975, 2) * np.std(gaps, ddof=1) / np.sqrt(3)
    assert np.isclose(measured.update_error.high - measured.update_error.value, quantile)
    combined = np.sqrt(measured.parameter_error**2 + 4 * measured.memory_error.value**2)
    assert np.isclose(measured.state_error, combined)
    assert measured.operator == "update"


def test_the_memory_error_does_not_see_the_parameters_and_the_parameter_error_not_the_memory(x64):
    tx = optax.adamw(0.1, weight_decay=0.5)
    (w, state), (v, other) = trained(tx, 1), trained(tx, 2)
    measure = audits.make_state_alignment(tx, key=KEY, probe_scale=0.1)
    mixed = measure((w, other), (v, other))
    assert mixed.memory_error.value == mixed.carry_error == 0.0
    assert mixed.parameter_error == measure((w, state), (v, other)).parameter_error > 0
    assert measure((v, state), (v, other)).memory_error.value > 0


def test_probes_of_the_size_of_gradients_see_second_moments_that_large_ones_drown(x64):
    tx = optax.scale_by_rms(decay=0.999)
    params = as_params(np.ones(SIZE))
    states = [
        (params, tx.init(params)._replace(nu=jax.tree.map(lambda p, c=c: c + 0 * p, params)))
        for c in (1e-4, 4e-4)
    ]
    small = [{"x": 1e-2 * np.eye(SIZE), "y": np.full(SIZE, 1.0)}] * 2
    options = {"tx": tx, "loss_fn": loss_fn, "key": KEY}
    scaled = audits.state_alignment(*states, batches=small, **options)
    drowned = audits.state_alignment(*states, probe_scale=10.0, **options)
    assert np.isclose(scaled.memory_error.value, 1.0, atol=0.05)  # steps twice as long
    assert drowned.memory_error.value < 0.1


def test_an_operator_may_be_given_and_a_record_is_not_looked_at(x64):
    tx = optax.adam(0.1)
    (w, state), (v, other) = trained(tx, 1), trained(tx, 2)
    mean = lambda params, state, vector: state[0].mu
    measured = audits.state_alignment(
        (w, UnlearnerState(state, "record")), (v, other), tx=tx, key=KEY, operator=mean
    )
    mu, ideal = flat(state[0].mu), flat(other[0].mu)
    assert np.isclose(
        measured.memory_error.value, np.linalg.norm(mu - ideal) / np.linalg.norm(ideal)
    )
    assert measured.operator == "given"


def test_the_same_key_gives_the_same_figures_and_one_program_serves_many_states(x64):
    tx = optax.adam(0.1)
    measure = audits.make_state_alignment(tx, loss_fn, batches=BATCHES, key=KEY, num_probes=3)
    first = measure(trained(tx, 1), trained(tx, 2))
    assert measure(trained(tx, 1), trained(tx, 2)) == first
    zero = measure(trained(tx, 1), trained(tx, 1))
    assert (zero.parameter_error, zero.memory_error.value, zero.update_error.value) == (0, 0, 0)
    assert np.isclose(zero.update_cosine.value, 1.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_probes": 1}, "num_probes=1"),
        ({"batches": BATCHES}, "loss_fn"),
        ({"weights": (1.0, -1.0)}, "weights"),
    ],
    ids=["probes", "loss", "weights"],
)
def test_what_makes_no_sense_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        audits.make_state_alignment(optax.sgd(0.1), key=KEY, **options)


# --- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (60, 100)])
def test_clopper_pearson_is_scipys(successes, trials):
    ours = audits.clopper_pearson(successes, trials, confidence=0.9)
    theirs = scipy.stats.binomtest(successes, trials).proportion_ci(0.9, method="exact")
    np.testing.assert_allclose(ours[1:], (theirs.low, theirs.high), atol=1e-12)
    assert ours.value == successes / trials


def test_a_single_value_has_no_interval_and_an_infinite_one_neither():
    assert audits.mean_interval([2.0]) == (2.0, -np.inf, np.inf)
    assert audits.mean_interval([2.0, np.inf]) == (np.inf, -np.inf, np.inf)
    with pytest.raises(ValueError, match="at least one"):
        audits.mean_interval([])
