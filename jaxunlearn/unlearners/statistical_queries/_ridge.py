"""Ridge regression from integer sums, and the solve whose answer does not depend on its route.

The coefficients are the solution of an integer system, rounded to a grid. A float64 inverse,
factorised or downdated by Woodbury's formula, only proposes corrections; the residual of what it
proposes is computed in integers, and bounds the error: all eigenvalues of the matrix are >= l2.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float64, Int64

from jaxunlearn import errors, records
from jaxunlearn.types import Batch
from jaxunlearn.unlearners.statistical_queries._summation import Solved, Summation

GUARD = 1e-4
"""Least eigenvalue of I - X_U A^-1 X_U^T at which the inverse is still downdated."""

_GUARD_BITS = 96  # bits of the iterate below the grid of the solution
_BOUND_BITS = 56  # the iterate is known to 2^56 of these units: 2^-40 of the grid
_TIE_BITS = 66  # and a coefficient so near to a tie counts as one
_MAX_REFINEMENTS = 60
_LIMB = 21


def ridge(
    *,
    l2: float,
    grid: float = 2.0**-16,
    target_grid: float | None = None,
    solution_grid: float = 2.0**-24,
    features: Callable[[Batch], Array] = operator.itemgetter("x"),
    targets: Callable[[Batch], Array] = operator.itemgetter("y"),
) -> Summation:
    """Ridge regression in summation form, for `statistical_queries`.

        theta = argmin sum_i |y_i - x_i^T theta|^2 + l2 |theta|^2 = A^-1 c
        A = X^T X + l2 I,   c = X^T y
        A_U^-1 = A^-1 + A^-1 X_U^T (I - X_U A^-1 X_U^T)^-1 X_U A^-1          (deleting the rows U)

    l2 does not grow with the number of rows: a deletion would otherwise change all of A. There is
    no intercept; append a column of ones.

    Args:
      l2: > 0, of the sum of squares; rounded to a multiple of grid^2.
      grid: power of two to which features are rounded; they must lie within 2^24 of it.
      target_grid: the same for the targets; None means `grid`.
      solution_grid: power of two to which the coefficients are rounded.
      features: rows -> (b, d).
      targets: rows -> (b,) or (b, m).

    Returns:
      A `Summation` with params {"coefficients": float32 (d,) or (d, m)}: the exact solution for
      the rounded rows, to the nearest multiple of `solution_grid`, whatever was added and deleted
      before, in any order. (What decides a tie could differ with a chance of about 2^-38 each.)

    Cost: O(d^2) a row to fit; a deletion of u rows costs O(u d^2) by Woodbury's formula, and
      O(d^3) where the guard refuses the formula or 3 u > d; both add about 18 products d by d a
      refinement, some three of them. The record holds 16 d^2 bytes.

    Raises:
      ValueError: an option is out of range.  SolverError: the system is too ill-conditioned.

    >>> rows = {"x": np.array([[1.0], [2.0]]), "y": np.array([2.0, 4.0])}
    >>> query = ridge(l2=5.0)
    >>> query.solve(query.sums(query.integers(rows)), 2, None, None).params["coefficients"]
    Array([1.], dtype=float32)
    """
    target_grid = grid if target_grid is None else target_grid
    for name, value in (
        ("grid", grid), ("target_grid", target_grid), ("solution_grid", solution_grid),
    ):  # fmt: skip
        records.check_grid(value, name)
    l2_units = round(l2 / grid**2) if l2 > 0 and math.isfinite(l2 / grid**2) else 0
    if not 1 <= l2_units < 2**62:
        raise ValueError(f"Expected l2={l2} in [{grid**2:g}, {2.0**62 * grid**2:g}].")
    to_solution = target_grid / grid / solution_grid
    shift = round(math.log2(to_solution)) + _GUARD_BITS
    if shift < 0:
        raise ValueError("Expected solution_grid * grid / target_grid below 2^96.")

    def integers(rows):
        x = np.asarray(features(rows))
        y = np.asarray(targets(rows))
        if x.ndim != 2 or y.ndim not in (1, 2):
            raise errors.MissingDataError(
                f"Expected features (b, d) and targets (b,) or (b, m), got {x.shape}, {y.shape}."
            )
        return {"x": records.quantise(x, grid), "y": records.quantise(y, target_grid)}

    def sums(units):
        y = units["y"].reshape(len(units["y"]), -1)
        cross = records.cross_product(units["x"], y)
        if units["y"].ndim == 1:
            cross = cross[:, 0]
        return {"gram": records.cross_product(units["x"], units["x"]), "cross": cross}

    def solve(totals, count, aid, removed):
        del count
        dimension = len(totals["gram"])
        diagonal = l2_units * np.eye(dimension, dtype=np.int64)
        gram = records.add_exactly(totals["gram"], diagonal)
        cross = totals["cross"].reshape(dimension, -1)
        iterate, inverse, measured = _solve(gram, cross, l2_units, shift, aid, removed)
        grid_steps = _to_grid(iterate).reshape(totals["cross"].shape)
        values = np.ldexp(grid_steps.astype(np.float64), round(math.log2(solution_grid)))
        return Solved({"coefficients": jnp.asarray(values, jnp.float32)}, inverse, measured)

    def predict(params, batch):
        return jnp.matmul(
            features(batch), params["coefficients"], precision=jax.lax.Precision.HIGHEST
        )

    return Summation(
        name="ridge",
        target="minimiser",
        describe=(
            f"Features are rounded to multiples of {grid!r}, targets to multiples of "
            f"{target_grid!r}, l2 to {l2_units * grid**2!r}; the coefficients of these rows are "
            f"exact to the nearest multiple of {solution_grid!r}, then given in float32."
        ),
        reproduced=(
            "measured",
            "Rounding a row to the grid is exact on every machine; a fingerprint of what was added "
            "was compared with what was subtracted.",
        ),
        integers=integers,
        sums=sums,
        solve=solve,
        predict=predict,
    )


def _solve(gram, cross, l2_units, shift, aid, removed) -> tuple[np.ndarray, np.ndarray, dict]:
    """(iterate, inverse, measurements) by the downdated inverse, or else by a fresh one."""
    limbs = _limbs(gram)
    measured: dict[str, Any] = {"least_pivot": None, "route": "factorised"}
    if removed is not None and 3 * len(removed["x"]) <= len(gram):
        inverse, measured["least_pivot"] = downdate(aid, removed["x"].astype(np.float64))
        if inverse is not None:
            found = _refine(limbs, cross, inverse, l2_units, shift)
            if found is not None:
                return found[0], inverse, measured | {"route": "woodbury", "refinements": found[1]}
    inverse = _invert(gram)
    found = None if inverse is None else _refine(limbs, cross, inverse, l2_units, shift)
    if inverse is None or found is None:
        raise errors.SolverError(
            "Expected a ridge system that float64 can factorise, got one too ill-conditioned. "
            "Raise l2, or scale the features alike."
        )
    return found[0], inverse, measured | {"refinements": found[1]}


def downdate(
    inverse: Float64[np.ndarray, "d d"], removed: Float64[np.ndarray, "u d"]
) -> tuple[Float64[np.ndarray, "d d"] | None, float]:
    """The inverse without some rows by Woodbury's formula, and the least pivot 1 - h.

    None where the pivot is below `GUARD`: then so many digits of the inverse would go.
    """
    half = inverse @ removed.T
    capacitance = np.eye(len(removed)) - removed @ half
    if not np.all(np.isfinite(capacitance)):
        return None, 0.0
    least = float(np.linalg.eigvalsh((capacitance + capacitance.T) / 2)[0])
    if least < GUARD:
        return None, least
    return inverse + half @ np.linalg.solve(capacitance, half.T), least


def _invert(gram: Int64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"] | None:
    """A float64 inverse by Cholesky's factorisation; None where it breaks down."""
    try:
        factor = scipy.linalg.cho_factor(gram.astype(np.float64))
        return scipy.linalg.cho_solve(factor, np.eye(len(gram)))
    except np.linalg.LinAlgError:
        return None


def _refine(limbs, cross, inverse, l2_units, shift) -> tuple[np.ndarray, int] | None:
    """Integers T with |T 2^-shift - A^-1 c| < 2^(56 - shift), and how many corrections it took.

    None where corrections do not shrink the residual: the inverse is too far from the matrix's.
    """
    to_int = np.frompyfunc(lambda x: int(math.ldexp(x, shift)), 1, 1)
    to_float = np.frompyfunc(lambda r: math.ldexp(float(r), -shift), 1, 1)
    scaled = cross.astype(object) * (1 << shift)
    iterate = np.zeros(cross.shape, object)
    residual, previous = scaled, None
    for step in range(_MAX_REFINEMENTS):
        norms = [math.isqrt(sum(int(r) ** 2 for r in column)) + 1 for column in residual.T]
        bound = max(norms, default=0) // l2_units + 1
        if bound <= 1 << _BOUND_BITS:
            return iterate, step
        if previous is not None and 4 * bound > previous:
            return None
        previous = bound
        move = inverse @ to_float(residual).astype(np.float64)
        if not np.all(np.isfinite(move)):
            return None
        iterate = iterate + to_int(move)
        residual = scaled - _exact_product(limbs, iterate)
    return None


def _limbs(gram: Int64[np.ndarray, "d d"]) -> list[Float64[np.ndarray, "d d"]]:
    """A matrix as three of 21 bits each, the last with the sign."""
    mask = (1 << _LIMB) - 1
    parts = [gram & mask, (gram >> _LIMB) & mask, gram >> 2 * _LIMB]
    return [part.astype(np.float64) for part in parts]


def _exact_product(limbs, vector: np.ndarray) -> np.ndarray:
    """The integer matrix times long integers: products of pieces that float64 holds exactly."""
    dimension, columns = vector.shape
    bits = 52 - (_LIMB + 1) - max(1, dimension - 1).bit_length()
    longest = max(int(value).bit_length() for value in vector.ravel())
    shifts = range(0, longest + 1, bits)
    mask = (1 << bits) - 1
    pieces = [(vector >> shift) & mask for shift in shifts[:-1]] + [vector >> shifts[-1]]
    stacked = np.concatenate(pieces, axis=1).astype(np.float64)
    total = np.zeros(vector.shape, object)
    for i, limb in enumerate(limbs):
        product = (limb @ stacked).astype(np.int64).astype(object)
        for j, shift in enumerate(shifts):
            total = total + (product[:, j * columns : (j + 1) * columns] << (shift + _LIMB * i))
    return total


def _to_grid(iterate: np.ndarray) -> np.ndarray:
    """The iterate to the nearest integer of the solution's grid, ties (to 2^-30) to even."""
    half = 1 << (_GUARD_BITS - 1)

    def nearest(value):
        low, rest = value >> _GUARD_BITS, value & (2 * half - 1)
        if abs(rest - half) <= 1 << _TIE_BITS:
            return low + (low & 1)
        return low + (rest > half)

    return np.frompyfunc(nearest, 1, 1)(iterate)
