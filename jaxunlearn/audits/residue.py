"""Residue: can a linear probe on the optimizer's state tell which of two rows was deleted?

The game. Rows a and b are alike to a deletion that works. Train many runs on D and a, delete a;
train as many on D and b, delete b. What is left is in both cases a run on D, and no probe of the
states can tell the groups apart. If one can, something of the row is still there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float64, PyTree

from jaxunlearn import tree
from jaxunlearn.audits.intervals import Interval, clopper_pearson

LEVEL = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residue:
    """What a cross-validated linear probe found.

    accuracy: share of held-out runs that it named rightly, with its Clopper-Pearson interval, which
      takes them for independent. Folds share training runs, so that they are not: under the null,
      with 16 runs in four folds, the interval at 0.95 held 1/2 in 0.927 of 300 trials. Judge by
      p_value.
    auc: of its scores, each compared with those of its own fold; 1/2 for a probe that knows
      nothing.
    p_value: share of permuted labellings that the probe names as well as the true one, or better,
      equal counts ranked by their auc;
      exact for exchangeable runs, whatever the probe and its folds.
    null_accuracy: mean over the permutations.
    detectable_accuracy: the least true accuracy of a probe, of which runs as many would have
      rejected the null at level 0.05 with probability `power`; above 1 where none would.
    power: 0.8 unless told otherwise.
    num_runs: of both groups.  num_features: inexact numbers of a state that vary between runs.
    """

    accuracy: Interval
    auc: float
    p_value: float
    null_accuracy: float
    detectable_accuracy: float
    power: float
    num_runs: int
    num_features: int
    num_permutations: int

    @property
    def found(self) -> bool:
        """Whether the null is rejected at level 0.05."""
        return self.p_value <= LEVEL

    def __str__(self) -> str:
        accuracy, low, high = self.accuracy
        told = "can" if self.found else "cannot be shown to"
        beyond = (
            f"an accuracy of {self.detectable_accuracy:.2f} or more would have been found"
            if self.detectable_accuracy <= 1
            else "no accuracy at all would have been found: more runs are needed"
        )
        return (
            f"p = {self.p_value:.3g} by permutation: a linear probe {told} tell which row was "
            f"deleted. Accuracy {accuracy:.2f} over {self.num_runs} runs, [{low:.2f}, {high:.2f}] "
            f"if held-out runs were independent, which folds that share training runs are not: it "
            f"covers a little less often than it says. With power {self.power:g} {beyond}."
        )


def residue(
    first: PyTree,
    second: PyTree,
    *,
    seed: int,
    paired: bool = False,
    num_folds: int = 5,
    ridge: float = 1.0,
    num_permutations: int = 999,
    confidence: float = 0.95,
    power: float = 0.8,
) -> Residue:
    """Trains a ridge classifier on some runs' states and asks it about the others.

    Features are standardised on the training runs alone. With K the kernel of the features and y
    the labels +-1, held-out scores are K_test (K_train + shift I)^-1 y_train: linear in y, so that
    all permutations cost one product.

    Args:
      first, second: states of the two groups, stacked: leaves with a leading axis of n runs each;
        anything is a state: parameters and state, or moments alone. Inexact leaves are looked at.
      seed: of folds and permutations, host integer.
      paired: run i of both groups had the same start and order; pairs then stay in one fold, and
        labels are swapped within pairs.
      num_folds: each holds as many runs of one group as of the other.
      ridge: > 0; the shift is this times the mean square norm of a training run's features.
      num_permutations: the p-value is a multiple of 1 / (1 + this).

    Returns:
      A `Residue`.

    Cost: (2 n)^2 inner products of states, and a solve of size 2 n a fold.

    References: the permutation test of Ojala and Garriga 2010, JMLR 11, section 3, test 1, with
      labels permuted within folds; Clopper and Pearson 1934.

    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(2, 20, 50))
    >>> b += 1.0
    >>> measured = residue({"m": a}, {"m": b}, seed=0)
    >>> measured.found, measured.accuracy.low > 0.5
    (True, True)
    """
    features, n = _features(first, second)
    _check(n, num_folds, ridge, num_permutations, power)
    rng = np.random.default_rng(seed)
    labels = np.repeat([1.0, -1.0], n)
    folds = _folds(rng, n, num_folds, paired)
    probe = _probe(features, folds, ridge)
    permuted = np.array([_permuted(rng, labels, folds, n, paired) for _ in range(num_permutations)])
    right, auc = _num_right(probe @ labels, labels), _auc(probe @ labels, labels, folds)
    null = np.array([_num_right(probe @ y, y) for y in permuted])
    # Counts tie often, which would make the test timid: the area under the curve decides.
    finer = np.array([_auc(probe @ y, y, folds) for y in permuted])
    as_good = (null > right) | ((null == right) & (finer >= auc))
    critical = float(np.quantile(null, 1 - LEVEL, method="higher"))
    return Residue(
        accuracy=clopper_pearson(round(right), 2 * n, confidence=confidence),
        auc=auc,
        p_value=float((1 + np.sum(as_good)) / (1 + num_permutations)),
        null_accuracy=float(np.mean(null) / (2 * n)),
        detectable_accuracy=_detectable(
            critical, 2 * n, power, least_p=2 / _num_labellings(folds, n, paired)
        ),
        power=power,
        num_runs=2 * n,
        num_features=features.shape[1],
        num_permutations=num_permutations,
    )


def _check(n, num_folds, ridge, num_permutations, power):
    if not 2 <= num_folds <= n:
        raise ValueError(f"Expected 2 <= num_folds={num_folds} <= {n} runs of each group.")
    if not ridge > 0:
        raise ValueError(f"Expected ridge={ridge} > 0.")
    if num_permutations < 19:
        raise ValueError(
            f"Expected num_permutations={num_permutations} >= 19, to reach p <= 0.05 at all."
        )
    if not 0 < power < 1:
        raise ValueError(f"Expected power={power} strictly between 0 and 1.")


def _features(first: PyTree, second: PyTree) -> tuple[Float64[np.ndarray, "r d"], int]:
    """The numbers that vary, both groups one after the other, and the runs of each."""
    same: bool = jax.tree.structure(first) == jax.tree.structure(second)  # type: ignore[operator]
    if not same:
        raise ValueError("Expected states of one structure, got two: are they of one optimizer?")
    columns = []
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        if jnp.shape(a) != jnp.shape(b) or not jnp.ndim(a):
            raise ValueError(
                f"Expected stacked states of like shapes, as many runs in both groups, got leaves "
                f"of shape {jnp.shape(a)} and {jnp.shape(b)}."
            )
        if tree.is_inexact(a):
            both = np.concatenate([np.asarray(a, np.float64), np.asarray(b, np.float64)])
            columns.append(both.reshape(len(both), -1))
    if not columns or len({len(c) for c in columns}) > 1:
        raise ValueError("Expected inexact leaves that all have the same number of runs.")
    features = np.concatenate(columns, axis=1)
    if not np.all(np.isfinite(features)):
        raise ValueError("Expected finite states. Leave out leaves that hold infinities.")
    varying = np.ptp(features, axis=0) > 0
    return features[:, varying], len(features) // 2


def _folds(rng, n: int, num_folds: int, paired: bool) -> np.ndarray:
    """The fold of each run: equally many of both groups in each, pairs together where `paired`."""
    of_group = np.arange(n) % num_folds
    first = rng.permutation(of_group)
    return np.concatenate([first, first if paired else rng.permutation(of_group)])


def _permuted(rng, labels: np.ndarray, folds: np.ndarray, n: int, paired: bool) -> np.ndarray:
    """Labels under the null: swapped in pairs, or shuffled in each fold."""
    if paired:
        signs = rng.choice([-1.0, 1.0], size=n)
        return np.concatenate([signs, -signs])
    shuffled = labels.copy()
    for fold in np.unique(folds):
        shuffled[folds == fold] = rng.permutation(labels[folds == fold])
    return shuffled


def _probe(features, folds, ridge: float) -> Float64[np.ndarray, "r r"]:
    """The matrix that takes labels to held-out scores: a run's row is zero at its own fold."""
    matrix = np.zeros((len(features), len(features)))
    for fold in np.unique(folds):
        test, train = folds == fold, folds != fold
        centre, spread = np.mean(features[train], 0), np.std(features[train], 0)
        scaled = (features - centre) * np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0)
        kernel = scaled @ scaled[train].T
        size = np.sum(train)
        shift = ridge * max(np.trace(kernel[train]) / size, np.finfo(np.float64).tiny)
        matrix[np.ix_(test, train)] = kernel[test] @ np.linalg.inv(
            kernel[train] + shift * np.eye(size)
        )
    return matrix


def _num_right(scores, labels) -> float:
    """Runs named rightly; a score of zero is half right."""
    return float(np.sum(scores * labels > 0) + 0.5 * np.sum(scores == 0))


def _auc(scores, labels, folds) -> float:
    """How often a run of the first group scores above one of the second in its own fold."""
    above = compared = 0.0
    for fold in np.unique(folds):
        one, other = (scores[(folds == fold) & (labels == sign)] for sign in (1, -1))
        above += np.sum(one[:, None] > other) + 0.5 * np.sum(one[:, None] == other)
        compared += one.size * other.size
    return float(above / compared)


def _num_labellings(folds: np.ndarray, n: int, paired: bool) -> float:
    """How many labellings the permutations choose from; each is as good as its opposite."""
    if paired:
        return 2.0**n
    sizes = np.bincount(folds[:n])
    return float(np.prod(scipy.special.binom(2 * sizes, sizes)))


def _detectable(critical: float, runs: int, power: float, *, least_p: float) -> float:
    """The least accuracy at which more than `critical` of the runs are right with `power`."""
    needed = int(np.floor(critical)) + 1
    if needed > runs or least_p > LEVEL:
        return float("inf")
    # P(Binomial(runs, p) >= needed) is the regularised incomplete beta of p.
    return float(scipy.special.betaincinv(needed, runs - needed + 1, power))
