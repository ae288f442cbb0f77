"""State alignment: how far a deletion leaves weights and optimizer state from the counterfactual.

    python benchmarks/state_alignment.py                every cell, ten seeds: at most 20 minutes
    python benchmarks/state_alignment.py --quick        one minute: three cells, short streams
    python benchmarks/state_alignment.py --only momentum "MLP, digits"    cells by part of the name
    python benchmarks/state_alignment.py --out benchmarks/results         writes JSON and pictures
    python benchmarks/state_alignment.py --show benchmarks/results/state_alignment_cpu.json
    python benchmarks/state_alignment.py --show A.json B.json --out .     parts of a run, joined

An event stream loses one row that was used `lag` steps before the request. The target is the state
of the same run without that row (`records.oracle`), and four distances to it are measured for each
intervention, after Stewart 2026 ("Form and Function", arXiv 2605.17590), whose benchmark has no
public code; the formulas are those of `jaxunlearn.audits`. Medians over seeds, with intervals.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax
from _alignment import plan, report
from _harness import busy, environment, write_json


def main() -> None:
    options = parse()
    jax.config.update("jax_enable_x64", True)
    begun = time.perf_counter()
    if options.show:
        parts = [json.loads(pathlib.Path(path).read_text()) for path in options.show]
        cells = [cell for part in parts for cell in report.from_json(part["cases"])]
        order = [spec.name for spec in plan.FULL]
        cells.sort(key=lambda cell: order.index(cell.name) if cell.name in order else len(order))
        found_in = parts[0]["environment"]
    else:
        found_in = environment()
        print(", ".join(f"{k} {v}" for k, v in found_in.items() if not isinstance(v, dict)))
        if warning := busy():
            print(warning, file=sys.stderr)
        specs, size = chosen(options)
        for name in plan.left_out(specs):
            print(f"left out: {name}. It needs JAXUNLEARN_DATA.")
        print(f"streams of {size.num_steps} steps, lags {size.lags}, {size.seeds} seeds")
        with compiled_once():
            cells = list(plan.run(specs, size, report=told))
        print(f"{len(cells)} cells in {time.perf_counter() - begun:.0f} s")
    report.show(cells)
    if options.out:
        stem = "state_alignment_quick" if options.quick else "state_alignment"
        write(
            pathlib.Path(options.out), stem, cells, found_in, with_json=len(options.show or ()) != 1
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cells by name, or by part of it")
    parser.add_argument("--seeds", type=int, help="instead of ten, or three with --quick")
    parser.add_argument("--steps", type=int, help="of a stream; lags beyond it are left out")
    parser.add_argument("--out", help="folder for JSON and pictures; none by default")
    parser.add_argument(
        "--show", nargs="+", metavar="JSON", help="print an earlier run, and draw it to --out"
    )
    return parser.parse_args()


def chosen(options) -> tuple[list[plan.Spec], plan.Size]:
    """The cells and the size that were asked for."""
    specs, size = (plan.QUICK, plan.QUICK_SIZE) if options.quick else (plan.FULL, plan.FULL_SIZE)
    if options.only:
        names = [spec.name for spec in plan.FULL]
        fits = lambda name, part: name == part if part in names else part in name
        specs = [spec for spec in plan.FULL if any(fits(spec.name, p) for p in options.only)]
    if options.seeds:
        size = dataclasses.replace(size, seeds=options.seeds)
    if options.steps:
        lags = tuple(lag for lag in size.lags if lag < options.steps)
        size = dataclasses.replace(size, num_steps=options.steps, lags=lags)
    return list(specs), size


@contextlib.contextmanager
def compiled_once():
    """The oracle is the program that a replay runs: XLA compiles it once for both."""
    with tempfile.TemporaryDirectory() as folder:
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield


def told(cell) -> None:
    print(f"{cell.seconds:5.0f} s  {cell.name}, {cell.num_params} parameters", flush=True)


def write(folder: pathlib.Path, stem: str, cells, found_in, *, with_json: bool) -> None:
    """JSON and pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{found_in['device'].split(':')[0]}"
    if with_json:
        write_json(path.with_suffix(".json"), report.as_json(cells))
        print(f"wrote {path.with_suffix('.json')}")
    try:
        from _alignment import figure
    except ImportError as error:
        print(f"no pictures: {error}. pip install 'jaxunlearn[plots]'")
    else:
        for drawn in figure.draw(path, cells):
            print(f"wrote {drawn}")


if __name__ == "__main__":
    main()
