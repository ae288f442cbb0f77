"""Which primitives a jaxpr is made of."""

from typing import Any


def contains(closed: Any, primitive: str) -> bool:
    """Whether an equation of `closed`, or of a jaxpr inside it, binds the primitive."""
    jaxpr = getattr(closed, "jaxpr", closed)
    return any(
        eqn.primitive.name == primitive
        or any(contains(inner, primitive) for value in eqn.params.values() for inner in _in(value))
        for eqn in jaxpr.eqns
    )


def _in(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [inner for item in value for inner in _in(item)]
    return [value] if hasattr(getattr(value, "jaxpr", value), "eqns") else []
