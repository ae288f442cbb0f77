"""A cell of the benchmark: one model at one size, and every way to compute a few quantities on it.

A candidate is built by a function that may fail: a peer that is not installed, or that does not
know a layer, leaves a blank with the reason. Before anything is timed, each result is compared with
that of a slow and obvious reference on the same parameters and the same batch: a peer that computes
something else would be a broken baseline, and is left out as well.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from _harness import compare, seconds

MAX_DISAGREEMENT = 1e-3
"""Relative L2 distance to the reference: float32 and 1e-6 in a peer's clip factor, nothing more."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute `kernel`. `build()` gives a function without arguments.

    `arrays` turns its result into NumPy arrays that can be compared with the reference's.
    """

    name: str
    kernel: str
    build: Callable[[], Callable[[], Any]]
    arrays: Callable[[Any], list[np.ndarray]]
    framework: str = "jax"
    ours: bool = False


@dataclasses.dataclass
class Cell:
    """What was measured on one model at one size."""

    section: str
    model: str
    size: int
    baseline: str
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    blanks: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model and its size."""
        return f"{self.model}, {self.size}"

    def kernels(self) -> list[str]:
        """The kernels that were timed, in order."""
        return list(dict.fromkeys(r["kernel"] for r in self.results.values()))


def disagreement(arrays: Iterable[np.ndarray], reference: Iterable[np.ndarray]) -> float:
    """||a - b|| / ||b|| over all arrays, in float64; infinite where shapes differ."""
    arrays, reference = list(arrays), list(reference)
    if [np.shape(a) for a in arrays] != [np.shape(b) for b in reference]:
        return float("inf")
    gap = total = 0.0
    for a, b in zip(arrays, reference, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        gap, total = gap + np.sum((a - b) ** 2), total + np.sum(b**2)
    distance = float(np.sqrt(gap / max(total, 1e-300)))
    return distance if np.isfinite(distance) else float("inf")


def measure(
    cell: Cell,
    candidates: Iterable[Candidate],
    references: Mapping[str, list[np.ndarray]],
    *,
    patience: float = math.inf,
    **options,
) -> Cell:
    """Build, check and time every candidate of a cell. `references` holds arrays by kernel.

    A peer of which one call takes longer than `patience`, or than a second if that is more, is a
    blank that says how long.
    """
    functions, facts = {}, {}
    slowest = max(patience, 1.0)
    for candidate in candidates:
        needed = candidate.ours or candidate.name == cell.baseline
        try:
            function, fact = _checked(candidate, references[candidate.kernel], slowest, needed)
        except ImportError as error:
            cell.blanks[candidate.name] = f"not installed ({error.name})"
        except Unfit as error:
            if needed:
                raise
            cell.blanks[candidate.name] = str(error)
        except Exception as error:
            if needed:
                raise
            cell.blanks[candidate.name] = f"fails: {_first_line(error)}"
        else:
            functions[candidate.name], facts[candidate.name] = function, fact
    # What a bar is about has all of its repeats, however slow; a peer may have fewer.
    ours = [name for name, fact in facts.items() if fact["ours"]]
    timed = compare(functions, baseline=cell.baseline, always=ours, patience=patience, **options)
    cell.results = {name: result | facts[name] for name, result in timed.items()}
    return cell


class Unfit(Exception):
    """A candidate that runs, and that is still not timed."""


def _checked(candidate: Candidate, reference, slowest: float, needed: bool):
    """The function of a candidate and what is known of it before timing."""
    begun = time.perf_counter()
    function = candidate.build()
    result = jax.block_until_ready(function())
    first = time.perf_counter() - begun
    distance = disagreement(candidate.arrays(result), reference)
    if not distance <= MAX_DISAGREEMENT:
        raise Unfit(f"{candidate.name} disagrees by {distance:.1e}")
    if not needed and first > slowest and (call := seconds(function)) > slowest:
        raise Unfit(f"too slow to repeat: {call:.2g} s a call")
    return function, {
        "kernel": candidate.kernel,
        "framework": candidate.framework,
        "ours": candidate.ours,
        "disagreement": distance,
        "setting": getattr(function, "setting", None),
        "first_call_seconds": first,
    }


def _first_line(error: Exception) -> str:
    """What an exception says, in few words."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:90]}"


def one(result) -> list[np.ndarray]:
    """A single array."""
    return [np.asarray(result)]


def flat(result) -> list[np.ndarray]:
    """The arrays of a result that is a list or a tree."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]
