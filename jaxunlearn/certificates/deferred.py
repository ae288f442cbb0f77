"""Values of a certificate that are computed while the caller goes on."""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from jaxunlearn.certificates import schema
from jaxunlearn.errors import CertificateError

_running: set[Future] = set()
_lost: set[Future] = set()  # what ran when this process was forked off: its thread is not here
_starting = threading.Lock()


class Deferred:
    """A digest in a frozen dataclass, None by default, whose value may still be on its way.

    Whoever reads it waits for it; an error met on the way is raised there, and so is a
    `CertificateError` where what arrives is no digest, or never will.
    """

    def __set_name__(self, owner, name: str):
        self._name = name

    def __get__(self, instance, owner=None) -> str | None:
        if instance is None:
            return None
        value = instance.__dict__[self._name]
        if not isinstance(value, Future):
            return value
        if value in _lost:
            raise CertificateError(
                f"{self._name} was still being computed when this process was forked off, and "
                "never arrives here. Read it before the fork, or in the parent."
            )
        return schema.digest(self._name, value.result())

    def __set__(self, instance, value: "str | Future[str] | None") -> None:
        instance.__dict__[self._name] = value


def is_on_its_way(instance, name: str) -> bool:
    """Whether this `Deferred` field was given a future, so that reading it could wait."""
    return isinstance(vars(instance)[name], Future)


def deferred(**functions: Callable[[], str]) -> dict[str, Any]:
    """Futures of what the functions return, by name; another thread runs them one after another.

    Waits until what an earlier call started has ended, so that at most one caller's operands are
    held in memory. Where no thread can be started, as while Python shuts down, they run at once.

    >>> deferred(answer=lambda: "42")["answer"].result()
    '42'
    """
    with _starting:
        wait(_running)
        futures = {name: _started(function) for name, function in functions.items()}
        for future in futures.values():
            _running.add(future)
            future.add_done_callback(_running.discard)
    return futures


def _started(function: Callable[[], str]) -> Future:
    """The future of what `function` returns."""
    try:
        return _worker().submit(function)
    except RuntimeError:  # Python is shutting down
        future: Future = Future()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        return future


@functools.cache
def _worker() -> ThreadPoolExecutor:
    """One thread, that waits: starting one makes the caller wait."""
    return ThreadPoolExecutor(1, "jaxunlearn-digests")


def _begin_anew():
    """In a forked child: no thread runs, and a lock may be held by one that is gone."""
    global _starting
    _starting = threading.Lock()
    _lost.update(_running)
    _running.clear()
    _worker.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
