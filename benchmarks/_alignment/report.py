"""What a run found: one table for each question, and JSON."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from _harness import aligned

from _alignment import interventions as act
from _alignment.cells import COSTS, MEASURES, Cell, Summary

QUESTIONS = {
    "weights": "Does correcting the weights suffice?",
    "lag": "Does the memory clean itself with time?",
    "price": "What does each intervention buy, and for what?",
}
PRICES = ("gradients", "seconds", "copies", "while training")
SHARED = ("state", "direction")
"""Of the measures whose shares are kept; the others follow from the errors."""
HALVES = (act.PARAMETERS, act.MEMORY, act.PARAMETERS_RESET, act.PARAMETERS_REBUILT, act.REPLAY)


def pivot(cell: Cell) -> int:
    """The lag at which interventions are compared: the middle one."""
    return cell.lags[len(cell.lags) // 2]


def show(cells: list[Cell]) -> None:
    """All questions."""
    _weights(cells)
    _lags(cells)
    _price(cells)
    _blanks(cells)


def _title(key: str, text: str) -> None:
    print(f"\n{QUESTIONS[key]}\n{text}")


def _weights(cells: list[Cell]) -> None:
    _title(
        "weights",
        "Error of the next update's direction after doing nothing, and what is left of it (1: all) "
        "with half of the\nstate corrected by an oracle; medians over seeds.",
    )
    rows = []
    for cell in cells:
        lag = pivot(cell)
        rest = cell.errors[act.NOTHING][lag]["direction"]
        left = [_share(cell, half, lag, "direction") for half in HALVES]
        rows.append([cell.name, str(lag), _error(rest), *left])
    print(aligned([("", "lag", act.NOTHING, *HALVES), *rows]))


def _lags(cells: list[Cell]) -> None:
    _title("lag", "Error of the memory operator after doing nothing, by lag [interval].")
    lags = sorted({lag for cell in cells for lag in cell.lags})
    rows = [
        [cell.name, *(_interval(cell, lag) if lag in cell.lags else "" for lag in lags)]
        for cell in cells
    ]
    print(aligned([("", *(f"lag {lag}" for lag in lags)), *rows]))


def _interval(cell: Cell, lag: int) -> str:
    found = cell.errors[act.NOTHING][lag]["memory"]
    if not found.high:
        return "0"
    return f"{found.median:.2g} [{found.low:.2g}, {found.high:.2g}]"


def _price(cells: list[Cell]) -> None:
    _title(
        "price",
        "What is left of the combined state error (1: all of it, 0: exact), at the middle lag; "
        "then the price of a request:\ngradients and seconds relative to retraining, record in "
        "copies of the training state, more gradients a training step.",
    )
    for group in _by_problem(cells):
        names = [name for name in act.INTERVENTIONS if any(name in c.errors for c in group)]
        rows = [
            [name, *(_share(c, name, pivot(c), "state") for c in group), *_prices(group, name)]
            for name in names
        ]
        head = (group[0].problem, *(c.optimizer for c in group), *PRICES)
        print(aligned([head, *rows]) + "\n")


def _by_problem(cells: list[Cell]) -> list[list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.problem, []).append(cell)
    return list(groups.values())


def _prices(group: list[Cell], name: str) -> list[str]:
    """Medians over the optimizers of a problem."""
    return [number(price_of(group, name, cost)) for cost in COSTS]


def price_of(group: list[Cell], name: str, cost: str) -> float | None:
    """One cost at the middle lag, the median over cells; None where an oracle helped."""
    found = [c.costs[name][pivot(c)][cost] for c in group if name in c.costs]
    known = [value for value in found if value is not None]
    return float(np.median(known)) if known else None


def _share(cell: Cell, name: str, lag: int, measure: str) -> str:
    if name not in cell.shares:
        return ""
    found = cell.shares[name][lag][measure]
    return "" if found is None else number(found.median)


def _error(found: Summary) -> str:
    return f"{found.median:.2g}"


def number(value: float | None) -> str:
    """Two digits; nothing for None."""
    if value is None:
        return ""
    if value == 0 or value >= 10:
        return f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:.2g}"


def spread_of(cells: list[Cell]) -> str:
    """What the intervals are."""
    seeds = sorted({cell.seeds for cell in cells})
    if seeds[0] >= 6:  # fewer have no interval that holds the median with that probability
        return f"medians of {seeds[0]} seeds with 95 % intervals"
    return f"medians of {seeds[0]} seeds, from the least to the largest"


def _blanks(cells: list[Cell]) -> None:
    """Why some figures are missing, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for name, why in cell.blanks.items():
            reasons.setdefault((name, why), []).append(cell.name)
    for (name, why), where in reasons.items():
        places = f"{len(where)} cells" if len(where) > 3 else " and ".join(where)
        print(f"blank: {name}: {why} ({places})")


def as_json(cells: Iterable[Cell]) -> dict[str, Any]:
    """By cell; figures are lists over lags."""
    return {cell.name: _cell_as_json(cell) for cell in cells}


def _cell_as_json(cell: Cell) -> dict[str, Any]:
    flat = {
        field.name: getattr(cell, field.name)
        for field in dataclasses.fields(cell)
        if field.name not in ("errors", "shares", "costs")
    }
    found: dict[str, Any] = {}
    for name in cell.errors:
        found[name] = {
            "errors": _columns(cell.errors[name], cell.lags),
            "shares_of_doing_nothing": _columns(cell.shares[name], cell.lags, SHARED),
            "costs": {c: [_round(cell.costs[name][lag][c]) for lag in cell.lags] for c in COSTS},
        }
    return flat | {"interventions": found}


def _columns(table, lags, measures=MEASURES) -> dict[str, Any]:
    """By measure, one text a lag: "median [low, high]"."""
    parts = {}
    for measure in measures:
        column = [table[lag][measure] for lag in lags]
        if any(one is not None for one in column):
            parts[measure] = [None if one is None else _text(one) for one in column]
    return parts


def _text(one: Summary) -> str:
    return f"{one.median:.3g} [{one.low:.3g}, {one.high:.3g}]"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def from_json(cases: dict[str, Any]) -> list[Cell]:
    """What `as_json` wrote."""
    cells = []
    for case in cases.values():
        case = dict(case)
        found = case.pop("interventions")
        lags = tuple(case.pop("lags"))
        cell = Cell(lags=lags, **case)
        for name, parts in found.items():
            cell.errors[name] = _rows(parts["errors"], lags)
            cell.shares[name] = _rows(parts["shares_of_doing_nothing"], lags)
            costs = parts["costs"]
            cell.costs[name] = {lag: {c: costs[c][i] for c in COSTS} for i, lag in enumerate(lags)}
        cells.append(cell)
    return cells


def _rows(columns, lags) -> dict[int, dict[str, Summary | None]]:
    def at(measure, i):
        column = columns.get(measure)
        if column is None or column[i] is None:
            return None
        return Summary(
            *(float(x) for x in column[i].replace("]", "").replace(" [", ", ").split(","))
        )

    return {lag: {m: at(m, i) for m in MEASURES} for i, lag in enumerate(lags)}
