"""Ratios between functions, measured fairly: interleaved, paired, compiled first.

    results = compare({"plain": plain, "ours": ours}, baseline="plain")
    print(table(results))

Every candidate is a function without arguments that returns arrays. Within a repeat the candidates
run one after another in an order drawn anew, and each time is divided by the baseline's time of the
same repeat: a machine that slows down for a while slows both. The interval is that of the median of
these ratios, by order statistics, so it assumes nothing about their distribution.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

MIN_REPEATS = 30
FEWEST = 6
"""Of fewer samples no two order statistics hold the median with 95 percent."""

_SHORT = 0.02

Candidate = Callable[[], Any]


class Ratio(NamedTuple):
    """Median of paired ratios, its 95 percent interval, and how many ratios there are."""

    median: float
    low: float
    high: float
    num_repeats: int


def seconds(candidate: Candidate, calls: int = 1) -> float:
    """Wall-clock time of one call, results waited for; the mean of `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(candidate())
    return (time.perf_counter() - start) / calls


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Order statistics around the median that hold it with probability 95 percent or more.

    >>> median_interval(np.arange(6.0))
    (0.0, 5.0)
    """
    ordered, n = np.sort(values), len(values)
    # The largest k with P(Binomial(n, 1/2) < k) <= 0.025 gives the interval [x_(k), x_(n+1-k)].
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return (float(ordered[k - 1]), float(ordered[n - k])) if k else (float("nan"), float("nan"))


def compare(
    candidates: Mapping[str, Candidate],
    *,
    baseline: str,
    repeats: int = MIN_REPEATS,
    seed: int = 0,
    patience: float = math.inf,
    sample_seconds: float = 0.0,
    always: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Time `candidates` against one of them.

    Args:
      candidates: functions by name.
      baseline: the name that ratios are taken to.
      repeats: at least 30.
      seed: of the order within each repeat.
      patience: seconds that a candidate may take altogether. A slower one runs in fewer of the
        repeats, evenly spaced, six at least; the others run in all.
      always: names that run in all repeats whatever they take; the baseline is one of them.
      sample_seconds: a shorter call is repeated until it fills this time, after one that does not
        count, and the mean is the sample.

    Returns, by name: compile_seconds (the first call), median_seconds, ratio (median of the paired
    ratios to the baseline), ratio_low and ratio_high (95 percent interval), num_repeats, and the
    raw seconds, None in a repeat without this candidate.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"Expected repeats={repeats} >= {MIN_REPEATS}.")
    if baseline not in candidates:
        raise ValueError(f"Expected baseline={baseline!r} to be one of {', '.join(candidates)}.")
    compile_seconds = {name: seconds(candidate) for name, candidate in candidates.items()}
    usual = {name: _usual_seconds(candidate) for name, candidate in candidates.items()}
    calls = {name: max(1, math.ceil(sample_seconds / usual[name])) for name in candidates}
    rounds = {name: int(min(repeats, max(FEWEST, patience / usual[name]))) for name in candidates}
    rounds |= dict.fromkeys({baseline, *always} & set(candidates), repeats)
    times: dict[str, list[float | None]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed).shuffle
    for repeat in range(repeats):
        shuffle(order)
        for name in order:
            n = rounds[name]
            takes_part = (repeat + 1) * n // repeats > repeat * n // repeats
            if takes_part and sample_seconds and usual[name] < _SHORT:
                seconds(candidates[name])
            times[name].append(seconds(candidates[name], calls[name]) if takes_part else None)
    results = {}
    for name, raw in times.items():
        median, low, high, num_repeats = ratio_of(raw, times[baseline])
        results[name] = {
            "compile_seconds": compile_seconds[name],
            "median_seconds": float(np.median([t for t in raw if t is not None])),
            "ratio": median,
            "ratio_low": low,
            "ratio_high": high,
            "num_repeats": num_repeats,
            "seconds": raw,
        }
    return results


def _usual_seconds(candidate: Candidate) -> float:
    """About what a call takes that is not the first; a short one may have met a busy machine."""
    once = seconds(candidate)
    return max(once if once > 10 * _SHORT else min(once, seconds(candidate)), 1e-7)


def ratio_of(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> Ratio:
    """The ratio of two rows of raw seconds, over the repeats in which both took part.

    >>> ratio_of([2.0, None, 4.0], [1.0, 1.0, 1.0]).median
    3.0
    """
    pairs = zip(numerator, denominator, strict=True)
    ratios = np.array([a / b for a, b in pairs if a is not None and b is not None])
    return Ratio(float(np.median(ratios)), *median_interval(ratios), len(ratios))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain-text table, one line per candidate."""
    cells = [("", "median ms", "ratio", "95% interval", "repeats", "first call s")]
    cells += [
        (
            name,
            f"{1e3 * r['median_seconds']:.2f}",
            f"{r['ratio']:.2f}",
            f"[{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]",
            str(r["num_repeats"]),
            f"{r['compile_seconds']:.2f}",
        )
        for name, r in results.items()
    ]
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of cells with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *figures in cells:
        padded = [figure.rjust(width) for figure, width in zip(figures, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def temporary_bytes(function: Callable, *operands) -> int | None:
    """What XLA allocates beside arguments and results of `jit(function)`; None if unknown."""
    analysis = jax.jit(function).lower(*operands).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def flops(function: Callable, *operands) -> float | None:
    """What XLA counts for one call of `jit(function)`; None if it does not."""
    analysis = jax.jit(function).lower(*operands).compile().cost_analysis()
    return None if not analysis else analysis.get("flops")


def compile_seconds(function: Callable, *operands) -> float:
    """Tracing, lowering and compiling `function`, without a persistent cache.

    Give a function and shapes that the process has not seen, or JAX remembers parts of it.
    """
    with _no_persistent_cache():
        start = time.perf_counter()
        jax.jit(function).lower(*operands).compile()
        return time.perf_counter() - start


@contextlib.contextmanager
def _no_persistent_cache():
    """A compilation that was on disk would cost nothing."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]

    def enable(wanted):
        jax.config.update("jax_enable_compilation_cache", wanted)
        compilation_cache.reset_cache()  # or JAX goes by what it found at its first compilation

    enable(False)
    try:
        yield
    finally:
        enable(before)
