"""One problem under one optimizer: compiled once, trained for every seed, with its oracles.

The run is that of `unlearners.replay` (online L-BFGS: `unlearners.memory_pair`), one step at a
time; the others record the same rows under `lax.scan`. All divide a step by its scheduled rows.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from _alignment.optimizers import LBFGS_OPTIONS, Optimizer
from _alignment.problems import Problem, Stream
from jaxunlearn import kernels, records, transforms, tree, unlearners
from jaxunlearn.unlearners.memory_pair._online import make_online_step

EXACT, PATH, PAPER, LEAVE_ONE_OUT, JOINT, DELTAGRAD = (
    "exact", "path", "paper", "leave_one_out", "joint", "deltagrad",
)  # fmt: skip
ALL = (EXACT, PATH, PAPER, LEAVE_ONE_OUT, JOINT, DELTAGRAD)
REBUILD_BATCHES = 16
NOT_FOR_PAIRS = "pairs are not differentiated; see tangent (joint)"
NOT_FOR_OTHERS = "SGD and momentum only"


@dataclasses.dataclass
class Run:
    """One seed. actual: (params, state) of the optimizer; oracles by lag; states by route.

    retrain_seconds: of the whole run again; training_seconds: by route, of one scan, compiled.
    """

    seed: int
    stream: Stream
    actual: tuple[Any, Any]
    oracles: dict[int, tuple[Any, Any]]
    states: dict[str, tuple[Any, Any]]
    retrain_seconds: float
    training_seconds: dict[str, float]


class Laboratory:
    """Everything compiled for one cell; `run(seed)` trains under the routes that are wanted."""

    def __init__(
        self, problem: Problem, optimizer: Optimizer, num_steps: int, lags: tuple, wanted=ALL
    ):
        self.problem, self.optimizer = problem, optimizer
        self.num_steps, self.lags = num_steps, tuple(lags)
        self.size = problem.batch_size
        self.ids = problem.schedule(num_steps)
        self.num_ids = self.ids.size // problem.epochs
        self.is_pairs = optimizer.kind == "pairs"
        self.rate = optimizer.rates[problem.loss]
        self.tx = optimizer.make(self.rate, num_steps)
        routes, self.blanks = self._routes()
        self.routes = {name: r for name, r in routes.items() if name in {EXACT, *wanted}}
        self._segment = jax.jit(self._make_segment())
        self._steps = {name: self._make_step(route) for name, route in self.routes.items()}
        self._scans = {
            name: jax.jit(self._scanned(step), donate_argnums=(0, 1))
            for name, step in self._steps.items()
        }
        self._step = jax.jit(self._steps[EXACT], donate_argnums=(0, 1))
        self.rebuild = records.make_rebuild(
            self.tx, problem.loss_fn,
            records.Rebuild(
                key=jax.random.key(0), batch_size=self.size, num_batches=REBUILD_BATCHES,
                rules=optimizer.rules,
            ),
            records.Penalty(problem.l2),
        )  # fmt: skip

    def victim(self, lag: int) -> int:
        """An id that the `lag`-th last step used, and none after it."""
        return int(self.ids[self.num_steps - lag, 0])

    def first_use(self, lag: int) -> int:
        """The first step that used the victim."""
        return int(np.argmax((self.ids == self.victim(lag)).any(axis=1)))

    def pair_route(self, mode: str):
        """`memory_pair` with another way to delete; it reads the same record."""
        return unlearners.memory_pair(
            self.problem.loss_fn, num_examples=self.num_ids, max_steps=self.num_steps,
            batch_size=self.size, mode=mode, learning_rate=self.rate, l2=self.problem.l2,
            normalizer="batch", verify="off", progress=False, nothing_below=None,
            paper=transforms.PaperDeletion(rate=None) if mode == "paper" else None,
            **LBFGS_OPTIONS,
        )  # fmt: skip

    def _routes(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The unlearners, and why some are left out."""
        common = {
            "num_examples": self.num_ids, "batch_size": self.size, "max_steps": self.num_steps,
            "normalizer": "batch", "l2": self.problem.l2, "progress": False,
        }  # fmt: skip
        build = lambda method, **more: method(self.tx, self.problem.loss_fn, **common, **more)
        path = build(unlearners.fixed_path, verify="off")
        if self.is_pairs:
            blanks = {PAPER: NOT_FOR_PAIRS, LEAVE_ONE_OUT: NOT_FOR_PAIRS, DELTAGRAD: NOT_FOR_OTHERS}
            return {EXACT: self.pair_route("replay"), PATH: path}, blanks
        tracked = [self.victim(lag) for lag in self.lags]
        recollect = functools.partial(build, unlearners.recollect, num_probes=0)
        routes = {
            EXACT: build(unlearners.replay, verify="off"),
            PATH: path,
            PAPER: recollect(recursion="paper", track=tracked),
            LEAVE_ONE_OUT: recollect(track=tracked),
            JOINT: recollect(joint=True),
        }
        if not self.optimizer.deltagrad:
            return routes, {DELTAGRAD: NOT_FOR_OTHERS}
        published = build(unlearners.deltagrad, verify="off", settle=0)
        return routes | {DELTAGRAD: published}, {}

    def _make_segment(self):
        """The steps of the exact route, as its own deletion runs them."""
        loss_fn, l2 = self.problem.loss_fn, self.problem.l2
        if not self.is_pairs:
            penalty = records.Penalty(l2)
            return records.make_segment(self.tx, loss_fn, normalizer="batch", penalty=penalty)
        tx = transforms.online_lbfgs(
            loss_fn, learning_rate=self.rate, l2=l2, owners_per_pair=self.size, **LBFGS_OPTIONS
        )
        step = make_online_step(tx, loss_fn, normalizer="batch")
        return records.loop_over_steps(step)

    def _make_step(self, route):
        """(params, state, rows, ids) -> (params, state): one step under an unlearner."""
        gradient = kernels.weighted_grad(self.problem.loss_fn)
        value = kernels.weighted_loss(self.problem.loss_fn)
        ones = jnp.ones(self.size, jnp.float32)

        def step(params, state, rows, ids):
            grads = gradient(params, rows, ones)
            extra = {"value_fn": lambda p: value(p, rows, ones), "grad": grads}
            extra = extra if self.is_pairs else {}
            updates, state = route.update(grads, state, params, batch=rows, ids=ids, **extra)
            return optax.apply_updates(params, updates), state

        return step

    @staticmethod
    def _scanned(step):
        def run(params, state, rows, ids):
            body = lambda carry, at: (step(*carry, *at), None)
            return jax.lax.scan(body, (params, state), (rows, ids))[0]

        return run

    def run(self, seed: int) -> Run:
        """Trains under every route, and once without each victim."""
        stream = self.problem.draw(seed, self.num_ids, self.size)
        start = self.problem.start(seed)
        states = {EXACT: self._by_loop(start, stream)}
        steps = {name: leaf[self.ids] for name, leaf in stream.rows.items()}
        seconds = {}
        for name in self.routes:
            if name in self.blanks or name == EXACT:
                continue
            try:
                begun = time.perf_counter()
                states[name] = self._by_scan(name, start, steps)
                seconds[name] = time.perf_counter() - begun
            except Exception as error:  # its cell stays blank, with the reason
                self.blanks[name] = reason_of(error)
        actual, oracles, retrain = self._oracles(start, stream)
        params, state = states[EXACT]
        if not tree.same_bits((params, state.inner), actual):
            raise AssertionError("The recorded run does not replay bit for bit.")
        return Run(seed, stream, actual, oracles, states, retrain, seconds)

    def _by_loop(self, start, stream: Stream):
        route = self.routes[EXACT]
        params, state = tree.copy(start), route.init(start)
        for ids in self.ids:
            rows = {name: leaf[ids] for name, leaf in stream.rows.items()}
            params, state = self._step(params, state, rows, ids)
        return params, state

    def _by_scan(self, name: str, start, steps):
        state = self.routes[name].init(start)
        found = self._scans[name](tree.copy(start), state, steps, self.ids)
        return jax.block_until_ready(found)

    def _oracles(self, start, stream: Stream):
        """The whole run, and the same without each victim from the step that used it on."""
        log, reader = records.log_of(self.ids), records.RowReader(stream.rows)
        reader.prepare(self.ids.ravel())
        at_cut: dict[int, Any] = {}
        run = functools.partial(records.run_log, self._segment, segment_length=1, show=False)
        begun = time.perf_counter()
        *actual, _ = run(
            *(start, self._fresh(start), log, reader), start=0, stop=self.num_steps,
            cuts=[self.first_use(lag) for lag in self.lags],
            on_cut=lambda step, params, inner: at_cut.update({step: (params, inner)}),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        oracles = {}
        for lag in self.lags:
            kept = records.without(log, np.array([self.victim(lag)]))
            first = self.first_use(lag)
            *found, _ = run(*at_cut[first], kept, reader, start=first, stop=self.num_steps)
            oracles[lag] = tuple(found)
        return tuple(actual), oracles, seconds

    def _fresh(self, params):
        """The optimizer's state before training, with the avals that the exact route has."""
        return self.routes[EXACT].init(params).inner


def reason_of(error: Exception) -> str:
    """What an exception says, in few words."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:120]}"
