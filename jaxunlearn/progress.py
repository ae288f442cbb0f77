"""Progress of long work: a rich bar in a terminal, plain text without rich, silence elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(
    label: str, total: int, *, show: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """A context that yields `advance(steps)`.

    Args:
      label: what is being done.
      total: number of steps.
      show: None shows it when standard error is a terminal; True always; False never.

    >>> with progress("replaying", 3, show=False) as advance:
    ...     advance(3)
    """
    visible = sys.stderr.isatty() if show is None else show
    if not visible or total <= 0:
        yield lambda steps: None
        return
    try:
        import rich.console
        import rich.progress as bars
    except ImportError:
        yield _plain(label, total)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


def _plain(label: str, total: int) -> Callable[[int], None]:
    """A line now and then: at each tenth, and at most every two seconds."""
    state = {"done": 0, "shown": -1, "time": 0.0}

    def advance(steps: int) -> None:
        state["done"] += steps
        tenth = 10 * state["done"] // total
        due = time.monotonic() - state["time"] > 2.0 or state["done"] >= total
        if tenth > state["shown"] and due:
            state["shown"], state["time"] = tenth, time.monotonic()
            sys.stderr.write(f"{label}: {state['done']}/{total}\n")

    return advance
