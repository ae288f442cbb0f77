"""What comes after a certified step: the optimizer's state, made anew."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from jaxunlearn import tree
from jaxunlearn.records.log import get_settings
from jaxunlearn.records.participation import seen_ids
from jaxunlearn.records.rebuild import Rebuild, make_rebuild
from jaxunlearn.records.replay import Penalty
from jaxunlearn.records.rows import RowReader
from jaxunlearn.records.window import finished
from jaxunlearn.types import LossFn, Params, Status, UnlearnerState


class Remaker(NamedTuple):
    """What `make_remaker` returns.

    check: (params), raises `UnknownStateError` where the state cannot be rebuilt.
    fresh: (params) -> the state of an optimizer that has made no step.
    after: (params, reader, opt_state, ids) -> the state after `ids` are forgotten: fresh, or with
      `rebuild` remade from the released parameters and the rows that stay.
    """

    check: Callable[[Params], None]
    fresh: Callable[[Params], optax.OptState]
    after: Callable[[Params, RowReader, UnlearnerState, np.ndarray], optax.OptState]


def make_remaker(
    tx: optax.GradientTransformation, loss_fn: LossFn, rebuild: Rebuild | None, penalty: Penalty
) -> Remaker:
    """How a method that certifies its parameters alone comes by a state of `tx`."""
    rebuilder = make_rebuild(tx, loss_fn, rebuild, penalty) if rebuild else None

    def check(params):
        if rebuilder:
            rebuilder.check(params)

    def fresh(params):
        return tree.copy(optax.with_extra_args_support(tx).init(params))

    def after(params, reader, opt_state, ids):
        if rebuilder is None:
            inner = fresh(params)
        else:
            participation = opt_state.record.participation
            inner = rebuilder.again(
                params,
                reader,
                np.setdiff1d(seen_ids(participation), ids),
                num_steps=int(participation.num_steps),
                settings=get_settings(opt_state.inner),
            )
        return tree.match_weak_types(inner, opt_state.inner)

    return Remaker(check, fresh, after)


def landed(
    params: Params, state: UnlearnerState, moved: Params, solved: Bool[Array, ""]
) -> tuple[Params, UnlearnerState, dict[str, Array]]:
    """What a pure `forget_step` returns: `moved` in the dtypes of `params`, or NaN."""
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, params)
    flag = jnp.where(solved, 0, int(Status.SOLVER_FAILED)).astype(jnp.int32)
    return finished(tree.match_weak_types(moved, params), state.inner, state.record, flag)
