"""The parts of k-means in integer arithmetic, so that a row's part does not depend on the others.

Rows and centroids are whole numbers of grid steps, kept as float64: with `max_units` every product
and distance is an integer below 2^53, the same in any order, at the speed of a matrix product.
"""

import math

import numpy as np
from jaxtyping import Float64, Int64


def max_units(dimension: int) -> int:
    """How far from zero a row may lie, in grid steps: distances of (3 max)^2 d stay below 2^53."""
    return 1 << ((49 - max(1, dimension - 1).bit_length()) // 2)


def plant(
    rows: Float64[np.ndarray, "n d"],
    draws: Float64[np.ndarray, "n k"],
    kept: tuple[int, ...] = (),
) -> np.ndarray:
    """Seeds by k-means++ as a race: indices (k,) of rows.

        s_t = argmin_i E_ti / D_t(i)^2,   E_ti = -log u_ti ~ Exp(1)

    The winner is i with probability D_t(i)^2 / sum_j D_t(j)^2, D_t the distance to the nearest
    earlier seed (Arthur and Vassilvitskii 2007). A row that does not win changes nothing when it is
    taken out, so that the race without it has the same winner.

    Args:
      kept: earlier seeds that stand already.
    """
    distance = np.full((len(rows),), np.inf)
    seeds = list(kept)
    for seed in seeds:
        distance = np.minimum(distance, _squares(rows, rows[seed]))
    log = np.frompyfunc(math.log, 1, 1)  # NumPy's own may round by position
    for t in range(len(seeds), draws.shape[1]):
        weight = distance if t else np.ones_like(distance)
        time = -log(draws[:, t]).astype(np.float64)
        with np.errstate(divide="ignore"):
            seeds.append(int(np.argmin(time / weight)))
        distance = np.minimum(distance, _squares(rows, rows[seeds[-1]]))
    return np.asarray(seeds, np.int64)


def nearest(
    rows: Float64[np.ndarray, "n d"], centroids: Float64[np.ndarray, "k d"]
) -> tuple[Int64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """(nearest centroid, the first of equals; squared distance to it), both exact."""
    scores = np.sum(centroids**2, axis=1) - 2.0 * (rows @ centroids.T)
    labels = np.argmin(scores, axis=1)
    return labels, scores[np.arange(len(rows)), labels] + np.sum(rows**2, axis=1)


def cluster_sums(
    rows: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, "n"], num_clusters: int
) -> tuple[Int64[np.ndarray, "k d"], Int64[np.ndarray, "k"]]:
    """(sum of the rows of each cluster, their number), exact."""
    member = (labels[:, None] == np.arange(num_clusters)).astype(np.float64)
    return (member.T @ rows).astype(np.int64), member.sum(axis=0).astype(np.int64)


def exact_total(distances: Float64[np.ndarray, "n"]) -> int:
    """The sum of integers below 2^53 as a Python integer, which does not overflow."""
    units = distances.astype(np.int64)
    return (int(np.sum(units >> 26)) << 26) + int(np.sum(units & (2**26 - 1)))


def _squares(rows, centre) -> Float64[np.ndarray, "n"]:
    return np.sum((rows - centre) ** 2, axis=1)
