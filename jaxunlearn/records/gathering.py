"""Taking the sums that a deletion without the other rows works from, in float64 on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records.ids import bucket
from jaxunlearn.records.iterates import widen
from jaxunlearn.records.participation import Participation, forgotten_ids, seen_ids
from jaxunlearn.records.rows import RowReader, all_rows
from jaxunlearn.records.statistics import (
    Statistics,
    Sums,
    check_convex,
    digest_leaf,
    is_of,
    pack_sums,
    sums_of,
    unpack_sums,
)
from jaxunlearn.types import LossFn, Params


class Gatherer(NamedTuple):
    """What `make_gatherer` returns.

    sizes: (params, record, num_new) -> whether the sums in the record are of these parameters or of
      the last release, and of as many rows as were seen; and by name, how many are forgotten and
      how many stay once num_new more are gone, and the gradient norm that training left, or 0.
    stored: (params, record, reader) -> `Statistics`, those at hand, else taken from all rows.
    removed: (sums, params, ids, reader) -> `kernels.LossSums` of the rows to forget, at the origin.
    """

    sizes: Callable[..., tuple[bool, dict[str, Any]]]
    stored: Callable[..., Statistics]
    removed: Callable[..., kernels.LossSums]


def make_gatherer(
    loss_fn: LossFn,
    *,
    num_examples: int,
    l2: float,
    check: Callable[[kernels.LossSums], None],
    refine: Callable[[Sums], Float64[np.ndarray, "p"]],
    left: Callable[[Sums], float],
    polish_steps: int = 1,
    features: Callable[..., Any] | None = None,
    microbatch_size: int | None = None,
) -> Gatherer:
    """Sums of a loss, compiled once for all requests.

    Args:
      check: refuses rows that refute what was declared of them.
      refine: sums -> a better minimiser, with which the sums are taken once more, while it is one.
      left: sums -> the norm of the gradient of the whole objective at their origin.
      polish_steps: how often at most.
    """
    measure = jax.jit(
        kernels.loss_sums(loss_fn, features=features, microbatch_size=microbatch_size)
    )
    loss_checked: list[bool] = []

    def at(origin, rows, weights):
        with jax.enable_x64(True):
            return jax.device_get(measure(*widen((origin, rows, weights))))

    def gather(params, participation: Participation, reader: RowReader) -> Sums:
        batch = all_rows(reader, participation, np.zeros(0, np.int32), num_examples)
        if not loss_checked:
            few = jax.tree.map(lambda leaf: leaf[batch.weights > 0][:8], batch.rows)
            kernels.check_loss(loss_fn, params, few)
            with jax.enable_x64(True):
                kernels.check_float64(loss_fn, *widen((params, few)))
            loss_checked.append(True)

        def taken(origin):
            figures = at(tree.split(origin, params), batch.rows, batch.weights)
            sums = sums_of(origin, figures, l2=l2)
            return figures, sums._replace(start=left(sums))

        figures, sums = taken(tree.flatten(params))
        for _ in range(polish_steps):
            check_convex(sums.hessian, num_rows=sums.num_rows)
            better, others = taken(refine(sums))
            if not others.start < sums.start:
                break
            figures, sums = better, others
        check_convex(sums.hessian, num_rows=sums.num_rows)
        check(figures)
        return sums

    def at_hand(params, record) -> bool:
        is_release = tree.digest_bytes(params) == np.asarray(record.release_digest).tobytes()
        count = int(record.statistics.num_stored)
        everyone = count > 0 and count == len(seen_ids(record.participation))
        return everyone and (is_release or is_of(record.statistics, params))

    def sizes(params, record, num_new: int) -> tuple[bool, dict[str, Any]]:
        known = at_hand(params, record)
        return known, {
            "num_forgotten": len(forgotten_ids(record.participation)) + num_new,
            "num_retained": len(seen_ids(record.participation)) - num_new,
            "start": unpack_sums(record.statistics).start if known else 0.0,
        }

    def stored(params, record, reader: RowReader) -> Statistics:
        if at_hand(params, record):
            return record.statistics
        return pack_sums(gather(params, record.participation, reader), digest_leaf(params))

    def removed(sums: Sums, params: Params, ids: np.ndarray, reader: RowReader):
        if len(ids) >= sums.num_rows:
            raise errors.RetainSetEmptyError(
                "Expected at least one row to be retained: there is nothing left to fit. Start "
                "afresh."
            )
        padded = bucket(ids)
        weights = (padded >= 0).astype(np.float64)
        figures = at(tree.split(sums.origin, params), reader(padded), weights)
        check(figures)
        return figures

    return Gatherer(sizes, stored, removed)


def check_stored(
    loss_fn: LossFn,
    l2: float,
    strong_convexity: float,
    noise_stddev: float | None,
    max_releases: int,
) -> None:
    """Refuse what no method that deletes from stored sums can be made with.

    Raises:
      ValueError: naming the argument.
      LossSignatureError: the loss takes a key.
    """
    if not (l2 >= 0 and strong_convexity >= 0 and 0 < l2 + strong_convexity < np.inf):
        raise ValueError(
            f"Expected l2={l2} >= 0 and strong_convexity={strong_convexity} >= 0, not both zero."
        )
    if noise_stddev is not None and not (noise_stddev > 0 and np.isfinite(noise_stddev)):
        raise ValueError(f"Expected noise_stddev={noise_stddev} > 0.")
    if int(max_releases) != max_releases or max_releases < 1:
        raise ValueError(f"Expected an integer max_releases={max_releases} >= 1.")
    if kernels.takes_key(loss_fn):
        raise errors.LossSignatureError(
            "Expected loss_fn(params, batch): a minimiser has no key. Evaluate the model "
            "deterministically, or use unlearners.replay."
        )
