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
from jaxtyping import Array, Bool, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs
from jaxunlearn.records import (
    Segment,
    StepLog,
    drop_after,
    observe,
    read_slot,
    take_checkpoint,
    write_step,
)
from jaxunlearn.types import Batch, Params, Status, UnlearnerState
from jaxunlearn.unlearners.memory_pair._burials import (
    bury_traced,
    count_ids,
    each_once,
    faults_of,
    slot_before,
    uses,
)
from jaxunlearn.unlearners.memory_pair._events import (
    Event,
    EventKind,
    Outcome,
    Stream,
    StreamOutput,
    StreamState,
)
from jaxunlearn.unlearners.memory_pair._online import Twins, relative_gap, twins_of

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


class _Span(NamedTuple):
    """Steps of the ledger that an event runs, and the checkpoint that a deletion starts from."""

    slot: Array
    start: Array
    stop: Array


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
        ids = jnp.where(kind == EventKind.DELETE, each_once(ids), ids)
        outcome = _judge(state.stream_opt_state.record, kind, ids, num_examples, max_deletions)
        done = outcome == Outcome.DONE
        inserts = done & (kind == EventKind.INSERT)
        deletes = done & (kind == EventKind.DELETE)
        looks = (kind == EventKind.INSERT) | (kind == EventKind.PREDICT)
        loss = learner.loss(state.stream_params, event.event_rows, weights)
        output = _no_output(outcome, jnp.where(looks, loss, 0))
        state = _append(state, event, ids, inserts, num_examples)
        span = _span_of(state.stream_opt_state.record, ids, inserts, deletes)
        state, made, output = _delete(state, learner, mode, ids, deletes, span, output)
        gone = jnp.where(made, ids, -1)
        runs = span._replace(start=jnp.where(inserts | made, span.start, span.stop))
        exact = mode == "replay"
        return _run_ledger(state, learner, every, gone, inserts, runs, exact), output

    return Stream(init_stream, step)


def _judge(record, kind, ids, num_examples, max_deletions) -> Array:
    """DONE where the event can go ahead, else why not."""
    participation = record.participation
    strange, gone, unseen = faults_of(participation, ids, num_examples)
    deletes, inserts = kind == EventKind.DELETE, kind == EventKind.INSERT
    refused = (deletes | inserts) & (jnp.any(strange | gone) | ~jnp.any(ids >= 0))
    refused |= deletes & jnp.any(unseen)
    full = inserts & (participation.num_steps >= record.log.step_ids.shape[0])
    outcome = jnp.where(full, int(Outcome.FULL), int(Outcome.DONE))
    if max_deletions is not None:
        exhausted = deletes & (record.num_deletions + count_ids(ids) > max_deletions)
        outcome = jnp.where(exhausted, int(Outcome.EXHAUSTED), outcome)
    return jnp.where(refused, int(Outcome.REFUSED), outcome).astype(jnp.int32)


def _no_output(outcome, loss) -> StreamOutput:
    """What an event says that does nothing but look."""
    wide = jnp.promote_types(loss.dtype, jnp.float32)
    none = jnp.zeros((), wide)
    return StreamOutput(outcome, loss.astype(wide), jnp.zeros((), jnp.int32), none, none, none)


def _append(state: StreamState, event: Event, ids, inserts, num_examples: int) -> StreamState:
    """An insert's row in the ledger, written in place; any other event writes beyond its end."""
    record = state.stream_opt_state.record
    old, length = record.participation, record.log.step_ids.shape[0]
    at = jnp.where(inserts, old.num_steps, length)
    log = write_step(record.log, at, ids=ids, key=None, settings={}, non_finite=jnp.zeros((), bool))
    new = observe(old, jnp.where(inserts, ids, -1), num_examples)
    participation = new._replace(
        num_steps=jnp.where(inserts, new.num_steps, old.num_steps),
        num_steps_with_ids=jnp.where(inserts, new.num_steps_with_ids, old.num_steps_with_ids),
    )
    put = lambda leaf, row: leaf.at[at].set(jnp.asarray(row, leaf.dtype), mode="drop")
    record = record._replace(participation=participation, log=log)
    return StreamState(
        state.stream_params,
        state.stream_opt_state._replace(record=record),
        jax.tree.map(put, state.stream_rows, event.event_rows),
    )


def _span_of(record, ids, inserts, deletes) -> _Span:
    """One step for an insert; everything since the checkpoint before the rows for a deletion."""
    stop = record.participation.num_steps

    def for_deletion(log, checkpoints):
        slot, start = slot_before(checkpoints, jnp.argmax(jnp.any(uses(log, ids), axis=1)))
        return _Span(slot.astype(jnp.int32), start, stop)

    otherwise = _Span(jnp.zeros((), jnp.int32), stop - inserts.astype(jnp.int32), stop)
    return jax.lax.cond(
        deletes, for_deletion, lambda log, checkpoints: otherwise, record.log, record.checkpoints
    )


def _delete(state, learner: Learner, mode: str, ids, deletes, span: _Span, output: StreamOutput):
    """(state, made, output): where a replay starts, or the model corrected; the ids are noted."""
    params, inner = state.stream_params, state.stream_opt_state.inner
    record = state.stream_opt_state.record

    def by_replay():
        before = read_slot(record.checkpoints, span.slot)  # type: ignore[arg-type]
        return *before, output._replace(num_replayed=span.stop - span.start), jnp.ones((), bool)

    def by_correction():
        twins, told = None, output
        if learner.twin is not None:
            twins = _run_twins(learner.twin, state, ids, span)
            influence = relative_gap(twins.other_params, twins.params)
            told = told._replace(
                num_replayed=span.stop - span.start,
                influence=influence.astype(told.influence.dtype),
            )
        by = _by_tangent if mode == "tangent" else _by_correction
        return by(learner, state, twins, ids, told)

    params, inner, output, made = jax.lax.cond(
        deletes,
        by_replay if mode == "replay" else by_correction,
        lambda: (params, inner, output, jnp.zeros((), bool)),
    )
    gone = jnp.where(made, ids, -1)
    record = record._replace(
        participation=bury_traced(record.participation, gone),
        checkpoints=jax.lax.cond(
            made, lambda c: drop_after(c, span.start), lambda c: c, record.checkpoints
        ),
        num_deletions=record.num_deletions + count_ids(gone),
    )
    state = StreamState(params, UnlearnerState(inner, record), state.stream_rows)
    return state, made, output


def _by_tangent(learner: Learner, state: StreamState, twins, ids, output: StreamOutput):
    """(params, inner, output, made): moved as the linearised run is, where it can be trusted."""
    made = is_trusted(twins)
    old = state.stream_params, state.stream_opt_state.inner
    new = moved_by(*old, twins)
    params, inner = jax.tree.map(lambda n, o: jnp.where(made, n, o), new, old)
    code = jnp.where(made, int(Outcome.DONE), int(Outcome.UNTRUSTED)).astype(jnp.int32)
    return params, inner, output._replace(outcome=code), made


def _by_correction(learner: Learner, state: StreamState, twins, ids, output: StreamOutput):
    """The same by `learner.correct` at the current state, unless nothing is left of the rows."""
    params, inner = state.stream_params, state.stream_opt_state.inner
    record = state.stream_opt_state.record
    rows = rows_of(state.stream_rows, record.log, ids)

    def correct():
        given = (params, inner, rows, ids, record.num_deletions)
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
    leave = lambda: (params, without_sums(inner, twins), told, jnp.ones((), bool))
    return jax.lax.cond(is_gone(inner, twins, ids), leave, correct)


def is_gone(inner, twins: Twins, ids) -> Bool[Array, ""]:
    """Whether nothing is left of the rows in `inner` but what `without_sums` takes out.

    The runs had equal parameters to rounding since before the oldest pair of either, so that every
    pair was made at equal points; none is the rows' own; and the sums, which never forget, can be
    replaced, being finite.
    """
    memory, other = inner.curvature, twins.other_inner.curvature
    oldest = jnp.maximum(jnp.max(lbfgs.ages(memory)), jnp.max(lbfgs.ages(other)))
    quiet = twins.quiet_steps > oldest.astype(jnp.int32) + 1
    same_number = memory.num_pairs == other.num_pairs
    sums = jnp.isfinite(twins.other_inner.gradient_square_sum)
    return quiet & same_number & sums & ~jnp.any(lbfgs.owned(memory, ids))


def without_sums(inner, twins: Twins):
    """`inner` with the counters and the sum of squares of the run without the rows.

    They have every step since the first in them: they never decay, and S_t sets later step sizes.
    """
    memory, other = inner.curvature, twins.other_inner
    ahead = memory.push_clock - other.curvature.push_clock
    clocks = memory.pair_clocks
    memory = memory._replace(
        push_clock=memory.push_clock - ahead,
        pair_clocks=jnp.where(lbfgs.is_occupied(memory), clocks - ahead, clocks),
    )
    return inner._replace(
        num_online_steps=other.num_online_steps,
        gradient_square_sum=other.gradient_square_sum.astype(inner.gradient_square_sum.dtype),
        curvature=memory,
    )


def is_trusted(twins: Twins) -> Bool[Array, ""]:
    """Whether first order can have a say: a predicted move below `MAX_INFLUENCE` of the norm."""
    return relative_gap(twins.other_params, twins.params) <= MAX_INFLUENCE


def moved_by(params: Params, inner, twins: Twins) -> tuple[Params, Any]:
    """`params` moved as the other run is from the recorded one, with the other's inner state."""
    move = lambda p, other, base: p + (other - base)
    moved = jax.tree.map(move, params, twins.other_params, twins.params)
    same = tree.match_weak_types(twins.other_inner, inner)
    return moved, same


def _run_twins(twin: Callable, state: StreamState, ids, span: _Span) -> Twins:
    """Both runs over the ledger as it is before the deletion."""
    record = state.stream_opt_state.record

    def body(i, twins):
        row = _row_at(record.log, state.stream_rows, i)
        leaves = jnp.any(row.ids[:, None] == jnp.where(ids >= 0, ids, -2), axis=1)
        return twin(twins, row, jnp.where(leaves, 0, row.weights))

    begin = twins_of(*read_slot(record.checkpoints, span.slot))  # type: ignore[arg-type]
    return jax.lax.fori_loop(span.start, span.stop, body, begin)


def _run_ledger(
    state: StreamState, learner: Learner, every: int, gone, inserts, span: _Span, exact: bool
) -> StreamState:
    """Steps of the ledger one after another: those gone erased, then run, checkpoints included.

    Where deletions are not `exact`, they only erase.
    """
    record = state.stream_opt_state.record

    def advance(i, log, rows, carry):
        params, inner, checkpoints = carry
        fresh = inserts | (i > span.start)
        take = lambda c: take_checkpoint(c, i, params, inner, every=every)
        checkpoints = jax.lax.cond(fresh, take, lambda c: c, checkpoints)
        params, inner, _ = learner.step(params, inner, _row_at(log, rows, i))
        return params, inner, checkpoints

    def body(i, carry):
        step_ids, rows, learned = carry
        leaves = jnp.any(step_ids[i][:, None] == jnp.where(gone >= 0, gone, -2), axis=1)
        step_ids = step_ids.at[i].set(jnp.where(leaves, -1, step_ids[i]))
        mask = lambda leaf: leaves.reshape(-1, *(1,) * (leaf.ndim - 2))
        rows = jax.tree.map(lambda x: x.at[i].set(jnp.where(mask(x), 0, x[i])), rows)
        log = record.log._replace(step_ids=step_ids)
        if exact:
            learned = advance(i, log, rows, learned)
        else:
            run = lambda c: advance(i, log, rows, c)
            learned = jax.lax.cond(inserts, run, lambda c: c, learned)
        return step_ids, rows, learned

    learned = state.stream_params, state.stream_opt_state.inner, record.checkpoints
    carry = (record.log.step_ids, state.stream_rows, learned)
    step_ids, rows, (params, inner, checkpoints) = jax.lax.fori_loop(
        span.start, span.stop, body, carry
    )
    bad = jnp.where(tree.all_finite(params), 0, int(Status.NON_FINITE)).astype(jnp.int32)
    participation = record.participation
    record = record._replace(
        participation=participation._replace(status=participation.status | bad),
        log=record.log._replace(step_ids=step_ids),
        checkpoints=checkpoints,
    )
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
