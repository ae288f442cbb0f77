"""Exact deletion for learners in summation form: subtract the row's terms and solve again.

Cao and Yang 2015, "Towards Making Systems Forget with Machine Unlearning" (IEEE S&P): a learner
that asks its rows only for sums, chosen before it sees any answer, forgets a row by updating the
sums. Here the sums are integers, so that what was added is subtracted to the last bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32

from jaxunlearn import certificates, errors, records, tree
from jaxunlearn.types import ExactLearner, ForgetInfo, Forgotten, Quote, UnlearnerState
from jaxunlearn.unlearners.statistical_queries._bayes import (
    gaussian_naive_bayes,
    multinomial_naive_bayes,
)
from jaxunlearn.unlearners.statistical_queries._ridge import ridge
from jaxunlearn.unlearners.statistical_queries._summation import Solved, Summation, summation

__all__ = [
    "Solved",
    "StatisticalQueryRecord",
    "Summation",
    "gaussian_naive_bayes",
    "multinomial_naive_bayes",
    "ridge",
    "statistical_queries",
    "summation",
]

_METHOD = "statistical_queries"
_PAPER = "Cao and Yang 2015 (IEEE S&P)"


class StatisticalQueryRecord(NamedTuple):
    """What a deletion needs; never released.

    query_sums: the sums, as pairs of 32-bit words.
    query_rows: number of rows in them.
    query_aid: float64 arrays that speed up the next solve, as pairs of words.
    query_fingerprints: 64 bits of each row's integers; zero where absent or forgotten.
    """

    fitted: records.Fitted
    query_sums: PyTree
    query_rows: Int[Array, ""]
    query_aid: PyTree
    query_fingerprints: UInt32[Array, "n 2"]


def statistical_queries(query: Summation, *, num_examples: int) -> ExactLearner:
    """A learner that forgets a row by subtracting its terms from exact sums.

        sums = sum_i q(x_i, y_i),   q integer,   params = solve(sums, n)
        sums' = sums - sum_{i in U} q(x_i, y_i),   params' = solve(sums', n - |U|)

    `fit(data, ids=None)` reads each row once, `forget` only the rows to be forgotten.

    Args:
      query: `ridge(...)`, `gaussian_naive_bayes(...)`, `multinomial_naive_bayes(...)`, or your own
        by `summation(...)`.
      num_examples: ids are dense in 0..num_examples-1.

    Returns:
      An `ExactLearner`. The state's `inner` is `()`. In a `Quote`, a row's statistics stand where
      a gradient stands elsewhere.

    Cost: `fit`: the statistics of each row and one solve. `forget`: those of the rows to forget and
      one solve; nothing grows with the number of rows retained. The record takes the sums, the
      solve's aid and 8 bytes an example.

    Guarantees:
      Parameters and sums equal, bit for bit, those of `fit` on the retained rows, in whatever order
      and company rows were read, added and deleted. (Ridge: but for a chance of about 2^-38 a
      coefficient. `summation`: as far as its `solve` is deterministic.)
      A row that reads otherwise than when it was fitted is refused.

    Raises (fit):
      IdError, MissingDataError, NonFiniteError, SumOverflowError, SolverError.
    Raises (forget):
      IdError, WrongStateError, MissingDataError (also for a changed row), RetainSetEmptyError,
      SolverError; inputs are untouched.

    >>> learner = statistical_queries(ridge(l2=1.0), num_examples=3)
    >>> data = {"x": np.array([[1.0], [2.0], [5.0]]), "y": np.array([2.0, 4.0, 0.0])}
    >>> params, state = learner.fit(data)
    >>> forgotten = learner.forget(params, state, [2], data=data)
    >>> forgotten.params == learner.fit(data, [0, 1])[0]
    True

    References:
      Cao and Yang 2015. Deviations: rows are rounded to a grid, which makes the sums exact; queries
      that depend on earlier answers (their "adaptive" learners) are not handled: every answer of
      such a learner changes with the first.
    """
    records.check_num_examples(num_examples)
    if not isinstance(query, Summation):
        raise TypeError(f"Expected a query such as ridge(l2=1.0), got {type(query).__name__}.")
    method = f"{_METHOD}, {query.name}"
    seconds: list[float] = []

    def fit(data, ids=None):
        ids = records.fit_ids(ids, num_examples)
        prints = np.zeros((num_examples,), np.uint64)
        sums = None
        for block, rows in records.read_blocks(records.RowReader(data), ids):
            units = query.integers(rows)
            prints[block] = records.fingerprints(*jax.tree.leaves(units))
            part = query.sums(units)
            sums = part if sums is None else jax.tree.map(records.add_exactly, sums, part)
        solved = query.solve(sums, len(ids), None, None)
        _check_finite(solved)
        fitted = records.mark_fitted(num_examples, ids, solved.params)
        return solved.params, _state(fitted, sums, len(ids), solved.aid, prints)

    def check_request(params, state, ids, requester=None):
        request = records.check_learner_request(
            params, state, ids, requester,
            record_type=StatisticalQueryRecord, method=_METHOD, num_examples=num_examples,
        )  # fmt: skip
        records.retained_ids(state.record.fitted, request.ids)
        return request

    def subtract(sums, prints, data, ids):
        """The sums without `ids`, and the integers of their rows."""
        read = []
        for block, rows in records.read_blocks(records.RowReader(data), ids):
            units = query.integers(rows)
            found = records.fingerprints(*jax.tree.leaves(units))
            records.check_unchanged(prints[block], found, block)
            minus = jax.tree.map(np.negative, query.sums(units))
            sums = jax.tree.map(records.add_exactly, sums, minus)
            read.append(units)
        return sums, jax.tree.map(lambda *parts: np.concatenate(parts), *read)

    def forget(params, state, ids, *, data=None, requester=None):
        request = check_request(params, state, ids, requester)
        ids = request.ids
        if not ids.size:
            return Forgotten(params, state, ForgetInfo.of(method, request))
        record = state.record
        prints = records.unpack_int64(record.query_fingerprints).view(np.uint64)
        sums, removed = subtract(
            jax.tree.map(records.unpack_int64, record.query_sums), prints, data, ids
        )
        num_rows = int(record.query_rows) - len(ids)
        aid = jax.tree.map(_unpack_float64, record.query_aid)
        solved = query.solve(sums, num_rows, aid, removed)
        _check_finite(solved)
        prints = prints.copy()
        prints[ids] = 0
        fitted = records.mark_forgotten(record.fitted, ids, solved.params)
        new_state = _state(fitted, sums, num_rows, solved.aid, prints)
        result = certificates.concluded(
            request, (params, state), (solved.params, new_state),
            {"rows_read": len(ids), **solved.measurements},
            **_promise(query, method),
        )  # fmt: skip
        seconds[:] = [result.info.seconds]
        return result

    def quote(params, state, ids):
        try:
            ids = check_request(params, state, ids).ids
        except (errors.IdError, errors.RetainSetEmptyError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="exact")
        return Quote(
            feasible=True,
            reason="",
            guarantee="exact",
            num_forgotten=len(ids),
            num_steps=1 if ids.size else 0,
            num_gradients=len(ids),
            retrain_gradients=int(state.record.query_rows) - len(ids),
            memory_bytes=3 * tree.num_bytes(state.record) if ids.size else 0,
            seconds=seconds[0] if seconds else None,
        )

    return ExactLearner(fit, query.predict, forget, quote)


def _state(fitted, sums, num_rows, aid, prints) -> UnlearnerState:
    """Host arrays as the leaves of a state."""
    record = StatisticalQueryRecord(
        fitted=fitted,
        query_sums=jax.tree.map(records.pack_int64, sums),
        query_rows=jnp.asarray(num_rows, jnp.int32),
        query_aid=jax.tree.map(_pack_float64, aid),
        query_fingerprints=records.pack_int64(prints.view(np.int64)),
    )
    return UnlearnerState(inner=(), record=record)


def _pack_float64(array):
    return records.pack_int64(np.ascontiguousarray(array, np.float64).view(np.int64))


def _unpack_float64(words):
    return records.unpack_int64(words).view(np.float64)


def _check_finite(solved: Solved) -> None:
    """Refuse NaN; the -inf of a class without rows stands."""
    if any(bool(jnp.any(jnp.isnan(leaf))) for leaf in jax.tree.leaves(solved.params)):
        raise errors.NonFiniteError("Solving the sums gave NaN; nothing was released.")


def _promise(query: Summation, method: str) -> dict[str, Any]:
    """The fields of the certificate."""
    return {
        "method": method,
        "paper": _PAPER,
        "target": query.target,
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "requests": "adaptive",
        "assumptions": (
            certificates.Assumption("grid", "proven", query.describe),
            certificates.Assumption(
                "exact sums",
                "proven",
                "Sums are 64-bit integers; an overflow is an error. What is left after a deletion "
                "does not depend on the order, the batches or the device of additions.",
            ),
            certificates.Assumption("rows unchanged", *query.reproduced),
            *certificates.assumed("public settings", "secret record"),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }
