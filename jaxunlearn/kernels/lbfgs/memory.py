"""Filling a memory, and asking whose pairs it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxunlearn.kernels._checks import concrete, is_traced
from jaxunlearn.kernels._programs import compiled_once
from jaxunlearn.kernels.lbfgs._trees import check_like, inner, row_products
from jaxunlearn.kernels.lbfgs.admission import Admission, curvature, is_usable
from jaxunlearn.kernels.lbfgs.state import NO_OWNER, LBFGSMemory, is_occupied
from jaxunlearn.types import Params


def init(params: Params, memory_size: int, *, owners_per_pair: int = 1) -> LBFGSMemory:
    """An empty memory, B = H = I.

    Args:
      params: real floating-point leaves, arrays or `jax.ShapeDtypeStruct`. Pairs are float32, or
        wider where the leaf is; a leaf's `NamedSharding` is kept, if traced that of explicit axes.
      memory_size: m, pairs held at most, >= 1.
      owners_per_pair: k, ids that one pair can carry, >= 1 (the rows of its minibatch).

    Cost: memory 2 m parameter counts and 4 m^2 inner products.

    Raises:
      TypeError: a leaf is not real floating point.

    >>> memory = init({"w": jnp.zeros(3, jnp.bfloat16)}, memory_size=2)
    >>> memory.pairs["w"].shape, memory.pairs["w"].dtype
    ((2, 2, 3), dtype('float32'))
    """
    for name, size in (("memory_size", memory_size), ("owners_per_pair", owners_per_pair)):
        if size < 1:
            raise ValueError(f"Expected {name}={size} >= 1.")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("Expected parameters with at least one leaf, got none.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Expected floating-point parameters, got {jax.dtypes.result_type(leaf)} at "
                f"params{jax.tree_util.keystr(path)}. Leave it out of the memory."
            )
    pairs = jax.tree.map(lambda leaf: _empty_slots(leaf, memory_size), params)
    wide = jnp.result_type(*jax.tree.leaves(pairs))
    return LBFGSMemory(
        pairs=pairs,
        pair_gram=jnp.zeros((memory_size, 2, memory_size, 2), wide),
        pair_owners=jnp.full((memory_size, owners_per_pair), NO_OWNER, jnp.int32),
        pair_clocks=jnp.zeros((memory_size,), jnp.uint32),
        next_slot=jnp.zeros((), jnp.int32),
        num_pairs=jnp.zeros((), jnp.int32),
        push_clock=jnp.zeros((), jnp.uint32),
    )


def push(
    memory: LBFGSMemory,
    s: Params,
    y: Params,
    *,
    owner: int | Int[Array, ""] | Int[Array, " k"] = NO_OWNER,
    gradient_norm: float | Float[Array, ""] | None = None,
    admission: Admission | None = None,
) -> tuple[LBFGSMemory, Bool[Array, ""]]:
    """Offer a pair; if it is admitted, it takes the place of the oldest where the ring is full.

    Args:
      s: the step, like the parameters.
      y: the change of the gradient along it, both gradients on the same rows.
      owner: an id, or up to k ids padded with -1, to whom the pair belongs; -1 is nobody. An id is
        an int32; a traced one of 64 bits that does not fit is nobody.
      gradient_norm: ||g|| where the step began; some rules need it.
      admission: the rule, `curvature()` by default. Whatever it says, a pair whose s's, s'y, y'y
        or their quotients are not positive and finite is not admitted.

    Returns:
      (memory, admitted). A pair that is not admitted changes nothing but `push_clock`: to offer
      zeros is to let the time pass.

    Cost: the rule, and 4 m + 3 inner products: two passes over the pairs. In place where the memory
    is donated (`jax.jit(..., donate_argnums=0)`); else 2 m parameter counts are copied.
    Each inner product is taken by itself, so that it is the same in every slot, bit for bit.

    Raises:
      TypeError, ValueError: an owner that is no integer, or that no int32 holds.

    >>> memory, admitted = push(init(jnp.zeros(2), 3), jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
    >>> bool(admitted), int(memory.num_pairs), float(memory.pair_gram[0, 0, 0, 1])
    (True, 1, 4.0)
    """
    check_like(memory.pairs, s, "s")
    check_like(memory.pairs, y, "y")
    owners = _owner_row(owner, memory.pair_owners.shape[1])
    rule = admission or curvature()
    return compiled_once(functools.partial(_push, rule), memory, s, y, owners, gradient_norm)


def _push(rule: Admission, memory: LBFGSMemory, s: Params, y: Params, owners, gradient_norm):
    """`push` of a pair for the ids `owners`."""
    s, y = (jax.tree.map(lambda v, w: jnp.asarray(v, w.dtype), v, memory.pairs) for v in (s, y))
    y, admitted = rule(memory, s, y, gradient_norm)
    admitted = admitted & is_usable(inner(s, s), inner(s, y), inner(y, y))

    slot, num_slots = memory.next_slot, memory.pair_owners.shape[0]
    pairs, gram = write_pair(memory, slot, s, y, admitted)
    keep = lambda new, old: jnp.where(admitted, new, old)
    memory = LBFGSMemory(
        pairs=pairs,
        pair_gram=gram,
        pair_owners=keep(memory.pair_owners.at[slot].set(owners), memory.pair_owners),
        pair_clocks=keep(memory.pair_clocks.at[slot].set(memory.push_clock), memory.pair_clocks),
        next_slot=keep((slot + 1) % num_slots, slot),
        num_pairs=keep(jnp.minimum(memory.num_pairs + 1, num_slots), memory.num_pairs),
        push_clock=memory.push_clock + jnp.ones((), jnp.uint32),
    )
    return memory, admitted


def ages(memory: LBFGSMemory) -> UInt[Array, " m"]:
    """How many pairs were offered after each slot's, (m,) uint32; 0 in empty slots.

    Right up to 2**32 - 1 offers later, and modulo 2**32 from then on.

    Cost: O(m); the pairs are not read.

    >>> memory, _ = push(init(jnp.zeros(1), 2), jnp.ones(1), jnp.ones(1))
    >>> memory, _ = push(memory, jnp.ones(1), jnp.ones(1))
    >>> ages(memory)
    Array([1, 0], dtype=uint32)
    """
    age = memory.push_clock - memory.pair_clocks - jnp.ones((), jnp.uint32)
    return jnp.where(is_occupied(memory), age, jnp.zeros((), jnp.uint32))


def owned(memory: LBFGSMemory, owners: int | Int[Array, "..."]) -> Bool[Array, " m"]:
    """Which slots hold a pair that belongs to any of `owners`, (m,); -1 among them is nobody.

    An id that no int32 holds belongs to nobody: where it is not traced, a `ValueError`.

    Cost: m k comparisons for each of `owners`; the pairs are not read.

    >>> memory, _ = push(init(jnp.zeros(1), 2), jnp.ones(1), jnp.ones(1), owner=7)
    >>> owned(memory, jnp.array([7, -1]))
    Array([ True, False], dtype=bool)
    """
    wanted = ids_of(owners).ravel()
    match = memory.pair_owners[:, :, None] == wanted
    return jnp.any(match & (wanted != NO_OWNER), axis=(1, 2)) & is_occupied(memory)


def find(memory: LBFGSMemory, owner: int | Int[Array, ""]) -> Int[Array, ""]:
    """The slot of the newest pair that belongs to `owner`, int32; -1 where there is none.

    Cost: as `owned`.

    >>> memory, _ = push(init(jnp.zeros(1), 2), jnp.ones(1), jnp.ones(1), owner=7)
    >>> int(find(memory, 7)), int(find(memory, 8))
    (0, -1)
    """
    mine, num_slots = owned(memory, owner), memory.pair_owners.shape[0]
    newest_first = (memory.next_slot - 1 - jnp.arange(num_slots, dtype=jnp.int32)) % num_slots
    rank = jnp.argmax(mine[newest_first])
    return jnp.where(jnp.any(mine), newest_first[rank], -1)


def write_pair(memory: LBFGSMemory, slot, s: Params, y: Params, wanted: Bool[Array, ""]):
    """`pairs` and `pair_gram` with (s, y) in a slot where `wanted`; else with the same values."""

    def write(leaf, s, y):
        new = jnp.stack([s, y])[None]
        old = lax.dynamic_slice_in_dim(leaf, slot, 1)
        return lax.dynamic_update_slice_in_dim(leaf, jnp.where(wanted, new, old), slot, 0)

    # The products read what was just written: anything else would make XLA copy the pairs.
    pairs = jax.tree.map(write, memory.pairs, s, y)
    rows = row_products(pairs, s, y).astype(memory.pair_gram.dtype)
    gram = memory.pair_gram.at[:, :, slot].set(rows).at[slot].set(jnp.moveaxis(rows, 2, 0))
    return pairs, jnp.where(wanted, gram, memory.pair_gram)


def _empty_slots(leaf, memory_size: int) -> Array:
    """Zeros (m, 2, *shape) in float32 or wider, sharded like the leaf."""
    wide = jnp.promote_types(jax.dtypes.result_type(leaf), jnp.float32)
    zeros = jnp.zeros((memory_size, 2, *jnp.shape(leaf)), wide)
    traced = is_traced(leaf)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size <= 1:
        return zeros
    if traced and not any(sharding.spec):  # automatic or manual axes, which say nothing here
        return zeros
    place = jax.sharding.reshard if traced else jax.device_put
    return place(zeros, NamedSharding(sharding.mesh, PartitionSpec(None, None, *sharding.spec)))


def ids_of(owners) -> Int[Array, "..."]:
    """Ids as int32; a traced one that does not fit becomes -1, nobody's."""
    limits = np.iinfo(np.int32)
    given = concrete(owners)
    dtype = owners.dtype if given is None else given.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"Expected integer owners, got {dtype}.")
    if given is not None:
        # Before JAX sees them, which cuts 64-bit integers down without a word.
        if np.any((given < limits.min) | (given > limits.max)):
            raise ValueError(f"Expected owners in {limits.min}..{limits.max}, got {owners}.")
        return jnp.asarray(
            owners if isinstance(owners, Array) else given.astype(np.int32), jnp.int32
        )
    narrow = owners.astype(jnp.int32)
    fits = (narrow.astype(dtype) == owners) & ((narrow < 0) == (owners < 0))
    return jnp.where(fits, narrow, NO_OWNER)


def _owner_row(owner, num_owners: int) -> Int[Array, " k"]:
    """One pair's ids, padded with -1."""
    row = jnp.atleast_1d(ids_of(owner))
    if row.ndim != 1 or row.size > num_owners:
        raise ValueError(
            f"Expected at most owners_per_pair={num_owners} owners, got shape {row.shape}. "
            "Say owners_per_pair=... to init."
        )
    return jnp.pad(row, (0, num_owners - row.size), constant_values=NO_OWNER)
