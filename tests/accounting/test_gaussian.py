"""The exact Gaussian mechanism against 150-digit decimals and mpmath, one side at a time."""

import decimal
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn.accounting import (
    compose_gaussian,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_noise_stddev,
    round_down,
    round_up,
)

D = decimal.Decimal
DIGITS = decimal.Context(prec=150)

# (epsilon, delta, noise at sensitivity 1): mpmath, 60 digits, root of Balle & Wang 2018, Theorem 8.
NOISE = [
    (0.1, 1e-3, 17.404396203031165),
    (0.1, 1e-5, 30.74956613197745),
    (0.5, 1e-3, 4.61012795072814),
    (0.5, 1e-5, 7.031826675582492),
    (1.0, 1e-3, 2.574657018637206),
    (1.0, 1e-5, 3.730631634815942),
    (2.0, 1e-3, 1.4452391609297834),
    (2.0, 1e-5, 1.9938124456435367),
    (5.0, 1e-3, 0.6898423270003575),
    (5.0, 1e-5, 0.891868264951518),
    (10.0, 1e-3, 0.4060595580241385),
    (10.0, 1e-5, 0.4998886197090085),
    (0.001, 1e-12, 5412.30219384392706),
    (0.001, 1e-5, 1724.25903358380749),
    (0.1, 1e-9, 50.209818263015328),
    (1.0, 1e-12, 6.55782206745885009),
    (1.0, 0.3, 0.690230580014599254),
    (10.0, 1e-12, 0.744612322921754357),
    (50.0, 1e-12, 0.190710442406377139),
    (50.0, 1e-5, 0.149760607560836019),
    (50.0, 0.5, 0.0990178438782379295),
]
# (noise, delta, epsilon at sensitivity 1): mpmath, 60 digits.
EPSILON = [
    (0.5, 1e-3, 7.581279924570114),
    (0.5, 1e-5, 9.997256146434301),
    (1.0, 1e-3, 3.1386705485829394),
    (1.0, 1e-5, 4.3771780956812245),
    (2.0, 1e-3, 1.3522762448025543),
    (2.0, 1e-5, 1.9930914044151196),
    (4.0, 1e-3, 0.5920067183621291),
    (4.0, 1e-5, 0.9263415039982295),
    (10.0, 1e-3, 0.19753397323971042),
    (10.0, 1e-5, 0.3406693646843264),
]
# (noise, epsilon, delta at sensitivity 1): mpmath, 60 digits.
DELTA = [
    (0.5, 0.0, "0.6826894921370859"),
    (0.5, 0.1, "0.66663951552884598"),
    (0.5, 1.0, "0.50986166005467015"),
    (0.5, 5.0, "0.032281984750072821"),
    (1.0, 0.0, "0.38292492254802621"),
    (1.0, 0.1, "0.35232517168136666"),
    (1.0, 1.0, "0.12693673750664395"),
    (1.0, 5.0, "5.7937216919194941e-7"),
    (2.0, 0.1, "0.15926050741399167"),
    (2.0, 5.0, "4.4154434702996193e-24"),
    (4.0, 1.0, "2.9242721048564073e-6"),
    (4.0, 5.0, "4.1402302196292381e-90"),
    (10.0, 0.1, "0.008751768145809594"),
    (10.0, 1.0, "1.2308359836427042e-25"),
]


def oracle_delta(epsilon, mu):
    """Balle & Wang 2018, Theorem 8, in 150-digit decimals: right to 50 digits above 1e-60."""
    with decimal.localcontext(DIGITS):
        epsilon, mu = D(epsilon), D(mu)
        lower, upper = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        return upper_tail(lower) - epsilon.exp() * upper_tail(upper)


def upper_tail(x):
    """Q(x) = 1/2 - phi(x) (x + x^3/3 + x^5/15 + ...)."""
    term = total = x
    n = 1
    while abs(term) > D("1e-145"):
        n += 2
        term = term * x * x / n
        total += term
    return D("0.5") - (-x * x / 2).exp() / (2 * PI).sqrt() * total


def machin_pi():
    """pi = 16 atan(1/5) - 4 atan(1/239)."""
    with decimal.localcontext(decimal.Context(prec=160)):
        atan = lambda n: sum((-1) ** k / (D(n) ** (2 * k + 1) * (2 * k + 1)) for k in range(120))
        return 16 * atan(5) - 4 * atan(239)


PI = machin_pi()


def draws(num, seed):
    rng = np.random.default_rng(seed)
    epsilon, delta = 10 ** rng.uniform(-3, 1.7, num), 10 ** rng.uniform(-12, -0.5, num)
    return zip(epsilon.tolist(), delta.tolist(), (10 ** rng.uniform(-9, 9, num)).tolist())


@pytest.mark.parametrize(("epsilon", "delta", "exact"), NOISE)
def test_noise_lies_above_the_mpmath_value_by_less_than_a_billionth(epsilon, delta, exact):
    noise = gaussian_noise_stddev(epsilon=epsilon, delta=delta, sensitivity=1.0)
    assert 0 <= noise / exact - 1 < 1e-9
    assert 0 <= 1 - exact * gaussian_mu(epsilon=epsilon, delta=delta) < 1e-9


@pytest.mark.parametrize(("noise", "delta", "exact"), EPSILON)
def test_epsilon_lies_above_the_mpmath_value_by_less_than_a_billionth(noise, delta, exact):
    epsilon = gaussian_epsilon(delta=delta, noise_stddev=noise, sensitivity=1.0)
    assert 0 <= epsilon / exact - 1 < 1e-9


@pytest.mark.parametrize(("noise", "epsilon", "exact"), DELTA)
def test_delta_lies_above_the_mpmath_value_by_less_than_a_billionth(noise, epsilon, exact):
    delta = gaussian_delta(epsilon=epsilon, noise_stddev=noise, sensitivity=1.0)
    assert 0 <= delta / float(exact) - 1 < 1e-9
    oracle = oracle_delta(epsilon, 1 / D(noise))
    assert oracle < D("1e-60") or abs(float(oracle) / float(exact) - 1) < 1e-15


def test_the_decimal_oracle_agrees_with_mpmath_to_fifty_digits():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        tail = lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2
        for epsilon, mu in [(0.001, 2.0**-12), (1.0, 0.25), (10.0, 2.0), (50.0, 5.0), (1.0, 4.0)]:
            e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
            exact = tail(e / m - m / 2) - mpmath.exp(e) * tail(e / m + m / 2)
            assert abs(mpmath.mpf(str(oracle_delta(epsilon, mu))) / exact - 1) < 1e-45


def test_every_result_is_safe_and_a_hundred_millionth_less_noise_is_not():
    for epsilon, delta, sensitivity in draws(1000, seed=0):
        scale = {"epsilon": epsilon, "sensitivity": sensitivity}
        noise = gaussian_noise_stddev(delta=delta, **scale)
        assert gaussian_delta(noise_stddev=noise, **scale) <= delta
        assert gaussian_delta(noise_stddev=noise * (1 - 1e-8), **scale) > delta


def test_safe_and_tight_by_the_decimal_oracle():
    for epsilon, delta, sensitivity in draws(150, seed=1):
        noise = gaussian_noise_stddev(epsilon=epsilon, delta=delta, sensitivity=sensitivity)
        assert oracle_delta(epsilon, D(sensitivity) / D(noise)) <= delta
        assert oracle_delta(epsilon, D(sensitivity) / (D(noise) * (1 - D("1e-8")))) > delta
        mu = gaussian_mu(epsilon=epsilon, delta=delta)
        assert oracle_delta(epsilon, D(mu)) <= delta
        found = gaussian_epsilon(delta=delta, noise_stddev=1.0, sensitivity=mu)
        assert oracle_delta(found, D(mu)) <= delta
        assert abs(found / epsilon - 1) < 1e-9
        above = D(gaussian_delta(epsilon=epsilon, noise_stddev=1.0, sensitivity=mu))
        assert 0 <= above / oracle_delta(epsilon, D(mu)) - 1 < D("1e-9")


def test_the_textbook_formula_is_unsafe_at_epsilon_ten_and_is_not_what_we_compute():
    textbook = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    assert gaussian_delta(epsilon=10.0, noise_stddev=textbook, sensitivity=1.0) > 1e-5
    assert gaussian_noise_stddev(epsilon=10.0, delta=1e-5, sensitivity=1.0) > textbook


def test_extreme_arguments_stay_finite_ordered_and_safe():
    assert gaussian_delta(epsilon=1.0, noise_stddev=1e-300, sensitivity=1e300) == 1.0
    assert 0 < gaussian_delta(epsilon=1.0, noise_stddev=1e300, sensitivity=1e-300) < 1e-300
    assert gaussian_delta(epsilon=0.0, noise_stddev=1e6, sensitivity=1.0) > 3.98e-7
    assert gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=1e6) > 5e11
    assert gaussian_epsilon(delta=0.5, noise_stddev=1.0, sensitivity=0.1) == 0.0
    assert gaussian_epsilon(delta=0.5, noise_stddev=1.0, sensitivity=0.0) == 0.0
    assert gaussian_epsilon(delta=0.5, noise_stddev=1e-200, sensitivity=1e200) == math.inf
    assert gaussian_mu(epsilon=1e-300, delta=1e-300) > 0


# mpmath, 60 digits: noises 1, 2, 4 together, and ten of 3 each, at delta 1e-5.
@pytest.mark.parametrize(
    ("noises", "exact"),
    [((1.0, 2.0, 4.0), 5.127368256811985), ((3.0,) * 10, 4.6529845309685065)],
)
def test_composition_equals_one_gaussian_of_the_total_mu(noises, exact):
    mu = compose_gaussian(1 / noise for noise in noises)
    assert 0 <= gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=mu) / exact - 1 < 1e-9


@given(st.lists(st.floats(0, 1e6), max_size=8))
@settings(max_examples=200, deadline=None)
def test_composition_is_the_least_float_not_below_the_root(mus):
    total, square = compose_gaussian(mus), sum((Fraction(mu) ** 2 for mu in mus), Fraction(0))
    assert Fraction(total) ** 2 >= square
    assert total == 0 or Fraction(math.nextafter(total, 0)) ** 2 < square


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=500, deadline=None)
def test_twelve_digits_round_to_the_stated_side_and_stay_there(x):
    up, down = round_up(x), round_down(x)
    assert down <= x <= up
    assert round_up(up) == up
    assert round_down(down) == down
    assert not math.isfinite(up) or abs(x) < 1e-290 or up - x <= 1.0000001e-11 * abs(x)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (gaussian_mu, {"epsilon": -1, "delta": 0.1}, "Expected epsilon=-1 > 0"),
        (gaussian_mu, {"epsilon": math.nan, "delta": 0.1}, "Expected epsilon=nan > 0"),
        (gaussian_mu, {"epsilon": math.inf, "delta": 0.1}, "Expected epsilon=inf > 0"),
        (gaussian_mu, {"epsilon": 1.0, "delta": 0.0}, "Expected delta=0.0"),
        (gaussian_mu, {"epsilon": 1.0, "delta": 1.0}, "Expected delta=1.0"),
        (gaussian_mu, {"epsilon": 1.0, "delta": math.nan}, "Expected delta=nan"),
        (
            gaussian_noise_stddev,
            {"epsilon": 1.0, "delta": 0.1, "sensitivity": 0.0},
            "Expected sensitivity=0.0 > 0",
        ),
        (
            gaussian_delta,
            {"epsilon": 1.0, "noise_stddev": 0.0, "sensitivity": 1.0},
            "Expected noise_stddev=0.0 > 0",
        ),
        (
            gaussian_epsilon,
            {"delta": 0.1, "noise_stddev": 1.0, "sensitivity": -1.0},
            "Expected sensitivity=-1.0 >= 0",
        ),
        (compose_gaussian, None, "Expected mu=-1.0 >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function([1.0, -1.0]) if arguments is None else function(**arguments)
