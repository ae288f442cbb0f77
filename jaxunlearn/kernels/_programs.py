"""Eager calls of functions that close over functions, compiled once for everything they compute.

JAX finds a compiled loop again by the identity of the Python functions in it, which a solver makes
anew at each call, as its user makes the product. Here a call outside any trace is traced as a
whole, and compiled for every new jaxpr: equal ones share a program, whatever made them, and the
arrays they close over are its operands. Nothing that a function read the last time is remembered.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jaxtyping import PyTree

from jaxunlearn.kernels._checks import is_traced

_BODY_ONLY = frozenset(
    {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
)


def compiled_once(function: Callable[..., PyTree], *operands: PyTree) -> Any:
    """`function(*operands)`; called outside a trace, a second call of its kind compiles nothing."""
    leaves, treedef = jax.tree.flatten(operands)
    if _any_traced(leaves):
        return function(*operands)
    flat = lambda *leaves: function(*jax.tree.unflatten(treedef, leaves))
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    if _any_traced(closed.consts):  # `function` closes over values of a trace around us
        return function(*operands)
    results = _compiled(_Program(closed))(closed.consts, leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


class _Program:
    """A jaxpr without its constants; equal to any other that computes the same step by step."""

    def __init__(self, closed: jex_core.ClosedJaxpr):
        self.jaxpr = closed.jaxpr
        self.key = _jaxpr_key(closed.jaxpr)
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other) -> bool:
        return isinstance(other, _Program) and self.key == other.key

    def run(self, consts: list, leaves: list) -> list:
        """Evaluate it."""
        return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(self.jaxpr, consts))(*leaves)


@functools.lru_cache(maxsize=128)
def _compiled(program: _Program):
    """The program under `jit`; one that is no longer used is let go with its executable."""
    return jax.jit(program.run)


class _Same:
    """An object as a key: only itself is equal to it."""

    def __init__(self, held: Any):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and self.held is other.held


def _jaxpr_key(jaxpr) -> tuple:
    """What the jaxpr computes, as nested tuples of hashable values."""
    numbers: dict[Any, int] = {}

    def bound(var):
        numbers[var] = len(numbers)
        return var.aval

    def read(atom):
        if isinstance(atom, jex_core.Literal):
            value = np.asarray(atom.val)
            return type(atom.val), value.dtype.name, value.tobytes(), atom.aval
        return numbers[atom]

    heads = tuple(bound(var) for var in (*jaxpr.constvars, *jaxpr.invars))
    steps = tuple(
        (
            eqn.primitive,
            _params_key(eqn),
            tuple(read(atom) for atom in eqn.invars),
            tuple(bound(var) for var in eqn.outvars),
            _value_key(eqn.ctx),
        )
        for eqn in jaxpr.eqns
    )
    return len(jaxpr.constvars), heads, steps, tuple(read(atom) for atom in jaxpr.outvars)


def _params_key(eqn) -> tuple:
    """The parameters of an equation; of functions with their own derivative, what they compute."""
    values = sorted(eqn.params.items())
    if eqn.primitive.name in _BODY_ONLY:
        values = [(name, v) for name, v in values if isinstance(v, _JAXPRS)]
    return tuple((name, _value_key(value)) for name, value in values)


_JAXPRS = (jex_core.Jaxpr, jex_core.ClosedJaxpr)


def _value_key(value: Any) -> Any:
    """A value as part of a key: by what it says, or else by identity."""
    if isinstance(value, _JAXPRS):
        consts = tuple(map(_Same, getattr(value, "consts", ())))
        return _jaxpr_key(getattr(value, "jaxpr", value)), consts
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_value_key, value))
    if isinstance(value, dict):
        return dict, tuple((name, _value_key(value[name])) for name in sorted(value, key=repr))
    if isinstance(value, float | complex):
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def _any_traced(values: Iterable[Any]) -> bool:
    return any(map(is_traced, values))
