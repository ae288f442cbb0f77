"""A small harness for ratios between functions: interleaved, paired, compiled first.

    results = compare({"plain": plain, "ours": ours}, baseline="plain")
    print(table(results))
    write_json("results/x.json", {"case": results})

Every candidate is a function without arguments that returns arrays. Within a repeat the candidates
run one after another in an order drawn anew, and each time is divided by the baseline's time of the
same repeat: a machine that slows down for a while slows both. The interval is that of the median of
these ratios, by order statistics, so it assumes nothing about their distribution.
"""

import json
import math
import os
import pathlib
import platform
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

MIN_REPEATS = 30


def seconds(candidate: Callable[[], Any]) -> float:
    """Wall-clock time of one call, results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(candidate())
    return time.perf_counter() - start


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Order statistics around the median that hold it with probability 95 percent or more."""
    ordered, n = np.sort(values), len(values)
    # The largest k with P(Binomial(n, 1/2) < k) <= 0.025 gives the interval [x_(k), x_(n+1-k)].
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return (float(ordered[k - 1]), float(ordered[n - k])) if k else (float("nan"), float("nan"))


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    repeats: int = MIN_REPEATS,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Time `candidates` against one of them.

    Returns, by name: compile_seconds (the first call), median_seconds, ratio (median of the paired
    ratios to the baseline), ratio_low and ratio_high (95 percent interval), and the raw seconds.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"Expected repeats={repeats} >= {MIN_REPEATS}.")
    compile_seconds = {name: seconds(candidate) for name, candidate in candidates.items()}
    for candidate in candidates.values():  # once more: the first call also touches fresh memory
        seconds(candidate)
    order, times = list(candidates), {name: [] for name in candidates}
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            times[name].append(seconds(candidates[name]))
    reference = np.asarray(times[baseline])
    results = {}
    for name, raw in times.items():
        ratios = np.asarray(raw) / reference
        low, high = median_interval(ratios)
        results[name] = {
            "compile_seconds": compile_seconds[name],
            "median_seconds": float(np.median(raw)),
            "ratio": float(np.median(ratios)),
            "ratio_low": low,
            "ratio_high": high,
            "seconds": raw,
        }
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain-text table, one line per candidate."""
    header = ("", "median ms", "ratio", "95% interval", "first call s")
    cells = [header] + [
        (
            name,
            f"{1e3 * r['median_seconds']:.2f}",
            f"{r['ratio']:.2f}",
            f"[{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]",
            f"{r['compile_seconds']:.2f}",
        )
        for name, r in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for name, *figures in cells:
        padded = [figure.rjust(width) for figure, width in zip(figures, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What a figure depends on, without date or host name."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.machine(),
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "x64": bool(jax.config.jax_enable_x64),
    }


def write_json(path: str | os.PathLike, cases: Mapping[str, Any]) -> None:
    """Write results and environment, directories included."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "cases": cases}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
