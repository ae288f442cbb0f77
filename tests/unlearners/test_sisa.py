"""Sharded and sliced ensembles: equality with training from scratch, and what keeps it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import accounting, errors, unlearners
from tests.conformance.cases import differing

NUM_ROWS, KEY = 24, jax.random.key(7)


def make_data(num_rows=NUM_ROWS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 3)).astype(np.float32)
    return {"x": x, "y": (x @ [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=num_rows) > 0).astype(int)}


def outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jax.nn.log_softmax(hidden @ params["out"])


def loss(params, batch):
    return -jnp.mean(jnp.take_along_axis(outputs(params, batch), batch["y"][:, None], axis=1))


def init(key):
    first, second = jax.random.split(key)
    return {"in": jax.random.normal(first, (3, 4)), "out": jax.random.normal(second, (4, 2))}


def make(tx=None, loss_fn=loss, **options):
    options = {"num_shards": 3, "num_slices": 2, "batch_size": 3, "epochs_per_slice": 2} | options
    return unlearners.sisa(
        optax.adam(0.05) if tx is None else tx,
        loss_fn,
        init_params=init,
        apply_fn=lambda p, b: jax.nn.softmax(outputs(p, b)),
        **({"num_examples": NUM_ROWS} | options),
    )


@functools.cache
def fitted(name="adam"):
    learner = make(OPTIMIZERS[name]())
    return learner, *learner.fit(make_data(), key=KEY)


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "sgd": lambda: optax.sgd(0.05),
    "schedule-clip-adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 20))
    ),
}


def same_as_refit(learner, params, state, gone):
    """Every leaf but the bits of who took part."""
    kept = np.setdiff1d(np.arange(NUM_ROWS), gone)
    oracle, oracle_state = learner.fit(make_data(), kept, key=KEY)
    parts = lambda p, s: (p, s.inner, s.record.sisa_checkpoints, s.record.fitted.fitted_digest)
    return differing(parts(params, state), parts(oracle, oracle_state)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forget_equals_training_from_scratch_in_every_leaf(name):
    learner, params, state = fitted(name)
    result = learner.forget(params, state, [4, 17], data=make_data())
    assert same_as_refit(learner, result.params, result.opt_state, [4, 17])
    again = learner.forget(result.params, result.opt_state, [0, 9, 22], data=make_data())
    assert same_as_refit(learner, again.params, again.opt_state, [0, 4, 9, 17, 22])


@pytest.mark.parametrize("width", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_shards_side_by_side_in_one_program_are_exact_too(width):
    learner = make(shards_at_once=width)
    params, state = learner.fit(make_data(), key=KEY)
    for gone in ([4], [4, 17, 2]):
        result = learner.forget(params, state, gone, data=make_data())
        assert same_as_refit(learner, result.params, result.opt_state, gone)
    alone = fitted()[1]
    close = jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-4)), params, alone)
    assert all(jax.tree.leaves(close))


def later_slice_id(state):
    """An id whose deletion restarts from a checkpoint rather than from the beginning."""
    learner, params, state = fitted()
    quotes = [learner.quote(params, state, [i]).num_steps for i in range(NUM_ROWS)]
    return int(np.argmin(quotes))


@pytest.mark.parametrize(("name", "differs"), [("adam", True), ("momentum", True), ("sgd", False)])
def test_a_checkpoint_of_weights_alone_is_not_exact_for_a_stateful_optimizer(name, differs):
    """The released code resumes with a fresh optimizer; only plain SGD does not notice."""
    learner, params, state = fitted(name)
    gone = [later_slice_id(state)]
    tx = OPTIMIZERS[name]()
    weights_only = tuple((p, jax.vmap(tx.init)(p)) for p, _ in state.record.sisa_checkpoints)
    released_way = state._replace(record=state.record._replace(sisa_checkpoints=weights_only))
    kept = np.setdiff1d(np.arange(NUM_ROWS), gone)
    oracle, _ = learner.fit(make_data(), kept, key=KEY)
    theirs = learner.forget(params, released_way, gone, data=make_data())
    ours = learner.forget(params, state, gone, data=make_data())
    assert differing(ours.params, oracle) == []
    gap = max(
        float(np.max(np.abs(a - b)))
        for a, b in zip(jax.tree.leaves(theirs.params), jax.tree.leaves(oracle), strict=True)
    )
    assert (gap > 1e-3) if differs else (gap == 0.0)


def test_shards_without_a_deleted_row_keep_every_bit():
    learner, params, state = fitted()
    result = learner.forget(params, state, [4], data=make_data())
    (touched, _), = result.info.measurements["first_slices"]  # fmt: skip
    for shard in range(3):
        here = lambda tree, at=shard: jax.tree.map(lambda leaf: leaf[at], tree)
        changed = differing(here(result.params), here(params)) != []
        assert changed == (shard == touched)
        moved = differing(here(result.opt_state.inner), here(state.inner)) != []
        assert moved == (shard == touched)


def test_a_deletion_reads_its_shard_alone_and_not_the_row():
    _, params, state = fitted()
    asked, data = set(), make_data()

    class Spy:
        def __getitem__(self, ids):
            asked.update(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], data)

    fresh = make()
    fresh.forget(params, state, [4], data=data)  # its loss has been checked now
    fresh.forget(params, state, [5], data=Spy())
    assert 5 not in asked
    assert len(asked) <= NUM_ROWS // 3 + 1


def test_shards_are_of_equal_size_and_every_row_has_a_place():
    learner = make(num_examples=22)
    params, state = learner.fit(make_data(22), key=KEY)
    steps = [learner.quote(params, state, [i]).num_steps for i in range(22)]
    assert len(set(steps)) == 2
    assert 10 <= steps.count(max(steps)) <= 12


def test_the_mean_cost_of_a_deletion_is_the_formula():
    learner = make(num_slices=4, batch_size=1, num_shards=3)
    params, state = learner.fit(make_data(), key=KEY)
    quotes = [learner.quote(params, state, [i]) for i in range(NUM_ROWS)]
    shard = quotes[0].retrain_gradients / 3
    mean = np.mean([quote.num_gradients for quote in quotes])
    assert mean / shard == pytest.approx(accounting.sliced_retraining(4))
    result = learner.forget(params, state, [3, 8], data=make_data())
    quote = learner.quote(params, state, [3, 8])
    assert quote.num_steps == result.info.measurements["replayed_steps"]


def test_dropout_keys_belong_to_rows_and_steps():
    def noisy(params, batch, key):
        mask = jax.random.bernoulli(key, 0.7, batch["x"].shape)
        return loss(params, {"x": batch["x"] * mask, "y": batch["y"]})

    learner = make(loss_fn=noisy)
    params, state = learner.fit(make_data(), key=KEY)
    result = learner.forget(params, state, [4, 17], data=make_data())
    assert same_as_refit(learner, result.params, result.opt_state, [4, 17])
    assert differing(params, fitted()[1])


def test_l2_and_a_single_slice_are_exact():
    learner = make(l2=0.1, num_slices=1)
    params, state = learner.fit(make_data(), key=KEY)
    assert state.record.sisa_checkpoints == ()
    result = learner.forget(params, state, [4], data=make_data())
    assert same_as_refit(learner, result.params, result.opt_state, [4])


def test_a_shard_may_lose_all_of_its_rows():
    learner, params, state = fitted()
    places = [learner.forget(params, state, [i], data=make_data()).info for i in range(NUM_ROWS)]
    gone = [i for i, info in enumerate(places) if info.measurements["first_slices"][0][0] == 1]
    assert len(gone) == NUM_ROWS // 3
    result = learner.forget(params, state, gone, data=make_data())
    assert same_as_refit(learner, result.params, result.opt_state, gone)


def test_answers_are_aggregated():
    votes = jnp.array([[[0.4, 0.6]], [[0.4, 0.6]], [[0.9, 0.1]]])
    data = make_data(1)
    answer = lambda aggregate: unlearners.sisa(
        optax.sgd(0.1), loss, init_params=init, num_examples=9, num_shards=3, batch_size=1,
        apply_fn=lambda p, b: p, aggregate=aggregate,
    ).predict(votes, data)  # fmt: skip
    assert np.allclose(answer("mean"), [[1.7 / 3, 1.3 / 3]])
    assert np.allclose(answer("majority"), [[1 / 3, 2 / 3]])
    assert np.allclose(answer(lambda out: out.max(axis=0)), [[0.9, 0.6]])


def test_an_ensemble_learns():
    data = make_data(120)
    learner = make(num_examples=120, epochs_per_slice=5)
    params, _ = learner.fit(data, key=KEY)
    assert np.mean(np.argmax(learner.predict(params, data), axis=1) == data["y"]) > 0.9


def test_a_loss_that_couples_rows_is_refused():
    def coupled(params, batch):
        x = batch["x"] - jnp.mean(batch["x"], axis=0)
        return loss(params, {"x": x, "y": batch["y"]})

    with pytest.raises(errors.CoupledLossError):
        make(loss_fn=coupled).fit(make_data(), key=KEY)


def test_a_run_that_diverges_is_a_typed_error():
    with pytest.raises(errors.NonFiniteError):
        make(tx=optax.sgd(1e38)).fit(make_data(), key=KEY)


@pytest.mark.parametrize(
    "options",
    [
        {"num_shards": 0}, {"num_slices": 9}, {"num_shards": 25}, {"batch_size": True},
        {"epochs_per_slice": 1.5}, {"aggregate": "median"}, {"num_examples": 0},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="Expected"):
        make(**options)


@pytest.mark.parametrize("key", [None, 3])
def test_fit_needs_a_typed_key(key):
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        make().fit(make_data(), key=key)
