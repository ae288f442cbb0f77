"""The state-alignment benchmark: what a lag is, what the oracle is, figures that survive JSON."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import oracle, records, tree

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The scripts of the benchmarks, importable as they are when one of them runs."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def part(name):
    return importlib.import_module(f"_alignment.{name}")


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_victim_was_used_lag_steps_ago_and_not_since(epochs):
    problem = part("problems").problem("ridge", "digits", epochs)
    ids = problem.schedule(40)
    assert np.all(np.bincount(ids.ravel()) == epochs)
    for lag in (1, 5, 10):
        uses = np.flatnonzero((ids == ids[40 - lag, 0]).any(axis=1))
        assert uses[-1] == 40 - lag
        assert len(uses) == epochs


def test_seeds_draw_other_rows_and_the_same_held_out_batches():
    problem = part("problems").problem("logistic", "rotating digits")
    one, other = (problem.draw(seed, 80, 8) for seed in (0, 1))
    assert not np.array_equal(one.rows["x"], other.rows["x"])
    for a, b in zip(one.held_out, other.held_out, strict=True):
        assert np.array_equal(a["x"], b["x"])
    assert np.array_equal(problem.draw(0, 80, 8).rows["x"], one.rows["x"])


def test_drifting_digits_start_upright_and_turn():
    problems = part("problems")
    upright = problems.problem("logistic", "digits").draw(0, 80, 8).rows["x"]
    turned = problems.problem("logistic", "rotating digits").draw(0, 80, 8).rows["x"]
    assert np.allclose(turned[:8], upright[:8])
    assert not np.allclose(turned[8:16], upright[8:16])


def test_the_online_newton_step_holds_the_inverse_of_its_metric(x64):
    tx = part("optimizers").online_newton_step(0.5, damping=2.0)
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    state, metric = tx.init(params), 2.0 * np.eye(5)
    for _ in range(4):
        g = rng.normal(size=5)
        metric += np.outer(g, g)
        updates, state = tx.update({"a": jnp.asarray(g[:3]), "b": jnp.asarray(g[3:])}, state)
    expected = -0.5 * np.linalg.solve(metric, g)
    assert np.allclose(np.concatenate([updates["a"], updates["b"]]), expected, rtol=1e-12)


@pytest.fixture(scope="module")
def cell():
    """Momentum on a short stream: nothing, both halves, replay."""
    act = part("interventions")
    wanted = (act.NOTHING, act.PARAMETERS, act.MEMORY, act.REPLAY, act.DROP_PAIR)
    with jax.enable_x64(True):
        return part("cells").measure(
            "logistic", "digits", "momentum", num_steps=12, lags=(1, 5), seeds=2,
            interventions=wanted,
        )  # fmt: skip


def test_replay_is_exact_and_halves_are_halves(cell):
    act = part("interventions")
    for lag in cell.lags:
        assert all(one.high == 0.0 for one in cell.errors[act.REPLAY][lag].values())
        assert all(one.low > 0.0 for one in cell.errors[act.NOTHING][lag].values())
        at = lambda name, measured, lag=lag: cell.errors[name][lag][measured].median
        assert at(act.PARAMETERS, "parameters") == at(act.MEMORY, "memory") == 0.0
        assert at(act.PARAMETERS, "memory") == at(act.NOTHING, "memory")
        assert at(act.MEMORY, "parameters") == at(act.NOTHING, "parameters")
    assert cell.blanks[act.DROP_PAIR] == act.ONLY_PAIRS
    assert cell.costs[act.REPLAY][5]["gradients"] == 5 / 12


def test_figures_survive_json(cell):
    report = part("report")
    text = json.dumps(report.as_json([cell]), allow_nan=False)
    (again,) = report.from_json(json.loads(text))
    assert again.name == cell.name
    assert json.dumps(report.as_json([again]), allow_nan=False) == text


def test_a_broken_state_counts_as_infinitely_far():
    summary = part("cells").Summary.of([1.0, np.inf, np.inf])
    assert (summary.median, summary.low, summary.high) == (np.inf, 1.0, np.inf)
    assert part("report")._text(summary) == "inf [1, inf]"


@pytest.mark.slow
def test_the_laboratorys_oracle_is_the_librarys(x64):
    training, problems = part("training"), part("problems")
    problem = problems.problem("ridge", "digits", 2)
    chosen = part("optimizers").OPTIMIZERS["Nesterov"]
    laboratory = training.Laboratory(problem, chosen, 16, (1, 5), ())
    run = laboratory.run(0)
    for lag in (1, 5):
        log = records.log_of(laboratory.ids)
        expected = oracle(
            laboratory.tx, problem.loss_fn, problem.start(0), log=log, data=run.stream.rows,
            forget=[laboratory.victim(lag)], l2=problem.l2, show=False,
        )  # fmt: skip
        assert tree.same_bits(expected, run.oracles[lag])
