"""The pure parts of a Memory Pair: an insert's arguments, and what `forget_step` does."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxunlearn import records, transforms
from jaxunlearn.kernels import lbfgs
from jaxunlearn.types import Status
from jaxunlearn.unlearners.memory_pair._burials import deletion_status, each_once, erase
from jaxunlearn.unlearners.memory_pair._online import twins_of


def correction(loss_fn, mode, paper, odometer, options):
    """(params, inner, rows, ids, num_before) -> (params, inner, step_norm, noise_stddev, fits)."""
    if mode != "paper":

        def drop_pairs(params, inner, rows, ids, num_before):
            memory = inner.curvature
            memory = lbfgs.drop(memory, lbfgs.owned(memory, ids))
            zero = jnp.zeros((), inner.gradient_square_sum.dtype)
            return params, inner._replace(curvature=memory), zero, zero, jnp.ones((), bool)

        return drop_pairs

    paper = paper or transforms.PaperDeletion()
    limits = {}
    if odometer is not None:
        paper = dataclasses.replace(paper, noise_stddev=odometer.noise_stddev)
        limits = {"sensitivity": odometer.sensitivity}
    return transforms.make_step_back(
        loss_fn, paper,
        learning_rate=options["learning_rate"], l2=options["l2"],
        scale_range=options.get("scale_range"), **limits,
    )  # fmt: skip


def correct_now(back, num_examples, odometer, params, state, rows, ids, weights):
    """A deletion by `correction` at the present state, noted and charged for like any other.

    The result is poisoned, and the record as it was but for its status, where an id is out of
    range, forgotten already or never seen, and where capacity or sensitivity do not suffice.
    """
    record = state.record
    going = each_once(jnp.where(weights != 0, ids, -1))
    capacity = None if odometer is None else odometer.max_deletions
    status = deletion_status(record, going, num_examples, capacity)
    new_params, inner, _, _, fits = back(params, state.inner, rows, going, record.num_deletions)
    status |= jnp.where(fits, 0, int(Status.BUDGET_EXHAUSTED)).astype(jnp.int32)
    erased = erase(record, going)
    record = jax.tree.map(lambda new, old: jnp.where(status == 0, new, old), erased, record)
    return records.finished(new_params, inner, record, status)


def other_of(twin_segment):
    """`make_twin_segment`'s run as (params, inner, segment, active) -> (params, inner, flags)."""

    def run(params, inner, segment, active):
        leaving = jnp.where(segment.weights == 0, segment.ids, -1).ravel()
        whole = segment._replace(weights=(segment.ids >= 0).astype(segment.weights.dtype))
        twins, _, flags = twin_segment(twins_of(params, inner), leaving, whole, active)
        return twins.other_params, twins.other_inner, flags

    return run


def insert_of(batch, ids, key) -> dict[str, Any]:
    """What `online_lbfgs` wants of a step; without a batch, a loss that makes no pair."""
    if batch is None:
        return {"value_fn": lambda params: jnp.zeros(())}
    if ids is None:
        return {"batch": batch}
    weights = (ids >= 0).astype(jnp.float32)
    num_rows = jnp.sum(ids >= 0, dtype=jnp.int32)
    return {"batch": batch, "ids": ids, "weights": weights, "num_rows": num_rows, "key": key}
