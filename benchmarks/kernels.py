"""The kernels beside every peer: per-example gradients, products, L-BFGS, solves, compile, memory.

    python benchmarks/kernels.py                      every model, batch size and installed peer
    python benchmarks/kernels.py --quick              two minutes: fewer cells, nothing but JAX
    python benchmarks/kernels.py --only products lbfgs
    python benchmarks/kernels.py --out benchmarks/results    writes kernels_<device>.json and .png
    python benchmarks/kernels.py --show benchmarks/results/kernels_cpu.json    an earlier run again

Peers come with `pip install 'jaxunlearn[peers]'`; one that is missing leaves a blank. Figures are
medians of interleaved repeats, compiled first, of functions whose results were compared before.
The floor of a table is its row with ratio 1; "/ own gradient" is relative to the plain gradient of
the candidate's own framework, "/ ours" compares seconds with seconds.
"""

import argparse
import json
import pathlib
import sys
import time

from _harness import MIN_REPEATS, busy, environment, write_json
from _kernels import bars, plan, report


def main() -> None:
    options = parse()
    begun = time.perf_counter()
    if options.show:
        content = json.loads(pathlib.Path(options.show).read_text())
        cells, found_in = report.from_json(content["cases"]), content["environment"]
        for cell in cells:
            report.show_cell(cell, MIN_REPEATS)
    else:
        found_in = environment()
        print(", ".join(f"{k} {v}" for k, v in found_in.items() if not isinstance(v, dict)))
        print(", ".join(f"{k} {v or 'missing'}" for k, v in found_in["versions"].items()))
        if warning := busy():
            print(warning, file=sys.stderr)
        cells = plan.run(
            options.only, quick=options.quick, repeats=options.repeats, patience=options.patience,
            report=report.show_cell,
        )  # fmt: skip
        print(f"\n{len(cells)} cells in {time.perf_counter() - begun:.0f} s")
    report.show_bars(bars.findings(cells))
    if options.out:
        write(pathlib.Path(options.out), cells, found_in, with_json=not options.show)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--only", nargs="+", choices=list(plan.PLAN), default=list(plan.PLAN))
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS)
    parser.add_argument(
        "--patience", type=float, default=1.0,
        help="factor on the seconds after which a slow peer runs in fewer of the repeats",
    )  # fmt: skip
    parser.add_argument("--out", help="folder for kernels_<device>.json and .png; none by default")
    parser.add_argument("--show", metavar="JSON", help="print an earlier run, and draw it to --out")
    return parser.parse_args()


def write(folder: pathlib.Path, cells, found_in, *, with_json: bool) -> None:
    """JSON and picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels_{found_in['device'].split(':')[0]}"
    if with_json:
        write_json(stem.with_suffix(".json"), report.as_json(cells))
        print(f"wrote {stem.with_suffix('.json')}")
    if not any(cell.section in ("per_example", "products") for cell in cells):
        return
    try:
        from _kernels import figure
    except ImportError as error:
        print(f"no picture: {error}. pip install 'jaxunlearn[plots]'")
    else:
        print(f"wrote {figure.draw(stem.with_suffix('.png'), cells, found_in)}")


if __name__ == "__main__":
    main()
