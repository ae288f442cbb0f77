"""Neumann series: full products, or one sample's product a step (LiSSA)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxunlearn.kernels._checks import check_number
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels._stable import widen, widened
from jaxunlearn.kernels.solves.common import (
    Matvec,
    Problem,
    Solution,
    Solver,
    Space,
    as_function,
    as_vector,
    check_count,
    check_stack,
    iterate,
    iterative,
    like,
    problem,
    zeros,
)


class _State(NamedTuple):
    """One iteration to the next; `norm2` is r' r."""

    x: PyTree
    residual: PyTree
    norm2: Float[Array, "*k"]
    iteration: Int[Array, "*k"]
    negative: Bool[Array, "*k"]


def spectral_radius(
    matvec: Matvec,
    vector: PyTree,
    *,
    key: Key[Array, ""],
    num_iterations: int = 20,
    many: bool = False,
) -> Float[Array, ""]:
    """The largest |eigenvalue| of a symmetric operator, from below, by power iteration.

        ||A v|| with v <- A v / ||A v||, from a random v

    Args:
      matvec: v -> A v; stacks to stacks with `many`.
      vector: only its shapes and dtypes are read; with `many` a stack, which gives as many starts.
      key: of the random start.
      num_iterations: >= 1. After k of them in n unknowns the estimate is short by a fraction of at
        most about log(n) / k in the mean over starts.

    Returns:
      The estimate, the largest over the starts; NaN where a product is not finite.

    Cost: `num_iterations` products.

    >>> radius = spectral_radius(lambda v: jnp.array([1.0, -3.0]) * v, jnp.zeros(2),
    ...                          key=jax.random.key(0))
    >>> round(float(radius), 4)
    3.0

    References: Kuczynski and Wozniakowski 1992, "Estimating the largest eigenvalue by the power and
      Lanczos algorithms with a random start", theorem 3.1.
    """
    check_count("num_iterations", num_iterations)
    space, product = Space(many), as_function(matvec)

    def radius(vector, key):
        vector = as_vector(vector)
        leaves, treedef = jax.tree.flatten(vector)
        keys = jax.random.split(key, len(leaves))
        draws = [jax.random.normal(k, v.shape, widened(v)) for k, v in zip(keys, leaves)]
        start = jax.tree.unflatten(treedef, draws)

        def step(_, carry):
            v, norm = carry
            v = space.scale(jnp.where(norm > 0, 1.0 / jnp.where(norm > 0, norm, 1.0), norm), v)
            v = widen(product(like(v, vector)))
            return v, space.norm(v)

        _, norms = lax.fori_loop(0, num_iterations, step, (start, space.norm(start)))
        return jnp.max(norms)

    return compiled_once(radius, vector, key)


def neumann(
    *,
    step: float | None = None,
    key: Key[Array, ""] | None = None,
    num_power_iterations: int = 20,
    safety: float = 1.2,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    many: bool = False,
    loop: str = "auto",
) -> Solver:
    """The Neumann series of a positive definite A, with a step below 2 / (spectral radius).

        x_k = step sum_{j < k} (I - step A)^j rhs,  that is  x += step r,  r -= step A r

    Args:
      step: > 0, in units of 1 / A. None measures it: 1 / (safety * spectral radius).
      key: of the random start of `spectral_radius`, unless the call brings its own; one of the two
        is needed where `step` is None.
      num_power_iterations: products spent on that measurement.
      safety: > 0.5. The series converges as long as the estimate is at least 1 / (2 safety) of the
        truth, and loses a factor `safety` in speed where it is exact.
      tol: stop when ||A x - rhs|| <= tol * ||rhs|| by the recurrence; >= 0.
      max_iterations, many, loop: as for `cg`.

    Returns:
      A function (matvec, rhs, *, x0=None, key=None) -> `Solution`. Jits and vmaps. Stops at
      r' A r <= 0, and when the residual is twice what it was at the start: the series then
      diverges, and `residual_norm` above ||rhs|| says so. `num_iterations` includes the power
      iterations.

    Cost: one product an iteration, `num_power_iterations` for the step, one for the residual and
    one for `x0` if given; about (condition number) * safety * log(1 / tol) iterations. `cg` needs
    fewer by a square root, and is the better choice unless products are noisy. Memory: two copies
    of the right-hand side.

    Raises:
      ValueError: an option out of range, a stack whose leaves disagree, or, at the call, neither
        `step` nor a `key`.

    >>> solution = neumann(step=0.5)(lambda x: 2.0 * x, jnp.array([2.0, 4.0]))
    >>> solution.x, int(solution.num_iterations)
    (Array([1., 2.], dtype=float32), 1)
    """
    _check_step(step, safety)
    check_count("num_power_iterations", num_power_iterations)
    space, default_key = Space(many), key

    def body(system: Problem, where: str) -> Solution:
        omega, measured = jnp.asarray(step or 0.0), 0
        if step is None and system.key is not None:
            measured = num_power_iterations
            radius = spectral_radius(
                system.matvec, system.rhs, key=system.key, num_iterations=measured, many=many
            )
            omega = _safe_step(radius, safety)
        state = _start(space, system)
        limit = 4 * state.norm2

        def active(state: _State):
            return system.unsolved(state, max_iterations) & (state.norm2 <= limit)

        def advance(state: _State) -> _State:
            direction = system.rounded(state.residual)
            return _advance(space, state, direction, system.product(direction), omega)

        state = iterate(space, active, advance, state, loop=where, max_iterations=max_iterations)
        return system.solution(state.x, state.iteration + measured, state.negative)

    run = iterative(body, tol=tol, max_iterations=max_iterations, many=many, loop=loop)

    def solve(
        matvec: Matvec,
        rhs: PyTree,
        *,
        x0: PyTree | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Solution:
        key = default_key if key is None else key
        if step is None and key is None:
            raise ValueError("Expected step=, or key= for the power iteration that chooses it.")
        return run(matvec, rhs, x0=x0, key=key)

    return solve


def lissa(
    *,
    num_steps: int,
    num_repeats: int = 1,
    step: float | None = None,
    num_power_iterations: int = 10,
    num_radius_samples: int = 4,
    safety: float = 1.5,
    key: Key[Array, ""] | None = None,
    many: bool = False,
) -> Solver:
    """LiSSA: the Neumann recursion with a fresh sample of the operator at every step.

        x <- x + step (rhs - A_j x),  A_j unbiased for A, averaged over independent repeats

    Args:
      num_steps: depth of the recursion, >= 1.
      num_repeats: independent recursions that are averaged, >= 1; they run as one stack.
      step: > 0. None measures it: 1 / (safety * the largest spectral radius among
        `num_radius_samples` samples), since every sample has to contract, not their mean alone.
      num_power_iterations, safety: as for `neumann`, for each of these samples.
      key: of the samples, unless the call brings its own; one of the two is needed.
      many: leaves of the right-hand side have a leading axis K, and `matvec` and `sampled` map
        stacks to stacks: K systems share their samples.

    Returns:
      A function (matvec, rhs, *, sampled, x0=None, key=None) -> `Solution`. `sampled(vector, key)`
      is the product with the operator of one sample, `matvec` the product with A itself, called
      once for the residual, and once for `x0` if given. `num_iterations` counts sampled products.
      A recursion that diverges stops when its iterate is not finite; `residual_norm` above ||rhs||
      or not a number says so. `negative_curvature` says x' A x <= 0.

    Cost: num_steps * num_repeats sampled products, num_power_iterations * num_radius_samples more
    for the step, and one full product. Memory: two copies of the right-hand side a repeat. The
    mean is off by (1 - step * smallest eigenvalue)^num_steps, relatively; the noise of the samples
    falls with step and with 1 / num_repeats.

    References: Agarwal, Bullins and Hazan 2017, "Second-order stochastic optimization for machine
      learning in linear time", estimator 1 and algorithm 1. Deviation: theirs presumes an operator
      scaled to norm one; ours measures the scale.

    >>> matvec = lambda v: 0.5 * v
    >>> solution = lissa(num_steps=50, step=1.0)(
    ...     matvec, jnp.array([1.0, 2.0]), sampled=lambda v, key: matvec(v), key=jax.random.key(0))
    >>> solution.x.round(4)
    Array([2., 4.], dtype=float32)
    """
    for name, count in (
        ("num_steps", num_steps),
        ("num_repeats", num_repeats),
        ("num_power_iterations", num_power_iterations),
        ("num_radius_samples", num_radius_samples),
    ):
        check_count(name, count)
    _check_step(step, safety)
    space, default_key = Space(many), key

    def chosen_step(system: Problem, product, key):
        """The step that contracts for each of several samples."""

        def radius(key_sample):
            key_start, key_operator = jax.random.split(key_sample)
            options = {"key": key_start, "num_iterations": num_power_iterations, "many": many}
            return spectral_radius(lambda v: product(v, key_operator), system.residual, **options)

        radii = jax.vmap(radius)(jax.random.split(key, num_radius_samples))
        return _safe_step(jnp.max(radii), safety)

    def body(sampled, matvec, rhs, x0, key):
        key_radius, key_steps = jax.random.split(key)
        system = problem(space, matvec, rhs, x0, 0.0)
        product = lambda v, k: widen(sampled(like(v, system.rhs), k))
        count, omega = num_steps * num_repeats, jnp.asarray(step or 0.0)
        if step is None:
            omega = chosen_step(system, product, key_radius)
            count += num_power_iterations * num_radius_samples

        def recursion(key_repeat):
            def advance(carry):
                j, x = carry
                images = product(x, jax.random.fold_in(key_repeat, j))
                gap = jax.tree.map(jnp.subtract, system.residual, images)
                return j + 1, space.axpy(omega, gap, x)

            def proceed(carry):
                return (carry[0] < num_steps) & jnp.any(jnp.isfinite(space.peak(carry[1])))

            nothing = jax.tree.map(jnp.zeros_like, system.residual)
            return lax.while_loop(proceed, advance, (jnp.zeros((), jnp.int32), nothing))[1]

        repeats = jax.vmap(recursion)(jax.random.split(key_steps, num_repeats))
        x = system.total(jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), repeats))
        product_of_x = widen(matvec(x))
        gap = jax.tree.map(jnp.subtract, product_of_x, widen(system.rhs))
        negative = (space.dot(x, product_of_x) <= 0) & (space.peak(x) != 0)
        spent = zeros(space, system.rhs, jnp.int32) + count
        return Solution(x, space.norm(gap), spent, negative)

    def solve(
        matvec: Matvec,
        rhs: PyTree,
        *,
        sampled: Callable[[PyTree, Key[Array, ""]], PyTree],
        x0: PyTree | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Solution:
        key = default_key if key is None else key
        if key is None:
            raise ValueError("Expected key=, of the samples, at the call or at the factory.")
        if many:
            check_stack(rhs)
        run = functools.partial(body, sampled, as_function(matvec))
        return compiled_once(run, rhs, x0, key)

    return solve


def _start(space: Space, system: Problem) -> _State:
    """x = 0."""
    nothing = jax.tree.map(jnp.zeros_like, system.residual)
    norm2 = space.dot(system.residual, system.residual)
    count, negative = (zeros(space, system.residual, dtype) for dtype in (jnp.int32, bool))
    return _State(nothing, system.residual, norm2, count, negative)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _advance(space: Space, state: _State, direction, product, omega) -> _State:
    """Add one term, unless its curvature is not positive."""
    moves = space.dot(direction, product) > 0
    residual = space.axpy(-omega, product, state.residual)
    residual = space.select(moves, residual, state.residual)
    return _State(
        x=space.axpy(jnp.where(moves, omega, 0.0), direction, state.x),
        residual=residual,
        norm2=jnp.where(moves, space.dot(residual, residual), state.norm2),
        iteration=state.iteration + 1,
        negative=state.negative | ~moves,
    )


def _safe_step(radius: Array, safety: float) -> Array:
    """1 / (safety * radius); zero for a zero operator, NaN for one that is not finite."""
    return jnp.where(radius == 0, 0.0, 1.0 / (safety * jnp.where(radius == 0, 1.0, radius)))


def _check_step(step: float | None, safety: float) -> None:
    """Refuse a step that cannot converge."""
    if step is not None:
        check_number("step", step, above=0)
    check_number("safety", safety, above=0.5)
