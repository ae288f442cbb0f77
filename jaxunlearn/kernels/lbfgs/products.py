"""Products with the L-BFGS approximations of the Hessian, B, and of its inverse, H."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn import tree
from jaxunlearn.kernels._checks import check_number
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels.lbfgs import _forms
from jaxunlearn.kernels.lbfgs._trees import (
    against,
    against_many,
    check_like,
    combine,
    combine_many,
    inner,
)
from jaxunlearn.kernels.lbfgs.state import LBFGSMemory
from jaxunlearn.types import Params

FEW_FLOATS = 8192  # numbers in the pairs below which two loops beat the small solves


def inverse_product(
    memory: LBFGSMemory,
    vector: Params,
    *,
    scale: float | Float[Array, ""] | None = None,
    damping: float | Float[Array, ""] = 0.0,
    form: str = "auto",
) -> Params:
    """H v, or (B + damping I)^-1 v.

    H = gamma I + [S gamma Y] [R^-T (D + gamma Y'Y) R^-1, -R^-T; -R^-1, 0] [S gamma Y]', R the upper
    triangle of S'Y and D its diagonal: the inverse of BFGS, updated with the pairs from gamma I.

    Args:
      vector: like the parameters, in any floating dtype.
      scale: gamma > 0; by default s'y / y'y of the newest pair, and 1 where there is none.
      damping: >= 0, added to the Hessian's diagonal; exact, through the compact B.
      form: "compact", "two_loop" (no damping), or "auto": two loops where all pairs together hold
        8192 numbers at most, compact elsewhere and for any damping. (One vector on a CPU: two loops
        took 0.3 of the time of compact at m = 5, d = 20, and 1.2 at m = 20, d = 1000.)

    Returns:
      The product, like `vector`, in its dtypes; sums in the dtype of the pairs.

    Cost: compact: the pairs are read twice, 4 m parameter counts, and O(m^2) beside. Two loops:
      the same reads in 2 m steps one after another, and `vector` read and written in each.

    References: Nocedal and Wright 2006, algorithm 7.4 (two loops); Byrd, Nocedal and Schnabel 1994,
      "Representations of quasi-Newton matrices and their use in limited memory methods", equation
      (3.1). Deviations: pairs are scaled to s'y = 1, and the inner products are kept, not formed.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(2), memory_size=3)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> inverse_product(memory, jnp.array([4.0, 8.0]))
    Array([1., 2.], dtype=float32)
    >>> jnp.round(inverse_product(memory, jnp.array([4.0, 8.0]), damping=4.0), 5)
    Array([0.5, 1. ], dtype=float32)
    """
    tiny = tree.num_parameters(memory.pairs) <= FEW_FLOATS and _is_zero(damping)
    form = "two_loop" if form == "auto" and tiny else form
    return _multiply(memory, vector, scale, damping, form, inverse=True)


def inverse_product_many(
    memory: LBFGSMemory,
    vectors: Params,
    *,
    scale: float | Float[Array, ""] | None = None,
    damping: float | Float[Array, ""] = 0.0,
    form: str = "auto",
) -> Params:
    """`inverse_product` for a stack of vectors: every leaf of `vectors` has a leading axis r.

    Args, returns and references as `inverse_product`; "auto" is compact.

    Cost: compact: 8 m r multiplications and additions a parameter, as two matrix products; the
      pairs are read twice for all r together. Two loops: those of one vector, r times.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(2), memory_size=3)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> inverse_product_many(memory, jnp.array([[4.0, 8.0], [8.0, 0.0]]))
    Array([[1., 2.],
           [2., 0.]], dtype=float32)
    """
    return _multiply(memory, vectors, scale, damping, form, inverse=True, many=True)


def product(
    memory: LBFGSMemory,
    vector: Params,
    *,
    scale: float | Float[Array, ""] | None = None,
    damping: float | Float[Array, ""] = 0.0,
    form: str = "auto",
) -> Params:
    """B v, or (B + damping I) v.

    B = sigma I - [sigma S, Y] [sigma S'S, L; L', -D]^-1 [sigma S, Y]', sigma = 1 / gamma, L the
    strict lower triangle of S'Y and D its diagonal.

    Args:
      vector: like the parameters, in any floating dtype.
      scale: gamma > 0, the *inverse* scale, as in `inverse_product`: B H = I at equal `scale`.
      damping: >= 0, added to the diagonal.
      form: "compact", "unrolled" (B_0 + sum b b' - a a'), or "auto", which is compact.

    Returns:
      The product, like `vector`, in its dtypes.

    Cost: compact: the pairs are read twice, 4 m parameter counts, and O(m^3) beside. Unrolled:
      O(m^2) passes over a parameter count, and m more of memory.

    References: Byrd, Nocedal and Schnabel 1994, equations (3.5) and (2.26); Nocedal and Wright
      2006, procedure 7.6 (unrolled).

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(2), memory_size=3)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> product(memory, jnp.array([1.0, 2.0]), damping=0.5)
    Array([4.5, 9. ], dtype=float32)
    """
    return _multiply(memory, vector, scale, damping, form, inverse=False)


def product_many(
    memory: LBFGSMemory,
    vectors: Params,
    *,
    scale: float | Float[Array, ""] | None = None,
    damping: float | Float[Array, ""] = 0.0,
    form: str = "auto",
) -> Params:
    """`product` for a stack of vectors: every leaf of `vectors` has a leading axis r.

    Args, returns and references as `product`; cost as `inverse_product_many`.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(2), memory_size=3)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> product_many(memory, jnp.array([[1.0, 2.0], [2.0, 0.0]]))
    Array([[4., 8.],
           [8., 0.]], dtype=float32)
    """
    return _multiply(memory, vectors, scale, damping, form, inverse=False, many=True)


def initial_scale(memory: LBFGSMemory) -> Float[Array, ""]:
    """gamma, the default `scale`: s'y / y'y of the newest pair, 1 for an empty memory.

    Cost: O(m^2); the pairs are not read.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory, _ = lbfgs.push(lbfgs.init(jnp.zeros(1), 2), jnp.array([1.0]), jnp.array([4.0]))
    >>> initial_scale(memory)
    Array(0.25, dtype=float32)
    """
    return _forms.inverse_scale(_forms.ordered(memory))


def _multiply(
    memory: LBFGSMemory, vectors: Params, scale, damping, form: str, *, inverse: bool, many=False
) -> Params:
    """The product with one vector or a stack: checked, and compiled once where it is eager."""
    check_like(memory.pairs, vectors, "vectors" if many else "vector", lead=int(many))
    _check(form, "two_loop" if inverse else "unrolled", scale, damping)

    def run(memory, vectors, scale, shift):
        shift = damping if shift is None else shift
        if form in ("auto", "compact"):
            middle_of = _inverse if inverse else _direct
            return _compact(memory, vectors, middle_of, scale, shift, many=many)
        wide = _wide(memory, vectors)
        if inverse:
            one = lambda vector: _two_loop(memory, vector, scale)
            return _like((jax.vmap(one) if many else one)(wide), vectors)
        stacked = wide if many else jax.tree.map(lambda leaf: leaf[None], wide)
        found = _unrolled(memory, stacked, scale, shift)
        return _like(found if many else jax.tree.map(lambda leaf: leaf[0], found), vectors)

    # A Python zero says that there is no damping; anything else is a number to compile for.
    return compiled_once(run, memory, vectors, scale, None if _is_zero(damping) else damping)


def _check(form: str, sequential: str, scale, damping) -> None:
    """Refuse a form that does not exist, what it cannot do, and numbers out of range."""
    check_number("damping", damping, least=0)
    if scale is not None:
        check_number("scale", scale, above=0)
    if form not in ("auto", "compact", sequential):
        raise ValueError(f'Expected form={form!r} to be "auto", "compact" or "{sequential}".')
    if form == "two_loop" and not _is_zero(damping):
        raise ValueError('Expected damping=0.0 with form="two_loop"; use form="compact".')


def _is_zero(damping) -> bool:
    """Whether there is no damping, known when the function is traced."""
    return isinstance(damping, int | float) and damping == 0


def _inverse(small, gamma, damping):
    """The compact form of (B + damping I)^-1."""
    if _is_zero(damping):
        return _forms.inverse_middle(small, gamma)
    return _forms.damped_inverse_middle(small, gamma, damping)


def _direct(small, gamma, damping):
    """The compact form of B + damping I."""
    shift, solve = _forms.direct_middle(small, gamma)
    return (shift if _is_zero(damping) else shift + damping), solve


def _compact(memory, vectors, middle_of, scale, damping, *, many: bool = False):
    """Read the pairs, solve in 2 m unknowns, read the pairs."""
    small = _forms.ordered(memory)
    shift, solve = middle_of(small, _forms.inverse_scale(small, scale), damping)
    wide = _wide(memory, vectors)
    products = against_many(memory.pairs, wide) if many else against(memory.pairs, wide)[..., None]
    found = _forms.coefficients(small, solve, products)
    # Or XLA works out the scalar again for every element that it multiplies.
    shift, found = lax.optimization_barrier((shift, found))
    if many:
        return _like(combine_many(memory.pairs, found, shift, wide), vectors)
    return _like(combine(memory.pairs, found[..., 0], shift, wide), vectors)


def _two_loop(memory: LBFGSMemory, vector: Params, scale) -> Params:
    """Algorithm 7.4 of Nocedal and Wright 2006; empty slots are passed over by a zero rho."""
    small = _forms.ordered(memory)
    rho = small.scale**2
    row_of = lambda slot: jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), memory.pairs
    )
    step = lambda q, weight, row, half: jax.tree.map(
        lambda a, leaf: a + weight.astype(a.dtype) * leaf[half], q, row
    )
    dot = lambda row, half, q: inner(jax.tree.map(lambda leaf: leaf[half], row), q)

    def first(q, at):
        slot, weight = at
        row = row_of(slot)
        alpha = weight * dot(row, 0, q)
        return step(q, -alpha, row, 1), alpha

    def second(r, at):
        slot, weight, alpha = at
        row = row_of(slot)
        return step(r, alpha - weight * dot(row, 1, r), row, 0), None

    q, alphas = lax.scan(first, vector, (small.order, rho), reverse=True)
    gamma = _forms.inverse_scale(small, scale)
    r = jax.tree.map(lambda leaf: gamma.astype(leaf.dtype) * leaf, q)
    return lax.scan(second, r, (small.order, rho, alphas))[0]


def _unrolled(memory: LBFGSMemory, vectors: Params, scale, damping) -> Params:
    """Procedure 7.6 of Nocedal and Wright 2006: B = B_0 + sum_i b_i b_i' - a_i a_i'."""
    small = _forms.ordered(memory)
    sigma = 1 / _forms.inverse_scale(small, scale)
    # The same layout as `pairs`, oldest first: a_i in the place of s_i, b_i in that of y_i.
    factors = jax.tree.map(
        lambda leaf: leaf[small.order] * _column(small.scale, leaf).at[:, 0].set(0), memory.pairs
    )
    signs = jnp.array([-1.0, 1.0], small.ss.dtype)

    def add(i, factors):
        s = jax.tree.map(lambda leaf: leaf[small.order[i], 0], memory.pairs)
        earlier = jnp.arange(len(small.live)) < i
        weights = against(factors, s) * signs * earlier[:, None]
        a = combine(factors, weights, sigma, s)
        size = inner(s, a)
        a = jax.tree.map(lambda leaf: jnp.where(small.live[i], leaf / jnp.sqrt(size), 0), a)
        return jax.tree.map(lambda leaf, new: leaf.at[i, 0].set(new), factors, a)

    factors = lax.fori_loop(0, len(small.live), add, factors)
    weights = against_many(factors, vectors) * signs[:, None]
    shift = sigma if _is_zero(damping) else sigma + damping
    return combine_many(factors, weights, shift, vectors)


def _column(scale: Array, leaf: Array) -> Array:
    """(m,) as (m, 2, 1, ..., 1), to go with a leaf of `pairs`."""
    return jnp.broadcast_to(
        scale.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1)),
        (len(scale), 2, *(1,) * (leaf.ndim - 2)),
    )


def _wide(memory: LBFGSMemory, vectors: Params) -> Params:
    """Vectors in the dtypes of the pairs."""
    return jax.tree.map(lambda v, w: jnp.asarray(v, w.dtype), vectors, memory.pairs)


def _like(result: Params, vectors: Params) -> Params:
    """The result in the dtypes of the vectors."""
    return jax.tree.map(lambda r, v: r.astype(jnp.result_type(v)), result, vectors)
