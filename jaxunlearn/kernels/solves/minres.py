"""MINRES: symmetric systems of any sign."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.solves.common import (
    Matvec,
    Problem,
    Solution,
    Solver,
    Space,
    iterate,
    iterative,
    zeros,
)

CYCLE = 16
"""Iterations between two looks at the true residual: a sixteenth more products."""


class _State(NamedTuple):
    """The letters of Paige and Saunders, as in their code (and SciPy's)."""

    x: PyTree
    r1: PyTree
    r2: PyTree
    y: PyTree
    w1: PyTree
    w2: PyTree
    oldb: Float[Array, "*k"]
    beta: Float[Array, "*k"]
    dbar: Float[Array, "*k"]
    epsln: Float[Array, "*k"]
    phibar: Float[Array, "*k"]
    cs: Float[Array, "*k"]
    sn: Float[Array, "*k"]
    tnorm2: Float[Array, "*k"]
    iteration: Int[Array, "*k"]
    negative: Bool[Array, "*k"]
    settled: Bool[Array, "*k"]


class _Best(NamedTuple):
    """The iterate of the smallest residual that was measured, which may be the first guess.

    norm_at_start: that of the residual from which the recurrence runs.
    """

    x: PyTree
    norm: Float[Array, "*k"]
    norm_at_start: Float[Array, "*k"]


def minres(
    *,
    tol: float = 1e-6,
    max_iterations: int = 100,
    preconditioner: Matvec | None = None,
    many: bool = False,
    loop: str = "auto",
) -> Solver:
    """MINRES (Paige and Saunders 1975): min ||A x - rhs|| over Krylov spaces, A symmetric.

    A may be indefinite or singular. Where the system has no solution, iteration ends when A r is
    zero, or when the rounding of a step would exceed its gain: x is then a least-squares solution
    (up to what A maps to zero), `num_iterations` is below `max_iterations`, and `residual_norm`,
    above the tolerance, is the distance of the right-hand side from the range.

    Rounding costs MINRES the square of the condition number. So the true residual is measured every
    16 iterations; where it is twice what the recurrence says, the recurrence starts again from it,
    or, when it has come down by less than a tenth since the last start, iteration ends:
    `num_iterations` below `max_iterations` with `residual_norm` above the tolerance says so.

    Args:
      tol: stop when ||A x - rhs|| <= tol * ||rhs|| by the recurrence, and at most twice that by
        measurement; norms are those of M^-1 under a preconditioner, where that of rhs is scaled to
        match; >= 0.
      max_iterations, preconditioner, many, loop: as for `cg`; M is positive definite even where A
        is not.

    Returns:
      A function (matvec, rhs, *, x0=None, key=None) -> `Solution`, of the x with the smallest
      residual that was measured: never a larger one than at `x0`, or at zero. `negative_curvature`
      says that A is not positive definite on the space searched, which does not stop it: it holds
      as soon as the Lanczos matrix has an eigenvalue <= 0. It also holds where a product is not a
      number or M is not positive definite, and this does stop it.

    Cost: one product an iteration, one more for every 16 iterations begun, and one for `x0` if
    given; one call of the preconditioner with each product, and one more. Memory:
    nine copies of the right-hand side.

    Raises:
      ValueError: an option out of range, or a stack whose leaves disagree.

    >>> indefinite = jnp.array([1.0, -2.0])
    >>> solution = minres()(lambda x: indefinite * x, jnp.array([3.0, 4.0]))
    >>> solution.x.round(4), bool(solution.negative_curvature)
    (Array([ 3., -2.], dtype=float32), True)

    References: Paige and Saunders 1975, "Solution of sparse indefinite systems of linear
      equations", section 6; Liu and Roosta 2022, "MINRES: from negative curvature detection to
      monotonicity properties", section 3 (the sign of r' A r from the rotations); Sleijpen, van der
      Vorst and Modersitzki 2000, "Differences in the effects of rounding errors in Krylov solvers
      for symmetric indefinite linear systems" (the square of the condition). Deviations: the
      restarts; the two tests for a system without solution, the second without preconditioner only.
    """
    space = Space(many)

    def body(system: Problem, where: str) -> Solution:
        state = _start(space, system.residual, preconditioner)
        norm = space.norm(system.residual)
        stop = system.target * jnp.where(norm > 0, state.phibar / jnp.where(norm > 0, norm, 1), 1)

        def active(state: _State):
            usable = (state.phibar > stop) & ~state.settled
            return usable & (state.iteration < max_iterations)

        def step(state: _State) -> _State:
            beta = jnp.where(state.beta > 0, state.beta, 1.0)
            v = system.rounded(space.scale(1.0 / beta, state.y))
            state, v, alfa = _lanczos(space, state, v, system.product(v))
            y = state.r2 if preconditioner is None else widen(preconditioner(state.r2))
            return _rotate(space, preconditioner is None, state, v, alfa, y)

        def cycle(carry: tuple[_State, _Best]) -> tuple[_State, _Best]:
            state, best = carry
            end = state.iteration + CYCLE
            within = lambda state: active(state) & (state.iteration < end)
            steps = min(CYCLE, max_iterations)
            state = iterate(space, within, step, state, loop=where, max_iterations=steps)
            residual = system.remaining(state.x)
            return _judged(space, state, best, residual, _start(space, residual, preconditioner))

        cycles = -(-max_iterations // CYCLE)
        carry = state, _Best(x=state.x, norm=norm, norm_at_start=norm)
        state, best = iterate(
            space, lambda carry: active(carry[0]), cycle, carry, loop=where, max_iterations=cycles
        )
        norm = _stable.scale_by(best.norm, system.exponent)
        return Solution(system.total(best.x), norm, state.iteration, state.negative)

    return iterative(body, tol=tol, max_iterations=max_iterations, many=many, loop=loop)


def _start(space: Space, residual: PyTree, preconditioner: Matvec | None) -> _State:
    """Before the first Lanczos vector."""
    y = residual if preconditioner is None else widen(preconditioner(residual))
    square = space.dot(residual, y)
    beta = jnp.sqrt(jnp.maximum(square, 0.0))
    broken = ~(square > 0) & (space.peak(residual) != 0)
    nothing = jax.tree.map(jnp.zeros_like, residual)
    zero, one = jnp.zeros_like(beta), jnp.ones_like(beta)
    return _State(
        x=nothing, r1=nothing, r2=residual, y=y, w1=nothing, w2=nothing,
        oldb=zero, beta=beta, dbar=zero, epsln=zero, phibar=beta, cs=-one, sn=zero, tnorm2=zero,
        iteration=zeros(space, residual, jnp.int32), negative=broken, settled=broken,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _judged(space: Space, state: _State, best: _Best, residual: PyTree, fresh: _State):
    """The state and the best iterate after a look at the true residual.

    fresh: the start from that residual. It takes over where the recurrence has lost the residual,
      unless it gained nothing since it started: then rounding has the last word.
    """
    norm = space.norm(residual)
    better = norm < best.norm
    lost = ~(fresh.phibar <= 2 * state.phibar) & ~state.settled
    again = lost & (norm <= 0.9 * best.norm_at_start)
    kept = state._replace(settled=state.settled | lost)
    moved = fresh._replace(
        x=state.x, iteration=state.iteration, negative=state.negative | fresh.negative
    )
    best = _Best(
        x=space.select(better, state.x, best.x),
        norm=jnp.where(better, norm, best.norm),
        norm_at_start=jnp.where(again, norm, best.norm_at_start),
    )
    return space.select(again, moved, kept), best


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _lanczos(space: Space, state: _State, v: PyTree, product: PyTree):
    """The next Lanczos vector before normalisation, in r2; the state is otherwise the old one."""
    first = state.oldb == 0
    ratio = jnp.where(first, 0.0, state.beta / jnp.where(first, 1.0, state.oldb))
    y = space.axpy(-ratio, state.r1, product)
    alfa = space.dot(v, y)
    y = space.axpy(-alfa / state.beta, state.r2, y)
    return _State(*state[:1], state.r2, y, *state[3:]), v, alfa


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _rotate(space: Space, plain: bool, state: _State, v: PyTree, alfa: Array, y: PyTree) -> _State:
    """Apply the old rotation, form the new one, and move along its direction.

    plain: there is no preconditioner, so that norms can be compared.
    """
    square = space.dot(state.r2, y)
    beta = jnp.sqrt(jnp.maximum(square, 0.0))
    delta = state.cs * state.dbar + state.sn * alfa
    gbar = state.sn * state.dbar - state.cs * alfa
    epsln, dbar = state.sn * beta, -state.cs * beta
    # ||A r|| / ||r|| of the iterate so far, and a lower bound of ||A||.
    root = jnp.hypot(gbar, dbar)
    tnorm2 = state.tnorm2 + alfa**2 + state.beta**2 * (state.iteration > 0) + beta**2
    eps = jnp.finfo(beta.dtype).eps
    finite = jnp.isfinite(alfa) & jnp.isfinite(square) & (square >= -eps * tnorm2)
    exhausted = root <= 10 * eps * jnp.sqrt(tnorm2)
    gamma = jnp.maximum(jnp.hypot(gbar, beta), jnp.finfo(beta.dtype).tiny)
    cs, sn = gbar / gamma, beta / gamma
    w = space.axpy(-state.epsln, state.w1, space.axpy(-delta, state.w2, v))
    w = space.scale(1.0 / gamma, w)
    if plain:
        # A step whose rounding, in A x, exceeds what it takes off the residual, and shows.
        noise = eps * jnp.sqrt(tnorm2 * space.dot(w, w))
        exhausted |= jnp.abs(cs) * noise > jnp.maximum(jnp.sqrt(eps), cs**2 / 2)
    moves = finite & ~exhausted
    x = space.axpy(cs * state.phibar, w, state.x)
    return _State(
        x=space.select(moves, x, state.x),
        r1=state.r1, r2=state.r2, y=y, w1=state.w2, w2=w,
        oldb=state.beta, beta=beta, dbar=dbar, epsln=epsln,
        phibar=jnp.where(moves, sn * state.phibar, state.phibar),
        cs=cs, sn=sn, tnorm2=tnorm2, iteration=state.iteration + 1,
        negative=state.negative | ~finite | (state.cs * gbar >= 0),
        settled=~moves | (beta == 0),
    )  # fmt: skip
