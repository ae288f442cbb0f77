"""Values of a certificate that are computed while the caller goes on."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

_running: list[Future] = []
_starting = threading.Lock()


class Deferred:
    """A field of a frozen dataclass, None by default, whose value may still be on its way.

    Whoever reads it waits for it; an error met on the way is raised there.
    """

    def __set_name__(self, owner, name: str):
        self._name = name

    def __get__(self, instance, owner=None) -> str | None:
        if instance is None:
            return None
        value = instance.__dict__[self._name]
        return value.result() if isinstance(value, Future) else value

    def __set__(self, instance, value: "str | Future[str] | None") -> None:
        instance.__dict__[self._name] = value


def is_on_its_way(instance, name: str) -> bool:
    """Whether this `Deferred` field was given a future, so that reading it could wait."""
    return isinstance(vars(instance)[name], Future)


def deferred(**functions: Callable[[], str]) -> dict[str, Any]:
    """Futures of what the functions return, by name; another thread runs them one after another.

    Waits until what an earlier call started has ended, so that at most one caller's operands are
    held in memory.

    >>> deferred(answer=lambda: "42")["answer"].result()
    '42'
    """
    with _starting:
        wait(_running)
        futures = {name: _worker().submit(function) for name, function in functions.items()}
        _running[:] = futures.values()
    return futures


@functools.cache
def _worker() -> ThreadPoolExecutor:
    """One thread, that waits: starting one makes the caller wait."""
    return ThreadPoolExecutor(1, "jaxunlearn-digests")
