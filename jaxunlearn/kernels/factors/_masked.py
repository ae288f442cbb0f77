"""Factors without the rows that are not finite."""

from jax import lax
from jaxtyping import Array, Bool

from jaxunlearn.kernels.factors._protocol import Factor
from jaxunlearn.kernels.rowwise import local_params


def cleaned(
    factors: tuple[Factor, ...], is_clean: Bool[Array, ""], mask: Bool[Array, " b"]
) -> tuple[Factor, ...]:
    """`factors` where `is_clean`; or with zeros in the rows where `mask` is false.

    Zero times a row that is not finite is NaN, so such rows must not stay. The loop runs once or
    not at all, in place: a branch, or a `where`, would copy every factor of a clean batch.
    """

    def mask_rows(state):
        return state[0] | True, tuple(factor.kept(mask) for factor in state[1])

    start = local_params((is_clean, tuple(factors)), mask)
    return lax.while_loop(lambda state: ~state[0], mask_rows, start)[1]
