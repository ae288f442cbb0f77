"""The small matrices of the compact representations (Byrd, Nocedal and Schnabel 1994).

Pairs stand oldest first and are scaled so that s'y = 1: a BFGS update does not depend on the length
of its pair, and the triangular factors become unit triangular whatever the lengths are. Rows of
empty slots are those of the identity, and nothing goes into them or comes out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxunlearn.kernels.lbfgs.state import LBFGSMemory

Solve = Callable[[Array, Array], tuple[Array, Array]]
Middle = tuple[Array, Solve]
"""(shift, solve): the operator is shift I + [S Y] M [S Y]', and solve(S'v, Y'v) = M [S'v; Y'v]."""


class OrderedPairs(NamedTuple):
    """Inner products of the pairs, oldest first: S'S, S'Y and Y'Y, scaled."""

    order: Int[Array, " m"]
    live: Bool[Array, " m"]
    scale: Float[Array, " m"]
    ss: Float[Array, "m m"]
    sy: Float[Array, "m m"]
    yy: Float[Array, "m m"]


def ordered(memory: LBFGSMemory) -> OrderedPairs:
    """The inner products of a memory in the order in which its pairs came."""
    num_slots = memory.pair_owners.shape[0]
    rank = jnp.arange(num_slots, dtype=jnp.int32)
    order = (memory.next_slot - memory.num_pairs + rank) % num_slots
    live = rank < memory.num_pairs
    gram = memory.pair_gram[order][:, :, order]
    curved = jnp.diagonal(gram[:, 0, :, 1])
    scale = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, curved, 1)), 0)
    # One factor at a time: their product can overflow where the scaled entry does not.
    gram = gram * scale[:, None, None, None] * scale[:, None]
    return OrderedPairs(order, live, scale, gram[:, 0, :, 0], gram[:, 0, :, 1], gram[:, 1, :, 1])


def inverse_scale(small: OrderedPairs, scale=None) -> Float[Array, ""]:
    """gamma of H0 = gamma I: s'y / y'y of the newest pair, 1 for an empty memory, or as given."""
    if scale is not None:
        return jnp.asarray(scale, small.yy.dtype)
    newest = jnp.maximum(jnp.sum(small.live) - 1, 0)
    return jnp.where(small.live[0], 1 / jnp.where(small.live[0], small.yy[newest, newest], 1), 1)


def inverse_middle(small: OrderedPairs, gamma) -> Middle:
    """H, equation (3.1) of Byrd, Nocedal and Schnabel: two triangular solves."""
    upper = jnp.triu(small.sy) + _on_empty(small)

    def solve(s_v, y_v):
        first = solve_triangular(upper, s_v)
        middle = small.live[:, None] * first + gamma * (small.yy @ first - y_v)
        return solve_triangular(upper, middle, trans=1), -gamma * first

    return gamma, solve


def direct_middle(small: OrderedPairs, gamma) -> Middle:
    """B, equation (3.5) of Byrd, Nocedal and Schnabel, by the Cholesky factor of their (2.26)."""
    sigma = 1 / gamma
    lower = jnp.tril(small.sy, -1)
    factor = cho_factor(sigma * small.ss + lower @ lower.T + _on_empty(small), lower=True)

    def solve(s_v, y_v):
        x = cho_solve(factor, sigma * s_v + lower @ y_v)
        return -sigma * x, y_v - lower.T @ x

    return sigma, solve


def damped_inverse_middle(small: OrderedPairs, gamma, damping) -> Middle:
    """(B + damping I)^-1, by Woodbury's identity on the compact B and a block elimination.

    With tau = 1/gamma + damping the 2m-by-2m matrix is [A F; F' -E], A >= 0 and E > 0, so that
    both factors are Cholesky's; at damping 0 it is `inverse_middle`.
    """
    sigma = 1 / gamma
    tau = sigma + damping
    cross = jnp.tril(small.sy, -1) - (sigma / tau) * small.sy
    inner = cho_factor(jnp.eye(len(small.live), dtype=cross.dtype) + small.yy / tau, lower=True)
    outer = (sigma * damping / tau) * small.ss + cross @ cho_solve(inner, cross.T)
    factor = cho_factor(outer + _on_empty(small), lower=True)

    def solve(s_v, y_v):
        x = cho_solve(factor, sigma * s_v + cross @ cho_solve(inner, y_v))
        z = cho_solve(inner, cross.T @ x - y_v)
        return sigma * x / tau**2, z / tau**2

    return 1 / tau, solve


def coefficients(small: OrderedPairs, solve: Solve, products: Array) -> Float[Array, "m 2 r"]:
    """M [S'v; Y'v] in slot order, from <pairs[i, a], v_j> in slot order."""
    products = products[small.order] * small.scale[:, None, None]
    found = jnp.stack(solve(products[:, 0], products[:, 1]), axis=1)
    return jnp.zeros_like(products).at[small.order].set(found * small.scale[:, None, None])


def dense_middle(small: OrderedPairs, solve: Solve) -> Float[Array, "2m 2m"]:
    """M itself in slot order, its rows and columns as in `pairs.reshape(2 m, ...)`."""
    size = 2 * len(small.live)
    unit = jnp.eye(size, dtype=small.ss.dtype).reshape(size // 2, 2, size)
    matrix = coefficients(small, solve, unit).reshape(size, size)
    return 0.5 * (matrix + matrix.T)


def _on_empty(small: OrderedPairs) -> Float[Array, "m m"]:
    """Ones on the diagonal of the empty slots."""
    return jnp.diag(1 - small.live.astype(small.ss.dtype))
