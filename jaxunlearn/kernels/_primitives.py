"""Which primitives a jaxpr is made of."""

from collections.abc import Iterator
from typing import Any

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Primitives that only call their body, whatever JAX names them."""


def convolves(closed: Any) -> bool:
    """Whether `closed`, or a jaxpr inside it, convolves: XLA loops on CPU do that slowly."""
    return any(eqn.primitive.name == "conv_general_dilated" for eqn, _ in equations(closed))


def equations(closed: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every equation of `closed` and of the jaxprs inside it, each with those inside itself."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        inner = [jaxpr for value in eqn.params.values() for jaxpr in jaxprs_in(value)]
        yield eqn, inner
        for jaxpr in inner:
            yield from equations(jaxpr)


def jaxprs_in(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [inner for item in value for inner in jaxprs_in(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
