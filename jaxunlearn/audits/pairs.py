"""The inverse Hessian that an L-BFGS state stands for, read out in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, PyTree

from jaxunlearn.kernels import lbfgs

Vectors = Float64[np.ndarray, "r d"]


class Curvature(NamedTuple):
    """Curvature pairs oldest first; H is what BFGS makes of gamma I with them.

    clocks: when each pair came, to match it with the same pair of another state.
    gamma: s'y / y'y of the newest pair, 1 without pairs, unless replaced.
    """

    steps: Float64[np.ndarray, "m d"]
    changes: Float64[np.ndarray, "m d"]
    clocks: np.ndarray
    gamma: float

    def __call__(self, vectors: Vectors) -> Vectors:
        """H v for every row v, by two loops (Nocedal and Wright 2006, algorithm 7.4).

        Pairs of negative curvature, which Optax does not refuse, act as they do there.
        """
        shares, rho = [], 1 / np.sum(self.steps * self.changes, axis=1)
        for i in reversed(range(len(rho))):
            shares.append(rho[i] * (vectors @ self.steps[i]))
            vectors = vectors - shares[-1][:, None] * self.changes[i]
        vectors = self.gamma * vectors
        for i in range(len(rho)):
            back = rho[i] * (vectors @ self.changes[i])
            vectors = vectors + (shares.pop() - back)[:, None] * self.steps[i]
        return vectors


def curvature_of(state: PyTree) -> Curvature | None:
    """The pairs of the one L-BFGS memory in `state`; None where there is none, or several."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_is_memory) if _is_memory(node)]
    if len(nodes) != 1:
        return None
    return _of_optax(nodes[0]) if _is_optax(nodes[0]) else _of_kernels(nodes[0])


def unread_leaves(state: PyTree, ideal: PyTree) -> tuple[str, ...]:
    """Paths of the leaves that `curvature_of` does not read and in which the states differ."""
    theirs = {jax.tree_util.keystr(path): leaf for path, leaf in _unread(ideal)}
    ours = {jax.tree_util.keystr(path): leaf for path, leaf in _unread(state)}
    same = lambda name: np.array_equal(ours[name], theirs[name], equal_nan=True)
    return tuple(
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not same(name)
    )


def _unread(state: PyTree) -> list[tuple[Any, np.ndarray]]:
    """(path, leaf) beside the one memory; of Optax's, its unfinished pair."""

    def without_pairs(node):
        if not _is_memory(node):
            return node
        return {"params": node.params, "updates": node.updates} if _is_optax(node) else {}

    rest = jax.tree.map(without_pairs, state, is_leaf=_is_memory)
    is_key = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    words = lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf
    pairs, _ = jax.tree_util.tree_flatten_with_path(rest)
    return [(path, np.asarray(words(leaf), np.float64)) for path, leaf in pairs]


def norm_distance(one: Curvature, other: Curvature) -> float | None:
    """||H - H'||_2 / ||H'||_2 over all vectors; None where a pair has no positive curvature."""
    if any(np.any(np.sum(c.steps * c.changes, axis=1) <= 0) for c in (one, other)):
        return None
    with jax.enable_x64(True):
        first, second = _memory(one), _memory(other)
        return float(_relative_distance(first, second, one.gamma, other.gamma))


@jax.jit
def _relative_distance(first, second, scale, other_scale):
    gap = lbfgs.operator_distance(first, second, scale=scale, other_scale=other_scale)
    return gap / lbfgs.eigenvalue_range(second, scale=other_scale)[1]


def _is_optax(node: Any) -> bool:
    return type(node).__name__ == "ScaleByLBFGSState" and hasattr(node, "_fields")


def _is_memory(node: Any) -> bool:
    return _is_optax(node) or isinstance(node, lbfgs.LBFGSMemory)


def _of_optax(node: Any) -> Curvature:
    """The pairs that the state holds; the one that the next step will add is not among them."""
    size = len(node.weights_memory)
    order = (int(node.count) - 1 + np.arange(size)) % size  # oldest first: slot count - 2 is newest
    clocks = int(node.count) - 1 - size + np.arange(size)
    live = np.asarray(node.weights_memory)[order] != 0
    rows = lambda stack: _flat(stack, 1)[order][live]
    return _curvature(rows(node.diff_params_memory), rows(node.diff_updates_memory), clocks[live])


def _of_kernels(node: Any) -> Curvature:
    size, held = len(node.pair_owners), int(node.num_pairs)
    order = (int(node.next_slot) - held + np.arange(held)) % size
    pairs = _flat(node.pairs, 2)[order]
    return _curvature(pairs[:, 0], pairs[:, 1], np.asarray(node.pair_clocks)[order])


def _curvature(steps, changes, clocks) -> Curvature:
    gamma = 1.0
    if len(steps):
        gamma = float(steps[-1] @ changes[-1] / (changes[-1] @ changes[-1]))
    return Curvature(steps, changes, clocks, gamma)


def _memory(curvature: Curvature) -> lbfgs.LBFGSMemory:
    """The pairs as a memory of the kernels in float64, at least one slot."""
    held, size = len(curvature.steps), max(1, len(curvature.steps))
    pairs = np.zeros((size, 2, curvature.steps.shape[1]))
    pairs[:held, 0], pairs[:held, 1] = curvature.steps, curvature.changes
    clocks = np.zeros(size, np.uint32)
    clocks[:held] = curvature.clocks.astype(np.int64) % 2**32
    return lbfgs.LBFGSMemory(
        pairs=jnp.asarray(pairs),
        pair_gram=jnp.asarray(np.einsum("iad,jbd->iajb", pairs, pairs)),
        pair_owners=jnp.full((size, 1), -1, jnp.int32),
        pair_clocks=jnp.asarray(clocks),
        next_slot=jnp.asarray(held % size, jnp.int32),
        num_pairs=jnp.asarray(held, jnp.int32),
        push_clock=jnp.asarray(0, jnp.uint32),
    )


def _flat(stack: PyTree, lead: int) -> np.ndarray:
    """All leaves side by side in float64, after `lead` leading axes."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stack)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], axis=-1)
