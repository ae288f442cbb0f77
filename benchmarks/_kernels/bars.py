"""What the kernels are meant to reach, as data, and whether a run shows it.

A bar is met when the 95 percent interval of the measured median reaches it.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from _harness import ratio_of

from _kernels.cells import Cell

PEERS = "every peer"


@dataclasses.dataclass(frozen=True)
class Bar:
    """`kernel` over `versus` is at most `limit`, or `versus` over `kernel` is at least `limit`.

    Both in seconds (bytes in the section "memory"), on every cell whose model begins with `model`;
    `per` divides a figure of many vectors by their number; `claimed` says that the README has it,
    and `claims/kernels_meet_their_bars.py` fails where it is missed.
    """

    section: str
    kernel: str
    model: str
    limit: float
    direction: str
    versus: str
    per: int = 1
    claimed: bool = False

    def __str__(self) -> str:
        if self.direction == "at most":
            each = f", each of {self.per}" if self.per > 1 else ""
            return f"{self.kernel} / {self.versus}{each}, {self.model}: at most {self.limit:g}"
        times = "ahead of" if self.limit == 1 else f"at least {self.limit:g} times as fast as"
        return f"{self.kernel}, {self.model}: {times} {self.versus}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A bar on one cell: the median, its interval, and how far from the limit that is."""

    bar: Bar
    cell: Cell
    against: str
    median: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        """Whether the interval reaches the limit."""
        if self.bar.direction == "at most":
            return self.low <= self.bar.limit
        return self.high >= self.bar.limit

    @property
    def margin(self) -> float:
        """Above 1 the median is on the right side of the limit, by this factor."""
        ratio = self.median / self.bar.limit
        return 1 / ratio if self.bar.direction == "at most" else ratio


MLP, CNN, BLOCK, LOGISTIC = "MLP", "CNN", "transformer", "logistic"
PLAIN, CLIP, NORMS = "plain gradient", "clipped sum", "norms"
HVP, MANY, NUM_TANGENTS = "one HVP", "64 tangents", 64
ACTION, ACTIONS = "L-BFGS action", "L-BFGS, 64 right-hand sides"
SOLVES, COMPILE, MEMORY = "CG, 16 right-hand sides", "compile clipped sum", "clipped sum, bytes"
STREAM, OPTAX_ACTION = "stream 4 m d floats", "Optax, two loops"
SIXTEEN_CALLS = "jax.scipy cg, 16 calls"

BARS = (
    Bar("per_example", CLIP, MLP, 1.2, "at most", PLAIN, claimed=True),
    Bar("per_example", CLIP, MLP, 2.0, "at least", "Opacus ghost"),
    Bar("per_example", CLIP, MLP, 100.0, "at least", "jax_privacy"),
    Bar("per_example", CLIP, BLOCK, 1.35, "at most", PLAIN, claimed=True),
    Bar("per_example", CLIP, BLOCK, 1.0, "at least", PEERS),
    Bar("per_example", CLIP, CNN, 1.6, "at most", PLAIN),
    Bar("per_example", CLIP, CNN, 1.0, "at least", PEERS),
    Bar("per_example", NORMS, MLP, 0.8, "at most", PLAIN, claimed=True),
    Bar("per_example", NORMS, BLOCK, 1.1, "at most", PLAIN, claimed=True),
    Bar("per_example", NORMS, CNN, 1.3, "at most", PLAIN),
    Bar("memory", MEMORY, "", 1.5, "at most", PLAIN),
    Bar("products", HVP, MLP, 1.6, "at most", PLAIN),
    Bar("products", HVP, CNN, 1.4, "at most", PLAIN),
    Bar("products", MANY, MLP, 1.5, "at most", PLAIN, per=NUM_TANGENTS),
    Bar("products", MANY, CNN, 1.25, "at most", PLAIN, per=NUM_TANGENTS),
    Bar("products", MANY, BLOCK, 1.25, "at most", PLAIN, per=NUM_TANGENTS),
    Bar("products", MANY, "", 1.0, "at least", PEERS),
    Bar("lbfgs", ACTION, "", 0.7, "at least", STREAM),
    Bar("lbfgs", ACTION, "", 1.0, "at least", OPTAX_ACTION),
    Bar("lbfgs", ACTIONS, "", 2.5, "at least", OPTAX_ACTION),
    Bar("solves", SOLVES, LOGISTIC, 2.0, "at least", SIXTEEN_CALLS, claimed=True),
    Bar("compile", COMPILE, "", 3.0, "at most", PLAIN),
)


def findings(cells: Iterable[Cell], bars: Iterable[Bar] = BARS) -> Iterator[Finding]:
    """Every bar on every cell that measured both of its sides."""
    cells = list(cells)
    for bar in bars:
        for cell in cells:
            if cell.section == bar.section and cell.model.startswith(bar.model):
                yield from _on(bar, cell)


def _on(bar: Bar, cell: Cell) -> Iterator[Finding]:
    """The bar on one cell: ours against the named candidate, or against the nearest peer."""
    ours = [r for r in cell.results.values() if r["ours"] and r["kernel"] == bar.kernel]
    if not ours:
        return
    ours.sort(key=lambda r: r["median_seconds"])  # of several forms, what a user would take
    for name in _others(bar, cell):
        other = cell.results[name]["seconds"]
        sides = (ours[0]["seconds"], other) if bar.direction == "at most" else (
            other, ours[0]["seconds"],
        )  # fmt: skip
        median, low, high, count = ratio_of(*sides)
        if count == 1:  # bytes: exact
            low = high = median
        yield Finding(bar, cell, name, median / bar.per, low / bar.per, high / bar.per)


def _others(bar: Bar, cell: Cell) -> list[str]:
    """Names of the candidates that a bar is taken against; none where a peer is missing."""
    if bar.versus != PEERS:
        return [bar.versus] if bar.versus in cell.results else []
    peers = {
        name: result["median_seconds"]
        for name, result in cell.results.items()
        if not result["ours"] and result["kernel"] == bar.kernel
    }
    return [min(peers, key=peers.__getitem__)] if peers else []
