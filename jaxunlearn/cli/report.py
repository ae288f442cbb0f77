"""What the demo found: a table, report.json, the certificates, and a picture."""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from jaxunlearn.certificates import environment

_ROLES = ("forget", "retain", "test")


def write(folder: pathlib.Path, task, results, seconds: float) -> dict[str, pathlib.Path]:
    """Write every file of the report; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"report": folder / "report.json"}
    for result in results:
        certificate = result["info"].certificate
        path = folder / f"certificate-{certificate.method}.json"
        path.write_text(certificate.to_json())
        paths[f"certificate ({certificate.method})"] = path
    content = {
        "dataset": task.name,
        "num_rows": len(task.x),
        "forgotten_ids": [int(i) for i in task.forget],
        "seed": task.seed,
        "seconds": seconds,
        "results": [_plain(result) for result in results],
        "environment": environment(),
    }
    paths["report"].write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    try:
        from jaxunlearn.cli import picture
    except ImportError:
        print("no picture: pip install 'jaxunlearn[plots]'", file=sys.stderr)
    else:
        paths["picture"] = picture.draw(folder / "report.png", task, results)
    return paths


def show(task, results, paths: dict[str, pathlib.Path], seconds: float) -> None:
    """The table and where the files are, on standard output."""
    print(
        f"\n{task.name}: {len(task.x)} training rows, {len(task.forget)} forgotten, "
        f"{seconds:.0f} seconds in all.\n"
    )
    header, rows = table(results)
    try:
        import rich.console
        import rich.table
    except ImportError:
        _print_plain(header, rows)
    else:
        drawn = rich.table.Table(*header)
        for row in rows:
            drawn.add_row(*row)
        console = rich.console.Console()
        console.print(drawn) if console.width >= 76 else _print_plain(header, rows)
    print("\nDistances are relative, in L2, to the oracle: a model that never saw the rows.")
    print("* Both without compilation, and forget with a check that the recorded run replays.")
    for name, path in paths.items():
        print(f"  {name:<22} {path}")


def table(results) -> tuple[list[str], list[list[str]]]:
    """One column a method, one row a finding."""
    header = ["", *(result["name"] for result in results)]
    arrow = lambda before, after: "not kept" if after is None else f"{before:.2e} -> {after:.2e}"
    line = lambda label, cell: [label, *(cell(result) for result in results)]
    rows = [
        line("guarantee", lambda r: _guarantee(r["info"].certificate)),
        line("scope", lambda r: r["info"].certificate.scope),
        line("parameters to oracle", lambda r: arrow(*_pair(r, "params"))),
        line("optimizer to oracle", lambda r: arrow(*_pair(r, "state"))),
    ]
    for role in _ROLES:
        label = f"{role} accuracy (oracle)"
        rows.append(line(label, lambda r, role=role: _accuracy(r["models"], role)))
    rows.append(
        line(
            "seconds (retraining)*",
            lambda r: f"{r['forget_seconds']:.2f} ({r['retrain_seconds']:.2f})",
        )
    )
    return header, rows


def _pair(result, part: str):
    return result["distance_before"][part], result["distance_after"][part]


def _accuracy(models, role: str) -> str:
    cell = f"{models['before'][role]:.3f} -> {models['after'][role]:.3f}"
    return f"{cell} ({models['oracle'][role]:.3f})"


def _guarantee(certificate) -> str:
    if certificate.epsilon is None:
        return certificate.guarantee
    return f"{certificate.guarantee}, ({certificate.epsilon:g}, {certificate.delta:g})"


def _print_plain(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _plain(value: Any) -> Any:
    """What JSON can hold; the trajectories stay out."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "paths"}
    if isinstance(value, np.ndarray):
        return [float(item) for item in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return {
        "method": value.method,
        "num_forgotten": value.num_forgotten,
        "seconds": value.seconds,
        "measurements": dict(value.measurements),
    }
