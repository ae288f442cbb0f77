"""The pictures, one for each question."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from _alignment import interventions as act
from _alignment.cells import COSTS, Cell
from _alignment.report import PRICES, QUESTIONS, number, pivot, price_of, spread_of

BLUE, GOLD, RED, INK, FAINT = "#2a6f97", "#c9a227", "#b4424a", "#2b2d33", "#b9bcc4"
LINES = (BLUE, RED, GOLD, "#5b8e55", "#7a5195", "#d17b49", "#4d9aa6", "#8b6b4a", INK)
LEAST = 1e-3
"""Shares below this are drawn as this."""
MARKS = (
    (act.PARAMETERS, RED, "o", "weights corrected, memory as it was"),
    (act.PARAMETERS_RESET, GOLD, "s", "weights corrected, memory reset"),
    (act.MEMORY, BLUE, "D", "memory corrected, weights as they were"),
)


def draw(stem: pathlib.Path, cells: list[Cell]) -> list[pathlib.Path]:
    """`stem`_weights.png, `stem`_lag.png and `stem`_price.png."""
    paths = []
    for key, make in (("weights", _weights), ("lag", _lag), ("price", _price)):
        figure = make(cells)
        paths.append(stem.with_name(f"{stem.name}_{key}.png"))
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", pad_inches=0.12)
        pyplot.close(figure)
    return paths


def _weights(cells: list[Cell]):
    """A row a cell: what is left of the next update's error when one half is right."""
    cells = [c for c in cells if any(c.shares[m[0]][pivot(c)]["direction"] for m in MARKS)]
    figure, axis = pyplot.subplots(figsize=(9.0, 1.9 + 0.34 * len(cells)))
    for place, cell in enumerate(reversed(cells)):
        found = [(cell.shares[name][pivot(cell)]["direction"], c, m) for name, c, m, _ in MARKS]
        ends = [one.median for one, *_ in found if one and one.median > 0]
        axis.plot([min(ends), max(ends)], [place, place], color=FAINT, lw=2, zorder=1)
        for (one, colour, marker), lift in zip(found, (0.16, 0.0, -0.16), strict=True):
            if one is None:
                continue
            ends, at = [max(one.low, LEAST), max(one.high, LEAST)], max(one.median, LEAST)
            axis.plot(ends, [place + lift] * 2, color=colour, lw=1)
            axis.plot(at, place + lift, marker, color=colour, ms=6.5, zorder=3)
            if one.median == 0 and lift == 0:
                axis.annotate("0", (at, place), (9, 0), textcoords="offset points", va="center")
    axis.axvline(1, color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    axis.set_xscale("log")
    axis.set_yticks(range(len(cells)), [c.name for c in reversed(cells)])
    axis.set_xlabel("error of the next update, relative to doing nothing (dashed)", color=INK)
    for _, colour, marker, label in MARKS:
        axis.plot([], [], marker, color=colour, label=label)
    figure.legend(
        loc="upper left", bbox_to_anchor=(0.0, 1 - 0.55 / figure.get_figheight()), ncols=3,
        frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    axis.set_ylim(-0.6, len(cells) - 0.4)
    lags = ", ".join(sorted({str(pivot(c)) for c in cells}))
    _finish(figure, axis, "weights", f"row used {lags} steps ago; {spread_of(cells)}\n")
    return figure


def _lag(cells: list[Cell]):
    """A panel a problem: the memory's error by lag, nothing done."""
    problems = list(dict.fromkeys(cell.problem for cell in cells))
    width = min(3, len(problems))
    height = -(-len(problems) // width)
    figure, axes = pyplot.subplots(
        height, width, figsize=(4.3 * width, 3.1 * height + 0.9), squeeze=False, sharey=True
    )
    with_memory = [cell.optimizer for cell in cells if _memory_errors(cell)]
    colours = dict(zip(dict.fromkeys(with_memory), LINES, strict=False))
    for axis, name in zip(axes.flat, problems, strict=False):
        for cell in cells:
            if cell.problem == name and cell.optimizer in colours:
                _lag_line(axis, cell, colours[cell.optimizer])
        axis.set_title(name, loc="left", fontsize=10.5, color=INK)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: "")
        lags = sorted({lag for cell in cells for lag in cell.lags})
        axis.set_xticks(lags)
        axis.tick_params(colors=INK, labelsize=9)
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("error of the memory operator", color=INK)
    for axis in axes.flat[len(problems) - width : len(problems)]:
        axis.set_xlabel("steps since the row was used", color=INK)
    line = lambda name: pyplot.Line2D([], [], color=colours[name], marker="o", ms=4, label=name)
    handles = [line(name) for name in colours]
    top = 1 - 0.36 / figure.get_figheight()
    figure.text(0.012, 0.012, f"nothing done; {spread_of(cells)}", fontsize=9, color=INK)
    figure.suptitle(QUESTIONS["lag"], x=0.012, ha="left", weight="bold", fontsize=13, color=INK)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, top),
        ncols=min(len(handles), 3 * width), frameon=False, fontsize=8.5,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 1 - 0.62 / figure.get_figheight()))
    return figure


def _lag_line(axis, cell: Cell, colour: str) -> None:
    shown = _memory_errors(cell)
    lags = [lag for lag, _ in shown]
    axis.plot(lags, [one.median for _, one in shown], "-o", color=colour, lw=1.8, ms=4)
    low, high = ([getattr(one, end) for _, one in shown] for end in ("low", "high"))
    axis.fill_between(lags, low, high, color=colour, alpha=0.13, lw=0)


def _memory_errors(cell: Cell) -> list[tuple]:
    """(lag, error of the memory operator); none for an optimizer without memory."""
    found = [(lag, cell.errors[act.NOTHING][lag]["memory"]) for lag in cell.lags]
    return [(lag, one) for lag, one in found if one.median > 0]


def _price(cells: list[Cell]):
    """Interventions by optimizers: what is left of the state's error; on the right the price."""
    main = cells[0].problem
    group = [cell for cell in cells if cell.problem == main]
    names = [n for n in act.INTERVENTIONS if any(n in c.shares for c in group)]
    shares = np.full((len(names), len(group)), np.nan)
    for column, cell in enumerate(group):
        for row, name in enumerate(names):
            found = cell.shares.get(name, {}).get(pivot(cell), {}).get("state")
            shares[row, column] = np.nan if found is None else found.median
    figure, axis = pyplot.subplots(figsize=(3.2 + 0.86 * (len(group) + 4), 1.8 + 0.36 * len(names)))
    colours = LinearSegmentedColormap.from_list("", [BLUE, "#f4f2ec", RED])
    axis.imshow(
        np.log10(np.maximum(shares, LEAST)), aspect="auto", cmap=colours,
        norm=TwoSlopeNorm(0, np.log10(LEAST), 1.3),
    )  # fmt: skip
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            strong = share < 2e-2 or share > 5
            axis.text(
                column, row, number(share), ha="center", va="center", fontsize=9,
                color="white" if strong else INK,
            )  # fmt: skip
    for place, cost in enumerate(COSTS):
        x = len(group) + place
        axis.text(x, -0.75, PRICES[place].replace(" ", "\n"), ha="center", va="bottom", fontsize=9)
        for row, name in enumerate(names):
            value = price_of(group, name, cost)
            text = "oracle" if value is None and place == 0 else number(value)
            axis.text(x, row, text, ha="center", va="center", fontsize=9, color=INK)
    axis.set_xlim(-0.5, len(group) + 3.5)
    axis.set_xticks(range(len(group)), [c.optimizer.replace(", ", "\n") for c in group], fontsize=9)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=9.5)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)
    lag = pivot(group[0])
    _finish(
        figure, None, "price",
        f"{main}, row used {lag} steps ago: what is left of the combined state error (1: all); "
        "right: gradients and seconds of a request\nrelative to retraining, record in copies of "
        "the training state, more gradients a training step",
    )  # fmt: skip
    return figure


def _finish(figure, axis, key: str, note: str) -> None:
    if axis is not None:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False, labelsize=9.5, colors=INK)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    height = figure.get_figheight()
    lines = 1 + note.count("\n")
    figure.text(0.012, 1 - 0.3 / height, QUESTIONS[key], weight="bold", fontsize=13, color=INK)
    figure.text(0.012, 1 - (0.36 + 0.17 * lines) / height, note, fontsize=9, color=INK)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.42 + 0.17 * lines) / height))
