"""Regret, capacity and odometer of the Memory Pair, against formulas, chance and golden runs."""

import json
import math
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxunlearn import accounting, errors
from jaxunlearn.accounting import RegretModel

MODEL = RegretModel(gradient_bound=0.5, strong_convexity=10.0, dimension=20)


def golden(name) -> pathlib.Path:
    root = os.environ.get("JAXUNLEARN_GOLDEN")
    if not root and os.environ.get("JAXUNLEARN_DATA"):
        root = str(pathlib.Path(os.environ["JAXUNLEARN_DATA"]).parent / "golden")
    path = pathlib.Path(root or "nowhere") / name
    if not path.is_file():
        pytest.skip(f"needs {name} in JAXUNLEARN_GOLDEN")
    return path


def test_the_worked_example_of_the_published_sample_calculation():
    model = RegretModel(gradient_bound=2.0, strong_convexity=0.5, dimension=1)
    assert round(model.logarithmic(1000), 1) == 63.3
    assert round(model.dynamic(1000, 25.0), 1) == 113.3
    # Its third term, 3.4 there, is 2.15 by the formula that it quotes.
    published = 10 * 2.0 * 0.05 * math.sqrt(2 * math.log(1 / 0.1))
    assert round(published, 2) == 2.15


def test_the_adaptive_bound_is_the_general_one_at_the_worst_sum_of_squares():
    model = RegretModel(
        gradient_bound=3.0, strong_convexity=1.0, dimension=2, diameter=4.0,
        lowest_curvature=0.25, highest_curvature=16.0,
    )  # fmt: skip
    general = 3.0 * 4.0 * math.sqrt(0.25 * 16.0 * 100)
    np.testing.assert_allclose(model.adaptive(9.0 * 100), general, rtol=1e-14)


def test_the_noise_term_covers_what_noise_does_and_the_published_one_does_not():
    rng = np.random.default_rng(0)
    d, m, sigma, delta_b, trials = 100, 5, 0.3, 0.05, 4000
    model = RegretModel(gradient_bound=2.0, strong_convexity=1.0, dimension=d)
    norms = np.linalg.norm(sigma * rng.normal(size=(trials, m, d)), axis=2)
    cost = 2.0 * norms.sum(axis=1)
    ours = model.noise(m, sigma, delta_b)
    published = m * 2.0 * sigma * math.sqrt(2 * math.log(1 / delta_b))
    # 4000 trials: a true rate of 5 percent shows at most 6.4 percent but for a chance of 1e-4.
    assert np.mean(cost > ours) <= 0.064
    assert np.mean(cost > published) == 1.0
    without_tail = 2.0 * sigma * m * math.sqrt(d)
    assert ours < 1.3 * without_tail


def test_one_deletion_costs_sigma_times_root_d_plus_the_tail():
    expected = 0.5 * 2.0 * (math.sqrt(20) + math.sqrt(2 * math.log(1 / 0.1)))
    np.testing.assert_allclose(MODEL.noise(1, 2.0, 0.1), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("noise", "growth"),
    [
        (accounting.zcdp_noise(0.3), 2.0),
        (accounting.composed_noise(1.0, 1e-6), 2.0),
        (accounting.published_noise(1.0, 1e-6), 4.0),
    ],
    ids=["zcdp", "composed", "basic"],
)
def test_sigma_grows_with_the_deletions_that_share_it(noise, growth):
    assert noise(40) / noise(10) == pytest.approx(growth, rel=0.1)


@given(
    st.floats(0.05, 5.0), st.floats(0.1, 20.0), st.integers(1, 500), st.integers(10, 10**6),
    st.floats(0.01, 5.0), st.floats(0.01, 20.0),
)  # fmt: skip
def test_the_capacity_is_the_last_count_that_fits_at_its_own_sigma(G, lam, d, T, rho, gamma):
    model = RegretModel(gradient_bound=G, strong_convexity=lam, dimension=d)
    noise = accounting.zcdp_noise(rho)
    capacity = accounting.deletion_capacity(
        model, noise, num_events=T, average_regret=gamma, max_deletions=10**9
    )

    def total(m):
        inserts = model.adaptive(G**2 * T)
        return inserts + model.noise(m, model.influence * noise(m), 0.05)

    m = capacity.num_deletions
    assert total(m + 1) > gamma * T or m == 10**9
    if m:
        assert total(m) <= gamma * T
        assert capacity.noise_stddev == model.influence * noise(m)
        assert capacity.regret == total(m)


def test_a_fixed_sigma_overstates_the_capacity():
    noise = accounting.zcdp_noise(1.0)
    solved = accounting.deletion_capacity(MODEL, noise, num_events=1000, average_regret=0.5)
    fixed = MODEL.influence * noise(1)
    left = 0.5 * 1000 - MODEL.adaptive(0.25 * 1000)
    published = left / (0.5 * fixed * math.sqrt(2 * math.log(1 / 0.05)))
    assert published > 20 * solved.num_deletions


def test_the_search_finds_the_published_capacities_at_the_published_cost():
    grid = json.loads(golden("memory_pair.json").read_text())["zcdp_joint_grid"]
    assert len(grid) > 50
    for case in grid:
        influence = case["L"] / case["lambda_"]
        noise = accounting.zcdp_noise(case["rho_total"])
        inserts = case["L"] * case["D"] * math.sqrt(case["c"] * case["C"] * case["T"])
        tail = math.sqrt(2 * math.log(1 / case["delta_b"]))

        def cost(m, inserts=inserts, influence=influence, noise=noise, tail=tail):
            return inserts + m * influence * (influence * noise(m)) * tail if m else inserts

        most = min(case["T"], 10_000)
        m = accounting.largest_within(cost, case["gamma"] * case["T"], most)
        expected = 0 if case["status"] == "degenerate" else case["m"]
        if case["status"] != "degenerate":
            np.testing.assert_allclose(influence * noise(m), case["sigma"], rtol=1e-9)
        assert m == expected


def test_quoting_spends_nothing_and_spending_counts():
    odometer = accounting.DeletionOdometer(max_deletions=5, noise_stddev=1.0, sensitivity=1.0)
    assert [odometer.quote(2, 2) for _ in range(3)] == [odometer.quote(2, 2)] * 3
    assert odometer.spend(odometer.spend(0, 2), 3) == 5
    assert not odometer.quote(5, 1).fits
    with pytest.raises(errors.BudgetExhaustedError, match="at most 0 more deletions"):
        odometer.spend(5, 1)
    with pytest.raises(errors.BudgetExhaustedError, match="for which the noise was made"):
        odometer.check_step(1.5)
    with pytest.raises(errors.BudgetExhaustedError, match="nan"):
        odometer.check_step(float("nan"))


def test_an_odometer_is_solved_for_a_stream():
    noise = accounting.zcdp_noise(1.0)
    odometer = accounting.DeletionOdometer.solve(
        MODEL, noise, rate=0.5, num_events=1000, average_regret=0.5
    )
    capacity = accounting.deletion_capacity(
        MODEL, noise, rate=0.5, num_events=1000, average_regret=0.5
    )
    assert odometer.max_deletions == capacity.num_deletions
    assert odometer.sensitivity == 0.5 * MODEL.influence
    told = odometer.quote(3, 2)
    expected = MODEL.noise(5, odometer.noise_stddev, 0.05) - MODEL.noise(
        3, odometer.noise_stddev, 0.05
    )
    assert told.noise_regret == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RegretModel(gradient_bound=0.0, strong_convexity=1.0, dimension=1),
        lambda: RegretModel(
            gradient_bound=1.0, strong_convexity=1.0, dimension=1, lowest_curvature=2.0
        ),
        lambda: accounting.zcdp_noise(0.0),
        lambda: accounting.published_noise(1.0, 2.0),
        lambda: accounting.deletion_capacity(
            MODEL, accounting.zcdp_noise(1.0), num_events=0, average_regret=1.0
        ),
        lambda: accounting.deletion_capacity(
            MODEL, accounting.zcdp_noise(1.0), num_events=9, average_regret=1.0,
            failure_probability=1.0,
        ),
        lambda: accounting.DeletionOdometer(max_deletions=-1, noise_stddev=1.0, sensitivity=1.0),
    ],
)  # fmt: skip
def test_figures_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="Expected"):
        make()
