"""Noise that a certificate may rest on: exact discrete Gaussians on a power-of-two grid.

Floating-point normals betray their centre through the bits that they cannot reach (Mironov 2012).
Here, on the host, the values are rounded to a grid, the noise is an integer, and every random
decision compares integers: no float is involved before the sum is scaled back.
"""

import dataclasses
import math
import os
import secrets
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from jaxunlearn.accounting.rounding import above
from jaxunlearn.accounting.sampler import Entropy, checked, discrete_gaussian, fill
from jaxunlearn.errors import NonFiniteError
from jaxunlearn.progress import progress as show_progress

__all__ = [
    "Entropy",
    "Release",
    "add_grid_noise",
    "cast_sensitivity",
    "discrete_gaussian",
    "grid_of",
    "grid_sensitivity",
    "source_of",
]

MIN_STDDEV_ON_GRID = 2**24
"""The noise is at least this many grid steps wide, and less than twice as many."""

_CLAMP, _REFUSED = 2**62, 2**61
_CHUNK = 2**16
_OS_ENTROPY = (secrets.token_bytes, os.urandom)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """Values after noise, and the facts about the noise that a certificate states.

    values: float64 (d,), multiples of `grid`; beyond 2^53 grid steps rounded to float64, which is
      post-processing of the noisy integer.
    grid: a power of two, in the unit of `values`.
    stddev_on_grid: the noise in grid steps, in [2^24, 2^25).
    noise_stddev: `grid * stddev_on_grid` exactly; at least what was asked for.
    sensitivity_on_grid: L2 sensitivity after rounding to the grid; None if none was given.
    rng: "os-entropy", or "injected" when the caller supplied the bytes.
    """

    values: Float64[np.ndarray, " d"]
    grid: float
    stddev_on_grid: int
    noise_stddev: float
    sensitivity_on_grid: float | None
    rng: str

    def cast(self, dtype: np.typing.DTypeLike) -> np.ndarray:
        """The noisy values in the parameters' own type: post-processing, at no cost.

        Raises:
          NonFiniteError: one does not fit; a function of the noisy values alone.

        >>> add_grid_noise(np.zeros(2), noise_stddev=1.0).cast(np.float16).dtype
        dtype('float16')
        """
        with np.errstate(over="ignore", under="ignore"):
            narrow = self.values.astype(dtype)
        if not np.all(np.isfinite(narrow)):
            raise NonFiniteError(f"Expected noisy values that {dtype} can hold. Use a wider type.")
        return narrow


def add_grid_noise(
    values: Float64[np.ndarray, " d"],
    *,
    noise_stddev: float,
    sensitivity: float | None = None,
    entropy: Entropy = secrets.token_bytes,
    progress: bool | None = False,
) -> Release:
    """Rounds `values` to a grid about 2^-24 of the noise and adds an exact discrete Gaussian.

        released_i = grid * (round(values_i / grid) + k_i),   P(k_i) ~ exp(-k_i^2 / (2 s^2))

    All parameters of one release go in as one vector: the grid depends on `noise_stddev` alone.
    Whatever is done with the result, a cast to a narrower type included, is post-processing.

    Args:
      values: float64 (d,), finite, below 2^61 grid steps (about 2^37 noise_stddev). Parameters of a
        narrower type are widened first, which is exact; if they were rounded to it after
        `sensitivity` was proven, that is `cast_sensitivity`.
      noise_stddev: the least standard deviation per coordinate, in the unit of `values`;
        `certified_noise` says how much is needed.
      sensitivity: L2 sensitivity of `values`; only recorded, with the cost of rounding added.
      entropy: source of random bytes, replaceable for tests. Whoever knows it knows the noise. A
        seed is refused.
      progress: shows a bar; None where standard error is a terminal.

    Returns:
      A `Release`; `Release.noise_stddev` is what the mechanism used. `values` is left alone.

    Cost: about 48 bytes of entropy and 0.3 microseconds per coordinate; memory for the result and
      20 MB.

    Guarantees:
      A refusal for size is a function of the noisy integers alone (they are clamped, which no
      sensitivity suffers from, and judged after the noise), so it costs no privacy. One for NaN or
      infinity is not: keep that error from whom the release is for.

    Raises:
      TypeError: `entropy` is not a function.
      NonFiniteError: a value is NaN or infinite.
      ValueError: another dtype or rank, a value too large for the grid, a scale out of range,
        bytes that cannot be random.

    >>> release = add_grid_noise(np.zeros(3), noise_stddev=1.0, sensitivity=0.5)
    >>> release.grid == 2.0**-24, release.stddev_on_grid == 2**24, release.noise_stddev
    (True, True, 1.0)
    >>> release.values.shape, release.rng
    ((3,), 'os-entropy')

    References:
      Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020.
      Mironov, "On significance of the least significant bits for differential privacy", CCS 2012.
    """
    values = np.asarray(values)
    if values.dtype != np.float64 or values.ndim != 1:
        raise ValueError(
            f"Expected a float64 vector, got {values.dtype} of shape {values.shape}. Ravel the "
            "parameters into one vector and widen it first."
        )
    draw = checked(entropy)
    grid, stddev_on_grid = grid_of(noise_stddev)
    if not np.all(np.isfinite([values.min(initial=0.0), values.max(initial=0.0)])):
        raise NonFiniteError("Expected finite values to release, got NaN or infinity.")
    on_grid = None
    if sensitivity is not None and values.size:
        on_grid = grid_sensitivity(sensitivity, noise_stddev=noise_stddev, dimension=values.size)
    noisy = np.empty_like(values)
    with show_progress("adding noise", values.size, show=progress) as advance:
        for begin in range(0, values.size, _CHUNK):
            part = slice(begin, begin + _CHUNK)
            noisy[part] = _on_grid(values[part], grid, stddev_on_grid, draw)
            advance(noisy[part].size)
    return Release(
        values=noisy,
        grid=grid,
        stddev_on_grid=stddev_on_grid,
        noise_stddev=grid * stddev_on_grid,
        sensitivity_on_grid=on_grid,
        rng=source_of(entropy),
    )


def source_of(entropy: Entropy) -> str:
    """What a certificate says of a source of bytes: "os-entropy" or "injected".

    >>> source_of(secrets.token_bytes), source_of(lambda size: bytes(size))
    ('os-entropy', 'injected')
    """
    return "os-entropy" if entropy in _OS_ENTROPY else "injected"


def _on_grid(values, grid, stddev_on_grid, entropy):
    """grid * (round(values / grid) + noise) for one chunk, refused where the sum is too large."""
    noise = np.empty(values.size, np.int64)
    fill(noise, stddev_on_grid, entropy)
    with np.errstate(over="ignore", under="ignore"):
        units = np.rint(values / grid)  # exact scaling; halves to even
    total = np.clip(units, -float(_CLAMP), float(_CLAMP)).astype(np.int64) + noise
    if np.any(np.abs(total) >= _REFUSED):  # the noise is below 2^35: a clamped value never passes
        raise ValueError(
            f"Expected values below 2^61 grid steps of {grid}. The noise is too small for them "
            "to be released on a grid."
        )
    return total.astype(np.float64) * grid


def grid_of(noise_stddev: float) -> tuple[float, int]:
    """The grid and the integer scale for a noise: ceil(noise_stddev / grid) in [2^24, 2^25).

    >>> grid_of(1.0) == (2.0**-24, 2**24)
    True
    """
    if not 2.0**-900 <= noise_stddev <= 2.0**900:
        raise ValueError(f"Expected noise_stddev={noise_stddev} in [2^-900, 2^900].")
    mantissa, exponent = math.frexp(noise_stddev)
    stddev_on_grid = math.ceil(mantissa * 2 * MIN_STDDEV_ON_GRID)
    if stddev_on_grid == 2 * MIN_STDDEV_ON_GRID:
        stddev_on_grid, exponent = MIN_STDDEV_ON_GRID, exponent + 1
    return math.ldexp(1.0, exponent - 25), stddev_on_grid


def grid_sensitivity(sensitivity: float, *, noise_stddev: float, dimension: int) -> float:
    """L2 sensitivity after rounding each of `dimension` coordinates to the grid: an upper bound.

    Each of the two vectors moves by at most grid/2 per coordinate, so their distance grows by at
    most grid * sqrt(dimension). Rounded up.

    Args:
      sensitivity: of the values before rounding, >= 0.
      noise_stddev: what `add_grid_noise` will be called with (or the `noise_stddev` it returned).
      dimension: number of coordinates released, >= 1.

    Raises:
      ValueError: an argument is out of range or not finite.

    >>> grid_sensitivity(1.0, noise_stddev=1.0, dimension=4) >= 1 + 2 * 2.0**-24
    True
    """
    if not 0 <= sensitivity < math.inf:
        raise ValueError(f"Expected sensitivity={sensitivity} >= 0 and finite.")
    if not 1 <= dimension <= 2**53:
        raise ValueError(f"Expected dimension={dimension} >= 1.")
    grid, _ = grid_of(noise_stddev)
    rounding = math.nextafter(grid * math.nextafter(math.sqrt(dimension), math.inf), math.inf)
    return math.nextafter(sensitivity + rounding, math.inf)


def cast_sensitivity(
    sensitivity: float,
    *,
    values: Float64[np.ndarray, " d"],
    dtype: np.typing.DTypeLike,
    oracle_cast: bool = True,
) -> float:
    """L2 sensitivity of parameters that were rounded to a narrower type: an upper bound.

    If w and the oracle's w* are at most `sensitivity` apart, and round to c(w) and c(w*), then

        ||c(w) - c(w*)|| <= sensitivity + ||c(w) - w|| + ||c(w*) - w*||,

    the second term at most half a step of the type in every coordinate of c(w), the third, since
    rounding moves x by at most u |x| or a (half the least step; in the range of float32 the least
    normal number, since XLA may flush what is below), at most u (||w|| + sensitivity) + sqrt(d) a.
    Both with 2^-10 of themselves added, so that the way to 16 bits may go through float32.
    For parameters kept in bfloat16 this is often more than the rest: prefer to keep the iterate in
    float64. A cast *after* the noise costs nothing.

    Args:
      sensitivity: proven before the cast, >= 0.
      values: c(w), as float64.
      dtype: the type rounded to: float16, bfloat16, float32.
      oracle_cast: whether the oracle's parameters are rounded too; False drops the third term.

    Raises:
      NonFiniteError: a value, or what the oracle's may be, is more than `dtype` can hold.
      ValueError: `sensitivity` is out of range, or `dtype` is no floating type below float64.

    >>> cast_sensitivity(0.5, values=np.ones(1), dtype=np.float16, oracle_cast=False)
    0.500488...
    """
    if not 0 <= sensitivity < math.inf:
        raise ValueError(f"Expected sensitivity={sensitivity} >= 0 and finite.")
    form = _format_of(dtype)
    values = np.abs(np.asarray(values, np.float64))
    largest = values.max(initial=0.0) + (sensitivity if oracle_cast else 0.0)
    if not largest <= form.largest:
        raise NonFiniteError(f"Expected values that {dtype} can hold, got NaN or up to {largest}.")
    count = max(values.size, 1)
    slack = 1.0 + (count + 8) * 2.0**-52  # sums and roots of `count` float64 numbers
    _, exponents = np.frexp(values)
    halves = np.ldexp(0.5, exponents - form.digits)  # half a step above |c(w)|
    halves = np.where(values < form.normal, form.absolute, halves)
    slack *= 1.0 + 2.0**-10  # float64 to bfloat16 goes by way of float32 and is rounded twice
    ours = math.sqrt(np.sum(halves**2)) * slack
    total = above(sensitivity + ours)
    if oracle_cast:
        norm = math.sqrt(np.sum(values**2)) * slack
        relative = 2.0**-form.digits * (norm + ours + sensitivity)
        total = above(total + (relative + math.sqrt(count) * form.absolute) * slack)
    return total


class _Format(NamedTuple):
    """A floating type: largest number, least normal one, digits; the error below `normal`."""

    largest: float
    normal: float
    digits: int
    absolute: float


def _format_of(dtype):
    """The `_Format` of a type of fewer than 64 bits."""
    import ml_dtypes

    try:
        info = ml_dtypes.finfo(dtype)
    except (ValueError, TypeError):
        raise ValueError(f"Expected a floating dtype, got {dtype}.") from None
    if info.bits >= 64:
        raise ValueError(f"Expected a dtype narrower than float64, got {dtype}.")
    normal, step = float(info.smallest_normal), float(info.smallest_subnormal)
    absolute = normal if info.minexp <= -126 else step / 2  # XLA may flush subnormals of float32
    return _Format(float(info.max), normal, info.nmant + 1, absolute)
