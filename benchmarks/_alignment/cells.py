"""A cell of the benchmark: one problem under one optimizer, over seeds, lags and interventions."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from _harness import median_interval

from _alignment.interventions import (
    INTERVENTIONS,
    NOTHING,
    ROUTES,
    TANGENT_JOINT,
    TANGENT_PAPER,
    USED_ONCE,
    Blank,
    Clinic,
    Outcome,
)
from _alignment.optimizers import OPTIMIZERS
from _alignment.problems import problem
from _alignment.training import Laboratory
from jaxunlearn import audits

MEASURES = ("parameters", "memory", "state", "direction")
COSTS = ("gradients", "seconds", "copies", "training_gradients")
NUM_PROBES = 8
ROUNDING = 1e-12
"""Errors below this are rounding: of nothing, no share is taken."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The median over seeds, and order statistics that hold it with probability 95 percent; of few
    seeds, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        values = np.asarray(list(values), np.float64)
        low, high = median_interval(values)
        if math.isnan(low):
            low, high = float(np.min(values)), float(np.max(values))
        with np.errstate(invalid="ignore"):
            median = float(np.median(values))
        return cls(math.inf if math.isnan(median) else median, low, high)


@dataclasses.dataclass
class Cell:
    """errors[intervention][lag][measure], shares likewise (of doing nothing, paired by seed, None
    where that is rounding), costs[intervention][lag][cost]; blanks[intervention]: why."""

    problem: str
    optimizer: str
    num_steps: int
    batch_size: int
    num_params: int
    seeds: int
    lags: tuple[int, ...]
    errors: dict[str, dict[int, dict[str, Summary]]] = dataclasses.field(default_factory=dict)
    shares: dict[str, dict[int, dict[str, Summary | None]]] = dataclasses.field(
        default_factory=dict
    )
    costs: dict[str, dict[int, dict[str, float | None]]] = dataclasses.field(default_factory=dict)
    blanks: dict[str, str] = dataclasses.field(default_factory=dict)
    training: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.optimizer}; {self.problem}"


def measure(
    loss: str,
    data: str,
    optimizer: str,
    *,
    num_steps: int,
    lags: tuple[int, ...],
    seeds: int,
    epochs: int = 1,
    interventions: tuple[str, ...] = INTERVENTIONS,
    advance: Callable[[int], None] = lambda n: None,
) -> Cell:
    """Every intervention at every lag, for seeds 0 .. seeds - 1.

    Where a row is used once, its tangents of all three kinds are the same: one is carried.
    """
    begun = time.perf_counter()
    asked, chosen = problem(loss, data, epochs), OPTIMIZERS[optimizer]
    lags = tuple(lag for lag in lags if lag <= num_steps // epochs)
    same = epochs == 1 and chosen.kind != "pairs"
    blanks = {name: USED_ONCE for name in (TANGENT_PAPER, TANGENT_JOINT) if same}
    interventions = tuple(name for name in interventions if name not in blanks)
    wanted = [ROUTES[name] for name in interventions if name in ROUTES]
    laboratory = Laboratory(asked, chosen, num_steps, lags, wanted)
    clinic, judge, found = Clinic(laboratory), None, []
    for seed in range(seeds):
        run = laboratory.run(seed)
        judge = judge or _judge_of(laboratory, run)  # batches are the same for all seeds
        for lag in lags:
            for name in interventions:
                if name in blanks:
                    continue
                try:
                    outcome = clinic.treat(name, run, lag)
                except Blank as blank:
                    blanks[name] = str(blank)
                    continue
                found.append((name, lag, seed, judge(outcome, run.oracles[lag]), outcome))
        advance(1)
    cell = Cell(
        problem=asked.name, optimizer=optimizer, num_steps=num_steps,
        batch_size=asked.batch_size, seeds=seeds, lags=tuple(lags), blanks=blanks,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(run.actual[0])),
    )  # fmt: skip
    _summarise(cell, [one for one in found if one[0] not in blanks])
    cell.seconds = time.perf_counter() - begun
    return cell


def _judge_of(laboratory: Laboratory, run) -> Callable[[Outcome, Any], dict[str, float]]:
    """The four measures on the held-out batches."""
    align = audits.make_state_alignment(
        laboratory.tx, laboratory.problem.loss_fn, key=jax.random.key(1),
        batches=run.stream.held_out, l2=laboratory.problem.l2, num_probes=NUM_PROBES,
        operator=laboratory.optimizer.operator,
    )  # fmt: skip

    def judge(outcome: Outcome, oracle) -> dict[str, float]:
        found = align((outcome.params, outcome.inner), oracle)
        figures = {
            "parameters": found.parameter_error,
            "memory": found.memory_error.value,
            "state": found.state_error,
            "direction": found.update_error.value,
        }
        # A state that cannot take a step, a negative second moment say, is as far off as can be.
        return {name: math.inf if math.isnan(x) else x for name, x in figures.items()}

    return judge


def _summarise(cell: Cell, found: list[tuple]) -> None:
    """Medians over seeds of errors, of shares and of costs."""
    at_rest = {(lag, seed): errors for name, lag, seed, errors, _ in found if name == NOTHING}
    groups: dict[tuple[str, int], list] = {}
    for name, lag, seed, errors, outcome in found:
        groups.setdefault((name, lag), []).append((errors, at_rest.get((lag, seed)), outcome))
    for (name, lag), entries in groups.items():
        errors = {m: Summary.of(e[m] for e, _, _ in entries) for m in MEASURES}
        cell.errors.setdefault(name, {})[lag] = errors
        shares: dict[str, Summary | None] = {}
        for m in MEASURES:
            usable = all(rest and rest[m] > ROUNDING for _, rest, _ in entries)
            ratios = [e[m] / rest[m] for e, rest, _ in entries] if usable else []
            shares[m] = Summary.of(ratios) if usable else None
        cell.shares.setdefault(name, {})[lag] = shares
        cell.costs.setdefault(name, {})[lag] = {c: _cost(entries, c) for c in COSTS}


def _cost(entries, cost: str) -> float | None:
    values = [getattr(outcome, cost) for *_, outcome in entries]
    return None if any(v is None for v in values) else float(np.median(values))
