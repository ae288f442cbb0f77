"""What all solvers share: the solution, vectors and stacks of them, scaling, and the loop."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._checks import check_number, is_traced
from jaxunlearn.kernels._primitives import convolves
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels._stable import widen

LOOPS = ("auto", "device", "host", "unrolled")


class Solution(NamedTuple):
    """What a solver returns; with many right-hand sides every field has a leading axis.

    x: the solution, like the right-hand side.
    residual_norm: ||matvec(x) - rhs||_2, evaluated at x, not carried by a recurrence. Solved means
      `residual_norm <= tol * ||rhs||`: NaN is not, and a series that diverged exceeds ||rhs||.
    num_iterations: products with the matrix, without the one for the residual.
    negative_curvature: whether some direction p had p' A p <= 0 or not a number; then x is the
      last good iterate. MINRES goes on past it.
    """

    x: PyTree
    residual_norm: Float[Array, "*k"]
    num_iterations: Int[Array, "*k"]
    negative_curvature: Bool[Array, "*k"]


Matvec = Callable[[PyTree], PyTree]
Solver = Callable[..., Solution]
"""`solver(matvec, rhs, *, x0=None, key=None) -> Solution`; `matvec` a function, or an operator with
`@`. Direct solvers do not read `x0`, and those that draw nothing do not read `key`. Outside any
trace a call is traced anew, so that what `matvec` reads may change, and compiled once for each kind
of problem, whichever function object asks."""


class Space(NamedTuple):
    """Arithmetic on pytrees as vectors, or (`many`) as stacks of vectors along a leading axis.

    Scalars have shape (), or (K,) for a stack of K.
    """

    many: bool

    def dot(self, a: PyTree, b: PyTree) -> Array:
        """<a, b>, one for each vector, accumulated in float32 or wider."""
        if not self.many:
            return tree.vdot(a, b)

        def dots(x, y):
            if jax.device_count() == 1 and jax.typeof(x).sharding.mesh.empty:
                return _stable.contract("kn,kn->k", rows_of(x), rows_of(y))
            return jnp.sum(widen(x) * widen(y), axis=tuple(range(1, jnp.ndim(x))))

        leaves = jax.tree.leaves(jax.tree.map(dots, a, b))
        return sum(leaves, start=jnp.zeros((), jnp.float32))

    def peak(self, a: PyTree) -> Array:
        """The largest magnitude, one for each vector."""
        axes = lambda leaf: tuple(range(int(self.many), jnp.ndim(leaf)))
        peaks = [jnp.max(jnp.abs(leaf), axis=axes(leaf), initial=0) for leaf in jax.tree.leaves(a)]
        wide = _stable.widened(*peaks) if peaks else jnp.float32
        return (
            jnp.max(jnp.stack([p.astype(wide) for p in peaks]), axis=0) if peaks else jnp.zeros(())
        )

    def norm(self, a: PyTree) -> Array:
        """||a||_2, neither overflowing nor underflowing on the way."""
        e = _stable.exponent(self.peak(a))
        scaled = self.shift(a, -e)
        return _stable.scale_by(jnp.sqrt(self.dot(scaled, scaled)), e)

    def shift(self, a: PyTree, e: Array) -> PyTree:
        """2^e a, in float32 or wider."""
        return jax.tree.map(lambda x: _stable.scale_by(widen(x), _along(e, x)), a)

    def scale(self, s: Array, a: PyTree) -> PyTree:
        """s a."""
        return jax.tree.map(lambda x: _along(s, x).astype(x.dtype) * x, a)

    def axpy(self, s: Array, x: PyTree, y: PyTree) -> PyTree:
        """y + s x, in the dtype of y."""
        return jax.tree.map(lambda a, b: b + (_along(s, a) * a).astype(b.dtype), x, y)

    def select(self, mask: Bool[Array, "*k"], a: PyTree, b: PyTree) -> PyTree:
        """`a` where `mask`, else `b`: vectors, or states all of whose leaves have the axis."""
        return jax.tree.map(lambda x, y: jnp.where(_along(mask, x), x, y), a, b)


class Problem(NamedTuple):
    """`A x = rhs` around a first guess, scaled by a power of two so that squares stay in range.

    residual: 2^-exponent (rhs - A x0), in float32 or wider.  target: the tolerance on its norm.
    key: for what is drawn, where a solver draws.
    """

    space: Space
    matvec: Matvec
    rhs: PyTree
    x0: PyTree | None
    residual: PyTree
    exponent: Int[Array, "*k"]
    target: Float[Array, "*k"]
    key: Key[Array, ""] | None = None

    def product(self, vector: PyTree) -> PyTree:
        """A v, called with the dtypes of the right-hand side, returned in float32 or wider."""
        return widen(self.matvec(like(vector, self.rhs)))

    def total(self, x: PyTree) -> PyTree:
        """The solution of the problem as it was put, from `x` of the scaled one."""
        x = self.space.shift(x, self.exponent)
        x = x if self.x0 is None else jax.tree.map(jnp.add, widen(self.x0), x)
        return like(x, self.rhs)

    def remaining(self, x: PyTree) -> PyTree:
        """The scaled residual at `x`, by a product."""
        images = self.matvec(self.total(x))
        gap = jax.tree.map(lambda b, ax: widen(b) - widen(ax), self.rhs, images)
        return self.space.shift(gap, -self.exponent)

    def rounded(self, vector: PyTree) -> PyTree:
        """`vector` rounded to what `matvec` will see of it, in its own dtype."""
        return jax.tree.map(_rounded, vector, self.rhs)

    def unsolved(self, state: Any, max_iterations: int) -> Bool[Array, "*k"]:
        """Which systems go on: above the tolerance by `norm2`, unbroken and with time left."""
        usable = (state.norm2 > self.target**2) & ~state.negative
        return usable & (state.iteration < max_iterations)

    def solution(self, x: PyTree, num_iterations: Array, negative: Array) -> Solution:
        """`x` solves the scaled problem: carry it back, and measure how well."""
        x = self.total(x)
        return measured(self.space, self.matvec, self.rhs, x, num_iterations, negative)


def problem(space: Space, matvec: Matvec, rhs: PyTree, x0, tol: float, key=None) -> Problem:
    """The scaled problem; one product if there is a guess."""
    rhs = as_vector(rhs)
    residual = rhs
    if x0 is not None:
        x0 = like(x0, rhs)
        residual = jax.tree.map(lambda b, ax: widen(b) - widen(ax), rhs, matvec(x0))
    exponent = _stable.exponent(space.peak(residual))
    target = _stable.scale_by(tol * space.norm(rhs), -exponent)
    scaled = space.shift(residual, -exponent)
    return Problem(space, matvec, rhs, x0, scaled, exponent, target, key)


def measured(space: Space, matvec, rhs, x, num_iterations, negative) -> Solution:
    """The solution with ||matvec(x) - rhs||: one product."""
    gap = jax.tree.map(lambda ax, b: widen(ax) - widen(b), matvec(x), rhs)
    return Solution(x, space.norm(gap), num_iterations, negative)


def iterative(
    body: Callable[[Problem, str], Solution],
    *,
    tol: float,
    max_iterations: int,
    many: bool,
    loop: str,
) -> Solver:
    """The solver that puts a problem and solves it by `body(problem, where its loop runs)`."""
    check_options(tol=tol, max_iterations=max_iterations, loop=loop)
    space = Space(many)

    def solve(
        matvec: Matvec,
        rhs: PyTree,
        *,
        x0: PyTree | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Solution:
        if many:
            check_stack(rhs)
        product = as_function(matvec)
        where = _place(loop, product, rhs)

        def whole(rhs, x0, key):
            return body(problem(space, product, rhs, x0, tol, key), where)

        return whole(rhs, x0, key) if where == "host" else compiled_once(whole, rhs, x0, key)

    return solve


def iterate(
    space: Space,
    active: Callable[[Any], Array],
    step: Callable[[Any], Any],
    state: Any,
    *,
    loop: str,
    max_iterations: int,
) -> Any:
    """`step` while some system is `active`; in a stack, finished systems stand still."""

    def proceed(state):
        return jnp.any(active(state))

    def masked(state):
        return _selected(space, active(state), step(state), state)

    body = masked if space.many else step
    if loop == "unrolled":
        for _ in range(max_iterations):
            state = masked(state)
        return state
    if loop == "host":
        try:
            while proceed(state):
                state = body(state)
            return state
        except jax.errors.ConcretizationTypeError as error:
            raise ValueError(
                'Expected loop="host" outside jit, vmap and scan, which trace the whole loop. '
                'Call the solver directly, with a jitted matvec, or take loop="device".'
            ) from error
    return lax.while_loop(proceed, body, state)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _selected(space: Space, mask: Array, new: Any, old: Any) -> Any:
    """`new` in the systems that `mask` marks: one call where the loop is on the host."""
    return space.select(mask, new, old)


def check_options(*, tol: float, max_iterations: int, loop: str) -> None:
    """Refuse a configuration that cannot be meant."""
    check_number("tol", tol, least=0)
    check_count("max_iterations", max_iterations)
    if loop not in LOOPS:
        raise ValueError(f"Expected loop={loop!r} to be one of {', '.join(LOOPS)}.")


def check_count(name: str, count: int) -> None:
    """Refuse what is not a whole number of at least one."""
    try:
        operator.index(count)
    except TypeError:
        raise ValueError(f"Expected {name}={count} to be an integer.") from None
    check_number(name, count, least=1)


def as_function(matvec: Any) -> Matvec:
    """The product as a function: a function itself, or `operator @ v` of an operator."""
    if callable(matvec):
        return matvec
    if hasattr(matvec, "__matmul__") and not hasattr(matvec, "__array__"):
        return lambda vector: matvec @ vector
    raise TypeError(
        f"Expected matvec to be a function v -> A v or an operator with A @ v, got "
        f"{type(matvec).__name__}. Of a matrix, pass lambda v: A @ v."
    )


def as_vector(rhs: PyTree) -> PyTree:
    """Leaves as floating-point arrays; integers become float32."""

    def convert(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"Expected real right-hand sides, got {leaf.dtype}.")
        return leaf if tree.is_inexact(leaf) else leaf.astype(jnp.float32)

    return jax.tree.map(convert, rhs)


def like(vector: PyTree, rhs: PyTree) -> PyTree:
    """`vector` in the dtypes of `rhs`."""
    return jax.tree.map(lambda v, b: jnp.asarray(v).astype(b.dtype), vector, rhs)


def zeros(space: Space, rhs: PyTree, dtype: Any) -> Array:
    """A scalar zero for each system."""
    shape = jnp.shape(jax.tree.leaves(rhs)[0])[:1] if space.many else ()
    return jnp.zeros(shape, dtype)


def check_stack(rhs: PyTree) -> int:
    """How many right-hand sides a stack holds; its leaves must agree."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(rhs)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "Expected a stack of right-hand sides, whose leaves share one leading axis, got shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(rhs)]}."
        )
    return lengths.pop()[0]


def _place(loop: str, matvec: Matvec, rhs: PyTree) -> str:
    """Where the loop runs: on the host for convolutions on CPU with no trace around us."""
    if loop != "auto":
        return loop
    if any(map(is_traced, jax.tree.leaves(rhs))) or jax.default_backend() != "cpu":
        return "device"
    closed = jax.make_jaxpr(matvec)(as_vector(rhs))
    traced = any(map(is_traced, closed.consts))
    return "host" if convolves(closed) and not traced else "device"


def rows_of(x: Array) -> Array:
    """(K, ...) as (K, n); as it is where an axis may be sharded, since merging it would gather."""
    return x if jax.device_count() > 1 else x.reshape(x.shape[0], _stable.size_of(x.shape[1:]))


def _along(s: Array, x: Array) -> Array:
    """`s` of shape () or (K,) so that it broadcasts against `x` along its leading axis."""
    return s.reshape(s.shape + (1,) * (x.ndim - s.ndim))


def _rounded(x: Array, rhs: Array) -> Array:
    """`x` rounded to the dtype of `rhs`; a pair of casts would be optimised away."""
    info, own = jnp.finfo(rhs.dtype), jnp.finfo(x.dtype)
    if info.bits >= own.bits:
        return x
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
