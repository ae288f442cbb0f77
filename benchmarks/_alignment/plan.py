"""Which cells are measured, and at which size."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from _alignment import interventions as act
from _alignment.cells import Cell, measure
from _alignment.optimizers import OPTIMIZERS
from _alignment.problems import is_here
from jaxunlearn.progress import progress


@dataclasses.dataclass(frozen=True)
class Spec:
    """One cell to be measured."""

    optimizer: str
    loss: str = "logistic"
    data: str = "digits"
    epochs: int = 1

    @property
    def name(self) -> str:
        again = f", {self.epochs} epochs" if self.epochs > 1 else ""
        return f"{self.optimizer}; {self.loss}, {self.data}{again}"


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a stream is, how far back deletions reach, how many seeds, and what is tried."""

    num_steps: int
    lags: tuple[int, ...]
    seeds: int
    interventions: tuple[str, ...] = act.INTERVENTIONS


MOMENTUM, ADAM, LBFGS = "momentum", "Adam, eps 1e-3", "online L-BFGS"
FULL_SIZE = Size(num_steps=440, lags=(1, 5, 20, 100, 400), seeds=10)
SLOW_TO_COMPILE = (act.REBUILT, act.PARAMETERS_REBUILT, act.DELTA_GRAD)
QUICK_SIZE = Size(
    num_steps=60,
    lags=(1, 5, 20),
    seeds=3,
    interventions=tuple(name for name in act.INTERVENTIONS if name not in SLOW_TO_COMPILE),
)
FULL = (
    *(Spec(name) for name in OPTIMIZERS),
    *(Spec(name, "ridge") for name in (MOMENTUM, LBFGS, "online Newton")),
    *(Spec(name, "MLP") for name in (ADAM, LBFGS)),
    *(Spec(name, data="rotating digits") for name in (MOMENTUM, LBFGS)),
    *(Spec(name, data="Adult") for name in (ADAM, LBFGS)),
    Spec(ADAM, data="MNIST"),
    Spec(MOMENTUM, "ridge", epochs=4),
    *(Spec(name, epochs=4) for name in (MOMENTUM, ADAM, "Adam, eps 1e-8")),
)
QUICK = (Spec(MOMENTUM), Spec(ADAM), Spec(LBFGS))


def run(
    specs: Iterable[Spec], size: Size, *, report: Callable[[Cell], None] = lambda cell: None
) -> Iterator[Cell]:
    """Measures one cell after another; those whose data are not here are left out, and named."""
    found = [spec for spec in specs if is_here(spec.data)]
    with progress("state alignment", len(found) * size.seeds) as advance:
        for spec in found:
            cell = measure(
                spec.loss, spec.data, spec.optimizer, epochs=spec.epochs,
                num_steps=size.num_steps, lags=size.lags, seeds=size.seeds,
                interventions=size.interventions, advance=advance,
            )  # fmt: skip
            report(cell)
            yield cell


def left_out(specs: Iterable[Spec]) -> list[str]:
    """Data sets that are wanted and cannot be read."""
    return sorted({spec.data for spec in specs if not is_here(spec.data)})
