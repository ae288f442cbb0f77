"""Flax NNX: the stock optimizer, graph mode and tree mode, and refusals that change nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nnx = pytest.importorskip("flax.nnx")

from jaxunlearn import adapters, errors, kernels, records, tree, unlearners  # noqa: E402
from jaxunlearn.types import UnlearnerState  # noqa: E402

NUM_EXAMPLES, FEATURES, CLASSES, BATCH, STEPS = 20, 5, 3, 4, 8
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def data_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(NUM_EXAMPLES, FEATURES)).astype(np.float32),
        "y": rng.integers(0, CLASSES, NUM_EXAMPLES).astype(np.int32),
    }


def batches_of(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.permutation(NUM_EXAMPLES)[:BATCH].astype(np.int32) for _ in range(STEPS)]


class Network(nnx.Module):
    def __init__(self, rngs, norm=False, dropout=0.0):
        self.inner = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x, key=None):
        x = self.inner(x)
        x = jnp.tanh(x if self.norm is None else self.norm(x))
        x = x if key is None else self.dropout(x, rngs=nnx.Rngs(dropout=key))
        return self.head(x)


def loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def keyed_loss(model, batch, key):
    return optax.softmax_cross_entropy_with_integer_labels(
        model(batch["x"], key), batch["y"]
    ).mean()


def make(loss=loss, tx=TX, seed=0, graph=None, **network):
    """A model, its loss function, and a stock optimizer with an unlearner inside."""
    model = Network(nnx.Rngs(seed), **network)
    loss_fn = adapters.nnx.loss_fn(model, loss, graph=graph)
    unlearner = unlearners.replay(
        tx, loss_fn, num_examples=NUM_EXAMPLES, batch_size=BATCH, max_steps=20
    )
    return model, loss_fn, nnx.Optimizer(model, unlearner, wrt=nnx.Param, graph=graph)


def train(model, optimizer, loss_fn, *, keys=None, extra=None, graph=None):
    """A training loop as a user writes it, but for `weighted_grad` and `ids=`."""
    data, gradient = data_of(), kernels.weighted_grad(loss_fn)

    @nnx.jit(graph=graph)
    def step(model, optimizer, batch, ids, key):
        options = {} if key is None else {"key": key}
        row_keys = None if key is None else kernels.example_keys(key, ids)
        params = adapters.nnx.params(model, optimizer)
        grads = gradient(params, batch, jnp.ones(BATCH), num_rows=BATCH, keys=row_keys)
        optimizer.update(model, grads, ids=ids, **options, **(extra or {}))

    for i, ids in enumerate(batches_of()):
        batch = jax.tree.map(lambda leaf, ids=ids: leaf[ids], data)
        step(model, optimizer, batch, jnp.asarray(ids), None if keys is None else keys[i])


def arrays_of(model, optimizer):
    """Everything there is, as plain arrays."""
    return tree.copy((nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(optimizer))))


def oracle_of(loss_fn, start, forget, **options):
    return records.oracle(
        TX, loss_fn, start, log=records.log_of(batches_of(), **options), data=data_of(),
        forget=forget,
    )  # fmt: skip


@pytest.mark.parametrize("graph", [True, False])
def test_train_and_forget_is_bitwise_the_oracle(graph):
    with nnx.set_graph_mode(graph):
        model, loss_fn, optimizer = make()
        start = tree.copy(nnx.as_pure(adapters.nnx.params(model, optimizer)))
        train(model, optimizer, loss_fn)
        quote = adapters.nnx.quote(model, optimizer, [3, 7])
        info = adapters.nnx.forget(model, optimizer, [7, 3, 3], data=data_of())
        params, inner = oracle_of(loss_fn, start, [3, 7])
        reached = nnx.as_pure(adapters.nnx.params(model, optimizer))
        assert tree.same_bits(jax.tree.leaves(reached), jax.tree.leaves(params))
        assert tree.same_bits(adapters.nnx.released(optimizer), inner)
        assert (info.ids, info.num_duplicates) == ((3, 7), 1)
        assert quote.feasible
        assert quote.num_steps == info.measurements["replayed_steps"]
        assert int(optimizer.step[...]) == STEPS
        # and once more, then training goes on
        adapters.nnx.forget(model, optimizer, 11, data=data_of())
        params, inner = oracle_of(loss_fn, start, [3, 7, 11])
        reached = nnx.as_pure(adapters.nnx.params(model, optimizer))
        assert tree.same_bits(jax.tree.leaves(reached), jax.tree.leaves(params))
        batch = jax.tree.map(lambda leaf: leaf[:BATCH], data_of())
        grads = nnx.grad(loss)(model, batch)
        optimizer.update(model, grads, ids=jnp.array([0, 1, 2, 4]))
        assert int(optimizer.step[...]) == STEPS + 1


@pytest.mark.slow
def test_the_graph_argument_decides_the_mode_too():
    model, loss_fn, optimizer = make(graph=False)
    start = tree.copy(nnx.as_pure(adapters.nnx.params(model, optimizer)))
    train(model, optimizer, loss_fn, graph=False)
    adapters.nnx.forget(model, optimizer, [3], data=data_of())
    params, _ = oracle_of(loss_fn, start, [3])
    reached = nnx.as_pure(adapters.nnx.params(model, optimizer))
    assert tree.same_bits(jax.tree.leaves(reached), jax.tree.leaves(params))


@pytest.mark.slow
def test_dropout_is_replayed_under_each_examples_own_key():
    model, loss_fn, optimizer = make(keyed_loss, dropout=0.4)
    start = tree.copy(nnx.as_pure(adapters.nnx.params(model, optimizer)))
    keys = jax.random.split(jax.random.key(9), STEPS)
    train(model, optimizer, loss_fn, keys=keys)
    adapters.nnx.forget(model, optimizer, [3, 7], data=data_of())
    params, inner = oracle_of(loss_fn, start, [3, 7], keys=keys)
    reached = nnx.as_pure(adapters.nnx.params(model, optimizer))
    assert tree.same_bits(jax.tree.leaves(reached), jax.tree.leaves(params))
    assert tree.same_bits(adapters.nnx.released(optimizer), inner)


def test_extra_arguments_of_update_pass_through():
    seen = []

    def update(updates, state, params=None, *, temperature, **extra):
        seen.append(temperature)
        return updates, state

    curious = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model, loss_fn, optimizer = make(tx=optax.chain(optax.sgd(0.1), curious))
    train(model, optimizer, loss_fn, extra={"temperature": 3.0})
    assert seen == [3.0]


def test_frozen_variables_of_the_model_are_left_alone():
    model, loss_fn, optimizer = make(norm=True)
    model.norm.mean[...] = jnp.linspace(-1, 1, 8)
    model.eval()
    loss_fn = adapters.nnx.loss_fn(model, loss)
    unlearner = unlearners.replay(
        TX, loss_fn, num_examples=NUM_EXAMPLES, batch_size=BATCH, max_steps=20
    )
    optimizer = nnx.Optimizer(model, unlearner, wrt=nnx.Param)
    before = tree.copy(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    train(model, optimizer, loss_fn)
    adapters.nnx.forget(model, optimizer, [3], data=data_of())
    assert tree.same_bits(nnx.as_pure(nnx.state(model, nnx.BatchStat)), before)


def test_the_loss_function_changes_nothing_of_the_model_even_in_training_mode():
    model = Network(nnx.Rngs(0), norm=True)
    model.train()
    before = tree.copy(nnx.as_pure(nnx.state(model)))
    loss_fn = adapters.nnx.loss_fn(model, loss)
    params, batch = nnx.state(model, nnx.Param), data_of()
    value = float(loss_fn(params, batch))
    jitted = float(jax.jit(loss_fn)(params, batch))
    assert tree.same_bits(nnx.as_pure(nnx.state(model)), before)
    assert abs(value - jitted) < 1e-6
    assert abs(value - float(loss(model, batch))) < 1e-6


@pytest.fixture(scope="module")
def trained():
    model, loss_fn, optimizer = make()
    train(model, optimizer, loss_fn)
    return model, optimizer


REFUSED = {
    "out of range": ([NUM_EXAMPLES], {}, errors.IdRangeError),
    "not an integer": ([1.5], {}, errors.IdTypeError),
    "2**32 + 5": ([2**32 + 5], {}, errors.IdRangeError),
    "missing data": ([3], {"data": None}, errors.MissingDataError),
    "broken data": (
        [3],
        {"data": {"x": np.zeros((2, FEATURES), np.float32)}},
        errors.MissingDataError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_leaves_model_and_optimizer_as_they_were(name, trained):
    ids, options, error = REFUSED[name]
    before = arrays_of(*trained)
    with pytest.raises(error):
        adapters.nnx.forget(*trained, ids, **({"data": data_of()} | options))
    assert tree.same_bits(arrays_of(*trained), before)
    assert not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(nnx.as_pure(nnx.state(trained[1])))
    )


def test_an_id_that_was_never_seen_is_refused():
    model, _, optimizer = make()
    before = arrays_of(model, optimizer)
    with pytest.raises(errors.NeverSeenError, match="pass ids= on every step"):
        adapters.nnx.forget(model, optimizer, [3], data=data_of())
    assert not adapters.nnx.quote(model, optimizer, [3]).feasible
    assert tree.same_bits(arrays_of(model, optimizer), before)


def test_batch_norm_in_training_mode_is_refused_and_nothing_changes():
    model, _, optimizer = make(norm=True)
    data = data_of()
    for ids in batches_of()[:3]:
        batch = jax.tree.map(lambda leaf, ids=ids: leaf[ids], data)
        optimizer.update(model, nnx.grad(loss)(model, batch), ids=jnp.asarray(ids))
    before = arrays_of(model, optimizer)
    with pytest.raises(errors.CoupledLossError, match="BatchNorm in training mode"):
        adapters.nnx.forget(model, optimizer, batches_of()[0][:1], data=data)
    assert tree.same_bits(arrays_of(model, optimizer), before)


@pytest.mark.parametrize("call", [adapters.nnx.forget, adapters.nnx.quote])
def test_an_optimizer_without_an_unlearner_is_refused(call):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    with pytest.raises(errors.WrongStateError, match=r"nnx\.Optimizer\(model, unlearners\.replay"):
        call(model, optimizer, [3])


def test_the_core_names_the_adapter_when_it_is_handed_the_optimizer(trained):
    model, optimizer = trained
    params = nnx.as_pure(adapters.nnx.params(model, optimizer))
    with pytest.raises(errors.WrongStateError, match=r"jaxunlearn\.adapters\.nnx\.forget"):
        optimizer.tx.forget(params, optimizer, [3], data=data_of())


def test_a_record_spoilt_in_training_is_refused_with_its_story(trained):
    model, _, optimizer = make()
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads, ids=jnp.array([1, 2]))
    optimizer.update(model, grads)
    before = arrays_of(model, optimizer)
    with pytest.raises(errors.TrainingRecordError, match="on some steps and not on others"):
        adapters.nnx.forget(model, optimizer, [1], data=data_of())
    assert tree.same_bits(arrays_of(model, optimizer), before)


# --- facts about NNX that the adapter rests on ---------------------------------------------------


class Kinds(NamedTuple):
    single: jax.Array
    half: jax.Array
    count: jax.Array
    flag: jax.Array
    key: jax.Array
    missing: None
    empty: tuple
    table: dict


def spy(state):
    """A transform that keeps `state` and adds up the ids that reach it."""

    def update(updates, state, params=None, *, example_ids=None, **extra):
        total = 0 if example_ids is None else jnp.sum(example_ids)
        return updates, (state[0], state[1] + total)

    start = (state, jnp.zeros((), jnp.int32))
    return optax.GradientTransformationExtraArgs(lambda params: tree.copy(start), update)


@pytest.mark.parametrize("graph", [True, False])
def test_t3_the_stock_optimizer_passes_ids_and_keeps_any_array_in_its_state(graph):
    state = Kinds(
        jnp.ones(2), jnp.ones(2, jnp.bfloat16), jnp.int32(1), jnp.array(True),
        jax.random.key(0), None, (), {"a": jnp.ones(1)},
    )  # fmt: skip
    with nnx.set_graph_mode(graph):
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, spy(state), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, ids):
            grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
            optimizer.update(model, grads, example_ids=ids)

        step(model, optimizer, jnp.array([3, 4]))
        kept, total = nnx.as_pure(optimizer.opt_state)
    assert int(total) == 7
    assert tree.same_bits(jax.tree.leaves(kept), jax.tree.leaves(state))


def test_t3_a_string_in_the_state_does_not_survive_so_strings_live_in_the_info():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    def train_with_a_string():
        tx = optax.GradientTransformation(lambda params: ("replay",), lambda u, s, p=None: (u, s))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        nnx.jit(lambda model, optimizer: optimizer.update(model, grads))(model, optimizer)

    with pytest.raises(TypeError):
        train_with_a_string()
    _, _, optimizer = make()
    assert all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(nnx.as_pure(optimizer.opt_state)))
    assert isinstance(nnx.as_pure(optimizer.opt_state), UnlearnerState)


def test_t4_what_is_not_a_parameter_is_dropped_from_the_gradients():
    class Ids(nnx.Variable):
        pass

    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(jax.tree.leaves(updates))
        kernel_only = jax.tree.map(jnp.zeros_like, params)
        return kernel_only, state

    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.State({"kernel": nnx.Param(jnp.ones((2, 1))), "ids": Ids(jnp.array([3, 4]))})
    optimizer.update(model, grads)
    assert [leaf.shape for leaf in seen[0]] == [(2, 1)]
