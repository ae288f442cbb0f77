"""Flax Linen: a TrainState that passes extra arguments, and refusals that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

linen = pytest.importorskip("flax.linen")

from flax.training import train_state as stock  # noqa: E402

from jaxunlearn import adapters, errors, kernels, records, tree, unlearners  # noqa: E402

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


class Network(linen.Module):
    norm: bool = False
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Dense(8)(x)
        if self.norm:
            x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(CLASSES)(x)


def loss(apply, batch):
    return optax.softmax_cross_entropy_with_integer_labels(apply(batch["x"]), batch["y"]).mean()


def keyed_loss(apply, batch, key):
    return loss(apply, batch)


class EpochState(adapters.linen.TrainState):
    epoch: int = 0


def make(loss=loss, module=None, state_type=adapters.linen.TrainState, tx=TX, **apply_kwargs):
    module = module or Network()
    variables = module.init(jax.random.key(0), jnp.zeros((1, FEATURES)))
    rest = {name: value for name, value in variables.items() if name != "params"}
    loss_fn = adapters.linen.loss_fn(module, loss, variables=rest, **apply_kwargs)
    unlearner = unlearners.replay(
        tx, loss_fn, num_examples=NUM_EXAMPLES, batch_size=BATCH, max_steps=20
    )
    state = state_type.create(apply_fn=module.apply, params=variables["params"], tx=unlearner)
    return state, loss_fn


def train(state, loss_fn, keys=None):
    data, gradient = data_of(), kernels.weighted_grad(loss_fn)

    @jax.jit
    def step(state, batch, ids, key):
        options = {} if key is None else {"key": key}
        row_keys = None if key is None else kernels.example_keys(key, ids)
        grads = gradient(state.params, batch, jnp.ones(BATCH), num_rows=BATCH, keys=row_keys)
        return state.apply_gradients(grads=grads, ids=ids, **options)

    for i, ids in enumerate(batches_of()):
        batch = jax.tree.map(lambda leaf, ids=ids: leaf[ids], data)
        state = step(state, batch, jnp.asarray(ids), None if keys is None else keys[i])
    return state


def oracle_of(state, loss_fn, forget, **options):
    return records.oracle(
        TX, loss_fn, state.params, log=records.log_of(batches_of(), **options), data=data_of(),
        forget=forget,
    )  # fmt: skip


def test_train_and_forget_is_bitwise_the_oracle():
    start, loss_fn = make(state_type=EpochState)
    state = train(start, loss_fn).replace(epoch=4)
    quote = adapters.linen.quote(state, [3, 7])
    after, info = adapters.linen.forget(state, [7, 3, 3], data=data_of())
    params, inner = oracle_of(start, loss_fn, [3, 7])
    assert tree.same_bits(after.params, params)
    assert tree.same_bits(adapters.linen.released(after), inner)
    assert (info.ids, info.num_duplicates) == ((3, 7), 1)
    assert quote.feasible
    assert quote.num_steps == info.measurements["replayed_steps"]
    assert (int(after.step), after.epoch) == (STEPS, 4)
    assert after.tx is state.tx
    again, _ = adapters.linen.forget(after, 11, data=data_of())
    params, inner = oracle_of(start, loss_fn, [3, 7, 11])
    assert tree.same_bits((again.params, adapters.linen.released(again)), (params, inner))


def test_dropout_is_replayed_under_each_examples_own_key():
    start, loss_fn = make(keyed_loss, Network(dropout=0.4), train=True)
    keys = jax.random.split(jax.random.key(9), STEPS)
    after, _ = adapters.linen.forget(train(start, loss_fn, keys), [3, 7], data=data_of())
    want = oracle_of(start, loss_fn, [3, 7], keys=keys)
    assert tree.same_bits((after.params, adapters.linen.released(after)), want)


def test_keywords_that_are_fields_are_replaced_and_all_others_reach_the_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    curious = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state, _ = make(state_type=EpochState, tx=optax.chain(curious, optax.sgd(0.1)))
    grads = jax.tree.map(jnp.ones_like, state.params)
    after = state.apply_gradients(grads=grads, ids=jnp.array([1, 2]), temperature=3.0, epoch=5)
    assert after.epoch == 5
    assert int(after.step) == 1
    assert seen["temperature"] == 3.0
    assert "epoch" not in seen
    assert records.seen_ids(after.opt_state.record.participation).tolist() == [1, 2]
    assert np.allclose(
        jax.tree.leaves(after.params)[0], jax.tree.leaves(state.params)[0] - 0.1, atol=1e-6
    )


def test_with_a_plain_optimizer_it_is_the_stock_train_state():
    params = {"w": jnp.ones(3)}
    options = {"apply_fn": None, "params": params, "tx": optax.sgd(0.1)}
    ours, theirs = adapters.linen.TrainState.create(**options), stock.TrainState.create(**options)
    for _ in range(2):
        ours, theirs = (s.apply_gradients(grads={"w": jnp.arange(3.0)}) for s in (ours, theirs))
    assert tree.same_bits(jax.tree.leaves(ours), jax.tree.leaves(theirs))


def test_t5_the_stock_train_state_takes_ids_for_a_field():
    state, _ = make(state_type=stock.TrainState)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    with pytest.raises(TypeError, match="ids"):
        state.apply_gradients(grads=grads, ids=jnp.array([1, 2]))


def test_a_stock_train_state_that_never_passed_ids_is_told_so():
    state, _ = make(state_type=stock.TrainState)
    state = state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, state.params))
    with pytest.raises(errors.NeverSeenError, match="pass ids= on every step"):
        adapters.linen.forget(state, [3], data=data_of())


@pytest.mark.parametrize("state_type", [stock.TrainState, adapters.linen.TrainState])
def test_the_core_names_the_adapter_when_it_is_handed_the_train_state(state_type):
    state, _ = make(state_type=state_type)
    with pytest.raises(errors.WrongStateError, match=r"jaxunlearn\.adapters\.linen\.forget"):
        state.tx.forget(state.params, state, [3], data=data_of())


@pytest.mark.parametrize("state_type", [stock.TrainState, adapters.linen.TrainState])
@pytest.mark.parametrize("call", [adapters.linen.forget, adapters.linen.quote])
def test_a_train_state_without_an_unlearner_is_refused(state_type, call):
    state = state_type.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.adam(1e-3))
    with pytest.raises(errors.WrongStateError, match=r"tx=unlearners\.replay"):
        call(state, [3])


@pytest.fixture(scope="module")
def trained():
    return train(*make())


@pytest.mark.parametrize(
    ("ids", "options", "error"),
    [
        ([NUM_EXAMPLES], {}, errors.IdRangeError),
        ([-1], {}, errors.IdRangeError),
        ([True], {}, errors.IdTypeError),
        ([2**32 + 5], {}, errors.IdRangeError),
        ([3], {"data": None}, errors.MissingDataError),
    ],
)
def test_a_refusal_leaves_the_train_state_as_it_was(ids, options, error, trained):
    before = tree.digest(trained)
    with pytest.raises(error):
        adapters.linen.forget(trained, ids, **({"data": data_of()} | options))
    assert tree.digest(trained) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained.opt_state))


def test_batch_norm_in_training_mode_is_refused_and_nothing_changes():
    state, _ = make(module=Network(norm=True), train=True)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    for ids in batches_of()[:3]:
        state = state.apply_gradients(grads=grads, ids=jnp.asarray(ids))
    before = tree.digest(state)
    with pytest.raises(errors.CoupledLossError, match="BatchNorm in training mode"):
        adapters.linen.forget(state, batches_of()[0][:1], data=data_of())
    assert tree.digest(state) == before


def test_batch_norm_in_evaluation_mode_is_a_mean_over_rows():
    state, loss_fn = make(module=Network(norm=True))
    kernels.check_loss(loss_fn, state.params, data_of())
