"""What enters the conformance suite: a method by one line of CASES, a transform by one of INSIDE.

All run on one least-squares problem, convex and tiny, whose parameters nest tuples and hold a
scalar leaf, so that any method can take it.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Budget, Unlearner, accounting, kernels, records, transforms, tree, unlearners
from jaxunlearn.records import unpack_float64

NUM_EXAMPLES, NUM_SEEN, BATCH, STEPS = 40, 13, 4, 9
"""40 ids are declared, rows 0..13 have data, ids 0..12 are trained on."""


class Entropy:
    """Bytes that can be rewound: two noisy releases are equal where they are before noise."""

    def __init__(self, seed: bytes = b"conformance"):
        self._seed, self._count = seed, 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._seed + self._count.to_bytes(8, "little")).digest(size)

    def rewind(self) -> None:
        self._count = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One method. factory(tx, loss_fn, num_examples=, **options) -> `Unlearner`.

    exact: parameters and inner state must equal the oracle's; `oracle_options` go to it.
    noisy: takes `entropy=`, which the suite injects and rewinds.
    has_max_steps: takes `max_steps=`, and refuses a run that is longer.
    crossed: is run with every transform of INSIDE; a mere variant runs with the plain one.
    operands: (run, forget) -> what `forget_step` takes to forget those ids from a `Trained`.
    before_noise: the parameters that a `Forgotten` had before noise.
    spread: (params, state) -> the state in which a method looks for these parameters too.
    own_tx: loss_fn -> the optimizer, for a method that brings its own; it is not crossed.
    needs_data: `forget` reads rows; without it looks at some only where it gets any.
    moves_params: a deletion moves the parameters, not the optimizer state alone.
    differentiates: of which rows `forget_step` takes gradients, and can fail: "kept", "gone" or
      none at all.
    is_slow: all tests of this case are.
    """

    name: str
    factory: Callable[..., Unlearner]
    options: dict[str, Any]
    operands: Callable[..., tuple]
    exact: bool = False
    noisy: bool = False
    has_max_steps: bool = False
    crossed: bool = True
    before_noise: Callable[[Any], Any] = lambda forgotten: forgotten.params
    oracle_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spread: Callable[..., Any] = lambda params, state: state
    needs_data: bool = True
    moves_params: bool = True
    differentiates: str | None = "kept"
    is_slow: bool = False
    own_tx: Callable[[Callable], optax.GradientTransformation] | None = None


def run_as_segment(run: "Trained", forget) -> tuple:
    """A whole run as one segment, from a fresh start, with the record rewound to step 0."""
    params, fresh = run.problem.start()
    record = run.state.record
    rewound = record.participation._replace(num_steps=fresh.record.participation.num_steps)
    state = fresh._replace(record=record._replace(participation=rewound))
    ids = np.stack([ids_of_step(t) for t in range(STEPS)])
    ids = np.where(np.isin(ids, forget), -1, ids)
    rows, _ = run.problem.batch(ids)
    return params, state, rows, ids, (ids >= 0).astype(np.float32)


def run_with_the_rows(run: "Trained", forget) -> tuple:
    """The same, with the rows to forget at weight zero: DeltaGrad subtracts their gradients."""
    params, state, *_ = run_as_segment(run, ())
    ids = np.stack([ids_of_step(t) for t in range(STEPS)])
    rows, _ = run.problem.batch(ids)
    weights = (ids >= 0) & ~np.isin(ids, forget)
    return params, state, rows, ids, weights.astype(np.float32)


def rows_at_once(run: "Trained", forget) -> tuple:
    """The trained state and all rows by id, -1 for those never trained on."""
    ids = np.arange(NUM_EXAMPLES, dtype=np.int32)
    ids = np.where(ids < NUM_SEEN, ids, -1)
    rows, _ = run.problem.batch(ids)
    weights = ((ids >= 0) & ~np.isin(ids, forget)).astype(np.float32)
    return run.params, run.state, rows, ids, weights


def bucket_and_sums(run: "Trained", forget) -> tuple:
    """The trained state with the sums over all rows in it, and the bucket of rows to forget."""
    state = run.problem.unlearner.store(run.params, run.state, data=run.problem.data)
    _, _, rows, ids, weights = units_to_add(run, forget)
    rows = jax.tree.map(np.copy, rows)
    return run.params, state, rows, ids, weights


def along_the_path(params, state):
    """The state as if the run had stood at `params` all along."""
    path = jax.tree.map(
        lambda leaf, p: jnp.broadcast_to(p, leaf.shape), state.record.path_params, params
    )
    return state._replace(record=state.record._replace(path_params=path))


def units_to_add(run: "Trained", forget) -> tuple:
    """The trained state and a bucket of ids with new weights: recollect looks at no rows."""
    ids = records.bucket(np.asarray(forget, np.int32)) if len(forget) else np.array([-1, -1])
    rows, _ = run.problem.batch(ids)
    return run.params, run.state, rows, ids.astype(np.int32), np.zeros(len(ids), np.float32)


def rows_to_go(run: "Trained", forget) -> tuple:
    """The trained state and the rows to go, with weight 1: what corrects the present state."""
    params, state, rows, ids, _ = units_to_add(run, forget)
    return params, state, rows, ids, (ids >= 0).astype(np.float32)


def with_spoilt_tangents(params, state):
    """The state as if a row of the run had exploded."""
    along = state.record.along
    infinite = lambda leaf: np.full(leaf.shape, np.inf, leaf.dtype)
    spoilt = tuple(jax.device_put(infinite(leaf), leaf.sharding) for leaf in along.tangents)
    record = state.record._replace(along=along._replace(tangents=spoilt))
    return state._replace(record=record)


def with_spoilt_sums(params, state):
    """The state as if a row of the run had exploded: sums that are not finite."""
    sums = state.record.statistics
    spoilt = jnp.full_like(sums.gradient_words, np.uint32(0x7FF00000))
    return state._replace(
        record=state.record._replace(statistics=sums._replace(gradient_words=spoilt))
    )


def iterate_of(forgotten):
    """The un-noised float64 iterate in the record."""
    words = forgotten.opt_state.record.iterate_words
    return tree.split(unpack_float64(words), forgotten.params)


def memory_pair(tx, loss_fn, **options) -> Unlearner:
    """`unlearners.memory_pair` where the suite hands every method an optimizer."""
    del tx
    return unlearners.memory_pair(loss_fn, **options)


def certified_removal(tx, loss_fn, *, entropy=None, **options) -> Unlearner:
    """`unlearners.certified_removal` with the same noise in the objective of every `init`."""
    entropy = entropy or Entropy()
    unlearner = unlearners.certified_removal(tx, loss_fn, entropy=entropy, **options)

    def init(params):
        entropy.rewind()
        return unlearner.init(params)

    return unlearner._replace(init=init)


def noisy_sgd(tx, loss_fn, **options) -> Unlearner:
    """`unlearners.noisy_sgd` where the suite hands every method an optimizer."""
    del tx
    return unlearners.noisy_sgd(loss_fn, **options)


def steps_to_come(run: "Trained", forget) -> tuple:
    """The trained state, and as many more steps over its batches as forgetting [3, 5] takes."""
    num_steps = run.forgotten.info.measurements["num_steps"]
    ids = np.stack([ids_of_step(t % STEPS) for t in range(num_steps)])
    ids = np.where(np.isin(ids, forget), -1, ids)
    rows, _ = run.problem.batch(ids)
    return run.params, run.state, rows, ids, (ids >= 0).astype(np.float32)


REPLAY = {"batch_size": BATCH, "max_steps": STEPS + 3, "num_checkpoints": 3}
KEPT = {"normalizer": "kept"}
DELTAGRAD = REPLAY | {"period": 2, "burn_in": 2, "settle": 0}
RECOLLECT = {
    "batch_size": BATCH,
    "max_steps": STEPS + 3,
    "if_rough": "replay",
    "rough_above": 1e9,
}
USERS = {"units": np.where(np.arange(NUM_EXAMPLES) == 12, 3, np.arange(NUM_EXAMPLES))}
"""Every example is its own user, but for user 3, who has examples 3 and 12."""
NEWTON = {
    "l2": 0.5,
    "noise_stddev": 10.0,
    "budget": Budget(epsilon=50.0, delta=1e-5, max_forget=8),
}
STORED = NEWTON | {
    "noise_stddev": 1e3,
    "constants": accounting.LossConstants(lipschitz=50.0, hessian_lipschitz=0.0, smoothness=50.0),
}
NOISY_SGD = {
    "batch_size": BATCH,
    "max_steps": 100,
    "l2": 15.0,
    "smoothness": 15.0,
    "gradient_clip": 1e3,
    "noise_stddev": 1e-6,
    "key": jax.random.key(3),
    "budget": Budget(epsilon=10.0, delta=1e-5, max_forget=8),
}
FINETUNING = {
    "batch_size": BATCH,
    "tuning": unlearners.Tuning(learning_rate=0.1, start_radius=1e-3, gradient_clip=1e-6),
    "num_steps": 5,
    "key": jax.random.key(4),
    "budget": Budget(epsilon=1e6, delta=1e-5, max_forget=8),
}
REBUILD = {"rebuild": records.Rebuild(key=jax.random.key(11), batch_size=BATCH, num_batches=3)}
_replay = functools.partial(
    Case, factory=unlearners.replay, operands=run_as_segment, exact=True, has_max_steps=True
)
_memory_pair = functools.partial(
    Case, factory=memory_pair, has_max_steps=True, crossed=False,
    own_tx=lambda loss_fn: transforms.online_lbfgs(loss_fn, owners_per_pair=BATCH),
)  # fmt: skip
_stored = functools.partial(
    Case, operands=bucket_and_sums, noisy=True, before_noise=iterate_of, spread=with_spoilt_sums,
)  # fmt: skip
_fixed_path = functools.partial(
    Case, factory=unlearners.fixed_path, operands=run_as_segment, has_max_steps=True,
    spread=along_the_path,
)  # fmt: skip
_recollect = functools.partial(
    Case, factory=unlearners.recollect, operands=units_to_add, has_max_steps=True,
    spread=with_spoilt_tangents, needs_data=False,
)  # fmt: skip
CASES = [
    _replay("replay", options=REPLAY),
    _replay("replay-kept", options=REPLAY | KEPT, oracle_options=KEPT, crossed=False),
    Case("deltagrad", unlearners.deltagrad, DELTAGRAD, run_with_the_rows, has_max_steps=True),
    _memory_pair("memory_pair", options=REPLAY, operands=run_as_segment),
    _memory_pair(
        "memory_pair-tangent", options=REPLAY | {"mode": "tangent"}, operands=run_with_the_rows
    ),
    _memory_pair(
        "memory_pair-paper",
        options=REPLAY | {"mode": "paper"},
        operands=rows_to_go,
        differentiates="gone",
    ),
    _memory_pair(
        "memory_pair-drop_pair",
        options=REPLAY | {"mode": "drop_pair"},
        operands=rows_to_go,
        moves_params=False,
        differentiates=None,
        is_slow=True,
    ),
    Case(
        "deltagrad-settle",
        unlearners.deltagrad,
        DELTAGRAD | {"settle": 3},
        run_with_the_rows,
        has_max_steps=True,
        crossed=False,
        is_slow=True,
    ),
    _recollect("recollect", options=RECOLLECT),
    _recollect("recollect-users", options=RECOLLECT | USERS, crossed=False, is_slow=True),
    _recollect(
        "recollect-offload", options=RECOLLECT | {"offload": "host"}, crossed=False, is_slow=True
    ),
    _recollect(
        "recollect-paper",
        options=RECOLLECT | KEPT | {"recursion": "paper"},
        crossed=False,
        is_slow=True,
    ),
    Case(
        "recollect-joint",
        unlearners.recollect,
        RECOLLECT | {"joint": True},
        run_with_the_rows,
        has_max_steps=True,
        crossed=False,
    ),
    Case("newton", unlearners.newton, NEWTON, rows_at_once, noisy=True, before_noise=iterate_of),
    Case(
        "certified_removal",
        certified_removal,
        NEWTON | {"num_rows": NUM_SEEN},
        rows_at_once,
        noisy=True,
    ),
    _stored("stored_newton", unlearners.stored_newton, STORED),
    _stored("infinitesimal_jackknife", unlearners.infinitesimal_jackknife, STORED),
    _stored(
        "infinitesimal_jackknife-l1",
        unlearners.infinitesimal_jackknife,
        STORED | {"l1": 0.05, "polish_steps": 5},
        crossed=False,
        is_slow=True,
    ),
    Case(
        "noisy_sgd",
        noisy_sgd,
        NOISY_SGD,
        steps_to_come,
        noisy=True,
        has_max_steps=True,
        crossed=False,
        differentiates=None,
        own_tx=lambda loss_fn: optax.chain(
            optax.scale(-1.0), transforms.gaussian_noise(1.0, key=jax.random.key(3))
        ),
    ),
    Case(
        "certified_finetuning",
        unlearners.certified_finetuning,
        FINETUNING,
        steps_to_come,
        noisy=True,
    ),
    Case(
        "certified_finetuning-rebuild",
        unlearners.certified_finetuning,
        FINETUNING | REBUILD,
        steps_to_come,
        noisy=True,
        crossed=False,
        is_slow=True,
    ),
    _fixed_path("fixed_path", options=REPLAY),
    _fixed_path("fixed_path-kept", options=REPLAY | KEPT, crossed=False, is_slow=True),
    Case(
        "newton-rebuild",
        unlearners.newton,
        NEWTON | REBUILD,
        rows_at_once,
        noisy=True,
        before_noise=iterate_of,
        crossed=False,
    ),
]


@dataclasses.dataclass(frozen=True)
class Inside:
    """An optimizer to be wrapped. before_step(step, inner) -> inner: what is set from outside."""

    name: str
    make: Callable[[], optax.GradientTransformation]
    before_step: Callable[[int, Any], Any] | None = None


def _is_matrix(params):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 0, params)


def _labels(params):
    return jax.tree.map(lambda leaf: "matrix" if jnp.ndim(leaf) else "scalar", params)


def _set_rate(step: int, inner):
    """A learning rate that the training loop decays, wherever it is injected."""
    rate = jnp.asarray(0.1 / (1 + step), jnp.float32)
    injected = lambda node: hasattr(node, "hyperparams")
    return jax.tree.map(
        lambda node: (
            node._replace(hyperparams=node.hyperparams | {"learning_rate": rate})
            if injected(node)
            else node
        ),
        inner,
        is_leaf=injected,
    )


_injected_sgd = optax.inject_hyperparams(optax.sgd)
_schedule = optax.cosine_decay_schedule(0.1, STEPS)
INSIDE = [
    Inside("adamw", lambda: optax.adamw(_schedule)),
    Inside("momentum", lambda: optax.sgd(0.05, momentum=0.9)),
    Inside("chain", lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))),
    Inside(
        "named_chain",
        lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sgd", optax.sgd(_schedule))),
    ),
    Inside(
        "masked",
        lambda: optax.chain(
            optax.masked(
                optax.scale_by_adam(), lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 0, p)
            ),
            optax.scale(-0.05),
        ),
    ),
    Inside(
        "partition",
        lambda: optax.partition({"matrix": optax.adam(0.1), "scalar": optax.sgd(0.1)}, _labels),
    ),
    Inside(
        "multi_steps",
        lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=2).gradient_transformation(),
    ),
    Inside("inject_hyperparams", lambda: _injected_sgd(learning_rate=_schedule, momentum=0.9)),
    Inside(
        "hyperparams_set_in_chain",
        lambda: optax.chain(optax.clip(1.0), optax.masked(_injected_sgd(learning_rate=0.1), True)),
        _set_rate,
    ),
    Inside("apply_if_finite", lambda: optax.apply_if_finite(optax.adam(0.1), 3)),
    Inside("lbfgs", lambda: optax.lbfgs(memory_size=2)),
    Inside(
        "add_noise",
        lambda: optax.chain(
            optax.add_noise(eta=0.01, gamma=0.5, key=jax.random.key(7)), optax.sgd(0.05)
        ),
    ),
]
PLAIN = INSIDE[0]
PAIRS = [(case, inside) for case in CASES for inside in INSIDE if case.crossed or inside is PLAIN]
FIRST = {"adamw", "inject_hyperparams"}
"""What every method is crossed with in each run; the rest of INSIDE is slow but for two methods."""


def _pair(case: Case, inside: Inside):
    """A parameter of the tests that are crossed."""
    is_fast = case.name in ("replay", "newton") or inside.name in FIRST
    is_fast &= not case.is_slow
    return pytest.param((case.name, inside.name), marks=[] if is_fast else [pytest.mark.slow])


CROSSED = [_pair(case, inside) for case, inside in PAIRS]
CROSSED_EXACT = [_pair(case, inside) for case, inside in PAIRS if case.exact]


def each(keep: Callable[[Case], bool] = lambda case: True):
    """A test of every case, or of those to keep; slow where the case is."""
    cases = [case for case in CASES if keep(case)]
    marks = [[pytest.mark.slow] if case.is_slow else [] for case in cases]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=m, id=c.name) for c, m in zip(cases, marks)]
    )


@dataclasses.dataclass
class Problem:
    """One method round one optimizer, on the suite's data; `traces` counts traces of the loss."""

    case: Case
    unlearner: Unlearner
    tx: optax.GradientTransformation
    loss_fn: Callable
    data: dict[str, np.ndarray]
    params: Any
    inside: Inside
    entropy: Entropy
    traces: list[int]
    step_traces: list[int]
    step: Callable

    def start(self):
        """Fresh parameters and state, safe to donate."""
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self.params)
        return params, self.unlearner.init(params)

    def train(self, steps: int = STEPS, *, start=None, first: int = 0):
        """`steps` donated steps of plain training, from a fresh start or from (params, state)."""
        params, state = self.start() if start is None else start
        for t in range(first, first + steps):
            if self.inside.before_step:
                state = state._replace(inner=self.inside.before_step(t, state.inner))
            params, state = self.step(params, state, *self.batch(ids_of_step(t)))
        return params, state

    def batch(self, ids):
        """Rows by id; padding gets garbage, which no method may look at."""
        rows = jax.tree.map(lambda leaf: leaf[np.maximum(ids, 0)], self.data)
        return rows, ids

    def forget(self, params, state, ids, **options):
        """`forget` with the suite's data, and the noise rewound."""
        self.entropy.rewind()
        return self.unlearner.forget(params, state, ids, **({"data": self.data} | options))


def ids_of_step(step: int) -> np.ndarray:
    """Row ids of one step: three epochs over rows 0..12, the last batch of each padded with -1."""
    order = np.random.default_rng(step // 4).permutation(12).astype(np.int32)
    order = np.concatenate([order, [12, -1, -1, -1]]).astype(np.int32)
    return order[(step % 4) * BATCH :][:BATCH]


def make_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(14, 5)).astype(np.float32),
        "y": rng.normal(size=14).astype(np.float32),
    }


def make_params(dtype=jnp.float32):
    """Nested tuples, a dict, a matrix and a scalar."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3, dtype)
    return {"bias": draw(), "deep": ((draw(5, 1),), ())}


def squared_error(params, batch):
    """Half the mean squared error of a linear model, quadratic in the parameters."""
    (matrix,), _ = params["deep"]
    predicted = (batch["x"].astype(matrix.dtype) @ matrix)[:, 0] + params["bias"]
    return 0.5 * jnp.mean((predicted - batch["y"].astype(matrix.dtype)) ** 2)


def make_problem(
    case: Case, inside: Inside, *, dtype=jnp.float32, tx=None, extra=None, **options
) -> Problem:
    """The suite's problem for one method and one optimizer. extra: more arguments for update."""
    traces, step_traces, entropy = [0], [0], Entropy()

    def loss_fn(params, batch):
        traces[0] += 1
        return squared_error(params, batch)

    if tx is None:
        tx = case.own_tx(loss_fn) if case.own_tx else inside.make()
    noise = {"entropy": entropy} if case.noisy else {}
    unlearner = case.factory(
        tx, loss_fn, num_examples=NUM_EXAMPLES, **(case.options | noise | options)
    )
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    value = kernels.weighted_loss(loss_fn)

    def step(params, state, rows, ids):
        step_traces[0] += 1
        weights = (ids >= 0).astype(jnp.float32)
        grads, info = gradient(params, rows, weights)
        value_fn = lambda p: value(p, rows, weights)
        updates, state = unlearner.update(
            grads, state, params, batch=rows, ids=ids,
            value=info.value, grad=grads, value_fn=value_fn, **(extra or {}),
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return Problem(
        case=case,
        unlearner=unlearner,
        tx=tx,
        loss_fn=loss_fn,
        data=make_data(),
        params=make_params(dtype),
        inside=inside,
        entropy=entropy,
        traces=traces,
        step_traces=step_traces,
        step=jax.jit(step, donate_argnums=(0, 1)),
    )


@dataclasses.dataclass
class Trained:
    """A problem, its trained parameters and state, and its answer to `forget([3, 5])`."""

    problem: Problem
    params: Any
    state: Any
    forgotten: Any


@functools.cache
def trained(case_name: str, inside_name: str = PLAIN.name) -> Trained:
    """Trained once a session; donate copies of it only."""
    case = next(case for case in CASES if case.name == case_name)
    inside = next(inside for inside in INSIDE if inside.name == inside_name)
    problem = make_problem(case, inside)
    params, state = problem.train()
    return Trained(problem, params, state, problem.forget(params, state, [3, 5]))


def avals(tree) -> list[tuple]:
    """Path, shape, dtype and weak type of every leaf."""
    return [
        (
            jax.tree_util.keystr(path),
            jnp.shape(x),
            jnp.result_type(x),
            bool(getattr(x, "weak_type", False)),
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def bits(tree) -> dict[str, tuple]:
    """Dtype, shape and bytes of every leaf by its path, typed keys by their words."""

    def content(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return array.dtype.name, array.shape, array.tobytes()

    return {
        jax.tree_util.keystr(path): content(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def differing(a, b) -> list[str]:
    """Paths of the leaves that differ in any bit; empty for equal trees."""
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    return [path for path in a if a[path] != b[path]]


@contextlib.contextmanager
def compilations():
    """Collects one entry for every program that XLA compiles inside the block."""
    found = []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def copied(tree):
    """A deep copy, to be donated."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
