"""Conjugate gradients: one right-hand side or many, preconditioned or not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.solves.common import (
    Matvec,
    Problem,
    Solution,
    Solver,
    Space,
    as_function,
    iterate,
    iterative,
    zeros,
)


class _State(NamedTuple):
    """One iteration to the next; `inner` is r' M^-1 r and `norm2` is r' r."""

    x: PyTree
    residual: PyTree
    direction: PyTree
    inner: Float[Array, "*k"]
    norm2: Float[Array, "*k"]
    iteration: Int[Array, "*k"]
    negative: Bool[Array, "*k"]


def cg(
    *,
    tol: float = 1e-6,
    max_iterations: int = 100,
    preconditioner: Matvec | None = None,
    many: bool = False,
    loop: str = "auto",
) -> Solver:
    """Conjugate gradients (Hestenes and Stiefel 1952) on pytrees, for one system or many at once.

        x += alpha p,  r -= alpha A p,  p = M^-1 r + beta p
        alpha = r' M^-1 r / p' A p,  beta = r_new' M^-1 r_new / r' M^-1 r

    Args:
      tol: stop when ||A x - rhs|| <= tol * ||rhs|| by the recurrence; >= 0.
      max_iterations: >= 1.
      preconditioner: v -> M^-1 v with M symmetric positive definite, on float32 or wider, such as
        `jacobi(diagonal)`, `nystrom(...).preconditioner(damping)` or the action of an L-BFGS
        memory. A stack to a stack with `many`: `jax.vmap` makes one.
      many: every leaf of the right-hand side has a leading axis K, and `matvec` maps stacks of
        vectors, as `hvp_many` does, so that K products read the data once. Each system stops on
        its own; one that broke or was never finite leaves the others alone.
      loop: "device" is an XLA loop. "host" is a Python loop, for eager calls with a jitted matvec:
        XLA on CPU runs convolutions inside its loops 20 to 50 times slower. "unrolled" writes out
        `max_iterations` steps, for few of them under `jit`. "auto" takes the host where a matvec
        with convolutions is solved on CPU outside any trace, and the device everywhere else.

    Returns:
      A function (matvec, rhs, *, x0=None, key=None) -> `Solution`. Jits and vmaps. Stops at
      curvature, of the matrix or of the preconditioner, that is not positive. Directions are
      rounded to the dtype of the right-hand side before `matvec` sees them; everything else is in
      float32 or wider.

    Cost: one product an iteration, one for the residual and one for `x0` if given; one call of the
    preconditioner an iteration and one more. Memory: four copies of the right-hand side.

    Raises:
      ValueError: an option out of range, a stack whose leaves disagree, or `loop="host"` in a
        trace.

    >>> solution = cg(tol=1e-6, max_iterations=10)(lambda x: 2.0 * x, jnp.array([2.0, 4.0]))
    >>> solution.x, int(solution.num_iterations)
    (Array([1., 2.], dtype=float32), 1)
    >>> cg(many=True)(lambda x: 2.0 * x, jnp.array([[2.0, 4.0], [0.0, 0.0]])).num_iterations
    Array([1, 0], dtype=int32)

    References: Saad 2003, "Iterative methods for sparse linear systems", algorithms 6.18 and 9.1.
    """
    space, inverse = Space(many), preconditioner and as_function(preconditioner)

    def body(system: Problem, where: str) -> Solution:
        active = functools.partial(system.unsolved, max_iterations=max_iterations)

        def precondition(state: _State) -> _State:
            turned = inverse and inverse(state.residual)
            return _turn(space, state, turned)

        def step(state: _State) -> _State:
            direction = system.rounded(state.direction)
            state = _advance(space, state, direction, system.product(direction))
            return precondition(state)

        state = precondition(_start(space, system.residual))
        state = iterate(space, active, step, state, loop=where, max_iterations=max_iterations)
        return system.solution(state.x, state.iteration, state.negative)

    return iterative(body, tol=tol, max_iterations=max_iterations, many=many, loop=loop)


def _start(space: Space, residual: PyTree) -> _State:
    """x = 0; `_turn` makes the first direction."""
    norm2 = space.dot(residual, residual)
    nothing = jax.tree.map(jnp.zeros_like, residual)
    count, negative = (zeros(space, residual, dtype) for dtype in (jnp.int32, bool))
    return _State(nothing, residual, nothing, jnp.zeros_like(norm2), norm2, count, negative)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _advance(space: Space, state: _State, direction: PyTree, product: PyTree) -> _State:
    """Move along the direction, or stay where its curvature is not positive."""
    curvature = space.dot(direction, product)
    alpha = state.inner / jnp.where(curvature > 0, curvature, 1.0)
    moves = (curvature > 0) & jnp.isfinite(alpha)
    alpha = jnp.where(moves, alpha, 0.0)
    # Selected, since zero times the NaN of a product is NaN.
    moved = space.axpy(-alpha, product, state.residual)
    residual = space.select(moves, moved, state.residual)
    return _State(
        x=space.axpy(alpha, direction, state.x),
        residual=residual,
        direction=direction,
        inner=state.inner,
        norm2=jnp.where(moves, space.dot(residual, residual), state.norm2),
        iteration=state.iteration + 1,
        negative=state.negative | ~moves,
    )


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _turn(space: Space, state: _State, preconditioned: PyTree | None) -> _State:
    """The next direction from z = M^-1 r, or r; a preconditioner with r' z <= 0 ends the solve."""
    inner = state.norm2
    if preconditioned is None:
        preconditioned = state.residual
    else:
        preconditioned = widen(preconditioned)
        inner = space.dot(state.residual, preconditioned)
    usable = state.inner > 0
    beta = jnp.where(usable, inner / jnp.where(usable, state.inner, 1.0), 0.0)
    return _State(
        x=state.x,
        residual=state.residual,
        direction=space.axpy(beta, state.direction, preconditioned),
        inner=inner,
        norm2=state.norm2,
        iteration=state.iteration,
        negative=state.negative | ((state.norm2 > 0) & ~(inner > 0)),
    )
