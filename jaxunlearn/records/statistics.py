"""Sums of gradients and Hessians kept after training, so that a deletion reads no retained row."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, UInt8, UInt32

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records.iterates import pack_float64, unpack_float64
from jaxunlearn.types import Params, Unlearner, UnlearnerState


class StoringUnlearner(Unlearner):
    """An `Unlearner` with one more function, the last act of training.

    store(params, opt_state, *, data) -> opt_state with the sums over all rows in its record, after
      which `forget` reads the rows to forget and no other. Where it was not called, or training
      went on since, `forget` does it, and then needs all rows.
    """

    _names = (*Unlearner._names, "store")
    store: Callable[..., UnlearnerState]


class Statistics(NamedTuple):
    """Sums over the rows of training at the origin, in float64 as pairs of 32-bit words.

    origin_words: the parameters at which they were taken.
    origin_digest: SHA-256 of the parameters they are of; zeros where nothing is stored yet.
    gradient_words: sum_i grad loss_i.  hessian_words: the lower triangle of sum_i hess loss_i.
    figure_words: sum_i ||grad loss_i||, what rounding in the sums is proportional to, and the norm
      of the gradient of the mean objective that training left at the origin.
    num_stored, num_gone: rows in the sums, and rows taken out of them since.

    After rows are forgotten `gradient_words` is of the others, and so is the Hessian where the
    method keeps it so.
    """

    origin_words: UInt32[Array, "p 2"]
    origin_digest: UInt8[Array, "32"]
    gradient_words: UInt32[Array, "p 2"]
    hessian_words: UInt32[Array, "t 2"]
    figure_words: UInt32[Array, "2 2"]
    num_stored: Int[Array, ""]
    num_gone: Int[Array, ""]


class Sums(NamedTuple):
    """`Statistics` on the host, in float64. start: the norm that training left."""

    origin: Float64[np.ndarray, "p"]
    gradient: Float64[np.ndarray, "p"]
    hessian: Float64[np.ndarray, "p p"]
    gradient_norm_sum: float
    start: float
    num_rows: int
    num_gone: int

    def without(self, removed: kernels.LossSums, *, keep_hessian: bool = False) -> "Sums":
        """The sums over the other rows; `keep_hessian` leaves that of all rows as it is."""
        hessian = self.hessian if keep_hessian else self.hessian - np.asarray(removed.hessian)
        return Sums(
            origin=self.origin,
            gradient=self.gradient - np.asarray(removed.gradient),
            hessian=hessian,
            gradient_norm_sum=self.gradient_norm_sum + float(removed.gradient_norm_sum),
            start=self.start,
            num_rows=self.num_rows - int(removed.num_rows),
            num_gone=self.num_gone + int(removed.num_rows),
        )


def init_statistics(params: Params, *, max_parameters: int) -> Statistics:
    """Nothing stored yet.

    Raises:
      RecordTooLargeError: more than `max_parameters` parameters, whose Hessian is not to be stored.
    """
    count = tree.num_parameters(params)
    if count > max_parameters:
        raise errors.RecordTooLargeError(
            f"Expected at most max_parameters={max_parameters}, got {count}: their Hessian takes "
            f"{4 * count * (count + 1) / 1e9:.2g} GB. Raise it, or use unlearners.newton."
        )
    words = lambda rows: jnp.zeros((rows, 2), jnp.uint32)
    return Statistics(
        origin_words=words(count),
        origin_digest=jnp.zeros((32,), jnp.uint8),
        gradient_words=words(count),
        hessian_words=words(count * (count + 1) // 2),
        figure_words=words(2),
        num_stored=jnp.zeros((), jnp.int32),
        num_gone=jnp.zeros((), jnp.int32),
    )


def pack_sums(sums: Sums, origin_digest: UInt8[Array, "32"]) -> Statistics:
    """`Sums` as they are kept in a record."""
    return Statistics(
        origin_words=pack_float64(sums.origin),
        origin_digest=origin_digest,
        gradient_words=pack_float64(sums.gradient),
        hessian_words=pack_float64(sums.hessian[np.tril_indices(len(sums.origin))]),
        figure_words=pack_float64(np.array([sums.gradient_norm_sum, sums.start])),
        num_stored=jnp.asarray(sums.num_rows, jnp.int32),
        num_gone=jnp.asarray(sums.num_gone, jnp.int32),
    )


def unpack_sums(statistics: Statistics) -> Sums:
    """The inverse of `pack_sums`."""
    origin = unpack_float64(statistics.origin_words)
    norm_sum, start = unpack_float64(statistics.figure_words)
    return Sums(
        origin=origin,
        gradient=unpack_float64(statistics.gradient_words),
        hessian=_symmetric(unpack_float64(statistics.hessian_words), len(origin)),
        gradient_norm_sum=float(norm_sum),
        start=float(start),
        num_rows=int(statistics.num_stored),
        num_gone=int(statistics.num_gone),
    )


def sums_of(origin: Float64[np.ndarray, "p"], figures: kernels.LossSums, *, l2: float) -> Sums:
    """`kernels.LossSums` of all rows, fetched, as `Sums`."""
    gradient, count = np.asarray(figures.gradient, np.float64), int(figures.num_rows)
    return Sums(
        origin=origin,
        gradient=gradient,
        hessian=np.asarray(figures.hessian, np.float64),
        gradient_norm_sum=float(figures.gradient_norm_sum),
        start=float(np.linalg.norm(gradient / count + l2 * origin)),
        num_rows=count,
        num_gone=0,
    )


def is_of(statistics: Statistics, params: Params) -> bool:
    """Whether the sums were taken at these parameters."""
    return tree.digest_bytes(params) == np.asarray(statistics.origin_digest).tobytes()


def digest_leaf(params: Params) -> UInt8[Array, "32"]:
    """SHA-256 of parameters, as a leaf of a record."""
    return jnp.asarray(np.frombuffer(tree.digest_bytes(params), np.uint8))


def traced_sums(statistics: Statistics) -> tuple[Array, Array, Array]:
    """(origin, gradient, Hessian) in float32, inside a trace: what a pure step works from."""
    origin = as_float32(statistics.origin_words)
    triangle = as_float32(statistics.hessian_words)
    lower = jnp.zeros((len(origin),) * 2).at[np.tril_indices(len(origin))].set(triangle)
    hessian = lower + lower.T - jnp.diag(jnp.diagonal(lower))
    return origin, as_float32(statistics.gradient_words), hessian


def as_float32(words: UInt32[Array, "n 2"]) -> Float[Array, "n"]:
    """Float64 words rounded to float32 inside a trace, where there may be no float64.

    >>> as_float32(pack_float64(np.array([-1.5, 0.0, 1e-3]))).tolist()
    [-1.5, 0.0, 0.0010000000474974513]
    """
    low, high = words[..., 0], words[..., 1]
    exponent = ((high >> 20) & 0x7FF).astype(jnp.int32)
    mantissa = (high & 0xFFFFF).astype(jnp.float32) * 2.0**-20
    mantissa = 1.0 + (mantissa + low.astype(jnp.float32) * 2.0**-52)
    value = jnp.ldexp(mantissa, exponent - 1023)
    value = jnp.where(exponent == 0, 0.0, jnp.where(exponent == 0x7FF, jnp.inf, value))
    return jnp.where(high >> 31 == 1, -value, value)


def _symmetric(triangle, size: int) -> Float64[np.ndarray, "p p"]:
    full = np.zeros((size, size))
    full[np.tril_indices(size)] = triangle
    return full + full.T - np.diag(np.diagonal(full))


def check_convex(hessian: Float64[np.ndarray, "p p"], *, num_rows: int) -> None:
    """Refuse a summed Hessian with a negative eigenvalue: the loss is not convex there.

    Raises:
      NonFiniteError: an entry is not finite.
      SolverError: its least eigenvalue is negative by more than rounding.
    """
    if not np.all(np.isfinite(hessian)):
        raise errors.NonFiniteError("Expected finite sums over the rows; nothing was released.")
    rounding = (num_rows + 4 * len(hessian)) * np.finfo(np.float64).eps
    least = float(np.linalg.eigvalsh(hessian)[0])
    if least < -rounding * float(np.trace(np.abs(hessian))):
        raise errors.SolverError(
            f"Expected a convex loss, met an eigenvalue {least:.3g} of the summed Hessian. Make "
            "the loss convex, or use unlearners.replay."
        )


class Damped(NamedTuple):
    """H / scale + curvature I, and its Cholesky factor."""

    matrix: Float64[np.ndarray, "p p"]
    factor: tuple[Float64[np.ndarray, "p p"], bool]


def factorised(hessian: Float64[np.ndarray, "p p"], *, scale: float, curvature: float) -> Damped:
    """A summed Hessian divided and damped, ready to be solved, on the host.

    Raises:
      SolverError: it is not positive definite.
    """
    import scipy.linalg

    matrix = hessian / scale + curvature * np.eye(len(hessian))
    try:
        factor = scipy.linalg.cho_factor(matrix, lower=True)
    except np.linalg.LinAlgError:
        raise errors.SolverError(
            "Expected a positive definite Hessian of the retained objective. Raise l2, or make "
            "the loss convex."
        ) from None
    return Damped(matrix, factor)


def solve_damped(
    damped: Damped, gradient: Float64[np.ndarray, "p"]
) -> tuple[Float64[np.ndarray, "p"], float]:
    """v with matrix v = -gradient, and a bound of its residual.

    The residual is computed anew, with an estimate of the rounding in H and in the product added.
    """
    import scipy.linalg

    matrix, factor = damped
    step = -scipy.linalg.cho_solve(factor, gradient)
    step = step - scipy.linalg.cho_solve(factor, matrix @ step + gradient)
    rounding = (len(step) + 1024) * np.finfo(np.float64).eps
    slack = rounding * (np.trace(matrix) * np.linalg.norm(step) + np.linalg.norm(gradient))
    return step, float(np.linalg.norm(matrix @ step + gradient) + slack)
