"""What the claims share: a few shares of a small cell, printed, and whether a bound holds."""

import jax

from _alignment import interventions as act
from _alignment.cells import Cell, measure

STEPS, SEEDS = 120, 5


def cell(optimizer: str, interventions, lags, *, loss: str = "logistic", **options) -> Cell:
    """A cell on the digits, which need no download; doing nothing is measured with it."""
    jax.config.update("jax_enable_x64", True)
    sizes = {"num_steps": STEPS, "seeds": SEEDS} | options
    wanted = (act.NOTHING, *interventions)
    return measure(loss, "digits", optimizer, interventions=wanted, lags=tuple(lags), **sizes)


def share(cell: Cell, intervention: str, lag: int, measured: str = "state") -> float:
    """The median share of what doing nothing leaves; 0 is exact."""
    found = cell.shares[intervention][lag][measured]
    if found is None:
        raise ValueError(f"Expected an error to take shares of, got rounding: {cell.name}, {lag}.")
    return found.median


def holds(text: str, value: float, *, at_most: float | None = None, at_least: float | None = None):
    """Prints the figure beside its bound, and says whether it is within."""
    fine = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
    print(f"{text}: {value:.3g} ({bound}){'' if fine else '  DOES NOT HOLD'}", flush=True)
    return fine
