"""The command line: what a newcomer runs first."""

import contextlib
import io
import json

import pytest

from jaxunlearn import certificates, cli
from jaxunlearn.cli import demo

pytest.importorskip("flax")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """(folder, printed) of a demo of few steps on few rows; the same code as the real one."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(demo, "NUM_STEPS", 40)
        patch.setattr(demo, "HIDDEN", 16)
        assert cli.main(["demo", "--dataset", "wine", "--forget", "5", "--out", str(out)]) == 0
    return out, said.getvalue()


def test_the_demo_reports_an_exact_and_a_certified_deletion(small_demo):
    out, printed = small_demo
    report = json.loads((out / "report.json").read_text())
    network, logistic = report["results"]
    assert network["distance_before"]["params"] > 0
    assert network["distance_after"] == {"params": 0.0, "state": 0.0}
    assert logistic["distance_after"]["params"] < logistic["distance_before"]["params"]
    assert len(report["forgotten_ids"]) == 5
    assert (out / "report.png").stat().st_size > 10_000
    assert "exact" in printed
    assert "certified, (1, 1e-05)" in printed


def test_the_certificates_of_the_demo_verify(small_demo):
    out, _ = small_demo
    for method, guarantee in (("replay", "exact"), ("newton", "certified")):
        text = (out / f"certificate-{method}.json").read_text()
        certificate = certificates.Certificate.from_json(text)
        assert certificate.guarantee == guarantee
        assert certificates.verify(certificate).ok


@pytest.mark.slow
def test_a_quiet_demo_says_nothing(tmp_path, capsys):
    cli.main(["demo", "--dataset", "wine", "--quiet", "--out", str(tmp_path)])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    "arguments", [["--dataset", "nope"], ["--dataset", "diabetes"], ["--forget", "0"]]
)
def test_a_request_that_cannot_be_met_exits_with_2_and_says_why(arguments, tmp_path, capsys):
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert "Expected" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_doctor_names_versions_extras_and_advice(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("jax", "device_kind", "x64", "matmul_precision", "xla_flags", "flax", "Advice"):
        assert word in printed
