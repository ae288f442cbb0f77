"""The oracle, against training loops that share no code with it and never look at the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import errors, tree
from jaxunlearn.records import (
    Penalty,
    RowReader,
    get_settings,
    init_log,
    log_of,
    make_segment,
    oracle,
    run_log,
)
from tests import oracles

NUM_EXAMPLES, FEATURES, CLASSES, BATCH, STEPS = 40, 5, 3, 6, 25
FORGET = (2, 3, 17, 30)
OPTIMIZERS = {
    "momentum": (
        optax.sgd(0.1, momentum=0.9),
        oracles.momentum(0.1),
        lambda inner: {"velocity": inner[0].trace},
    ),
    "adam": (
        optax.adam(0.01),
        oracles.adam(0.01),
        lambda inner: {"count": inner[0].count, "m": inner[0].mu, "v": inner[0].nu},
    ),
}


def softmax_loss(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
    return -jnp.mean(picked)


def problem(dtype=np.float32, seed=0):
    """Initial parameters, data, and the ids of each step (the last step of an epoch is short)."""
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(size=(FEATURES, CLASSES)).astype(dtype),
        "b": rng.normal(size=CLASSES).astype(dtype),
    }
    data = {
        "x": rng.normal(size=(NUM_EXAMPLES, FEATURES)).astype(dtype),
        "y": rng.integers(0, CLASSES, NUM_EXAMPLES).astype(np.int32),
    }
    epochs = [np.append(rng.permutation(NUM_EXAMPLES), [-1, -1]) for _ in range(4)]
    batches = np.concatenate(epochs).reshape(-1, BATCH)[:STEPS]
    batches[3, :4] = FORGET  # two rows are left of this step,
    batches[5] = [2, 3, 2, 17, -1, -1]  # and none of this one
    return params, data, batches


class Guarded:
    """Data that must not be asked for the forgotten rows."""

    def __init__(self, data, forbidden):
        self.data, self.forbidden = data, forbidden

    def __getitem__(self, ids):
        assert not np.isin(ids, self.forbidden).any()
        return jax.tree.map(lambda leaf: leaf[ids], self.data)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("normalizer", "l2"), [("batch", None), ("kept", 0.05)])
def test_equals_a_plain_loop_to_1e_12_in_double_precision(name, normalizer, l2, x64):
    params, data, batches = problem(np.float64)
    tx, optimizer, memory_of = OPTIMIZERS[name]
    got, inner = oracle(
        tx, softmax_loss, params, log=log_of(batches), data=Guarded(data, FORGET),
        forget=FORGET, normalizer=normalizer, l2=l2,
    )  # fmt: skip
    want, memory = oracles.train(
        oracles.softmax_row, params, data["x"], data["y"], batches, FORGET, optimizer,
        normalizer=normalizer, l2=l2 or 0.0,
    )  # fmt: skip
    assert oracles.relative_gap(got, want) < 1e-12
    assert oracles.relative_gap(memory_of(inner), memory) < 1e-12


@jax.jit
def plain_gradient(params, rows, scale):
    """The gradient of the mean over the rows that are there, times a number."""
    return jax.tree.map(lambda g: g * scale, jax.grad(softmax_loss)(params, rows))


def plain_run(tx, params, data, batches, forget, normalizer):
    """A loop as a user writes it, on the kept rows alone."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for ids in batches:
        scheduled = ids[ids >= 0]
        kept = scheduled[~np.isin(scheduled, forget)]
        grads = jax.tree.map(jnp.zeros_like, params)
        if len(kept):
            rows = jax.tree.map(lambda leaf, kept=kept: leaf[kept], data)
            scale = len(kept) / len(scheduled) if normalizer == "batch" else 1.0
            grads = plain_gradient(params, rows, scale)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "normalizer"),
    [
        ("momentum", "batch"),
        ("adam", "kept"),
        pytest.param("momentum", "kept", marks=pytest.mark.slow),
        pytest.param("adam", "batch", marks=pytest.mark.slow),
    ],
)
def test_equals_a_plain_loop_within_ten_times_what_one_ulp_does(name, normalizer):
    params, data, batches = problem()
    tx = OPTIMIZERS[name][0]
    got = oracle(
        tx, softmax_loss, params, log=log_of(batches), data=data, forget=FORGET,
        normalizer=normalizer,
    )  # fmt: skip
    want = plain_run(tx, params, data, batches, FORGET, normalizer)
    moved = []
    for seed in range(5):
        nudge = functools.partial(oracles.ulp_neighbour, np.random.default_rng(seed))
        start = jax.tree.map(nudge, params)
        moved.append(plain_run(tx, start, data, batches, FORGET, normalizer))
    one_ulp = max(tree.relative_distance(m, want) for m in moved)
    assert 0 < one_ulp < 1e-5
    assert tree.relative_distance(got, want) <= 10 * one_ulp
    # and the rows did matter: with them the run ends somewhere else
    assert tree.relative_distance(oracle_with_all(tx, normalizer), got) > 1e4 * one_ulp


def oracle_with_all(tx, normalizer):
    params, data, batches = problem()
    return oracle(tx, softmax_loss, params, log=log_of(batches), data=data, normalizer=normalizer)


def test_segments_of_one_step_and_of_eight_agree_to_rounding():
    params, data, batches = problem()
    run = lambda length: oracle(
        optax.adam(0.01), softmax_loss, params, log=log_of(batches), data=data, forget=FORGET,
        segment_length=length,
    )  # fmt: skip
    assert tree.relative_distance(run(1), run(8)) < 1e-6


def test_two_runs_are_bitwise_the_same():
    first, second = (oracle_with_all(optax.adam(0.01), "batch") for _ in range(2))
    assert tree.same_bits(first, second)


def test_padding_leaves_no_trace_in_the_gradient(x64):
    params, data, batches = problem(np.float64)
    spread = np.full((STEPS, 2 * BATCH), -1)
    spread[:, 1::2] = batches
    run = lambda some: oracle(
        optax.adam(0.01), softmax_loss, params, log=log_of(some), data=data, forget=FORGET
    )
    assert tree.relative_distance(run(spread), run(batches)) < 1e-13


def test_num_steps_stops_early():
    params, data, batches = problem()
    tx = optax.adam(0.01)
    run = lambda some, **options: oracle(
        tx, softmax_loss, params, log=log_of(some), data=data, **options
    )
    assert tree.same_bits(run(batches, num_steps=7), run(batches[:7]))
    assert tree.same_bits(run(batches, num_steps=0), tree.copy((params, tx.init(params))))


def test_a_step_that_was_never_taken_is_not_run():
    params, data, batches = problem()
    log = log_of(batches[:9], num_rows=[6] * 4 + [-1] * 5)
    _, inner = oracle(optax.adam(0.01), softmax_loss, params, log=log, data=data)
    assert int(inner[0].count) == 4


def test_a_step_with_nothing_left_has_a_zero_gradient_and_still_counts():
    params, data, _ = problem()
    for normalizer in ("batch", "kept"):
        got, inner = oracle(
            optax.sgd(0.5, momentum=0.9), softmax_loss, params, log=log_of([[2, 3], [5, 2]]),
            data=data, forget=(2, 3), num_steps=1, normalizer=normalizer,
        )  # fmt: skip
        assert tree.same_bits(got, jax.tree.map(jnp.asarray, params))
        assert not np.any(oracles.flat(inner[0].trace))


def test_with_no_row_left_at_all_every_step_has_a_zero_gradient():
    params, data, _ = problem()
    for normalizer in ("batch", "kept"):
        got, inner = oracle(
            optax.adam(0.1), softmax_loss, params, log=log_of([[1, 2], [2, -1]]), data=data,
            forget=(1, 2), normalizer=normalizer,
        )  # fmt: skip
        assert tree.same_bits(got, tree.copy(params))
        assert int(inner[0].count) == 2
        assert not np.any(oracles.flat(inner[0].mu))


def test_with_no_row_left_and_data_that_cannot_show_an_empty_batch_there_is_no_shape():
    class NeverEmpty:
        def __getitem__(self, ids):
            if len(ids) == 0:
                raise IndexError("no rows")
            return jax.tree.map(lambda leaf: leaf[ids], data)

    params, data, _ = problem()
    with pytest.raises(errors.MissingDataError, match="no rows"):
        oracle(
            optax.sgd(0.1), softmax_loss, params, log=log_of([[1, 2]]), data=NeverEmpty(),
            forget=(1, 2),
        )  # fmt: skip


def dropout_loss(params, batch, key):
    mask = jax.random.bernoulli(key, 0.7, batch["x"].shape)
    return softmax_loss(params, {"x": batch["x"] * mask, "y": batch["y"]})


def test_each_row_keeps_its_key_when_others_are_gone(x64):
    params, data, batches = problem(np.float64)
    batches = batches[:8]
    keys = jax.random.split(jax.random.key(3), len(batches))
    got, _ = oracle(
        optax.sgd(0.3), dropout_loss, params, log=log_of(batches, keys=keys), data=data,
        forget=FORGET,
    )  # fmt: skip
    want = params
    slope = jax.jit(jax.grad(dropout_loss))
    for ids, key in zip(batches, keys):
        scheduled = ids[ids >= 0]
        terms = [
            slope(
                want,
                jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], data),
                jax.random.fold_in(key, i),
            )
            for i in scheduled
            if i not in FORGET
        ]
        for name in want:
            moved = sum(np.asarray(term[name]) for term in terms) / len(scheduled)
            want = want | {name: want[name] - 0.3 * moved}
    assert oracles.relative_gap(got, want) < 1e-12


def test_hyperparameters_that_were_set_from_outside_are_set_again(x64):
    params, data, batches = problem(np.float64)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    rates = np.linspace(0.5, 0.05, STEPS)
    log = init_log(STEPS, BATCH, has_key=False, inner=tx.init(params))
    (path,) = get_settings(tx.init(params))
    log = log_of(batches)._replace(step_settings={path: {"learning_rate": rates}})
    got, _ = oracle(tx, softmax_loss, params, log=log, data=data, forget=FORGET)
    want = dict(params)
    for ids, rate in zip(batches, rates):
        want, _ = oracles.train(
            oracles.softmax_row, want, data["x"], data["y"], [ids], FORGET,
            oracles.momentum(rate, decay=0.0),
        )  # fmt: skip
    assert oracles.relative_gap(got, want) < 1e-12


def test_a_penalty_may_be_masked(x64):
    params, data, batches = problem(np.float64)
    run = lambda **options: oracle(
        optax.sgd(0.1), softmax_loss, params, log=log_of(batches[:1]), data=data, **options
    )[0]
    plain, masked = run(), run(l2=0.2, l2_mask={"w": True, "b": False})
    assert np.array_equal(masked["b"], plain["b"])
    assert np.allclose(masked["w"], plain["w"] - 0.1 * 0.2 * params["w"], rtol=1e-13, atol=0)
    called = run(l2=0.2, l2_mask=lambda p: {"w": True, "b": False})
    assert tree.same_bits(called, masked)


def test_the_penalty_is_the_derivative_of_its_value():
    params, _, _ = problem()
    for mask in (None, {"w": True, "b": False}):
        penalty = Penalty(0.3, mask)
        zeros = jax.tree.map(jnp.zeros_like, params)
        got = penalty.gradient(zeros, params)
        assert oracles.relative_gap(got, jax.grad(penalty.value)(params)) < 1e-6


def test_a_line_search_gets_the_value_of_what_it_minimises():
    params, data, _ = problem()
    everything = np.arange(NUM_EXAMPLES)[None].repeat(12, 0)
    tx = optax.lbfgs(memory_size=5)
    got, _ = oracle(
        tx, softmax_loss, params, log=log_of(everything), data=data, forget=FORGET,
        normalizer="kept", l2=0.1,
    )  # fmt: skip
    kept = np.setdiff1d(np.arange(NUM_EXAMPLES), FORGET)
    gradient = oracles.weighted_gradient(
        oracles.softmax_row, got, data["x"][kept], data["y"][kept], np.ones(len(kept)), len(kept)
    )
    slope = oracles.flat(gradient) + 0.1 * oracles.flat(got)
    assert np.linalg.norm(slope) < 1e-3


def test_the_state_before_each_cut_is_shown():
    params, data, batches = problem()
    tx = optax.adam(0.01)
    segment = make_segment(tx, softmax_loss, normalizer="batch", penalty=Penalty(None))
    run = jax.jit(segment, donate_argnums=(0, 1))
    for length in (1, 4):
        seen = {}
        keep = lambda step, *state, seen=seen: seen.update({step: tree.copy(state)})
        _, _, flags = run_log(
            run, *tree.copy((params, tx.init(params))), log_of(batches), RowReader(data),
            start=0, stop=12, segment_length=length, cuts=[0, 3, 10, 12, 40], on_cut=keep,
        )  # fmt: skip
        assert sorted(seen) == [0, 3, 10]
        assert flags.non_finite.shape == flags.non_finite_rows.shape == (12,)
        assert not flags.non_finite.any()
        assert not flags.non_finite_rows.any()
        want = oracle(tx, softmax_loss, params, log=log_of(batches), data=data, num_steps=10)
        assert tree.relative_distance(seen[10], want) < 1e-6
        assert length != 1 or tree.same_bits(tuple(seen[10]), want)
        assert tree.same_bits(seen[0], tree.copy((params, tx.init(params))))


def test_the_callers_arrays_are_neither_donated_nor_aliased():
    params, data, batches = problem()
    given = jax.tree.map(jnp.asarray, params)
    got = oracle(optax.sgd(0.1), softmax_loss, given, log=log_of(batches), data=data)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    before = tree.digest(got)
    aliased = oracle(optax.sgd(0.1), softmax_loss, params, log=log_of(batches), data=data)
    for leaf in (*params.values(), data["x"], batches):
        leaf[:] = 7
    assert tree.digest(aliased) == tree.digest(got) == before
