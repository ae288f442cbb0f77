"""The benchmark of the kernels and `jaxunlearn bench`: fair, complete, and judged by its bars."""

import importlib
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import cli
from jaxunlearn.cli import bench, timing

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The scripts of the benchmarks, importable as they are when one of them runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def part(name):
    return importlib.import_module(f"_kernels.{name}")


# Timing.


class Clock:
    """Candidates that take a known time, on a clock of their own."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def candidate(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


def test_a_ratio_is_that_of_the_same_repeats(monkeypatch):
    clock = Clock(monkeypatch)
    speed = {"now": 1.0}

    def candidate(cost):  # on a machine that slows down by half with every call
        def call():
            speed["now"] *= 1.5
            clock.now += cost * speed["now"]

        return call

    result = timing.compare({"a": candidate(1.0), "b": candidate(1.0)}, baseline="a")
    ratios = np.array(result["b"]["seconds"]) / np.array(result["a"]["seconds"])
    assert set(np.round(ratios, 6)) == {1.5, round(1 / 1.5, 6)}, "either came first in some repeats"
    assert result["b"]["ratio"] == np.median(ratios)
    assert result["a"]["ratio"] == result["a"]["ratio_low"] == 1.0


def test_the_first_call_is_not_in_the_median(monkeypatch):
    clock = Clock(monkeypatch)
    costs = iter([50.0] + [1.0] * 100)

    def compiling():
        clock.now += next(costs)

    result = timing.compare({"f": compiling}, baseline="f")["f"]
    assert result["compile_seconds"] == 50.0
    assert max(result["seconds"]) == 1.0


def test_a_slow_candidate_runs_in_fewer_repeats_evenly_spaced(monkeypatch):
    clock = Clock(monkeypatch)
    candidates = {name: clock.candidate(name, s) for name, s in (("a", 1.0), ("b", 2.0), ("c", 9))}
    result = timing.compare(candidates, baseline="a", patience=20.0, always=["c"])
    assert [result[name]["num_repeats"] for name in "abc"] == [30, 10, 30]
    took_part = [t is not None for t in result["b"]["seconds"]]
    assert [sum(took_part[k : k + 3]) for k in range(0, 30, 3)] == [1] * 10
    assert result["b"]["ratio"] == pytest.approx(2.0)
    patient = timing.compare(candidates, baseline="a", patience=0.1)
    assert patient["b"]["num_repeats"] == timing.FEWEST
    assert math.isfinite(patient["b"]["ratio_low"])


def test_a_short_call_is_repeated_to_fill_a_sample(monkeypatch):
    clock = Clock(monkeypatch)
    result = timing.compare({"f": clock.candidate("f", 0.25)}, baseline="f", sample_seconds=1.0)
    assert len(clock.calls) == 2 + 30 * 4
    assert result["f"]["median_seconds"] == pytest.approx(0.25)


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (timing.FEWEST, 30, 61):
        held = 0
        for _ in range(2000):
            low, high = timing.median_interval(rng.normal(size=n))
            held += low <= 0.0 <= high
        assert 0.945 <= held / 2000 <= 0.995
    assert math.isnan(timing.median_interval(np.arange(timing.FEWEST - 1.0))[0])


@pytest.mark.parametrize(("repeats", "baseline"), [(29, "f"), (30, "g")])
def test_too_few_repeats_and_an_unknown_baseline_are_refused(repeats, baseline):
    with pytest.raises(ValueError, match="Expected"):
        timing.compare({"f": lambda: None}, baseline=baseline, repeats=repeats)


def test_memory_and_compilation_are_those_of_the_program():
    x = jnp.ones((64, 64))
    assert timing.temporary_bytes(lambda x: jnp.sin(x @ x) @ x, x) >= x.nbytes
    assert timing.flops(lambda x: x @ x, x) >= 2 * 64**3


def test_a_persistent_cache_does_not_make_compilation_look_free(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    from jax.experimental.compilation_cache import compilation_cache

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        x = np.ones((3, 3), np.float32)
        assert timing.compile_seconds(lambda x: jnp.sinh(x) @ x, x) > 0
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: jnp.cosh(x) @ x).lower(x).compile()
        assert list(tmp_path.iterdir()), "the cache is on again"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# Cells: nothing is timed that is missing or wrong.


def some_cell(candidates, **options):
    cells = part("cells")
    given = [
        cells.Candidate(name, kernel, lambda f=f: f, cells.one, framework, name == "jaxunlearn")
        for name, kernel, f, framework in candidates
    ]
    cell = cells.Cell("per_example", "MLP", 4, "plain gradient")
    references = {"gradient": [np.ones(3)], "clipped sum": [np.full(3, 2.0)]}
    return cells.measure(cell, given, references, **options)


def missing():
    raise ImportError("No module named 'opacus'", name="opacus")


def test_a_missing_failing_or_wrong_peer_is_a_blank_with_its_reason():
    cell = some_cell(
        [
            ("plain gradient", "gradient", lambda: np.ones(3), "jax"),
            ("jaxunlearn", "clipped sum", lambda: np.full(3, 2.0), "jax"),
            ("Opacus ghost", "clipped sum", missing, "torch"),
            ("Optax", "clipped sum", lambda: np.full(3, 2.01), "jax"),
            ("BackPACK", "clipped sum", lambda: np.full(4, 2.0), "torch"),
            ("torch.func", "clipped sum", lambda: 1 / 0, "torch"),
        ]
    )
    assert list(cell.results) == ["plain gradient", "jaxunlearn"]
    assert cell.blanks == {
        "Opacus ghost": "not installed (opacus)",
        "Optax": "Optax disagrees by 5.0e-03",
        "BackPACK": "BackPACK disagrees by inf",
        "torch.func": "fails: ZeroDivisionError: division by zero",
    }


def test_a_wrong_result_of_ours_ends_the_run():
    with pytest.raises(part("cells").Unfit, match=r"jaxunlearn disagrees by 2\.5e-01"):
        some_cell(
            [
                ("plain gradient", "gradient", lambda: np.ones(3), "jax"),
                ("jaxunlearn", "clipped sum", lambda: np.full(3, 2.5), "jax"),
            ]
        )


def test_a_peer_too_slow_to_repeat_says_how_slow(monkeypatch):
    clock = Clock(monkeypatch)

    def taking(seconds, result):
        timed = clock.candidate("", seconds)
        return lambda: (timed(), result)[1]

    cell = some_cell(
        [
            ("plain gradient", "gradient", taking(1.0, np.ones(3)), "jax"),
            ("jaxunlearn", "clipped sum", taking(5.0, np.full(3, 2.0)), "jax"),
            ("Optax", "clipped sum", taking(5.0, np.full(3, 2.0)), "jax"),
        ],
        patience=2.0,
    )
    assert cell.blanks == {"Optax": "too slow to repeat: 5 s a call"}
    assert cell.results["jaxunlearn"]["num_repeats"] == 30


def test_not_a_number_agrees_with_nothing():
    disagreement = part("cells").disagreement
    assert disagreement([np.array([np.nan])], [np.array([1.0])]) == math.inf
    assert disagreement([np.array([3.0, 4.0])], [np.array([3.0, 4.0])]) == 0.0
    assert disagreement([np.array([3.0, 9.0])], [np.array([3.0, 4.0])]) == 1.0


# Bars.


def timed_cell(section="per_example", model="MLP 1-2", **seconds):
    """A cell with given raw seconds; keyword names stand for candidates."""
    names = {
        "plain": ("plain gradient", "gradient"),
        "ours": ("jaxunlearn", "clipped sum"),
        "ghost": ("Opacus ghost", "clipped sum"),
        "optax": ("Optax", "clipped sum"),
    }
    cell = part("cells").Cell(section, model, 4, "plain gradient")
    for key, raw in seconds.items():
        name, kernel = names[key]
        median, low, high, count = timing.ratio_of(raw, seconds["plain"])
        cell.results[name] = {
            "kernel": kernel, "ours": key == "ours", "framework": "jax", "seconds": raw,
            "median_seconds": float(np.median(raw)), "ratio": median, "ratio_low": low,
            "ratio_high": high, "num_repeats": count, "compile_seconds": 0.0, "setting": None,
        }  # fmt: skip
    return cell


def test_a_bar_is_met_when_its_interval_reaches_it():
    bars = part("bars")
    spread = np.linspace(0.9, 1.1, 31)
    cell = timed_cell(plain=[1.0] * 31, ours=list(1.25 * spread), ghost=[2.0] * 31)
    at_most = lambda limit: bars.Bar("per_example", "clipped sum", "MLP", limit, "at most",
                                     "plain gradient")  # fmt: skip
    at_least = lambda limit: bars.Bar("per_example", "clipped sum", "MLP", limit, "at least",
                                      "Opacus ghost")  # fmt: skip
    judged = lambda bar: next(iter(bars.findings([cell], [bar])))
    low, high = 1.25 * spread[9], 1.25 * spread[21]
    assert judged(at_most(low)).met
    assert not judged(at_most(low - 1e-3)).met
    assert judged(at_least(2.0 / low)).met
    assert not judged(at_least(2.0 / low + 1e-3)).met
    assert judged(at_least(1.0)).margin == pytest.approx(1.6)
    assert judged(at_most(1.0)).margin == pytest.approx(0.8)
    assert (judged(at_most(1.0)).low, judged(at_most(1.0)).high) == pytest.approx((low, high))


def test_ahead_of_every_peer_means_the_nearest_one():
    bars = part("bars")
    cell = timed_cell(plain=[1.0] * 30, ours=[2.0] * 30, ghost=[5.0] * 30, optax=[3.0] * 30)
    bar = bars.Bar("per_example", "clipped sum", "", 1.0, "at least", bars.PEERS)
    (finding,) = bars.findings([cell], [bar])
    assert (finding.against, finding.median) == ("Optax", 1.5)


def test_a_bar_without_its_peer_or_on_another_model_is_not_judged():
    bars = part("bars")
    cell = timed_cell(plain=[1.0] * 30, ours=[2.0] * 30)
    for model, versus in (("MLP", "Opacus ghost"), ("CNN", "plain gradient")):
        bar = bars.Bar("per_example", "clipped sum", model, 1.0, "at least", versus)
        assert list(bars.findings([cell], [bar])) == []


def test_every_bar_names_a_section_of_the_plan_and_a_direction():
    bars, plan = part("bars"), part("plan")
    for bar in bars.BARS:
        assert bar.section in plan.PLAN
        assert bar.direction in ("at most", "at least")
    assert any(bar.claimed for bar in bars.BARS)


# The whole run, on models of a few numbers.


def small_cells(only):
    """The cells of some sections, at the smallest shapes, with what needs nothing but JAX."""
    models, plan, linear = part("models"), part("plan"), part("section_linear")
    small = models.dense(5, 10)
    shapes = {
        "per_example": ((small, 4),),
        "products": ((small, 4),),
        "lbfgs": ((40, 1), (40, 2)),
        "solves": ((models.dense(4, 10), 8),),
        "compile": ((models.dense(3, 10), 4),),
        "memory": ((small, 4),),
    }
    sections = {
        name: section._replace(quick_shapes=shapes[name], quick_patience=0.01)
        for name, section in plan.PLAN.items()
    }
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "NUM_PAIRS", 3)
        patch.setattr(linear, "NUM_SYSTEMS", 2)
        cells = plan.run(
            only, quick=True, repeats=30, plan=sections, report=lambda cell, _: seen.append(cell)
        )
    assert seen == cells
    return cells


def check_cells(cells):
    """Nothing is missing, ours ran in all repeats, and everybody agreed."""
    for cell in cells:
        assert cell.blanks == {}
        ours = [result for result in cell.results.values() if result["ours"]]
        assert ours
        if cell.section not in ("compile", "memory"):
            assert all(result["num_repeats"] == 30 for result in ours)
            assert all(result["disagreement"] < 1e-4 for result in cell.results.values())


@pytest.fixture(scope="module")
def small_run(benchmarks):
    """The sections that compile fast."""
    return small_cells(["per_example", "lbfgs", "memory"])


def test_a_run_measures_its_sections_with_ours_in_all_repeats(small_run):
    assert [c.section for c in small_run] == ["per_example", "lbfgs", "lbfgs", "memory"]
    check_cells(small_run)


def test_a_run_answers_the_bars_that_need_no_peer(small_run):
    bars = part("bars")
    answered = {(f.bar.section, f.bar.versus) for f in bars.findings(small_run)}
    wanted = {("memory", bars.PLAIN), ("lbfgs", bars.STREAM), ("lbfgs", bars.OPTAX_ACTION)}
    assert answered == wanted


@pytest.mark.slow
def test_the_other_sections_run_too_and_solutions_report_their_residuals():
    bars = part("bars")
    cells = small_cells(["products", "solves", "compile"])
    assert [cell.section for cell in cells] == ["products", "solves", "compile"]
    check_cells(cells)
    for said in cells[1].facts["reported"].values():
        assert said["largest_relative_residual"] < 1e-4
    answered = {(f.bar.section, f.bar.versus) for f in bars.findings(cells)}
    assert {("compile", bars.PLAIN), ("products", bars.PEERS)} <= answered


def test_the_report_prints_every_candidate_and_survives_json(small_run, capsys):
    report, bars = part("report"), part("bars")
    content = json.loads(json.dumps(report.as_json(small_run)))
    again = report.from_json(content)
    for cell in again:
        report.show_cell(cell, 30)
    report.show_bars(bars.findings(again))
    printed = capsys.readouterr().out
    for cell in small_run:
        assert all(name.split(" (")[0] in printed for name in cell.results)
    assert "met. A bar is met when the interval reaches it" in printed
    assert len(content["bars"]) == len(list(bars.findings(small_run)))


def test_the_figure_is_drawn(small_run, tmp_path):
    pytest.importorskip("matplotlib")
    harness = importlib.import_module("_harness")
    path = part("figure").draw(tmp_path / "a.png", small_run, harness.environment())
    assert path.stat().st_size > 10_000


def test_the_script_writes_json_and_figure_where_told_and_shows_them_again(
    small_run, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    script = importlib.import_module("kernels")
    monkeypatch.setattr(part("plan"), "run", lambda *args, **options: small_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick"])
    script.main()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--out", "made"])
    script.main()
    stem = tmp_path / "made" / f"kernels_{jax.default_backend()}"
    environment = json.loads(stem.with_suffix(".json").read_text())["environment"]
    assert environment["versions"]["optax"]
    stem.with_suffix(".png").unlink()
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "argv", ["kernels.py", "--show", str(stem.with_suffix(".json")), "--out", "made"]
    )
    script.main()
    assert stem.with_suffix(".png").exists()
    assert "A bar is met when the interval reaches it" in capsys.readouterr().out


def test_the_claim_fails_on_a_missed_bar_and_on_one_not_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "claims"))
    script = importlib.import_module("kernels_meet_their_bars")
    bars, plan = part("bars"), part("plan")
    bar = bars.Bar(
        "per_example", "clipped sum", "MLP", 1.2, "at most", "plain gradient", claimed=True
    )
    monkeypatch.setattr(bars, "BARS", (bar,))
    outcomes = {}
    for name, cells in {
        "met": [timed_cell(plain=[1.0] * 30, ours=[1.1] * 30)],
        "missed": [timed_cell(plain=[1.0] * 30, ours=[1.3] * 30)],
        "unmeasured": [],
    }.items():
        monkeypatch.setattr(plan, "run", lambda *args, cells=cells, **options: cells)
        outcomes[name] = script.main()
    assert outcomes == {"met": 0, "missed": 1, "unmeasured": 1}
    assert "not measured: clipped sum / plain gradient, MLP" in capsys.readouterr().out


def test_the_twin_in_torch_is_the_same_function():
    pytest.importorskip("torch")
    models, peers = part("models"), part("peers_torch")
    for model in (models.dense(6, 4, 10), models.convolutional(), models.transformer(8, 4)):
        params, batch = model.params(), model.batch(3)
        reference = models.to_torch(jax.grad(model.loss_fn)(params, batch))
        twin = peers.twin(model, params, batch, 1.0)
        result = peers.numpy_of(peers.plain_gradient(twin)())
        assert part("cells").disagreement(result, reference) < 1e-5


# The command.


def make_small():
    """A case for --loss."""
    return lambda w, batch: jnp.mean((batch @ w) ** 2), jnp.ones(3), jnp.ones((4, 3))


def make_keyed():
    return lambda w, batch, key: 0.0, jnp.ones(3), jnp.ones((4, 3))


def make_nothing():
    return None


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """The functions above in a module of the working directory, as a user would have it."""
    lines = pathlib.Path(__file__).read_text().split("# The command.")[1].split("@pytest")[0]
    (tmp_path / "some_case.py").write_text(f"import jax.numpy as jnp\n{lines}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("some_case", None)


def test_bench_measures_the_users_own_loss(cases, tmp_path, capsys):
    status = cli.main(
        ["bench", "kernels", "--loss", "some_case:make_small", "--tangents", "2", "--out", "a.json"]
    )
    assert status == 0
    printed = capsys.readouterr().out
    wanted = ("some_case:make_small: 3 parameters, 4 rows", "2 Hessian products, each", "why")
    assert all(line in printed for line in wanted)
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert results[bench.GRADIENT]["ratio"] == 1.0
    assert results[bench.many_name(2)]["each"] == 2
    assert bench.USUAL in results


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss", "no_colon"],
        ["--loss", "no_such_module_at_all:make"],
        ["--loss", "some_case:absent"],
        ["--loss", "some_case:make_nothing"],
        ["--loss", "some_case:make_keyed"],
        ["--clip", "0"],
        ["--tangents", "0"],
        ["--repeats", "3"],
    ],
)
def test_bench_says_what_it_expected_and_exits_with_2(arguments, cases, capsys):
    assert cli.main(["bench", "kernels", *arguments]) == 2
    assert "Expected" in capsys.readouterr().err


def test_the_built_in_case_is_a_mean_of_rows():
    loss_fn, params, batch = bench.built_in(4, (3, 2, 10))
    rows = [loss_fn(params, jax.tree.map(lambda b, i=i: b[i : i + 1], batch)) for i in range(4)]
    np.testing.assert_allclose(loss_fn(params, batch), np.mean(rows), rtol=1e-6)
