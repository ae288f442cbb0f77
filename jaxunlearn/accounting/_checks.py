"""Refusals by name, shared by the modules of this package."""

import math

LEAST_DELTA = 1e-300


def expect(name, value, *, at_least=None, above_=None):
    """Raises unless `value` is finite and >= `at_least` or > `above_`."""
    bound, sign = (at_least, ">=") if above_ is None else (above_, ">")
    if not (math.isfinite(value) and (value >= bound if above_ is None else value > bound)):
        raise ValueError(f"Expected {name}={value} {sign} {bound:g} and finite.")


def expect_all(*, at_least=None, above_=None, **values):
    """`expect` of several values by name."""
    for name, value in values.items():
        expect(name, value, at_least=at_least, above_=above_)


def expect_delta(delta):
    """Raises unless 1e-300 <= delta < 1."""
    if not LEAST_DELTA <= delta < 1:
        raise ValueError(f"Expected delta={delta} in [1e-300, 1).")


def expect_count(name, value, *, at_least=1):
    """Raises unless `value` is an integer >= `at_least`; returns it as an int."""
    if isinstance(value, bool) or int(value) != value or value < at_least:
        raise ValueError(f"Expected an integer {name}={value} >= {at_least}.")
    return int(value)


def least_count(fits, *, start=1, most=2**40):
    """The least integer >= `start` that fits, of a predicate that stays true; None above `most`."""
    if fits(start):
        return start
    bad, good = start, 2 * start
    while not fits(good):
        bad, good = good, 2 * good
        if good > most:
            return None
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if fits(middle) else (middle, good)
    return good
