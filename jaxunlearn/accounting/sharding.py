"""What sharded and sliced training (SISA) is expected to retrain for a deletion."""

import math


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"Expected an integer {name}={value} >= 1.")


def sharded_retraining(
    num_examples: int, num_shards: int, num_requests: int, *, together: bool = False
) -> float:
    """Expected rows retrained over `num_requests` uniform deletions, times the epochs.

        one by one:  E = (N/S + 1/(2S) - 1) K - K^2 / (2S)
        together:    E = N (1 - (1 - 1/S)^K) - K

    Args:
      num_examples: N, in shards of equal size.  num_shards: S.  num_requests: K <= N.
      together: all requests are served in one retraining.

    Returns:
      Rows, each counted once for each epoch's worth of training it takes part in again.

    Raises:
      ValueError: a count is not a whole number in range.

    >>> round(sharded_retraining(1000, 10, 20), 2)
    1961.0
    >>> round(sharded_retraining(1000, 10, 20, together=True), 2)
    858.42

    References:
      Bourtoule et al. 2021, arXiv 1912.03817, section VII (time analysis).
    """
    _check(num_examples=num_examples, num_shards=num_shards, num_requests=num_requests)
    n, s, k = num_examples, num_shards, num_requests
    if k > n or s > n:
        raise ValueError(f"Expected num_requests={k} and num_shards={s} <= num_examples={n}.")
    if together:
        return -n * math.expm1(k * math.log1p(-1 / s)) - k if s > 1 else float(n - k)
    return (n / s + 1 / (2 * s) - 1) * k - k**2 / (2 * s)


def slice_epochs(epochs: float, num_slices: int) -> float:
    """Epochs after each slice that make sliced training cost what `epochs` without slices do.

        e_R = 2 e' / (R + 1)

    Raises:
      ValueError: an argument is out of range.

    >>> slice_epochs(10, 4)
    4.0
    """
    _check(num_slices=num_slices)
    if not epochs > 0:
        raise ValueError(f"Expected epochs={epochs} > 0.")
    return 2 * epochs / (num_slices + 1)


def sliced_retraining(num_slices: int) -> float:
    """Expected cost of one deletion from a shard of R slices, as a share of the whole shard.

        (2R + 1) / (3R): at best 1.5 times faster than without slices

    Raises:
      ValueError: `num_slices` is no whole number >= 1.

    >>> sliced_retraining(1), round(sliced_retraining(10**9), 6)
    (1.0, 0.666667)
    """
    _check(num_slices=num_slices)
    return (2 * num_slices + 1) / (3 * num_slices)
