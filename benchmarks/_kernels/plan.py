"""Which cells a run measures: all of them, or those of two minutes."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from _kernels import section_gradients, section_linear, section_programs
from _kernels.cells import Cell
from _kernels.models import convolutional, dense, transformer
from jaxunlearn.progress import progress

LOGISTIC, MLP, WIDE_MLP = dense(784, 10), dense(784, 256, 256, 10), dense(784, 512, 512, 10)
CNN, BLOCK = convolutional(), transformer()


class Section(NamedTuple):
    """A function that measures a cell, the shapes it gets, and how long one peer may take.

    `patience` and `quick_patience` are seconds: a peer that would take longer over all repeats runs
    in fewer of them.
    """

    measure: Callable[..., Cell]
    shapes: tuple[tuple, ...]
    quick_shapes: tuple[tuple, ...]
    patience: float = 0.0
    quick_patience: float = 0.0


PRODUCTS = ((LOGISTIC, 128), (MLP, 128), (CNN, 16), (BLOCK, 16))
ACTIONS = (
    (section_linear.DIMENSION, 1),
    (section_linear.ACTIONS_DIMENSION, section_linear.NUM_ACTIONS),
)
PROGRAMS = ((MLP, 256), (CNN, 16), (BLOCK, 16))

PLAN = {
    "per_example": Section(
        section_gradients.per_example,
        (
            *((LOGISTIC, size) for size in (64, 1024)),
            *((MLP, size) for size in (16, 64, 256, 1024)),
            (WIDE_MLP, 256),
            *((CNN, size) for size in (16, 64, 256)),
            *((BLOCK, size) for size in (16, 64)),
        ),
        ((MLP, 256), (CNN, 16), (BLOCK, 16)),
        patience=1.2,
        quick_patience=0.4,
    ),
    "products": Section(
        section_gradients.products, PRODUCTS, PRODUCTS[1:2], patience=2.0, quick_patience=0.4
    ),
    "lbfgs": Section(section_linear.lbfgs, ACTIONS, ACTIONS, patience=4.0, quick_patience=2.0),
    "solves": Section(section_linear.solves, ((LOGISTIC, 256),), ((LOGISTIC, 256),), 6.0, 2.0),
    "compile": Section(section_programs.compiling, PROGRAMS, PROGRAMS[:1]),
    "memory": Section(
        section_programs.memory,
        ((LOGISTIC, 1024), (MLP, 256), (MLP, 1024), (CNN, 64), (BLOCK, 64)),
        ((MLP, 256), (BLOCK, 16)),
    ),
}


def run(
    only: Collection[str] = tuple(PLAN),
    *,
    quick: bool,
    repeats: int,
    patience: float = 1.0,
    plan=None,
    report: Callable[[Cell, int], None] = lambda cell, repeats: None,
    show: bool | None = None,
) -> list[Cell]:
    """Measure the cells of `plan` (`PLAN` if None); `report(cell, repeats)` sees each as it comes.

    `patience` is a factor on the plan's seconds. A quick run leaves out what must be installed.
    """
    plan = PLAN if plan is None else plan
    work = [
        (section, shape)
        for name, section in plan.items()
        if name in only
        for shape in (section.quick_shapes if quick else section.shapes)
    ]
    cells = []
    with progress("kernels", len(work), show=show) as advance:
        for section, shape in work:
            limit = patience * (section.quick_patience if quick else section.patience)
            cell = section.measure(*shape, peers=not quick, repeats=repeats, patience=limit)
            report(cell, repeats)
            cells.append(cell)
            advance(1)
    return cells
