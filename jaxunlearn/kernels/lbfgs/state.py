"""The memory of L-BFGS: a ring of pairs (s, y), whose they are, and all their inner products."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

NO_OWNER = -1


class LBFGSMemory(NamedTuple):
    """Up to m pairs of a step s and the change y of the gradient along it, in a ring of m slots.

    pairs: like the parameters, every leaf (m, 2, *shape), s before y, in float32 or wider. Leaf by
      leaf, so that a sharded parameter's pairs are sharded like it.
    pair_gram: (m, 2, m, 2), the inner products of `pairs` with themselves. It is what makes a
      product with any vector read the pairs only twice.
    pair_owners: int32 (m, k), up to k ids to whom a pair belongs, padded with -1.
    pair_clocks: uint32 (m,), `push_clock` when the pair came.
    next_slot: int32 in 0..m-1, where the next pair goes.
    num_pairs: int32 in 0..m. The pairs are in the `num_pairs` slots before `next_slot`.
    push_clock: uint32, pairs ever offered, admitted or not, modulo 2**32.

    Slots without a pair hold zeros, owners -1 and clock 0.
    """

    pairs: PyTree
    pair_gram: Float[Array, "m 2 m 2"]
    pair_owners: Int[Array, "m k"]
    pair_clocks: UInt[Array, " m"]
    next_slot: Int[Array, ""]
    num_pairs: Int[Array, ""]
    push_clock: UInt[Array, ""]


def is_occupied(memory: LBFGSMemory) -> Bool[Array, " m"]:
    """Which slots hold a pair, (m,).

    Cost: O(m); the pairs are not read.

    >>> from jaxunlearn.kernels import lbfgs
    >>> lbfgs.is_occupied(lbfgs.init(jnp.zeros(2), 3))
    Array([False, False, False], dtype=bool)
    """
    num_slots = memory.pair_owners.shape[0]
    oldest = memory.next_slot - memory.num_pairs
    return (jnp.arange(num_slots, dtype=jnp.int32) - oldest) % num_slots < memory.num_pairs
