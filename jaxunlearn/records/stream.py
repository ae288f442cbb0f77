"""A stream of insert, delete and predict events as one pure step of fixed shapes, for `lax.scan`.

Every event, whatever it is, runs a range of the ledger through one loop body: an insert appends a
row and runs it, an exact deletion takes the row out and runs everything from the last checkpoint
before it, the rest run nothing. So a deletion replays in the very program that inserted, and the
state after it is, bit for bit, that of a stream that never held the row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.records.checkpoints import drop_after, read_slot, take_checkpoint
from jaxunlearn.records.events import (
    Event,
    EventKind,
    Outcome,
    Stream,
    StreamOutput,
    StreamState,
)
from jaxunlearn.records.log import StepLog, write_step
from jaxunlearn.records.online import Twins, relative_gap, twins_of
from jaxunlearn.records.participation import Participation, observe
from jaxunlearn.records.replay import Segment
from jaxunlearn.types import Batch, Params, Status, UnlearnerState

MAX_INFLUENCE = 0.5
"""The largest relative move that is believed of a first-order counterfactual."""


class Learner(NamedTuple):
    """The pure parts of a method that a stream is made of.

    step(params, inner, row) -> (params, inner, flags): one insert.
    loss(params, rows, weights) -> scalar.
    twin(twins, row, kept) -> twins, where first order is wanted; else None.
    correct(params, inner, rows, ids, num_before) -> (params, inner, step_norm, noise_stddev, fits):
      a deletion at the current state, by what the ledger has of the rows.
    """

    step: Callable
    loss: Callable
    twin: Callable | None
    correct: Callable


class _Plan(NamedTuple):
    """The range of the ledger that an event runs, and from where."""

    params: Params
    opt_state: UnlearnerState
    rows: PyTree
    start: Array
    stop: Array
    output: StreamOutput


def make_stream(
    init: Callable[[Params], UnlearnerState],
    learner: Learner,
    *,
    num_examples: int,
    mode: str,
    every: int,
    max_deletions: int | None = None,
    keyed: bool = False,
) -> Stream:
    """A `Stream` of a method whose record has participation, log, checkpoints and num_deletions.

    Args:
      init: params -> `UnlearnerState`.
      mode: "replay", "tangent" (the first-order counterfactual), or any other: `learner.correct`,
        unless first order says that nothing is left.
      every: steps between candidate checkpoints.
      max_deletions: ids that may be deleted, or None.
      keyed: whether the loss takes a key; such a stream is refused, since its events have none.

    Cost: an insert is one step; a deletion runs the ledger from the last checkpoint before the
      first use. The state holds every row: max_steps times the bytes of an event.
    """

    def init_stream(params, event):
        if keyed:
            raise ValueError("Expected a loss without a key: events carry none. Use update.")
        opt_state = init(params)
        length = opt_state.record.log.step_ids.shape[0]
        like = lambda leaf: jnp.zeros((length, *jnp.shape(leaf)), jnp.result_type(leaf))
        return StreamState(tree.copy(params), opt_state, jax.tree.map(like, event.event_rows))

    def step(state, event):
        ids = jnp.asarray(event.event_ids, jnp.int32)
        weights = (ids >= 0).astype(jnp.float32)
        kind = jnp.asarray(event.event_kind, jnp.int32)
        outcome = _judge(state.stream_opt_state.record, kind, ids, num_examples, max_deletions)
        done = outcome == Outcome.DONE
        inserts = done & (kind == EventKind.INSERT)
        deletes = done & (kind == EventKind.DELETE)
        looks = (kind == EventKind.INSERT) | (kind == EventKind.PREDICT)
        loss = learner.loss(state.stream_params, event.event_rows, weights)
        plan = _idle(state, outcome, jnp.where(looks, loss, 0))
        branches = (
            lambda plan: plan,
            lambda plan: _plan_insert(plan, event, ids, num_examples),
            lambda plan: _plan_deletion(plan, learner, mode, ids, num_examples),
        )
        plan = jax.lax.switch(inserts + 2 * deletes, branches, plan)
        return _carry_out(plan, learner, every, deletes), plan.output

    return Stream(init_stream, step)


def _judge(record, kind, ids, num_examples, max_deletions) -> Array:
    """DONE where the event can go ahead, else why not."""
    participation = record.participation
    real = ids >= 0
    strange = (ids < -1) | (ids >= num_examples)
    gone = real & has_bit(participation.forgotten_bits, ids)
    unseen = real & ~has_bit(participation.seen_bits, ids)
    deletes, inserts = kind == EventKind.DELETE, kind == EventKind.INSERT
    refused = (deletes | inserts) & (jnp.any(strange | gone) | ~jnp.any(real))
    refused |= deletes & jnp.any(unseen)
    full = inserts & (participation.num_steps >= record.log.step_ids.shape[0])
    outcome = jnp.where(full, int(Outcome.FULL), int(Outcome.DONE))
    if max_deletions is not None:
        exhausted = deletes & (record.num_deletions + _count(ids) > max_deletions)
        outcome = jnp.where(exhausted, int(Outcome.EXHAUSTED), outcome)
    return jnp.where(refused, int(Outcome.REFUSED), outcome).astype(jnp.int32)


def _idle(state: StreamState, outcome, loss) -> _Plan:
    """Nothing to run."""
    zero = jnp.zeros((), jnp.int32)
    wide = jnp.promote_types(loss.dtype, jnp.float32)
    none = jnp.zeros((), wide)
    output = StreamOutput(outcome, loss.astype(wide), zero, none, none, none)
    return _Plan(*state, zero, zero, output)


def _plan_insert(plan: _Plan, event: Event, ids, num_examples: int) -> _Plan:
    """The row appended to the ledger, and its one step to run."""
    record = plan.opt_state.record
    at = record.participation.num_steps
    log = write_step(
        record.log, at, ids=ids, key=None, settings=record.log.step_settings,
        non_finite=jnp.zeros((), bool),
    )  # fmt: skip
    record = record._replace(
        participation=observe(record.participation, ids, num_examples), log=log
    )
    put = lambda leaf, new: leaf.at[at].set(jnp.asarray(new, leaf.dtype), mode="drop")
    return plan._replace(
        opt_state=plan.opt_state._replace(record=record),
        rows=jax.tree.map(put, plan.rows, event.event_rows),
        start=at,
        stop=at + 1,
    )


def _plan_deletion(plan: _Plan, learner: Learner, mode: str, ids, num_examples: int) -> _Plan:
    """The ids out of the ledger; exact: a replay to run; else the correction made here."""
    record = plan.opt_state.record
    stop = record.participation.num_steps
    uses = jnp.any(record.log.step_ids[..., None] == jnp.where(ids >= 0, ids, -2), axis=-1)
    slot, start = _slot_before(record.checkpoints, jnp.argmax(jnp.any(uses, axis=1)))
    cleaned = record._replace(
        participation=bury_traced(record.participation, ids),
        log=record.log._replace(step_ids=jnp.where(uses, -1, record.log.step_ids)),
        checkpoints=drop_after(record.checkpoints, start),
        num_deletions=record.num_deletions + _count(ids),
    )
    erase = lambda leaf: jnp.where(uses.reshape(uses.shape + (1,) * (leaf.ndim - 2)), 0, leaf)
    rows = jax.tree.map(erase, plan.rows)
    before = read_slot(record.checkpoints, slot)  # type: ignore[arg-type]
    if mode == "replay":
        params, inner = before
        output = plan.output._replace(num_replayed=stop - start)
        return _Plan(params, UnlearnerState(inner, cleaned), rows, start, stop, output)

    output, twins = plan.output, None
    if learner.twin is not None:
        twins = _run_twins(learner.twin, before, plan, uses, start, stop)
        influence = relative_gap(twins.other_params, twins.params).astype(output.influence.dtype)
        output = output._replace(num_replayed=stop - start, influence=influence)
    by = _by_tangent if mode == "tangent" else _by_correction
    params, inner, output, made = by(learner, plan, twins, ids, output)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(made, n, o), new, old)
    state = UnlearnerState(inner, keep(cleaned, record))
    return _Plan(params, state, keep(rows, plan.rows), stop, stop, output)


def _by_tangent(learner: Learner, plan: _Plan, twins, ids, output: StreamOutput):
    """(params, inner, output, made): moved as the linearised run is, where it can be trusted."""
    made = is_trusted(twins)
    old = plan.params, plan.opt_state.inner
    new = moved_by(*old, twins)
    params, inner = jax.tree.map(lambda n, o: jnp.where(made, n, o), new, old)
    code = jnp.where(made, int(Outcome.DONE), int(Outcome.UNTRUSTED)).astype(jnp.int32)
    return params, inner, output._replace(outcome=code), made


def _by_correction(learner: Learner, plan: _Plan, twins, ids, output: StreamOutput):
    """The same by `learner.correct` at the current state, unless nothing is left of the rows."""
    params, inner = plan.params, plan.opt_state.inner
    rows = rows_of(plan.rows, plan.opt_state.record.log, ids)
    before = plan.opt_state.record.num_deletions

    def correct():
        given = (params, inner, rows, ids, before)
        new_params, new_inner, step_norm, stddev, fits = learner.correct(*given)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(fits, n, o), new, old)
        code = jnp.where(fits, int(Outcome.DONE), int(Outcome.EXHAUSTED)).astype(jnp.int32)
        cast = lambda x: x.astype(output.step_norm.dtype)
        told = output._replace(
            outcome=code, step_norm=cast(step_norm), noise_stddev=cast(jnp.where(fits, stddev, 0))
        )
        return keep(new_params, params), keep(new_inner, inner), told, fits

    if twins is None:
        return correct()
    told = output._replace(outcome=jnp.full((), int(Outcome.NOTHING_LEFT), jnp.int32))
    leave = lambda: (params, inner, told, jnp.ones((), bool))
    return jax.lax.cond(is_gone(inner.curvature, twins, ids), leave, correct)


def is_gone(memory, twins: Twins, ids) -> Bool[Array, ""]:
    """Whether the runs were equal to rounding since before the oldest pair, none of it theirs."""
    oldest = jnp.max(lbfgs.ages(memory)).astype(jnp.int32)
    return (twins.quiet_steps > oldest + 1) & ~jnp.any(lbfgs.owned(memory, ids))


def is_trusted(twins: Twins) -> Bool[Array, ""]:
    """Whether first order can have a say: a predicted move below `MAX_INFLUENCE` of the norm."""
    return relative_gap(twins.other_params, twins.params) <= MAX_INFLUENCE


def moved_by(params: Params, inner, twins: Twins) -> tuple[Params, Any]:
    """`params` moved as the other run is from the recorded one, with the other's inner state."""
    move = lambda p, other, base: p + (other - base)
    moved = jax.tree.map(move, params, twins.other_params, twins.params)
    same = tree.match_weak_types(twins.other_inner, inner)
    return moved, same


def _run_twins(twin: Callable, start_state, plan: _Plan, uses, start, stop) -> Twins:
    """Both runs over steps start .. stop - 1 of the ledger, as it was before the deletion."""
    log = plan.opt_state.record.log

    def body(i, twins):
        row = _row_at(log, plan.rows, i)
        return twin(twins, row, jnp.where(uses[i], 0, row.weights))

    return jax.lax.fori_loop(start, stop, body, twins_of(*start_state))


def _carry_out(plan: _Plan, learner: Learner, every: int, deletes) -> StreamState:
    """The planned range, one step after another, checkpoints included."""
    record = plan.opt_state.record
    log, rows = record.log, plan.rows

    def body(i, carry):
        params, inner, checkpoints = carry
        fresh = ~(deletes & (i == plan.start))
        take = lambda c: take_checkpoint(c, i, params, inner, every=every)
        checkpoints = jax.lax.cond(fresh, take, lambda c: c, checkpoints)
        params, inner, _ = learner.step(params, inner, _row_at(log, rows, i))
        return params, inner, checkpoints

    carry = (plan.params, plan.opt_state.inner, record.checkpoints)
    params, inner, checkpoints = jax.lax.fori_loop(plan.start, plan.stop, body, carry)
    bad = jnp.where(tree.all_finite(params), 0, int(Status.NON_FINITE)).astype(jnp.int32)
    participation = record.participation
    participation = participation._replace(status=participation.status | bad)
    record = record._replace(participation=participation, checkpoints=checkpoints)
    return StreamState(params, UnlearnerState(inner, record), rows)


def _row_at(log: StepLog, rows: PyTree, i) -> Segment:
    """Step i of the ledger."""
    ids = log.step_ids[i]
    return Segment(
        rows=jax.tree.map(lambda leaf: leaf[i], rows),
        ids=ids,
        weights=(ids >= 0).astype(jnp.float32),
        num_rows=log.step_num_rows[i],
        keys=log.step_keys[i],
        settings={},
    )


def rows_of(rows: PyTree, log: StepLog, ids) -> Batch:
    """What the ledger holds of each id, from its first use; zeros for padding."""

    def one(i):
        match = log.step_ids == jnp.where(i >= 0, i, -2)
        at = jnp.argmax(match.ravel())
        step, place = at // match.shape[1], at % match.shape[1]
        return jax.tree.map(lambda leaf: jnp.where(i >= 0, leaf[step, place], 0), rows)

    return jax.vmap(one)(ids)


def _slot_before(checkpoints, step) -> tuple[Array, Array]:
    """Slot and step of the last checkpoint taken before or at `step`, traced."""
    taken = checkpoints.checkpoint_steps
    usable = jnp.where((taken >= 0) & (taken <= step), taken, -1)
    slot = jnp.argmax(usable)
    return slot, usable[slot]


def has_bit(bits, ids) -> Bool[Array, "b"]:
    """Whether each id's bit is set; false for padding and strangers."""
    inside = (ids >= 0) & (ids < 32 * bits.shape[0])
    word = bits[jnp.where(inside, ids // 32, 0)]
    return inside & ((word >> (ids % 32).astype(jnp.uint32)) & 1).astype(bool)


def bury_traced(participation: Participation, ids) -> Participation:
    """`bury` inside a traced step; -1 is nobody."""

    def mark(i, bits):
        word = jnp.where(ids[i] >= 0, ids[i] // 32, bits.shape[0])
        bit = jnp.uint32(1) << (ids[i] % 32).astype(jnp.uint32)
        return bits.at[word].set(bits.at[word].get(mode="fill", fill_value=0) | bit, mode="drop")

    bits = jax.lax.fori_loop(0, ids.shape[0], mark, participation.forgotten_bits)
    return participation._replace(forgotten_bits=bits)


def _count(ids) -> Int[Array, ""]:
    """Different ids that are not padding."""
    order = jnp.sort(ids)
    first = jnp.concatenate([jnp.ones((1,), bool), order[1:] != order[:-1]])
    return jnp.sum(first & (order >= 0), dtype=jnp.int32)
