"""What may be done about a deletion request, and what it costs.

"parameters only" and "memory only" are given the oracle's half: no method has that, they show what
correcting one half alone is worth at best. "parameters, reset" and "parameters, rebuilt" have the
oracle's parameters too, as any method that corrects parameters aims at, and remake the state.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from _alignment.optimizers import MEMORY as MEMORY_SIZE
from _alignment.training import (
    DELTAGRAD,
    EXACT,
    JOINT,
    LEAVE_ONE_OUT,
    PAPER,
    PATH,
    REBUILD_BATCHES,
    Laboratory,
    Run,
    reason_of,
)
from jaxunlearn import records, tree

NOTHING = "do nothing"
PARAMETERS, MEMORY = "parameters only", "memory only"
RESET, PARAMETERS_RESET = "reset", "parameters, reset"
REBUILT, PARAMETERS_REBUILT = "rebuilt", "parameters, rebuilt"
FIXED_PATH, PAPER_DELETION, DROP_PAIR = "fixed path", "paper deletion", "drop pair"
TANGENT_PAPER, TANGENT_LOO, TANGENT_JOINT = (
    "tangent (paper)", "tangent (leave-one-out)", "tangent (joint)",
)  # fmt: skip
DELTA_GRAD, REPLAY = "DeltaGrad", "replay"
ORACLE_HELPED = (PARAMETERS, MEMORY, PARAMETERS_RESET, PARAMETERS_REBUILT)
INTERVENTIONS = (
    NOTHING, PARAMETERS, MEMORY, RESET, PARAMETERS_RESET, REBUILT, PARAMETERS_REBUILT, FIXED_PATH,
    PAPER_DELETION, DROP_PAIR, TANGENT_PAPER, TANGENT_LOO, TANGENT_JOINT, DELTA_GRAD, REPLAY,
)  # fmt: skip
ROUTES = {
    FIXED_PATH: PATH, TANGENT_PAPER: PAPER, TANGENT_LOO: LEAVE_ONE_OUT, TANGENT_JOINT: JOINT,
    DELTA_GRAD: DELTAGRAD, REPLAY: EXACT,
}  # fmt: skip
PAIR_MODES = {PAPER_DELETION: "paper", DROP_PAIR: "drop_pair", TANGENT_JOINT: "tangent"}
ONLY_PAIRS = "no curvature pairs"
USED_ONCE = "as leave-one-out: the row was used once"


class Blank(Exception):
    """An intervention that does not apply here, and why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an intervention left, and its price.

    gradients: evaluated for the request, in gradients of retraining; None where an oracle helped.
    seconds: of the request, over those of retraining.
    copies: bytes of the record, in copies of parameters and optimizer state.
    training_gradients: more gradients a training step.
    """

    params: Any
    inner: Any
    gradients: float | None
    seconds: float | None
    copies: float
    training_gradients: float = 0.0


class Clinic:
    """The interventions on the runs of one laboratory."""

    def __init__(self, laboratory: Laboratory):
        self._lab = laboratory
        modes = PAIR_MODES.items() if laboratory.is_pairs else ()
        self._pair_routes = {name: laboratory.pair_route(mode) for name, mode in modes}
        self._init = jax.jit(laboratory.tx.init)

    def treat(self, intervention: str, run: Run, lag: int) -> Outcome:
        """The state after one request, or `Blank`."""
        lab, (params, inner) = self._lab, run.actual
        ideal_params, ideal_inner = run.oracles[lag]
        given = {
            NOTHING: (params, inner),
            PARAMETERS: (ideal_params, inner),
            MEMORY: (params, ideal_inner),
        }
        if intervention in given:
            free = intervention == NOTHING
            return Outcome(*given[intervention], 0.0 if free else None, 0.0 if free else None, 0.0)
        helped = intervention in ORACLE_HELPED
        at = ideal_params if helped else params
        if intervention in (RESET, PARAMETERS_RESET):
            return self._remade(run, at, self._init, 0.0 if not helped else None)
        if intervention in (REBUILT, PARAMETERS_REBUILT):
            retained = np.delete(np.arange(lab.num_ids, dtype=np.int32), lab.victim(lag))
            reader = records.RowReader(run.stream.rows)
            again = lambda p: lab.rebuild.again(p, reader, retained, num_steps=lab.num_steps)
            return self._remade(run, at, again, None if helped else self._rebuild_gradients())
        return self._by_route(intervention, run, lag)

    def _remade(self, run: Run, params, make, gradients: float | None) -> Outcome:
        """Parameters as they are, beside a state made by `make`."""
        try:
            begun = time.perf_counter()
            inner = jax.block_until_ready(make(params))
            seconds = (time.perf_counter() - begun) / run.retrain_seconds
        except Exception as error:
            raise Blank(reason_of(error)) from error
        return Outcome(params, inner, gradients, None if gradients is None else seconds, 0.0)

    def _rebuild_gradients(self) -> float:
        """Mini-batch gradients, and for pairs a product of two gradients' cost a pair and batch."""
        lab = self._lab
        if lab.is_pairs:  # whose steps take three gradients
            return (REBUILD_BATCHES * (1 + 2 * (MEMORY_SIZE + 1))) / (3 * lab.num_steps)
        return REBUILD_BATCHES / lab.num_steps

    def _by_route(self, intervention: str, run: Run, lag: int) -> Outcome:
        """One of the library's unlearners."""
        lab = self._lab
        if intervention in self._pair_routes:
            route, name = self._pair_routes[intervention], EXACT
        elif intervention in (PAPER_DELETION, DROP_PAIR):
            raise Blank(ONLY_PAIRS)
        else:
            name = ROUTES[intervention]
            if name in lab.blanks:
                raise Blank(lab.blanks[name])
            route = lab.routes[name]
        params, state = run.states[name]
        additive = name in (PAPER, LEAVE_ONE_OUT)
        victim, data = [lab.victim(lag)], None if additive else run.stream.rows
        try:
            quote = route.quote(params, state, victim)
            begun = time.perf_counter()
            found = jax.block_until_ready(route.forget(params, state, victim, data=data)[:2])
            seconds = time.perf_counter() - begun
        except Exception as error:
            raise Blank(reason_of(error)) from error
        whole = tree.num_bytes((params, state.inner))
        return Outcome(
            found[0], found[1].inner,
            gradients=quote.num_gradients / quote.retrain_gradients,
            seconds=seconds / run.retrain_seconds,
            copies=tree.num_bytes(state.record) / whole,
            training_gradients=2.0 * len(lab.lags) if additive else 0.0,
        )  # fmt: skip
