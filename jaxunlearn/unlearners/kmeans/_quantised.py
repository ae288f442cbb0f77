"""Quantised k-means: a deletion that moves no centroid across its lattice changes nothing.

Ginart, Guan, Valiant, Zou 2019, "Making AI Forget You" (arXiv 1907.05012), algorithm 1.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxunlearn import certificates, errors, records, tree
from jaxunlearn.types import Batch, ExactLearner, ForgetInfo, Forgotten, Quote, UnlearnerState
from jaxunlearn.unlearners.kmeans import _lloyd

_METHOD = "quantised_kmeans"


class QuantisedKMeansRecord(NamedTuple):
    """The run as a deletion retraces it; never released. Integers are pairs of 32-bit words.

    qk_key: words of the key.
    qk_seeds: ids of the rows that the run started from.
    qk_centroids: centroids before each iteration, in grid steps; zero after the last.
    qk_sums, qk_counts: sum and number of the rows of each cluster in each iteration.
    qk_losses: sums of squared distances, each as two integers.
    qk_steps: how many iterations were looked at.
    qk_best: the one whose centroids are the answer.
    qk_fingerprints: 64 bits of each row; zero where absent or forgotten.
    """

    fitted: records.Fitted
    qk_key: UInt32[Array, "2"]
    qk_seeds: Int[Array, "k"]
    qk_centroids: UInt32[Array, "t1 k d 2"]
    qk_sums: UInt32[Array, "t k d 2"]
    qk_counts: UInt32[Array, "t k 2"]
    qk_losses: UInt32[Array, "t1 2 2"]
    qk_steps: Int[Array, ""]
    qk_best: Int[Array, ""]
    qk_fingerprints: UInt32[Array, "n 2"]


class _Path(NamedTuple):
    """The record's arrays on the host; `losses` a list of Python integers."""

    seeds: np.ndarray
    centroids: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    losses: list[int]
    steps: int
    best: int


class _Setting(NamedTuple):
    """What `quantised_kmeans` was called with, in grid steps."""

    num_clusters: int
    lattice: int
    balance: float
    max_iterations: int


def quantised_kmeans(
    num_clusters: int,
    *,
    num_examples: int,
    lattice: float,
    grid: float = 2.0**-12,
    balance: float = 0.2,
    max_iterations: int = 10,
    features: Callable[[Batch], Array] = operator.itemgetter("x"),
) -> ExactLearner:
    """Q-k-means: Lloyd's iterations whose centroids are rounded to a lattice with a random phase.

        c_t+1 = Q(g_t; phase_t),   Q(v; p) = lattice * round((v - p) / lattice) + p
        g_t = m_t if n_c >= balance n / k,  else w m_t + (1 - w) c_t,   w = n_c k / (balance n)

    m_t are the means of the clusters, n_c their sizes. It stops where the loss no longer falls,
    or after `max_iterations`. `forget` retraces the deleted rows through the iterations in exact
    integers: as long as every centroid rounds to the same point, the model stands. Where one does
    not, the run goes on from that iteration; where a seed is deleted, from that seed.

    Args:
      num_clusters: k >= 1.
      num_examples: ids are dense in 0..num_examples-1.
      lattice: > 0, a multiple of grid; coarser is more stable and less accurate.
      grid: power of two to which rows are rounded. With 2^10 features they must lie within 2^19
        of it.
      balance: gamma in (0, 1]; clusters smaller than this share of n / k keep some of their last
        centroid, so that one row moves no centroid far.
      features: rows -> (b, d).

    Returns:
      An `ExactLearner`: `fit(data, ids=None, *, key)`, params {"centroids": float32 (k, d)},
      `predict` the nearest centroid, int32 (b,). In a `Quote`, a row's distances to the centroids
      stand where a gradient stands elsewhere.

    Cost: `fit` reads each row once, keeps them all in float64 and takes n k d operations an
      iteration. `forget`: k d an iteration and row deleted, and nothing that grows with n unless a
      centroid or a seed changes; then the remaining iterations over all rows. The record takes
      16 max_iterations k d bytes and 8 an example.

    Guarantees:
      Parameters and record equal, bit for bit, those of `fit` on the retained rows with the same
      key; so their distribution over keys is that of retraining.
      A row that reads otherwise than when it was fitted is refused.

    Raises (fit):
      IdError, MissingDataError, NonFiniteError, SumOverflowError.
    Raises (forget):
      IdError, WrongStateError, MissingDataError, RetainSetEmptyError; inputs are untouched.

    >>> data = {"x": np.array([[0.0], [0.25], [0.5], [8.0], [8.5], [9.0]])}
    >>> learner = quantised_kmeans(2, num_examples=6, lattice=0.5)
    >>> params, state = learner.fit(data, key=jax.random.key(1))
    >>> learner.predict(params, data)[0] == learner.predict(params, data)[2]
    Array(True, dtype=bool)
    >>> forgotten = learner.forget(params, state, [1], data=data)
    >>> again, _ = learner.fit(data, [0, 2, 3, 4, 5], key=jax.random.key(1))
    >>> bool((again["centroids"] == forgotten.params["centroids"]).all())
    True

    References:
      Ginart et al. 2019, algorithm 1; the default of gamma and the stop by the loss are those of
      the authors' code. Deviations: (1) after a failed check the paper starts anew with fresh
      phases and seeds. That is not retraining in distribution: fresh phases come only where the
      old ones failed, so the outcomes that had failed stay too rare. Here phases stay, and every
      row's random numbers come from its id, so the run is a function of the retained rows and the
      key. (2) The run resumes where it first differs. (3) Rows are on a grid, and so are phases.
      (4) An empty cluster keeps its centroid.
    """
    setting = _check(num_clusters, lattice, grid, balance, max_iterations)
    records.check_num_examples(num_examples)

    def read(reader, ids):
        """(rows in grid steps, fingerprints)."""
        rows, prints = [], []
        for _, block in records.read_blocks(reader, ids):
            x = np.asarray(features(block))
            if x.ndim != 2:
                raise errors.MissingDataError(f"Expected features (b, d), got {x.shape}.")
            units = records.quantise(x, grid, limit=_lloyd.max_units(x.shape[1]))
            rows.append(units.astype(np.float64))
            prints.append(records.fingerprints(units))
        return np.concatenate(rows), np.concatenate(prints)

    def run(rows, ids, words, kept=()):
        """The path of a run from its seeds; kept: ids of seeds that stand."""
        seed_key, _ = jax.random.split(jax.random.wrap_key_data(words))
        draws = records.row_draws(seed_key, ids, num_clusters)
        seeds = _lloyd.plant(rows, draws, tuple(np.searchsorted(ids, kept)))
        return _iterate(setting, rows, _empty_path(setting, ids[seeds], rows[seeds]), words, 0)

    def fit(data, ids=None, *, key):
        words = records.key_words(key)
        ids = records.fit_ids(ids, num_examples)
        rows, found = read(records.RowReader(data), ids)
        prints = np.zeros((num_examples,), np.uint64)
        prints[ids] = found
        path = run(rows, ids, words)
        params = answer(path)
        return params, _state(records.mark_fitted(num_examples, ids, params), words, path, prints)

    def answer(path):
        return {"centroids": jnp.asarray(path.centroids[path.best] * grid, jnp.float32)}

    def check_request(params, state, ids, requester=None):
        request = records.check_learner_request(
            params, state, ids, requester,
            record_type=QuantisedKMeansRecord, method=_METHOD, num_examples=num_examples,
        )  # fmt: skip
        return request, records.retained_ids(state.record.fitted, request.ids)

    def revise(record, path, ids, retained, reader, prints):
        """The path without `ids`, and where it was resumed: None, or an iteration."""
        stale = np.flatnonzero(np.isin(path.seeds, ids))
        gone, found = read(reader, ids)
        records.check_unchanged(prints[ids], found, ids)
        if stale.size:
            rows, _ = read(reader, retained)
            return run(rows, retained, record.qk_key, path.seeds[: stale[0]]), 0
        path, resume = _retrace(setting, gone, path, record.qk_key, len(retained))
        if resume is None:
            return path, None
        rows, _ = read(reader, retained)
        return _iterate(setting, rows, path, record.qk_key, resume), resume

    def forget(params, state, ids, *, data=None, requester=None):
        request, retained = check_request(params, state, ids, requester)
        ids = request.ids
        if not ids.size:
            return Forgotten(params, state, ForgetInfo.of(_METHOD, request))
        record = state.record
        prints = records.unpack_int64(record.qk_fingerprints).view(np.uint64).copy()
        path, resumed = revise(
            record, _path_of(record), ids, retained, records.RowReader(data), prints
        )
        prints[ids] = 0
        new_params = answer(path)
        fitted = records.mark_forgotten(record.fitted, ids, new_params)
        measured = {
            "retrained": resumed is not None,
            "resumed_at": resumed,
            "rows_read": len(ids) + (len(retained) if resumed is not None else 0),
        }
        new_state = _state(fitted, record.qk_key, path, prints)
        return certificates.concluded(
            request, (params, state), (new_params, new_state), measured, **_promise(grid)
        )

    def quote(params, state, ids):
        try:
            request, retained = check_request(params, state, ids)
        except (errors.IdError, errors.RetainSetEmptyError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="exact")
        ids = request.ids
        steps = int(state.record.qk_steps) + 1
        seed = bool(np.isin(np.asarray(state.record.qk_seeds), ids).any())
        perhaps = "a seed is deleted: retrains" if seed else "unless a centroid leaves its cell"
        retrain = len(retained) * steps
        return Quote(
            feasible=True,
            reason=perhaps if ids.size else "",
            guarantee="exact",
            num_forgotten=len(ids),
            num_steps=steps if ids.size else 0,
            num_gradients=retrain if seed else min(retrain, len(ids) * steps),
            retrain_gradients=retrain,
            memory_bytes=2 * tree.num_bytes(state.record) if ids.size else 0,
        )

    def predict(params, batch):
        x, centroids = jnp.asarray(features(batch)), params["centroids"]
        squares = jnp.sum((x[:, None, :] - centroids) ** 2, axis=-1)
        return jnp.argmin(squares, axis=-1).astype(jnp.int32)

    return ExactLearner(fit, predict, forget, quote)


def _check(num_clusters, lattice, grid, balance, max_iterations) -> _Setting:
    """Refuse a bad configuration at the factory."""
    records.check_grid(grid)
    records.check_integers(num_clusters=num_clusters, max_iterations=max_iterations)
    steps = lattice / grid
    if not (steps >= 1 and steps == round(steps) and steps <= 2**17):
        raise ValueError(f"Expected lattice={lattice} a multiple of grid={grid}, up to 2^17 of it.")
    if not 0 < balance <= 1:
        raise ValueError(f"Expected balance={balance} in (0, 1].")
    return _Setting(num_clusters, round(steps), balance, max_iterations)


def _empty_path(setting: _Setting, seeds, centroids) -> _Path:
    """A path of which only the start is known."""
    shape = (setting.max_iterations, *centroids.shape)
    path = np.zeros((shape[0] + 1, *shape[1:]))
    path[0] = centroids
    losses = [0] * (setting.max_iterations + 1)
    return _Path(
        seeds, path, np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64), losses, 0, 0
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_phases(words, iterations: int, dimension: int, lattice: int):
    _, key = jax.random.split(jax.random.wrap_key_data(words))
    draw = lambda t: jax.random.randint(jax.random.fold_in(key, t), (dimension,), 0, lattice)
    return jax.vmap(draw)(jnp.arange(iterations))


def _phases(words, setting: _Setting, dimension: int) -> np.ndarray:
    """The lattice's offset in each iteration, in grid steps."""
    phases = _draw_phases(words, setting.max_iterations, dimension, setting.lattice)
    return np.asarray(jax.device_get(phases), np.float64)


def _move(setting: _Setting, sums, counts, num_rows: int, centroids, phase) -> np.ndarray:
    """The centroids after one iteration; elementwise, so the same wherever it is worked out."""
    counts = counts.astype(np.float64)[:, None]
    mean = sums.astype(np.float64) / np.maximum(counts, 1.0)
    share = np.minimum(1.0, counts * setting.num_clusters / (setting.balance * num_rows))
    corrected = np.where(share < 1.0, share * mean + (1.0 - share) * centroids, mean)
    return setting.lattice * np.floor((corrected - phase) / setting.lattice + 0.5) + phase


def _iterate(setting: _Setting, rows, path: _Path, words, start: int) -> _Path:
    """The path from iteration `start`, whose centroids are known, to its end."""
    centroids, sums, counts = path.centroids.copy(), path.sums.copy(), path.counts.copy()
    losses, last = list(path.losses), setting.max_iterations
    phases = _phases(words, setting, centroids.shape[-1])
    centroids[start + 1 :], sums[start:], counts[start:] = 0, 0, 0
    losses[start:] = [0] * len(losses[start:])
    for t in range(start, last + 1):
        labels, distances = _lloyd.nearest(rows, centroids[t])
        losses[t] = _lloyd.exact_total(distances)
        if t > 0 and losses[t] >= losses[t - 1]:
            return _Path(path.seeds, centroids, sums, counts, losses, t, t - 1)
        if t < last:
            sums[t], counts[t] = _lloyd.cluster_sums(rows, labels, setting.num_clusters)
            centroids[t + 1] = _move(
                setting, sums[t], counts[t], len(rows), centroids[t], phases[t]
            )
    return _Path(path.seeds, centroids, sums, counts, losses, last, last)


def _retrace(setting: _Setting, gone, path: _Path, words, num_rows: int):
    """(the path without the rows `gone`, None or the iteration from which it must be run)."""
    centroids, sums, counts = path.centroids.copy(), path.sums.copy(), path.counts.copy()
    losses, last = list(path.losses), setting.max_iterations
    phases = _phases(words, setting, centroids.shape[-1])
    for t in range(path.steps + 1):
        labels, distances = _lloyd.nearest(gone, centroids[t])
        losses[t] -= _lloyd.exact_total(distances)
        if t > 0 and losses[t] >= losses[t - 1]:  # stops here now, if not before
            centroids[t + 1 :], sums[t:], counts[t:] = 0, 0, 0
            losses[t + 1 :] = [0] * len(losses[t + 1 :])
            return _Path(path.seeds, centroids, sums, counts, losses, t, t - 1), None
        if t == last:
            return _Path(path.seeds, centroids, sums, counts, losses, t, t), None
        if t == path.steps:  # stopped here before, and goes on now
            return _Path(path.seeds, centroids, sums, counts, losses, t, t), t
        less, fewer = _lloyd.cluster_sums(gone, labels, setting.num_clusters)
        sums[t], counts[t] = sums[t] - less, counts[t] - fewer
        moved = _move(setting, sums[t], counts[t], num_rows, centroids[t], phases[t])
        if not np.array_equal(moved, centroids[t + 1]):
            centroids[t + 1] = moved
            return _Path(path.seeds, centroids, sums, counts, losses, t, t), t + 1
    raise AssertionError("unreachable: a path ends at its last step")


def _state(fitted, words, path: _Path, prints) -> UnlearnerState:
    """Host arrays as the leaves of a state."""
    losses = [[loss >> 62, loss & (2**62 - 1)] for loss in path.losses]
    record = QuantisedKMeansRecord(
        fitted=fitted,
        qk_key=words,
        qk_seeds=jnp.asarray(path.seeds, jnp.int32),
        qk_centroids=records.pack_int64(path.centroids.astype(np.int64)),
        qk_sums=records.pack_int64(path.sums),
        qk_counts=records.pack_int64(path.counts),
        qk_losses=records.pack_int64(np.asarray(losses, np.int64)),
        qk_steps=jnp.asarray(path.steps, jnp.int32),
        qk_best=jnp.asarray(path.best, jnp.int32),
        qk_fingerprints=records.pack_int64(prints.view(np.int64)),
    )
    return UnlearnerState(inner=(), record=record)


def _path_of(record: QuantisedKMeansRecord) -> _Path:
    losses = records.unpack_int64(record.qk_losses)
    return _Path(
        seeds=np.asarray(record.qk_seeds),
        centroids=records.unpack_int64(record.qk_centroids).astype(np.float64),
        sums=records.unpack_int64(record.qk_sums),
        counts=records.unpack_int64(record.qk_counts),
        losses=[(int(high) << 62) + int(low) for high, low in losses],
        steps=int(record.qk_steps),
        best=int(record.qk_best),
    )


def _promise(grid: float) -> dict[str, Any]:
    """The fields of the certificate."""
    return {
        "method": _METHOD,
        "paper": "Ginart et al. 2019, arXiv 1907.05012, algorithm 1",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "assumptions": (
            certificates.Assumption(
                "grid",
                "proven",
                f"Rows are rounded to multiples of {grid!r}; sums, distances and losses are exact "
                "integers, whatever the order of rows.",
            ),
            certificates.Assumption(
                "randomness",
                "proven",
                "A row's random numbers come from the key and its own id, and phases from the key: "
                "a run without the row draws the same for all others.",
            ),
            certificates.Assumption(
                "rows unchanged",
                "measured",
                "A fingerprint of each deleted row was compared with the row that was fitted.",
            ),
            *certificates.assumed("oblivious requests", "public settings", "secret record"),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }
