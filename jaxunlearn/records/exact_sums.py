"""Sums of integers on a power-of-two grid: what was added can be subtracted, to the last bit.

A float sum depends on the order of its terms, and subtracting one leaves rounding behind. Rows are
therefore rounded to a grid once, by themselves; everything after that is integer arithmetic.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64, UInt32, UInt64

from jaxunlearn import errors

MAX_UNITS = 2**24
"""A row's values lie within this many grid steps of zero."""

_EXACT = 2**53  # every integer up to here is a float64
_LIMIT = 2**63


def check_grid(grid: float, name: str = "grid") -> None:
    """Refuse a grid that is no power of two: dividing by another number would round."""
    mantissa, exponent = math.frexp(grid) if grid > 0 and math.isfinite(grid) else (0.0, 0)
    if mantissa != 0.5 or not -400 <= exponent <= 400:
        raise ValueError(f"Expected {name}={grid} to be a power of two, such as 2.0**-16.")


def quantise(values, grid: float, *, limit: int = MAX_UNITS) -> Int64[np.ndarray, "..."]:
    """`round(values / grid)`, halves to even: the same on every machine, row by row.

    Raises:
      NonFiniteError: a value is NaN or infinite.
      SumOverflowError: a value is further than `limit` grid steps from zero.

    >>> quantise(np.array([0.3, -1.0, 0.125]), 0.25)
    array([ 1, -4,  0])
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        values = values.astype(np.float32)  # bfloat16 and the like
    with np.errstate(over="ignore", under="ignore"):
        units = np.rint(values.astype(np.float64) / grid)
    if not np.all(np.isfinite(units)):
        raise errors.NonFiniteError("Expected rows of finite numbers, got NaN or infinity.")
    largest = float(np.max(np.abs(units), initial=0.0))
    if largest > limit:
        raise errors.SumOverflowError(
            f"Expected values within {limit * grid:g} of zero, {limit} steps of the grid {grid:g}, "
            f"got {largest * grid:g}. Scale the rows, or take a coarser grid."
        )
    return units.astype(np.int64)


def add_exactly(
    a: Int64[np.ndarray, "..."], b: Int64[np.ndarray, "..."]
) -> Int64[np.ndarray, "..."]:
    """`a + b`, or an error where the sum does not fit 64 bits.

    Raises:
      SumOverflowError
    """
    with np.errstate(over="ignore"):
        total = a + b
    if np.any(((a ^ total) & (b ^ total)) < 0):
        raise errors.SumOverflowError(
            "Expected sums below 2^63 grid steps. Take a coarser grid or scale the rows down."
        )
    return total


def cross_product(
    a: Int64[np.ndarray, "n p"], b: Int64[np.ndarray, "n q"]
) -> Int64[np.ndarray, "p q"]:
    """`a.T @ b` in exact integer arithmetic, at the speed of float64 matrix products.

    Below 2^53 every partial sum of a float64 product is an integer that float64 holds, in any
    order and with any fused operation. Rows are taken in chunks that stay below, and large
    factors are split in two.

    Raises:
      SumOverflowError: the result does not fit 64 bits.
    """
    largest_a = int(np.max(np.abs(a), initial=0)) or 1
    largest_b = int(np.max(np.abs(b), initial=0)) or 1
    chunk = (_EXACT - 1) // (largest_a * largest_b)
    if chunk < 64 and len(a) > chunk:
        if largest_b > largest_a:
            return cross_product(b, a).T
        shift = largest_a.bit_length() // 2
        high = cross_product(a >> shift, b)
        if int(np.max(np.abs(high), initial=0)) >= _LIMIT >> shift:
            raise errors.SumOverflowError("Expected products below 2^63 grid steps squared.")
        return add_exactly(high << shift, cross_product(a & ((1 << shift) - 1), b))
    total = np.zeros((a.shape[1], b.shape[1]), np.int64)
    for start in range(0, len(a), chunk or 1):
        rows = slice(start, start + chunk)
        part = a[rows].astype(np.float64).T @ b[rows].astype(np.float64)
        total = add_exactly(total, part.astype(np.int64))
    return total


def pack_int64(values: Int64[np.ndarray, "..."]) -> UInt32[Array, "... 2"]:
    """Integers as pairs of 32-bit words, low word first, so that they survive without x64."""
    shape = np.shape(values)
    return jnp.asarray(np.ascontiguousarray(values, "<i8").view("<u4").reshape(*shape, 2))


def unpack_int64(words: UInt32[Array, "... 2"]) -> Int64[np.ndarray, "..."]:
    """The inverse of `pack_int64`, on the host."""
    host = np.ascontiguousarray(jax.device_get(words), "<u4")
    return host.view("<i8").reshape(host.shape[:-1])


def fingerprints(*integers: Int64[np.ndarray, "b ..."]) -> UInt64[np.ndarray, "b"]:
    """64 bits of each row of some arrays together: equal for equal rows, else equal by accident.

    A sum of products with fixed odd factors, modulo 2^64. It finds rows that changed or were mixed
    up; it is no secret and no defence against somebody who makes rows collide.
    """
    flat = [np.asarray(part, np.int64).reshape(len(part), -1) for part in integers]
    joined = np.concatenate(flat, axis=1).view(np.uint64)
    words = np.random.default_rng(0x5EED).integers(0, 2**64, joined.shape[1] + 1, np.uint64)
    factors = words | np.uint64(1)
    with np.errstate(over="ignore"):
        return np.sum(joined * factors[1:], axis=1, dtype=np.uint64) ^ factors[0]
