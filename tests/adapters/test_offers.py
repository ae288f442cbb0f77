"""What methods offer beside `forget`, reached from Flax: the functional API, bit for bit."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nnx = pytest.importorskip("flax.nnx")

from flax import linen  # noqa: E402

from jaxunlearn import adapters, errors, tree, unlearners  # noqa: E402
from jaxunlearn.unlearners import Event, EventKind, Outcome  # noqa: E402

NUM_EXAMPLES, FEATURES, BATCH, STEPS = 16, 4, 2, 8
DATA = {
    "x": np.random.default_rng(0).normal(size=(NUM_EXAMPLES, FEATURES)).astype(np.float32),
    "y": np.sign(np.random.default_rng(1).normal(size=NUM_EXAMPLES)).astype(np.float32),
}
IDS = np.arange(NUM_EXAMPLES, dtype=np.int32).reshape(STEPS, BATCH)


def loss(model, batch):
    return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * model(batch["x"])[:, 0]))


def rows_of(ids):
    return jax.tree.map(lambda leaf: leaf[np.maximum(ids, 0)], DATA)


def recollect(loss_fn):
    tx = optax.sgd(0.05, momentum=0.5)
    options = {"num_examples": NUM_EXAMPLES, "batch_size": BATCH, "max_steps": STEPS}
    return unlearners.recollect(tx, loss_fn, **options, progress=False)


def memory_pair(loss_fn):
    options = {"num_examples": NUM_EXAMPLES, "batch_size": BATCH, "max_steps": STEPS}
    return unlearners.memory_pair(loss_fn, **options, memory_size=2, num_checkpoints=2)


class Nnx:
    """A model and its optimizer, and what the adapter does with them."""

    def __init__(self, method, graph):
        self.graph = graph
        self.model = nnx.Linear(FEATURES, 1, rngs=nnx.Rngs(0))
        self.tx = method(adapters.nnx.loss_fn(self.model, loss, graph=graph))
        self.before = adapters.nnx.describe(self.model, self.tx) if self.describes else None
        self.optimizer = nnx.Optimizer(self.model, self.tx, wrt=nnx.Param, graph=graph)

    @property
    def describes(self):
        return hasattr(self.tx, "describe")

    def train(self):
        @nnx.jit(graph=self.graph)
        def step(model, optimizer, batch, ids):
            optimizer.update(model, nnx.grad(loss)(model, batch), batch=batch, ids=ids)

        for ids in IDS:
            step(self.model, self.optimizer, rows_of(ids), ids)

    def opened(self):
        params = nnx.as_pure(adapters.nnx.params(self.model, self.optimizer))
        return tree.copy((params, nnx.as_pure(self.optimizer.opt_state)))

    def num_steps(self):
        return int(self.optimizer.step[...])

    def forget(self, ids):
        return adapters.nnx.forget(self.model, self.optimizer, ids, data=DATA)

    def refresh(self):
        adapters.nnx.refresh(self.model, self.optimizer, data=DATA)

    def describe(self):
        return adapters.nnx.describe(self.model, self.optimizer)

    def start_stream(self, events):
        return adapters.nnx.start_stream(self.model, self.optimizer, events)

    def run_stream(self, rows, events):
        run = nnx.jit(adapters.nnx.run_stream, graph=self.graph)
        return run(self.model, self.optimizer, rows, events)


class Linen:
    """The same for a Linen module and its `TrainState`."""

    def __init__(self, method):
        module = linen.Dense(1)
        params = module.init(jax.random.key(0), jnp.zeros((1, FEATURES)))["params"]
        self.tx = method(adapters.linen.loss_fn(module, loss))
        self.before = self.tx.describe(params) if hasattr(self.tx, "describe") else None
        self.state = adapters.linen.TrainState.create(
            apply_fn=module.apply, params=params, tx=self.tx
        )

    def train(self):
        @jax.jit
        def step(state, batch, ids):
            apply = lambda params: lambda x: state.apply_fn({"params": params}, x)
            grads = jax.grad(lambda params: loss(apply(params), batch))(state.params)
            return state.apply_gradients(grads=grads, batch=batch, ids=ids)

        for ids in IDS:
            self.state = step(self.state, rows_of(ids), ids)

    def opened(self):
        return tree.copy((self.state.params, self.state.opt_state))

    def num_steps(self):
        return int(self.state.step)

    def forget(self, ids):
        self.state, info = adapters.linen.forget(self.state, ids, data=DATA)
        return info

    def refresh(self):
        self.state = adapters.linen.refresh(self.state, data=DATA)

    def describe(self):
        return adapters.linen.describe(self.state)

    def start_stream(self, events):
        return adapters.linen.start_stream(self.state, events)

    def run_stream(self, rows, events):
        run = jax.jit(adapters.linen.run_stream)
        self.state, rows, output = run(self.state, rows, events)
        return rows, output


HOLDERS = {
    "nnx-graph": lambda method: Nnx(method, True),
    "nnx-tree": lambda method: Nnx(method, False),
    "linen": Linen,
}
each = pytest.mark.parametrize("holder", [
    "nnx-graph", pytest.param("nnx-tree", marks=pytest.mark.slow), "linen",
])  # fmt: skip


def same(held, params, opt_state):
    """Whether the holder has just these parameters and this state, the record included."""
    return tree.same_bits(jax.tree.leaves(held.opened()), jax.tree.leaves((params, opt_state)))


@each
def test_forget_and_refresh_are_those_of_the_functional_api(holder):
    held = HOLDERS[holder](recollect)
    held.train()
    params, opt_state = held.opened()
    info = held.forget([3, 6])
    after = held.tx.forget(params, opt_state, [3, 6], data=DATA)
    assert same(held, after.params, after.opt_state)
    assert info.measurements == after.info.measurements
    held.refresh()
    fresh = held.tx.refresh(after.params, after.opt_state, data=DATA)
    assert same(held, *fresh)
    assert not same(held, after.params, after.opt_state)
    assert held.num_steps() == STEPS
    held.forget([4])  # a deletion along the path without the others
    assert same(held, *held.tx.forget(*fresh, [4])[:2])


@each
def test_describe_is_known_before_training_and_is_what_the_record_takes(holder):
    held = HOLDERS[holder](recollect)
    params, opt_state = held.opened()
    assert held.before == held.describe() == held.tx.describe(params)
    assert held.before["total"] == tree.num_bytes(opt_state.record)


def events_of(script):
    """Events from (kind, ids) pairs; a deletion is shown no rows."""
    ids = np.full((len(script), BATCH), -1, np.int32)
    for row, (_, wanted) in zip(ids, script):
        row[: len(wanted)] = wanted
    kinds = np.array([int(kind) for kind, _ in script], np.int32)
    rows = jax.tree.map(lambda leaf: leaf * 1, rows_of(ids))
    for leaf in jax.tree.leaves(rows):
        leaf[kinds == EventKind.DELETE] = 0
    return Event(kinds, ids, rows)


SCRIPT = [
    (EventKind.INSERT, [0, 1]), (EventKind.INSERT, [2, 3]), (EventKind.PREDICT, [9]),
    (EventKind.DELETE, [1]), (EventKind.INSERT, [4, 5]), (EventKind.DELETE, [7]),
]  # fmt: skip


@each
def test_a_stream_is_that_of_the_functional_api_and_can_be_taken_up_again(holder):
    held, events = HOLDERS[holder](memory_pair), events_of(SCRIPT)
    first, second = (jax.tree.map(lambda leaf, s=s: leaf[s], events) for s in np.s_[:3, 3:])
    stream, (params, _) = held.tx.stream, held.opened()
    state = stream.init(params, jax.tree.map(lambda leaf: leaf[0], events))
    run = jax.jit(stream.run)
    rows = held.start_stream(events)
    for part in (first, second):
        state, wanted = run(state, part)
        rows, output = held.run_stream(rows, part)
        assert same(held, state.stream_params, state.stream_opt_state)
        assert tree.same_bits((rows, output), (state.stream_rows, wanted))
    assert output.outcome.tolist() == [Outcome.DONE, Outcome.DONE, Outcome.REFUSED]
    assert held.num_steps() == 3  # the inserts


@pytest.mark.parametrize("holder", ["nnx-graph", "linen"])
def test_a_stream_does_not_start_on_a_run_whose_rows_are_gone(holder):
    held, events = HOLDERS[holder](memory_pair), events_of(SCRIPT)
    held.train()
    before = held.opened()
    with pytest.raises(errors.WrongStateError, match="has taken no step"):
        held.start_stream(events)
    assert same(held, *before)


def replay(loss_fn):
    options = {"num_examples": NUM_EXAMPLES, "batch_size": BATCH, "max_steps": STEPS}
    return unlearners.replay(optax.sgd(0.1), loss_fn, **options)


@pytest.mark.parametrize("holder", ["nnx-graph", "linen"])
def test_what_a_method_does_not_offer_is_refused_with_the_one_that_does(holder):
    held, events = HOLDERS[holder](replay), events_of(SCRIPT)
    for call, method in (
        (held.refresh, "recollect"),
        (held.describe, "recollect"),
        (lambda: held.start_stream(events), "memory_pair"),
        (lambda: held.run_stream({}, events), "memory_pair"),
    ):
        with pytest.raises(errors.WrongStateError, match=rf"unlearners\.{method}"):
            call()
    with pytest.raises(errors.WrongStateError, match=r"unlearners\.recollect"):
        adapters.nnx.describe(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))


def test_nothing_that_an_unlearner_offers_is_out_of_reach_of_flax():
    methods = {
        name: getattr(unlearners, name)
        for name in unlearners.__all__
        if isinstance(getattr(unlearners, name), types.FunctionType)
    }
    assert {"recollect", "memory_pair"} <= set(methods)
    more = set()
    for made in (recollect(lambda p, b: p), memory_pair(lambda p, b: p)):
        plain = ("init", "update", "forget_step")  # the optimizer's own, and what is pure
        more |= {name for name in made._asdict() if name not in plain}
    reached = {"stream": ("start_stream", "run_stream")}
    for module in (adapters.nnx, adapters.linen):
        for name in more:
            assert all(hasattr(module, part) for part in reached.get(name, (name,)))
