"""What a run found: tables in the terminal, the bars, JSON."""

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from _harness import aligned, ratio_of

from _kernels import bars
from _kernels.cells import Cell

OWN_GRADIENT = {"jax": bars.PLAIN, "torch": "torch gradient"}
HEADER = ("", "median", "/ floor", "95% interval", "/ own gradient", "/ ours", "repeats")


def show_cell(cell: Cell, repeats: int) -> None:
    """One table: every candidate in seconds, against the floor, its own framework, and ours."""
    title = f"{cell.section.replace('_', ' ')}: {cell.model}, {_size_name(cell)} {cell.size}"
    rows = [
        _row(cell, name, repeats)
        for kernel in cell.kernels()
        for name in sorted(
            (n for n, r in cell.results.items() if r["kernel"] == kernel),
            key=lambda n: cell.results[n]["median_seconds"],
        )
    ]
    rows += [[name, *[""] * (len(HEADER) - 2), reason] for name, reason in cell.blanks.items()]
    _show(title, HEADER, rows)
    if "plain_flops_seconds" in cell.facts:
        least = cell.facts["plain_flops_seconds"]
        share = least / cell.results[bars.PLAIN]["median_seconds"]
        print(f"flops of the plain gradient at the rate of a matrix product: {1e3 * least:.3g} ms, "
              f"{share:.0%} of its time")  # fmt: skip
    if "stream_bytes_per_second" in cell.facts:
        print(f"stream: {cell.facts['stream_bytes_per_second'] / 1e9:.3g} GB/s")
    for name, said in cell.facts.get("reported", {}).items():
        print(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in said.items()))
    sys.stdout.flush()


def _size_name(cell: Cell) -> str:
    return "right-hand sides" if cell.section == "lbfgs" else "batch"


def _row(cell: Cell, name: str, repeats: int) -> list[str]:
    """The figures of one candidate."""
    result = cell.results[name]
    figure = amount_text(result["median_seconds"], cell.section)
    per = bars.NUM_TANGENTS if result["kernel"] == bars.MANY else 1
    interval = f"[{result['ratio_low'] / per:.3g}, {result['ratio_high'] / per:.3g}]"
    interval = interval if result["num_repeats"] > 1 else ""
    own = OWN_GRADIENT[result["framework"]]
    beside = [own, *(n for n, r in cell.results.items() if r["ours"])]
    ours = next((n for n in beside[1:] if cell.results[n]["kernel"] == result["kernel"]), None)
    ratio = lambda other, share=1: (
        "" if other not in cell.results else f"{_paired(cell, name, other) / share:.3g}"
    )
    label = f"{name}{' each' if per > 1 else ''}"
    if result.get("setting"):
        label += f" ({result['setting']})"
    count = str(result["num_repeats"]) if result["num_repeats"] != repeats else ""
    return [
        label, figure, f"{result['ratio'] / per:.3g}", interval,
        ratio(own, per) if cell.section != "memory" else "",
        "" if result["ours"] else ratio(ours), count,
    ]  # fmt: skip


def _paired(cell: Cell, name: str, other: str) -> float:
    """The median ratio of two candidates' raw figures."""
    raw = [cell.results[n]["seconds"] for n in (name, other)]
    shared = [a for a, b in zip(*raw, strict=True) if a is not None and b is not None]
    return ratio_of(*raw).median if shared else float("nan")


def amount_text(amount: float, section: str) -> str:
    """Milliseconds, or megabytes."""
    return f"{amount / 1e6:.2f} MB" if section == "memory" else f"{1e3 * amount:.3g} ms"


def show_bars(found: Iterable[bars.Finding]) -> None:
    """Each bar on each cell: what was measured, met or missed, by how much."""
    header = ("bar", "cell", "limit", "measured", "95% interval", "", "by")
    rows = []
    for finding in found:
        bar = finding.bar
        exact = finding.low == finding.high
        against = finding.against if bar.versus == bars.PEERS else bar.versus
        rows.append(
            [
                f"{bar.kernel} vs {against}" + (f", each of {bar.per}" if bar.per > 1 else ""),
                finding.cell.name, f"{bar.direction} {bar.limit:g}", f"{finding.median:.3g}",
                "exact" if exact else f"[{finding.low:.3g}, {finding.high:.3g}]",
                "met" if finding.met else "MISSED", f"{finding.margin:.2f}x",
            ]
        )  # fmt: skip
    if rows:
        _show("What it was meant to reach", header, rows)
        missed = sum(row[-2] == "MISSED" for row in rows)
        print(
            f"{len(rows) - missed} of {len(rows)} met. A bar is met when the interval reaches it;"
        )
        print("'by' is above 1 where the median is on the right side of the limit.")


def _show(title: str, header, rows) -> None:
    """A rich table where rich is installed and the terminal is wide enough."""
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        print(f"\n{title}\n{aligned([header, *rows])}")
        return
    console = rich.console.Console()
    if console.width < 100:
        print(f"\n{title}\n{aligned([header, *rows])}")
        return
    drawn = rich.table.Table(
        title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
    )
    for index, column in enumerate(header):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        style = "bold" if row[0].startswith("jaxunlearn") else "red" if "MISSED" in row else None
        drawn.add_row(*row, style=style)
    console.print(drawn)


def as_json(cells: Iterable[Cell]) -> dict[str, Any]:
    """Every figure, raw seconds to four digits, and the bars."""
    cells = list(cells)
    return {
        "cells": [
            {
                "section": cell.section, "model": cell.model, "size": cell.size,
                "baseline": cell.baseline, "blanks": cell.blanks, "facts": cell.facts,
                "results": _rounded(cell.results),
            }
            for cell in cells
        ],
        "bars": [
            {
                "bar": str(found.bar), "model": found.cell.model, "size": found.cell.size,
                "against": found.against, "limit": found.bar.limit,
                "direction": found.bar.direction, "median": _rounded(found.median),
                "low": _rounded(found.low), "high": _rounded(found.high), "met": found.met,
                "margin": _rounded(found.margin),
            }
            for found in bars.findings(cells)
        ],
    }  # fmt: skip


def from_json(content: dict[str, Any]) -> list[Cell]:
    """The cells of `as_json`, to draw or to judge an earlier run again."""
    return [Cell(**cell) for cell in content["cells"]]


def _rounded(value):
    """Four significant digits everywhere; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
