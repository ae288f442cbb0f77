"""Divide-and-conquer k-means: a tree of small problems, of which a deletion solves one path again.

Ginart, Guan, Valiant, Zou 2019, "Making AI Forget You" (arXiv 1907.05012), algorithm 2.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32

from jaxunlearn import certificates, errors, records, tree
from jaxunlearn.types import Batch, ExactLearner, ForgetInfo, Forgotten, Quote, UnlearnerState
from jaxunlearn.unlearners.kmeans import _lloyd

_METHOD = "divided_kmeans"


class DividedKMeansRecord(NamedTuple):
    """The tree, leaves first; never released.

    dk_key: words of the key.
    dk_centroids: for each level (nodes, k, d), in grid steps as pairs of 32-bit words.
    dk_counts: for each level (nodes, k), rows or child centroids of each; 0 where there is none.
    """

    fitted: records.Fitted
    dk_key: UInt32[Array, "2"]
    dk_centroids: PyTree
    dk_counts: tuple[Int[Array, "nodes k"], ...]


class _Tree(NamedTuple):
    """The record's arrays on the host."""

    centroids: list[np.ndarray]
    counts: list[np.ndarray]


def divided_kmeans(
    num_clusters: int,
    *,
    num_examples: int,
    width: int,
    height: int = 1,
    grid: float = 2.0**-12,
    max_iterations: int = 10,
    features: Callable[[Batch], Array] = operator.itemgetter("x"),
) -> ExactLearner:
    """DC-k-means: rows fall at random into the leaves of a tree; each node clusters what it gets.

    A leaf runs k-means on its rows, an inner node on the centroids of its `width` children; the
    root's centroids are the answer. `forget` runs the leaf of each deleted row again, without the
    row, and its ancestors as long as the centroids below them changed.

    Args:
      num_clusters: k >= 1.
      num_examples: ids are dense in 0..num_examples-1.
      width: children of a node, >= 2.  height: levels above the leaves, >= 1; width^height leaves.
      grid: power of two to which rows and centroids are rounded. With 2^10 features they must lie
        within 2^19 of it.
      max_iterations: of Lloyd's algorithm in a node; it stops earlier where nothing moves.
      features: rows -> (b, d).

    Returns:
      An `ExactLearner`: `fit(data, ids=None, *, key)`, params {"centroids": float32 (k, d)},
      `predict` the nearest centroid, int32 (b,). In a `Quote`, a row's distances to the centroids
      stand where a gradient stands elsewhere.

    Cost: a deletion reads and clusters the n / width^height rows of one leaf and width k centroids
      at each level above; with n^rho leaves O(max(n^rho, n^(1 - rho)) k d) an iteration. The
      record takes about 8 k d bytes a node. Rows of one leaf are held at a time.

    Guarantees:
      Parameters and record equal, bit for bit, those of `fit` on the retained rows with the same
      key; so their distribution over keys is that of retraining.
      The rows to be forgotten are not read again.

    Raises (fit):
      IdError, MissingDataError, NonFiniteError, SumOverflowError.
    Raises (forget):
      IdError, WrongStateError, MissingDataError, RetainSetEmptyError; inputs are untouched.

    >>> data = {"x": np.array([[0.0], [0.25], [0.5], [8.0], [8.5], [9.0]])}
    >>> learner = divided_kmeans(2, num_examples=6, width=2)
    >>> params, state = learner.fit(data, key=jax.random.key(0))
    >>> forgotten = learner.forget(params, state, [1], data=data)
    >>> again, _ = learner.fit(data, [0, 2, 3, 4, 5], key=jax.random.key(0))
    >>> bool((again["centroids"] == forgotten.params["centroids"]).all())
    True

    References:
      Ginart et al. 2019, algorithm 2. Deviations: a node's seeds come from random numbers of what
      it clusters, not from a stream, so that what stays draws the same numbers again; the path
      ends early where a node's centroids do not change; rows and centroids are on a grid.
    """
    _check(num_clusters, width, height, grid, max_iterations)
    records.check_num_examples(num_examples)
    num_leaves = width**height
    cluster = functools.partial(_cluster, num_clusters, max_iterations)

    def leaves_of(words, ids):
        """The leaf of each row, from its id and the key alone."""
        key, _ = jax.random.split(jax.random.wrap_key_data(words))
        draws = records.row_draws(key, ids, 1)[:, 0]
        return np.minimum((draws * num_leaves).astype(np.int64), num_leaves - 1)

    def read(reader, ids):
        blocks = []
        for _, rows in records.read_blocks(reader, ids):
            x = np.asarray(features(rows))
            if x.ndim != 2:
                raise errors.MissingDataError(f"Expected features (b, d), got {x.shape}.")
            blocks.append(records.quantise(x, grid, limit=_lloyd.max_units(x.shape[1])))
        return np.concatenate(blocks).astype(np.float64)

    def node_key(words, level, node):
        _, key = jax.random.split(jax.random.wrap_key_data(words))
        return jax.random.fold_in(jax.random.fold_in(key, level), node)

    def solve_leaf(built, words, leaf, ids, reader):
        """Cluster a leaf's rows; whether anything changed."""
        if not ids.size:
            return _put(built, 0, leaf, None)
        return _put(built, 0, leaf, cluster(read(reader, ids), ids, node_key(words, 0, leaf)))

    def solve_node(built, words, level, node):
        """Cluster the centroids of a node's children; whether anything changed."""
        children = slice(node * width, (node + 1) * width)
        counts = built.counts[level - 1][children].ravel()
        present = np.flatnonzero(counts)
        if not present.size:
            return _put(built, level, node, None)
        below = built.centroids[level - 1][children]
        rows = below.reshape(-1, below.shape[-1])[present]
        found = cluster(rows, present.astype(np.int32), node_key(words, level, node))
        return _put(built, level, node, found)

    def solve(built, words, leaves, ids, reader):
        """Solve `leaves` from the rows `ids` that are in the model, and what depends on them."""
        of = leaves_of(words, ids)
        order = np.argsort(of, kind="stable")
        bounds = np.searchsorted(of[order], np.arange(num_leaves + 1))
        rows_of = lambda leaf: np.sort(ids[order[bounds[leaf] : bounds[leaf + 1]]])
        solved = len(leaves)
        changed = [leaf for leaf in leaves if solve_leaf(built, words, leaf, rows_of(leaf), reader)]
        for level in range(1, height + 1):
            nodes = sorted({node // width for node in changed})
            solved += len(nodes)
            changed = [node for node in nodes if solve_node(built, words, level, node)]
        return {"nodes_solved": solved, "rows_read": int(sum(len(rows_of(x)) for x in leaves))}

    def fit(data, ids=None, *, key):
        words = records.key_words(key)
        ids = records.fit_ids(ids, num_examples)
        reader = records.RowReader(data)
        dimension = read(reader, ids[:1]).shape[1]
        built = _empty_tree(width, height, num_clusters, dimension)
        solve(built, words, range(num_leaves), ids, reader)
        params = answer(built)
        return params, _state(records.mark_fitted(num_examples, ids, params), words, built)

    def answer(built):
        """The root's centroids; those it lacks repeat the first."""
        root, counts = built.centroids[-1][0], built.counts[-1][0]
        centroids = np.where(counts[:, None] > 0, root, root[np.argmax(counts > 0)])
        return {"centroids": jnp.asarray(centroids * grid, jnp.float32)}

    def check_request(params, state, ids, requester=None):
        request = records.check_learner_request(
            params, state, ids, requester,
            record_type=DividedKMeansRecord, method=_METHOD, num_examples=num_examples,
        )  # fmt: skip
        return request, records.retained_ids(state.record.fitted, request.ids)

    def forget(params, state, ids, *, data=None, requester=None):
        request, retained = check_request(params, state, ids, requester)
        ids = request.ids
        if not ids.size:
            return Forgotten(params, state, ForgetInfo.of(_METHOD, request))
        record, reader = state.record, records.RowReader(data)
        built = _tree_of(record)
        leaves = np.unique(leaves_of(record.dk_key, ids)).tolist()
        measured = solve(built, record.dk_key, leaves, retained, reader)
        new_params = answer(built)
        fitted = records.mark_forgotten(record.fitted, ids, new_params)
        new_state = _state(fitted, record.dk_key, built)
        return certificates.concluded(
            request, (params, state), (new_params, new_state), measured, **_promise(grid)
        )

    def quote(params, state, ids):
        try:
            request, retained = check_request(params, state, ids)
        except (errors.IdError, errors.RetainSetEmptyError) as error:
            return Quote(feasible=False, reason=str(error), guarantee="exact")
        ids = request.ids
        words = state.record.dk_key
        leaves = np.unique(leaves_of(words, ids)) if ids.size else np.zeros((0,), np.int64)
        rows = int(np.isin(leaves_of(words, retained), leaves).sum())
        paths = {(level, int(x) // width**level) for x in leaves for level in range(height + 1)}
        return Quote(
            feasible=True,
            reason="",
            guarantee="exact",
            num_forgotten=len(ids),
            num_steps=len(paths),
            num_gradients=rows * max_iterations,
            retrain_gradients=len(retained) * max_iterations,
            memory_bytes=2 * tree.num_bytes(state.record) if ids.size else 0,
        )

    def predict(params, batch):
        x, centroids = jnp.asarray(features(batch)), params["centroids"]
        squares = jnp.sum((x[:, None, :] - centroids) ** 2, axis=-1)
        return jnp.argmin(squares, axis=-1).astype(jnp.int32)

    return ExactLearner(fit, predict, forget, quote)


def _check(num_clusters, width, height, grid, max_iterations) -> None:
    """Refuse a bad configuration at the factory."""
    records.check_grid(grid)
    records.check_integers(2, width=width)
    records.check_integers(num_clusters=num_clusters, height=height, max_iterations=max_iterations)
    if width**height > 2**20:
        raise ValueError(f"Expected at most 2^20 leaves, got {width}**{height}.")


def _cluster(num_clusters: int, max_iterations: int, rows, ids, key):
    """(centroids in whole grid steps, counts) of k-means from k-means++ seeds."""
    draws = records.row_draws(key, ids, num_clusters)
    centroids = rows[_lloyd.plant(rows, draws)]
    for _ in range(max_iterations):
        labels, _ = _lloyd.nearest(rows, centroids)
        sums, counts = _lloyd.cluster_sums(rows, labels, num_clusters)
        mean = np.rint(sums / np.maximum(counts, 1)[:, None])
        moved = np.where(counts[:, None] > 0, mean, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    labels, _ = _lloyd.nearest(rows, centroids)
    _, counts = _lloyd.cluster_sums(rows, labels, num_clusters)
    return np.where(counts[:, None] > 0, centroids, 0.0), counts


def _empty_tree(width: int, height: int, num_clusters: int, dimension: int) -> _Tree:
    sizes = [width ** (height - level) for level in range(height + 1)]
    return _Tree(
        [np.zeros((size, num_clusters, dimension)) for size in sizes],
        [np.zeros((size, num_clusters), np.int64) for size in sizes],
    )


def _put(built: _Tree, level: int, node: int, found) -> bool:
    """Write a node's centroids into the tree; whether its parent has to know."""
    centroids, counts = (0.0, 0) if found is None else found
    before = built.centroids[level][node].copy(), built.counts[level][node] > 0
    built.centroids[level][node], built.counts[level][node] = centroids, counts
    same = np.array_equal(before[0], built.centroids[level][node])
    return not (same and np.array_equal(before[1], built.counts[level][node] > 0))


def _state(fitted, words, built: _Tree) -> UnlearnerState:
    """Host arrays as the leaves of a state."""
    record = DividedKMeansRecord(
        fitted=fitted,
        dk_key=words,
        dk_centroids=tuple(records.pack_int64(c.astype(np.int64)) for c in built.centroids),
        dk_counts=tuple(jnp.asarray(c, jnp.int32) for c in built.counts),
    )
    return UnlearnerState(inner=(), record=record)


def _tree_of(record: DividedKMeansRecord) -> _Tree:
    return _Tree(
        [records.unpack_int64(c).astype(np.float64) for c in record.dk_centroids],
        [np.array(c, np.int64) for c in record.dk_counts],
    )


def _promise(grid: float) -> dict[str, Any]:
    """The fields of the certificate."""
    return {
        "method": _METHOD,
        "paper": "Ginart et al. 2019, arXiv 1907.05012, algorithm 2",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "assumptions": (
            certificates.Assumption(
                "grid",
                "proven",
                f"Rows and centroids are rounded to multiples of {grid!r}; sums and distances are "
                "exact integers, whatever the order of rows.",
            ),
            certificates.Assumption(
                "randomness",
                "proven",
                "A row's leaf and random numbers come from the key and its own id: a run without "
                "the row draws the same for all others.",
            ),
            *certificates.assumed(
                "rows unchanged", "oblivious requests", "public settings", "secret record"
            ),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }
