"""Rules by which the parts of an optimizer's state are remade, and the refusal of unknown ones."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, PyTree

from jaxunlearn import errors, tree
from jaxunlearn.records.curvature import Curvature, remake_memory, remake_optax_lbfgs

Remake = Callable[[Any, Any, "Context"], Any]
Rule = tuple[str, ...] | Remake
"""How one type of state is remade. A tuple names the fields that are states themselves and have
rules of their own; the other fields are as `tx.update` left them, so that `()` keeps all as it is.
A function (driven, fresh, context) -> node gets the node as `tx.update` left it and as `tx.init`
made it."""


class Context(NamedTuple):
    """What a rule may know, beside the node: all of it public or a function of the retain set.

    num_steps: of the run, traced.
    curvature: gradient and Hessian products at the released parameters.
    """

    num_steps: Int[Array, ""]
    curvature: Curvature


def as_driven(driven: Any, fresh: Any, context: Context) -> Any:
    """The node as `tx.update` left it: averages and sums of what it was fed, and counters."""
    del fresh, context
    return driven


def as_fresh(driven: Any, fresh: Any, context: Context) -> Any:
    """The node as `tx.init` makes it."""
    del driven, context
    return fresh


_KEEP: Rule = ()
_SIDE_BY_SIDE: Rule = ("inner_states",)  # they do not feed each other
_AVERAGES = (
    *("ScaleByAdam", "ScaleByAmsgrad", "ScaleByAdan", "ScaleByAdaDelta", "ScaleByBelief"),
    *("ScaleByLion", "ScaleByNovograd", "ScaleByRStdDev", "ScaleByRms", "ScaleByRss"),
    *("ScaleBySM3", "ScaleByAdemamix", "ScaleBySimplifiedAdEMAMix", "Muon", "Factored"),
    *("Trace", "Ema", "AddNoise", "ScaleBySchedule", "ZeroNans", "Monitor", "Snapshot"),
    "DifferentiallyPrivateAggregate",
)
_RULES: dict[tuple[str, str], Rule] = {
    **{("optax", f"{name}State"): _KEEP for name in _AVERAGES},
    ("optax", "MultiStepsState"): ("inner_opt_state",),
    ("optax", "MaskedState"): ("inner_state",),
    ("optax", "PartitionState"): _SIDE_BY_SIDE,
    ("optax", "MultiTransformState"): _SIDE_BY_SIDE,
    ("optax", "InjectHyperparamsState"): ("inner_state",),
    ("optax", "InjectStatefulHyperparamsState"): ("inner_state",),
    ("optax", "ApplyIfFiniteState"): ("inner_state",),
    ("optax", "ConditionallyMaskState"): ("inner_state",),
    ("optax", "ConditionallyTransformState"): ("inner_state",),
    ("optax", "SplitRealAndImaginaryState"): ("inner_state",),
    # Value and gradient infinite and zero, as in init: the next step evaluates both itself.
    ("optax", "ScaleByZoomLinesearchState"): as_fresh,
    ("optax", "ScaleByBacktrackingLinesearchState"): as_fresh,
    ("optax", "ScaleByLBFGSState"): remake_optax_lbfgs,
    ("jaxunlearn", "LBFGSMemory"): remake_memory,
    ("jaxunlearn", "OnlineLBFGSState"): ("curvature",),
}


_LIBRARY = dict(_RULES)


class Rules(NamedTuple):
    """Rules by package and name of a type, as they stood when they were taken.

    own: names of those that the library does not have, each with its rule's.
    """

    by_name: Mapping[tuple[str, str], Rule]
    own: tuple[str, ...]


def take_rules(given: Mapping[type, Rule]) -> Rules:
    """Those of the library, those registered by now, and `given`, which goes before both.

    >>> class LateState(NamedTuple):
    ...     late: Array
    >>> take_rules({LateState: as_fresh}).own[-1]
    'LateState: as_fresh'
    """
    rules = _RULES | {_name_of(state_type): rule for state_type, rule in given.items()}
    own = [(name[1], rule) for name, rule in rules.items() if _LIBRARY.get(name) != rule]
    return Rules(
        by_name=rules,
        own=tuple(f"{name}: {getattr(rule, '__name__', rule)}" for name, rule in own),
    )


def register_state(state_type: type, rule: Rule) -> None:
    """Say once how states of `state_type` are remade, for every later `Rebuild` and `rebuild`.

    A `Rebuild` takes the rules as it is made: what is registered after it changes nothing in it.

    >>> class SlowState(NamedTuple):
    ...     slow: Array
    >>> register_state(SlowState, as_fresh)
    """
    _RULES[_name_of(state_type)] = rule


def check_states(fresh: PyTree, rules: Rules) -> None:
    """Refuse a state with a part that no rule knows, by name. Shapes will do.

    Raises:
      UnknownStateError: a part holds floating-point numbers and has no rule; or it stands, in a
        chain, after one whose output cannot be driven (a line search, L-BFGS), so that what it was
        fed is unknown.
    """
    _check(fresh, rules.by_name, "state", after="")


def remake(driven: PyTree, fresh: PyTree, context: Context, rules: Rules) -> PyTree:
    """The state with every part remade by its rule."""
    return _remake(driven, fresh, context, rules.by_name)


def _name_of(state_type: type) -> tuple[str, str]:
    """Package and name: optax moves its classes between modules."""
    return state_type.__module__.split(".")[0], state_type.__name__


def _remake(driven, fresh, context, rules):
    rule = rules.get(_name_of(type(driven)))
    if callable(rule):
        return rule(driven, fresh, context)
    again = lambda a, b: _remake(a, b, context, rules)
    if rule is not None:
        inner = {name: again(getattr(driven, name), getattr(fresh, name)) for name in rule}
        return driven._replace(**inner) if inner else driven
    if _is_leaf(driven):
        return driven
    is_child = lambda node: node is not driven
    return jax.tree.map(again, driven, fresh, is_leaf=is_child)


def _check(node, rules, path: str, after: str) -> str:
    """Checks a node; returns the name of the last part whose output cannot be driven, or ""."""
    name = type(node).__name__
    rule = rules.get(_name_of(type(node)))
    if callable(rule) and rule is not as_driven:
        return name
    if rule == () or rule is as_driven:
        if after and any(map(tree.is_inexact, jax.tree.leaves(node))):
            raise errors.UnknownStateError(
                f"Expected {name} at {path} to stand before {after}, got it after: what {after} "
                "fed it cannot be made again from released parameters. Pass rules={"
                f"{name}: records.as_fresh}} to start it afresh."
            )
        return ""
    if rule:
        inner = [(f"{path}.{field}", getattr(node, field)) for field in rule]
        if rule == _SIDE_BY_SIDE:
            inner = [
                (f"{path}{key}", child) for path, node in inner for key, child in _children(node)
            ]
        return next(filter(None, [_check(child, rules, at, after) for at, child in inner]), "")
    if _is_leaf(node):
        if tree.is_inexact(node):
            raise errors.UnknownStateError(
                f"Expected a rule for the numbers at {path}, got none: rebuild does not know how "
                "they depend on the gradients. Pass rules={TheirState: records.as_driven} if they "
                "are averages or sums of gradients, records.as_fresh to start them afresh, or a "
                "function (driven, fresh, context) -> state."
            )
        return ""
    own = "" if type(node) in (dict, tuple, list) else f" of {name}"
    last = ""
    for key, child in _children(node):
        found = _check(child, rules, f"{path}{own}{key}", after or last)
        last = last or found
    return last


def _children(node):
    """(key, child) of one level of a pytree."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(jax.tree_util.keystr(path), child) for path, child in pairs]


def _is_leaf(node) -> bool:
    return jax.tree_util.all_leaves([node])
