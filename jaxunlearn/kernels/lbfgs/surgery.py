"""Taking pairs out of a memory, and correcting those that stay."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels.lbfgs._trees import check_like, inner
from jaxunlearn.kernels.lbfgs.admission import Admission, curvature, is_usable
from jaxunlearn.kernels.lbfgs.memory import ids_of, write_pair
from jaxunlearn.kernels.lbfgs.state import NO_OWNER, LBFGSMemory, is_occupied
from jaxunlearn.types import Params


def drop(memory: LBFGSMemory, which: Bool[Array, " m"]) -> LBFGSMemory:
    """The memory without the pairs in the slots `which`, the others packed from slot 0.

    Oldest first. What comes back is a function of the pairs that stay, of their clocks and of
    `push_clock`, and of nothing else. Leaf for leaf and bit for bit it is the memory that had been
    offered zeros in place of the dropped pairs, under a rule that does not look at the memory and
    as long as no pair had to leave for a dropped one; where the ring of that memory had come round,
    it is its `drop` of nothing, which packs it too. A pair that left to make room does not return.

    Args:
      which: bool (m,), by slot: `owned(memory, ids)`, `ages(memory) > 10`, or any other mask. Empty
        slots may be true.

    Cost: one pass over the pairs, and a second memory while it runs. No inner product is taken.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(1), memory_size=2)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0]), jnp.array([2.0]), owner=7)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0]), jnp.array([4.0]), owner=8)
    >>> memory = lbfgs.drop(memory, lbfgs.owned(memory, 7))
    >>> memory.pairs[:, 1], int(memory.num_pairs)
    (Array([[4.],
           [0.]], dtype=float32), 1)
    """
    num_slots = memory.pair_owners.shape[0]
    if jnp.shape(which) != (num_slots,) or not jnp.issubdtype(jnp.result_type(which), bool):
        raise ValueError(
            f"Expected a mask of {num_slots} slots, got {jnp.result_type(which)} of shape "
            f"{jnp.shape(which)}. Make one with owned(memory, ids) or ages(memory) > limit."
        )
    keep = is_occupied(memory) & ~jnp.asarray(which)
    rank = jnp.arange(num_slots, dtype=jnp.int32)
    oldest_first = (memory.next_slot - memory.num_pairs + rank) % num_slots
    source = oldest_first[jnp.argsort(~keep[oldest_first], stable=True)]
    num_pairs = jnp.sum(keep, dtype=jnp.int32)
    taken = rank < num_pairs

    def pack(leaf, fill=0):
        mask = taken.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(mask, leaf[source], jnp.asarray(fill, leaf.dtype))

    gram = pack(jnp.moveaxis(pack(memory.pair_gram), 2, 0))
    return LBFGSMemory(
        pairs=jax.tree.map(pack, memory.pairs),
        pair_gram=jnp.moveaxis(gram, 0, 2),
        pair_owners=pack(memory.pair_owners, NO_OWNER),
        pair_clocks=pack(memory.pair_clocks),
        next_slot=num_pairs % num_slots,
        num_pairs=num_pairs,
        push_clock=memory.push_clock,
    )


def correct(
    memory: LBFGSMemory,
    slot: int | Int[Array, ""],
    delta_y: Params,
    *,
    disown: int | Int[Array, "..."] = NO_OWNER,
    gradient_norm: float | Float[Array, ""] | None = None,
    admission: Admission | None = None,
) -> tuple[LBFGSMemory, Bool[Array, ""]]:
    """Add `delta_y` to the y of one pair, and ask again whether the pair may stay.

    For a pair whose y is a mean over rows, of which one leaves: `delta_y` is what its share was
    with the opposite sign. The s of the pair is the path's and stays.

    Args:
      slot: the pair's, as `find` gives it; where there is no pair (-1), nothing changes.
      delta_y: like the parameters.
      disown: ids that the pair no longer belongs to, any shape; -1 is nobody.
      gradient_norm, admission: as in `push`. The rule sees the pairs older than this one.

    Returns:
      (memory, admitted). A pair that is not admitted is dropped, and the others move as `drop`
      says: correct several pairs newest first, or `find` each.

    Cost: as `push`, and `drop` where the pair is not admitted; for that case a second memory is set
      aside while it runs, donated or not.

    >>> from jaxunlearn.kernels import lbfgs
    >>> memory = lbfgs.init(jnp.zeros(1), memory_size=2)
    >>> memory, _ = lbfgs.push(memory, jnp.array([1.0]), jnp.array([4.0]), owner=7)
    >>> slot = lbfgs.find(memory, 7)
    >>> memory, admitted = lbfgs.correct(memory, slot, jnp.array([-1.0]), disown=7)
    >>> float(memory.pairs[0, 1, 0]), bool(admitted), int(lbfgs.find(memory, 7))
    (3.0, True, -1)
    """
    check_like(memory.pairs, delta_y, "delta_y")
    operands = memory, slot, delta_y, ids_of(disown).ravel(), gradient_norm
    return compiled_once(functools.partial(_correct, admission or curvature()), *operands)


def _correct(rule: Admission, memory: LBFGSMemory, slot, delta_y: Params, wanted, gradient_norm):
    """`correct`, the ids that leave being `wanted`."""
    num_slots = memory.pair_owners.shape[0]
    slot = jnp.asarray(slot, jnp.int32)
    inside = (slot >= 0) & (slot < num_slots)
    at = jnp.where(inside, slot, 0)
    found = inside & is_occupied(memory)[at]
    row = lambda half: jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, at, keepdims=False)[half], memory.pairs
    )
    s, old_y = row(0), row(1)
    y = jax.tree.map(lambda a, b: a + jnp.asarray(b, a.dtype), old_y, delta_y)
    y, admitted = rule(_older_than(memory, at), s, y, gradient_norm)
    admitted = found & admitted & is_usable(inner(s, s), inner(s, y), inner(y, y))

    pairs, gram = write_pair(memory, at, s, y, admitted)
    leaves = jnp.any((memory.pair_owners[at][:, None] == wanted), axis=1) & found
    owners = jnp.where(leaves, NO_OWNER, memory.pair_owners[at])
    corrected = LBFGSMemory(
        pairs=pairs,
        pair_gram=gram,
        pair_owners=memory.pair_owners.at[at].set(owners),
        pair_clocks=memory.pair_clocks,
        next_slot=memory.next_slot,
        num_pairs=memory.num_pairs,
        push_clock=memory.push_clock,
    )
    this = (jnp.arange(num_slots) == at) & found
    return lax.cond(found & ~admitted, lambda m: drop(m, this), lambda m: m, corrected), admitted


def _older_than(memory: LBFGSMemory, slot) -> LBFGSMemory:
    """The same buffers, of which only the pairs older than the one in `slot` count."""
    num_slots = memory.pair_owners.shape[0]
    oldest = memory.next_slot - memory.num_pairs
    return LBFGSMemory(
        pairs=memory.pairs,
        pair_gram=memory.pair_gram,
        pair_owners=memory.pair_owners,
        pair_clocks=memory.pair_clocks,
        next_slot=slot,
        num_pairs=(slot - oldest) % num_slots,
        push_clock=memory.push_clock,
    )
