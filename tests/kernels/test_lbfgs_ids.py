"""Owner ids of pairs: one that an int32 cannot hold never stands for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.kernels import lbfgs

WRAPS_TO_7 = 2**32 + 7


def memory_of_seven():
    return lbfgs.push(lbfgs.init(jnp.zeros(1), 2), jnp.ones(1), jnp.ones(1), owner=7)[0]


@pytest.mark.parametrize(
    "owner", [WRAPS_TO_7, np.array([WRAPS_TO_7]), np.uint64(WRAPS_TO_7), np.int64(-(2**40))]
)
def test_an_id_that_no_int32_holds_is_refused_wherever_it_is_given(owner):
    memory = memory_of_seven()
    for call in (
        lambda: lbfgs.owned(memory, owner),
        lambda: lbfgs.find(memory, owner),
        lambda: lbfgs.push(memory, jnp.ones(1), jnp.ones(1), owner=owner),
        lambda: lbfgs.correct(memory, 0, jnp.ones(1), disown=owner),
    ):
        with pytest.raises(ValueError, match="Expected owners in"):
            call()


def test_a_traced_id_that_no_int32_holds_is_nobodys(x64):
    memory = memory_of_seven()
    owned = jax.jit(lbfgs.owned)
    assert not np.any(owned(memory, jnp.array([WRAPS_TO_7])))
    assert list(owned(memory, jnp.array([7, WRAPS_TO_7]))) == [True, False]


def test_owners_that_are_no_integers_are_refused():
    for bad in (7.0, True, np.float32(7), 2**70):
        with pytest.raises(TypeError, match="Expected integer owners"):
            lbfgs.owned(memory_of_seven(), bad)
