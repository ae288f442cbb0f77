"""The odometer: exact sums, quotes that spend nothing, quotas, alarms, and a poisoned stream."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import accounting, errors
from jaxunlearn.accounting import (
    Alarm,
    Odometer,
    Option,
    Request,
    Spent,
    amount_below,
    amount_of,
    split_budget,
    units_down,
    units_up,
)
from jaxunlearn.types import Budget, Quote


def ask(requester=None, alternatives=(), **costs):
    return Request(Option(name="newton", costs=costs), requester, tuple(alternatives))


def test_a_hundred_thousand_random_splits_never_sum_above_the_total():
    rng = np.random.default_rng(0)
    for trial in range(100_000):
        total = 10.0 ** rng.uniform(-12, 3)
        parts = split_budget(total, rng.exponential(size=rng.integers(1, 6)))
        # Multiples of one power of two: np.sum is exact, and so is this comparison.
        assert parts.sum() <= total
        assert parts.min() >= 0
        if trial < 1000:
            assert sum(map(Fraction, parts.tolist())) <= Fraction(total)
            assert sum(map(units_up, parts.tolist())) <= units_down(total)
            assert sum(parts.tolist()) > total * (1 - 1e-12)


def test_one_split_into_a_hundred_thousand_parts_never_sums_above_the_total():
    rng = np.random.default_rng(1)
    for total in (1.0, 0.1, 1e-5, 123.456):
        parts = split_budget(total, rng.exponential(size=100_000))
        assert sum(map(Fraction, parts.tolist())) <= Fraction(total)
        forward, shuffled = 0.0, 0.0
        for part in parts.tolist():
            forward += part
        for part in rng.permutation(parts).tolist():
            shuffled += part
        assert forward == shuffled <= total
        assert forward > total * (1 - 1e-10)


def test_a_split_budget_can_be_spent_to_the_last_part():
    rng = np.random.default_rng(2)
    for total in (1.0, 0.3, 1e-5):
        odometer = Odometer(totals={"epsilon": total})
        spent = odometer.start()
        for part in split_budget(total, rng.exponential(size=300)).tolist():
            spent = odometer.spend(spent, ask(epsilon=part))
        assert spent.totals["epsilon"] <= units_down(total)


def test_ten_tenths_are_one_and_three_tenths_are_three_tenths():
    for total, part, count in [(1.0, 0.1, 10), (0.3, 0.1, 3), (1e-5, 1e-6, 10), (0.7, 0.07, 10)]:
        odometer = Odometer(totals={"epsilon": total})
        spent = odometer.start()
        for _ in range(count):
            spent = odometer.spend(spent, ask(epsilon=part))
        assert spent.totals["epsilon"] == units_up(total)
        with pytest.raises(errors.BudgetExhaustedError, match="at most 0 of epsilon"):
            odometer.spend(spent, ask(epsilon=1e-30))


@given(st.lists(st.floats(0, 2.0), min_size=1, max_size=30))
@settings(max_examples=300, deadline=None)
def test_whatever_is_accepted_sums_to_at_most_the_total_exactly(costs):
    odometer = Odometer(totals={"epsilon": 3.7})
    spent, accepted = odometer.start(), []
    for cost in costs:
        before = spent
        if odometer.preview(spent, ask(epsilon=cost)).fits:
            spent = odometer.spend(spent, ask(epsilon=cost))
            accepted.append(Fraction(repr(cost)))
        else:
            with pytest.raises(errors.BudgetExhaustedError):
                odometer.spend(spent, ask(epsilon=cost))
            assert spent is before
    assert sum(accepted) <= Fraction("3.7")
    # A cost is rounded up by less than one unit.
    assert 0 <= Fraction(spent.totals["epsilon"], 10**30) - sum(accepted) <= Fraction(30, 10**30)


@given(st.floats(1e-20, 1e20))
@settings(max_examples=300, deadline=None)
def test_amounts_round_to_their_side_and_come_back(amount):
    assert units_down(amount) <= Fraction(repr(amount)) * 10**30 <= units_up(amount)
    assert units_up(amount) - units_down(amount) <= 1
    assert amount_of(units_up(amount)) >= amount
    assert amount_below(units_down(amount)) <= amount
    assert units_up(amount_below(units_up(amount))) <= units_up(amount)


def test_quoting_spends_nothing_and_says_what_spending_does():
    odometer = Odometer.for_gaussian(epsilon=1.0, delta=1e-5, totals={"deletions": 10})
    spent = odometer.spend(odometer.start(), ask(mu_squared=0.01, deletions=2))
    before = json.dumps(spent)
    request = ask(mu_squared=0.02, deletions=3)
    told = [odometer.preview(spent, request) for _ in range(3)]
    assert told[0] == told[1] == told[2]
    assert json.dumps(spent) == before
    after = odometer.spend(spent, request)
    assert odometer.privacy(after) == (told[0].epsilon, told[0].delta)
    assert told[0].left["deletions"] == 5.0
    exact = accounting.gaussian_epsilon(delta=1e-5, noise_stddev=1.0, sensitivity=math.sqrt(0.03))
    assert exact <= told[0].epsilon < exact * (1 + 1e-9)


def test_an_exhausted_budget_raises_its_own_error_and_changes_nothing():
    odometer = Odometer(totals={"deletions": 5, "seconds": 100.0})
    spent = odometer.spend(odometer.start(), ask("a", deletions=4, seconds=10.0))
    copy = json.dumps(spent)
    with pytest.raises(errors.BudgetExhaustedError, match="at most 1 of deletions"):
        odometer.spend(spent, ask("a", deletions=2, seconds=1.0))
    assert json.dumps(spent) == copy
    told = odometer.preview(spent, ask("a", deletions=2))
    assert not told.fits
    assert told.retrain_due
    assert told.left == {"deletions": 1.0, "seconds": 90.0}
    assert odometer.preview(spent, ask("a", deletions=1)).retrain_due  # the last one
    assert not odometer.preview(odometer.start(), ask("a", deletions=1)).retrain_due


def test_the_cheapest_alternative_is_the_fastest_that_fits():
    odometer = Odometer(totals={"mu_squared": 1.0})
    spent = odometer.spend(odometer.start(), ask(mu_squared=0.9))
    slow = Option(name="retrain", guarantee="exact", seconds=900.0)
    dear = Option(name="newton", costs={"mu_squared": 0.5}, seconds=1.0)
    replay = Option(name="replay", guarantee="exact", seconds=60.0, memory_bytes=10)
    lean = Option(name="lean replay", guarantee="exact", seconds=60.0, memory_bytes=5)
    told = odometer.preview(spent, ask(mu_squared=0.2, alternatives=(slow, dear, replay, lean)))
    assert not told.fits
    assert told.cheapest == lean
    assert odometer.preview(spent, ask(mu_squared=0.2, alternatives=(dear,))).cheapest is None
    assert odometer.preview(spent, ask(mu_squared=0.05, alternatives=(slow,))).cheapest == slow


def test_quotas_and_caps_refuse_without_calling_for_retraining():
    odometer = Odometer(totals={"deletions": 100}, quotas={"deletions": 5}, caps={"deletions": 3})
    spent = odometer.start()
    with pytest.raises(errors.QuotaExceededError, match="at most 3 of deletions in one request"):
        odometer.spend(spent, ask("a", deletions=4))
    spent = odometer.spend(spent, ask("a", deletions=3))
    with pytest.raises(errors.QuotaExceededError, match="'a' to ask for at most 2") as caught:
        odometer.spend(spent, ask("a", deletions=3))
    assert not isinstance(caught.value, errors.BudgetExhaustedError)
    told = odometer.preview(spent, ask("a", deletions=3))
    assert not told.fits
    assert not told.retrain_due
    assert odometer.preview(spent, ask("b", deletions=3)).fits
    assert odometer.preview(spent, ask(None, deletions=3)).fits


def test_requesters_without_a_name_share_one_quota():
    odometer = Odometer(totals={"deletions": 100}, quotas={"deletions": 5})
    spent = odometer.spend(odometer.start(), ask(None, deletions=5))
    with pytest.raises(errors.QuotaExceededError):
        odometer.spend(spent, ask(None, deletions=1))


def test_retraining_refills_the_totals_and_not_the_quotas():
    odometer = Odometer(totals={"deletions": 5}, quotas={"deletions": 5})
    spent = odometer.retrained(odometer.spend(odometer.start(), ask("a", deletions=5)))
    with pytest.raises(errors.QuotaExceededError):
        odometer.spend(spent, ask("a", deletions=1))
    assert odometer.preview(spent, ask("b", deletions=5)).fits
    anew = odometer.retrained(spent, keep_quotas=False)
    assert odometer.preview(anew, ask("a", deletions=5)).fits


def test_alarms_go_off_once_at_each_threshold():
    odometer = Odometer(totals={"deletions": 100}, quotas={"deletions": 60})
    spent, heard = odometer.start(), []
    for k in range(6):
        request = ask("a" if k < 5 else "b", deletions=10)
        heard += odometer.preview(spent, request).alarms
        spent = odometer.spend(spent, request)
    assert heard == [
        Alarm("deletions", 0.5, "a"),
        Alarm("deletions", 0.5),
        Alarm("deletions", 0.8, "a"),
    ]


def test_what_is_spent_survives_json():
    odometer = Odometer.for_zcdp(epsilon=1.0, delta=1e-6)
    spent = odometer.spend(odometer.start(), ask("a", rho=0.001))
    again = Spent(**json.loads(json.dumps(spent._asdict())))
    assert odometer.preview(again, ask("a", rho=0.001)) == odometer.preview(
        spent, ask("a", rho=0.001)
    )


@pytest.mark.parametrize("seed", range(3))
def test_all_of_a_gaussian_or_zcdp_total_is_within_epsilon(seed):
    rng = np.random.default_rng(seed)
    epsilon, delta = math.exp(rng.uniform(-3, 2)), 10 ** rng.uniform(-10, -3)
    for odometer, name in [
        (Odometer.for_gaussian(epsilon=epsilon, delta=delta), "mu_squared"),
        (Odometer.for_zcdp(epsilon=epsilon, delta=delta), "rho"),
    ]:
        spent = odometer.start()
        for part in split_budget(odometer.totals[name], rng.exponential(size=50)).tolist():
            spent = odometer.spend(spent, Request(Option(name="x", costs={name: part})))
        total, _ = odometer.privacy(spent)
        assert epsilon * (1 - 1e-5) < total <= epsilon


def test_basic_composition_adds_both_parameters():
    odometer = Odometer.for_basic(epsilon=1.0, delta=1e-5)
    spent = odometer.start()
    for _ in range(4):
        spent = odometer.spend(spent, ask(epsilon=0.25, delta=1e-6))
    assert odometer.privacy(spent) == (1.0, pytest.approx(4e-6, rel=1e-15))
    assert odometer.privacy(spent)[1] >= 4e-6
    with pytest.raises(errors.BudgetExhaustedError, match="of epsilon"):
        odometer.spend(spent, ask(epsilon=0.01, delta=0.0))


def test_a_budget_of_releases_on_the_grid_is_never_above_its_epsilon():
    budget = Budget(epsilon=0.5, delta=1e-6, max_forget=20)
    odometer = accounting.odometer_of(budget, dimension=1000, quotas={"deletions": 5})
    spent = odometer.start()
    cost = odometer.totals["mu_squared"] / 20
    for k in range(19):
        spent = odometer.spend(spent, ask(f"user {k % 4}", mu_squared=cost, deletions=1))
    epsilon, delta = odometer.privacy(spent)
    assert 0.4 < epsilon < 0.5
    assert delta == 1e-6
    told = odometer.preview(spent, ask("user 3", mu_squared=cost * (1 - 1e-9), deletions=1))
    assert told.fits
    assert told.retrain_due
    assert told.epsilon <= 0.5 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Odometer(totals={"a": -1.0}), "a=-1.0 >= 0"),
        (lambda: Odometer(totals={"a": math.nan}), "a=nan >= 0"),
        (lambda: Odometer(totals={"a": 1}, quotas={"b": 1}), "'b' among the totals"),
        (lambda: Odometer(totals={"a": 1}, thresholds=(0.0,)), "thresholds"),
        (lambda: split_budget(0.0, [1.0]), "total=0.0 > 0"),
        (lambda: split_budget(1.0, [-1.0, 2.0]), "weights >= 0"),
        (lambda: units_up(math.inf), "finite amount"),
    ],
)
def test_figures_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cost", [{"b": 1.0}, {"a": -0.1}, {"a": math.nan}, {"a": math.inf}])
def test_costs_that_make_no_sense_are_refused_by_both(cost):
    odometer = Odometer(totals={"a": 1.0})
    for act in (odometer.preview, odometer.spend):
        with pytest.raises(ValueError, match="Expected"):
            act(odometer.start(), ask(**cost))


# Slow-down poisoning: rows made expensive to remove.


def logistic_costs(rng, poison):
    """Residual budgets that removals take under Guo's bound: honest rows, then poisoned ones."""
    n, d, l2, gamma = 400, 6, 0.05, 1 / (6 * math.sqrt(3))
    x = rng.normal(size=(n, d)) * np.array([1.0, 1.0, 1.0, 0.05, 0.05, 0.05])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.sign(x @ rng.normal(size=d))
    if poison:
        # Inside the unit ball still, but along a direction without curvature, against its own kind.
        x[:60] = 0.0
        x[:60, 5] = 1.0
        y[:60] = np.where(np.arange(60) % 2, 1.0, -1.0)
    w = np.zeros(d)
    curvature = lambda w: 1 / (2 + 2 * np.cosh(x @ w))
    for _ in range(30):
        gradient = -(x * y[:, None]).T @ (1 / (1 + np.exp(y * (x @ w)))) / n + l2 * w
        hessian = (x.T * curvature(w)) @ x / n + l2 * np.eye(d)
        w = w - np.linalg.solve(hessian, gradient)
    costs = []
    for i in range(60):
        keep = np.arange(n) != i
        sum_hessian = (x[keep].T * curvature(w)[keep]) @ x[keep] + l2 * (n - 1) * np.eye(d)
        change = -y[i] * x[i] / (1 + np.exp(y[i] * (x[i] @ w))) + l2 * w
        step = np.linalg.solve(sum_hessian, change)
        moved = (x[keep] @ step) ** 2
        norm = np.linalg.norm(x[keep], 2)
        costs.append(accounting.linear_remainder(
            curvature_lipschitz=gamma, feature_norm=norm,
            displacement_square_norm=float(np.linalg.norm(moved)),
        ))  # fmt: skip
    return costs


def serve(odometer, stream):
    """How many of each requester were served until a total is exhausted; the state; the alarms."""
    spent, served, alarms = odometer.start(), {}, []
    for requester, cost in stream:
        request = Request(Option(name="guo", costs={"residual": cost}), requester)
        before = json.dumps(spent)
        try:
            told = odometer.preview(spent, request)
            spent = odometer.spend(spent, request)
        except errors.QuotaExceededError:
            assert json.dumps(spent) == before
            continue
        except errors.BudgetExhaustedError:
            assert json.dumps(spent) == before
            break
        alarms += told.alarms
        served[requester] = served.get(requester, 0) + 1
        assert spent.totals["residual"] <= units_down(odometer.totals["residual"])
    return served, spent, alarms


def test_a_poisoned_stream_exhausts_the_budget_without_overspending_and_quotas_hold_it_off():
    rng = np.random.default_rng(0)
    honest, poisoned = logistic_costs(rng, False), logistic_costs(rng, True)
    assert np.mean(poisoned) > 3 * np.mean(honest)
    total = 40 * float(np.mean(honest))
    attack = [("mallory", c) for c in poisoned]
    users = [(f"user {k % 10}", c) for k, c in enumerate(honest)]
    mixed = [pair for both in zip(attack, users, strict=True) for pair in both]

    alone, _, _ = serve(Odometer(totals={"residual": total}), users)
    assert sum(alone.values()) >= 30

    open_to_all = Odometer(totals={"residual": total})
    served, spent, alarms = serve(open_to_all, mixed)
    # The published attacks cut the interval between retrainings by 70 percent and more, as here.
    assert sum(n for who, n in served.items() if who != "mallory") < 0.3 * sum(alone.values())
    assert spent.totals["residual"] <= units_down(total)
    assert spent.totals["residual"] > 0.8 * units_down(total)
    assert [a.threshold for a in alarms if a.requester is None][:2] == [0.5, 0.8]

    guarded = Odometer(totals={"residual": total}, quotas={"residual": total / 4})
    served, spent, alarms = serve(guarded, mixed)
    assert sum(n for who, n in served.items() if who != "mallory") > 0.75 * sum(alone.values())
    assert Alarm("residual", 0.5, "mallory") in alarms
    assert spent.by_requester["mallory"]["residual"] <= units_down(total / 4)

    capped = Odometer(totals={"residual": total}, caps={"residual": 3 * float(np.mean(honest))})
    served, _, _ = serve(capped, mixed)
    assert served.get("mallory", 0) <= 0.2 * len(attack)


def test_the_odometer_of_the_memory_pair_is_the_general_one():
    odometer = accounting.DeletionOdometer(max_deletions=5, noise_stddev=1.0, sensitivity=1.0)
    assert odometer.odometer.totals == {"deletions": 5}
    for spent in range(7):
        for asked in range(4):
            told = odometer.quote(spent, asked)
            general = odometer.odometer.preview(Spent.of(deletions=spent), ask(deletions=asked))
            assert told.fits == general.fits == (spent + asked <= 5)
            if told.fits:
                assert odometer.spend(spent, asked) == spent + asked


def test_a_refused_quote_is_no_option():
    refused = Quote(feasible=False, reason="budget exhausted", guarantee="certified", seconds=0.1)
    with pytest.raises(ValueError, match="budget exhausted"):
        Option.of_quote("newton", refused)
