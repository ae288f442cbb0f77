"""Refusals at the factory, and a `quote` that says what `forget` would refuse."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Quote, errors
from jaxunlearn.records import (
    Penalty,
    check_choices,
    check_integers,
    check_storage,
    refusals_as_quotes,
)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "many", 2.0, math.nan, None, np.True_])
def test_what_is_no_count_is_refused(value):
    check_integers(count=np.int64(1))
    check_integers(0, count=0)
    with pytest.raises(ValueError, match=re.escape(f"Expected an integer count={value!r} >= 1")):
        check_integers(count=value)


def test_what_is_not_on_offer_is_refused_by_name():
    check_choices(verify=("off", ("report", "off")))
    with pytest.raises(ValueError, match=r"verify to be one of \('report', 'off'\), got 'maybe'"):
        check_choices(verify=("maybe", ("report", "off")))


def test_numbers_are_stored_as_floats_only():
    for dtype in (None, jnp.bfloat16, "float32"):
        check_storage(dtype)
    with pytest.raises(ValueError, match="floating storage_dtype"):
        check_storage(jnp.int8)


@pytest.mark.parametrize("l2", [-1.0, float("nan")])
def test_a_penalty_is_not_negative(l2):
    assert Penalty(0.0).l2 == 0.0
    with pytest.raises(ValueError, match="Expected l2="):
        Penalty(l2)


def test_a_quote_says_what_forget_would_refuse_and_raises_what_is_no_refusal():
    def quote(params, opt_state, ids):
        raise ids

    quoted = refusals_as_quotes(guarantee="exact")(quote)
    for error in (errors.NeverSeenError, errors.TrainingRecordError, errors.BudgetExhaustedError):
        refusal = quoted(None, None, error("no"))
        assert refusal == Quote(feasible=False, reason="no", guarantee="exact")
    with pytest.raises(errors.WrongStateError):
        quoted(None, None, errors.WrongStateError("no"))
