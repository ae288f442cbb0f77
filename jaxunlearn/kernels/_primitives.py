"""Which primitives a jaxpr is made of."""

from typing import Any


def contains(closed: Any, primitive: str) -> bool:
    """Whether an equation of `closed`, or of a jaxpr inside it, binds the primitive."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        inner = [jaxpr for value in eqn.params.values() for jaxpr in jaxprs_in(value)]
        if eqn.primitive.name == primitive or any(contains(body, primitive) for body in inner):
            return True
    return False


def jaxprs_in(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [inner for item in value for inner in jaxprs_in(item)]
    return [value] if hasattr(getattr(value, "jaxpr", value), "eqns") else []
