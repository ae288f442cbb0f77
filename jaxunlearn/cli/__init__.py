"""The command line: `jaxunlearn demo`, `jaxunlearn bench` and `jaxunlearn doctor`."""

import argparse
import sys
from collections.abc import Sequence

from jaxunlearn import __version__, errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed check, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except errors.JaxUnlearnError as error:
        print(f"jaxunlearn: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxunlearn", description="Delete datapoints from models and from their optimizers."
    )
    parser.add_argument("--version", action="version", version=f"jaxunlearn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train on real data, forget some rows, compare with a model that never saw them",
    )
    demo.add_argument("--dataset", default="digits", help="a name, or a file.npz (default: digits)")
    demo.add_argument("--forget", type=int, default=20, help="how many rows (default: 20)")
    demo.add_argument("--seed", type=int, default=0, help="initialisation, order, choice of rows")
    demo.add_argument("--out", default="demo-report", help="folder for the report")
    demo.add_argument("--quiet", action="store_true", help="no progress, no table")
    demo.set_defaults(run=_demo)
    bench = commands.add_parser("bench", help="what the kernels cost on your model and device")
    bench.add_argument("what", choices=["kernels"], help="what to measure")
    bench.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (loss_fn, params, batch)",
    )
    bench.add_argument("--clip", type=float, default=1.0, help="the clip norm (default: 1)")
    bench.add_argument("--tangents", type=int, default=64, help="Hessian products (default: 64)")
    bench.add_argument("--repeats", type=int, default=30, help="at least 30 (default: 30)")
    bench.add_argument("--out", metavar="FILE", help="write the figures to this JSON file too")
    bench.set_defaults(run=_bench)
    doctor = commands.add_parser("doctor", help="versions, devices, precision, flags, extras")
    doctor.set_defaults(run=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from jaxunlearn.cli import demo

    return demo.run(
        dataset=options.dataset,
        num_forget=options.forget,
        seed=options.seed,
        out=options.out,
        quiet=options.quiet,
    )


def _bench(options: argparse.Namespace) -> int:
    from jaxunlearn.cli import bench

    return bench.run(
        loss=options.loss,
        clip=options.clip,
        tangents=options.tangents,
        repeats=options.repeats,
        out=options.out,
    )


def _doctor(options: argparse.Namespace) -> int:
    from jaxunlearn.cli import doctor

    del options
    return doctor.run()
