"""Units, the slots that the tracked ones have in a stack, and the rows that belong to each."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxunlearn import errors
from jaxunlearn.records import check_num_examples, show_ids, validate_ids


class Units:
    """Which unit each example belongs to, and which units are tracked. Host data, never changed.

    Args:
      num_examples: example ids are 0..num_examples-1.
      units: (num_examples,) integers >= 0, each example's unit; None: every example is its own.
      track: the unit ids that have a slot; None: all.

    >>> units = Units(4, units=[0, 0, 1, 2], track=[2, 0])
    >>> units.num_slots, units.examples(np.array([0])), units.slots_of_examples(jnp.arange(4))
    (2, array([0, 1], dtype=int32), Array([ 0,  0, -1,  1], dtype=int32))
    """

    def __init__(self, num_examples: int, units: Any = None, track: Any = None):
        check_num_examples(num_examples)
        self.num_examples = num_examples
        self._unit_of = None if units is None else _checked_units(units, num_examples)
        self.num_units = num_examples if self._unit_of is None else int(self._unit_of.max()) + 1
        self._tracked = None
        if track is not None:
            self._tracked, _ = validate_ids(track, self.num_units)
            if not self._tracked.size:
                raise ValueError("Expected track to name at least one unit, or None for all.")
        if self._unit_of is not None:
            self._order = np.argsort(self._unit_of, kind="stable").astype(np.int32)
            self._starts = np.searchsorted(
                self._unit_of[self._order], np.arange(self.num_units + 1)
            )

    @property
    def num_slots(self) -> int:
        """Slots in a stack: one for each tracked unit."""
        return self.num_units if self._tracked is None else len(self._tracked)

    def examples(self, ids: Int[np.ndarray, " u"]) -> Int[np.ndarray, " e"]:
        """All examples of some units, sorted; on the host."""
        if self._unit_of is None:
            return np.asarray(ids, np.int32)
        parts = [self._order[self._starts[u] : self._starts[u + 1]] for u in ids]
        return np.sort(np.concatenate([np.zeros((0,), np.int32), *parts]))

    def count(self, ids: Int[np.ndarray, " e"]) -> int:
        """How many units some examples belong to; on the host."""
        return len(np.unique(ids if self._unit_of is None else self._unit_of[ids]))

    def of_examples(self, ids: Int[Array, " b"]) -> Int[Array, " b"]:
        """The unit of each example, -1 for what is none. Traced."""
        is_real = (ids >= 0) & (ids < self.num_examples)
        safe = jnp.where(is_real, ids, 0).astype(jnp.int32)
        unit = safe if self._unit_of is None else jnp.asarray(self._unit_of)[safe]
        return jnp.where(is_real, unit, -1)

    def slots(self, units: Int[Array, " b"]) -> Int[Array, " b"]:
        """The slot of each unit, -1 where it has none. Traced."""
        is_real = (units >= 0) & (units < self.num_units)
        if self._tracked is None:
            return jnp.where(is_real, units, -1).astype(jnp.int32)
        tracked = jnp.asarray(self._tracked)
        at = jnp.minimum(jnp.searchsorted(tracked, units), self.num_slots - 1)
        return jnp.where(is_real & (tracked[at] == units), at, -1).astype(jnp.int32)

    def slots_of_examples(self, ids: Int[Array, " b"]) -> Int[Array, " b"]:
        """The slot of each example's unit. Traced."""
        return self.slots(self.of_examples(ids))

    def check_tracked(self, ids: Int[np.ndarray, " u"]) -> None:
        """Refuse units without a slot.

        Raises:
          NotTrackedError: naming them.
        """
        if self._tracked is None:
            return
        strangers = ids[~np.isin(ids, self._tracked)]
        if strangers.size:
            raise errors.NotTrackedError(
                f"Expected units that track= names, got {show_ids(strangers)}: training carried no "
                "tangent for them. Forget them with joint=True or unlearners.replay."
            )


def _checked_units(units: Any, num_examples: int) -> Int[np.ndarray, " n"]:
    """Units as int32, or ValueError."""
    units = np.asarray(units)
    if units.shape != (num_examples,) or units.dtype.kind not in "iu":
        raise ValueError(
            f"Expected units: one integer for each of {num_examples} examples, got "
            f"{units.dtype.name}{list(units.shape)}."
        )
    if units.min() < 0 or units.max() > np.iinfo(np.int32).max:
        raise ValueError(f"Expected unit ids in 0..2**31-1, got {units.min()}..{units.max()}.")
    return units.astype(np.int32)
