"""Certificates: what cannot be claimed, what is kept, and what a reader can check."""

import copy
import dataclasses
import json
import math
import pickle
import random

import numpy as np
import pytest

from jaxunlearn import certificates
from jaxunlearn.accounting import (
    add_grid_noise,
    certified_noise,
    compose_gaussian,
    grid_of,
    release_epsilon,
    release_mu,
)
from jaxunlearn.certificates import (
    DISCRETE_GAUSSIAN,
    WHY_EXACT,
    Assumption,
    Certificate,
    Noise,
    Sensitivity,
    commit_ids,
    environment,
    schema,
    verify,
)
from jaxunlearn.errors import CertificateError
from jaxunlearn.tree import digest

SALT = bytes(range(32))
IDS = (4, 7, 19)
PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
STATE = {"mu": np.ones(3, np.float32)}


def plain(**changes):
    """An exact certificate."""
    fields = {
        "method": "replay",
        "paper": "Cao & Yang 2015",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": WHY_EXACT,
        "num_forgotten": 3,
        "forget_set_commitment": commit_ids(IDS, SALT)[0],
        "not_covered": ("Copies of the parameters made before.",),
        "environment": {"jax": "0.10.2", "backend": "cpu"},
        "params_after": digest(PARAMS),
        "state_after": digest(STATE),
        "created": "2030-01-31T12:00:00Z",
    }
    return Certificate(**(fields | changes))


def certified(*, distance=1 / 3, size=1000, rng="os-entropy", **changes):
    """A certified one whose figures have more than 12 digits."""
    stddev = certified_noise(epsilon=1.0, delta=1e-5, sensitivity=distance, dimension=size)
    fields = {
        "method": "newton",
        "paper": "Guo et al. 2020",
        "target": "minimiser",
        "guarantee": "certified",
        "scope": "params",
        "why_no_epsilon": "",
        "epsilon": 1.0,
        "delta": 1e-5,
        "sensitivity": Sensitivity(value=distance, status="proven", text="Strong convexity."),
        "noise": Noise(
            stddev=stddev, grid=grid_of(stddev)[0], mechanism=DISCRETE_GAUSSIAN, rng=rng
        ),
        "dimension": size,
        "residuals": {"newton": 1 / 7, "after": 0.0},
        "assumptions": (Assumption("convexity", "proven", "The loss is convex."),),
    }
    return plain(**(fields | changes))


def outcome(verification, name):
    return next(check.outcome for check in verification.checks if check.name == name)


@pytest.mark.parametrize("make", [plain, certified])
def test_json_there_and_back_is_the_same_certificate(make):
    certificate = make()
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate
    assert again.to_json() == certificate.to_json()
    assert Certificate.from_json(certificate.to_json().encode()) == certificate
    assert pickle.loads(pickle.dumps(certificate)) == certificate
    assert copy.deepcopy(certificate) == certificate
    assert dataclasses.replace(certificate) == certificate


def test_privacy_parameters_round_up_and_noise_rounds_down():
    third = 1 / 3
    certificate = certified(distance=third, epsilon=1 + third, delta=1e-5 * third * 4)
    document = json.loads(certificate.to_json())
    assert document["epsilon"] == "1.33333333334"
    assert document["delta"] == "1.33333333334e-05"
    assert document["sensitivity"]["value"] == "0.333333333334"
    assert document["residuals"]["newton"] == "0.142857142858"
    stddev = certified_noise(epsilon=1.0, delta=1e-5, sensitivity=third, dimension=1000)
    assert 0 <= stddev - certificate.noise.stddev < 1e-11


def test_json_has_sorted_fields_and_no_float_literal():
    document = certified().to_json()
    refuse = lambda literal: pytest.fail(f"a float literal: {literal}")
    parsed = json.loads(document, parse_float=refuse, parse_constant=refuse)
    assert list(parsed) == sorted(parsed)
    assert document == certified().to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guarantee": "heuristic"}, "no epsilon and no delta"),
        ({"guarantee": "bounded"}, "no epsilon and no delta"),
        ({"guarantee": "exact"}, "no epsilon and no delta"),
        ({"assumptions": ()}, "assumptions with an epsilon"),
        ({"noise": None}, "noise with an epsilon"),
        ({"sensitivity": None}, "sensitivity with an epsilon"),
        ({"delta": None}, "delta with an epsilon"),
        ({"epsilon": None}, "epsilon with an epsilon"),
        ({"dimension": None}, "dimension with an epsilon"),
        ({"epsilon": 0.999}, "to be at least 0.99999"),
        ({"delta": 0.999e-5}, "to be at least 1.0000"),
        ({"dimension": 10**9}, "to be at least"),
        ({"epsilon": math.inf}, "finite epsilon"),
        ({"epsilon": math.nan}, "finite epsilon"),
        ({"epsilon": "1.0"}, "to be a number"),
        ({"epsilon": -1.0}, "> 0"),
        ({"delta": 0.0}, "in \\(0, 1\\)"),
        ({"prior_mu": 0.1}, "to be at least inf"),
        ({"prior_mu": -0.1, "releases_covered": 2}, "prior_mu=-0.1 >= 0"),
        ({"prior_mu": 0.1, "releases_covered": 2}, "to be at least 1.0"),
        ({"why_no_epsilon": "none"}, "why_no_epsilon empty"),
        ({"not_covered": ()}, "not_covered"),
        ({"not_covered": ("",)}, "to say something"),
        ({"not_covered": "all"}, "to be a tuple"),
        ({"guarantee": "strong"}, "guarantee to be one of"),
        ({"target": "weights"}, "target to be one of"),
        ({"scope": "all"}, "scope to be one of"),
        ({"num_forgotten": 0}, "num_forgotten in"),
        ({"num_forgotten": True}, "to be an integer"),
        ({"num_forgotten": 3.0}, "to be an integer"),
        ({"schema_version": 2}, "schema_version 1"),
        ({"forget_set_commitment": "sha256:abc"}, "64 hex digits"),
        ({"params_after": "0" * 64}, "64 hex digits"),
        ({"created": "2030-02-31T12:00:00Z"}, "created as"),
        ({"created": "yesterday"}, "created as"),
        ({"residuals": {"newton": math.nan}}, "finite residuals"),
        ({"method": "a\x1b[31mb"}, "printable"),
        ({"sensitivity": 0.1}, "to be a Sensitivity"),
        ({"assumptions": ("convex",)}, "to be an Assumption"),
    ],
)
def test_a_certificate_that_contradicts_itself_cannot_be_made(changes, message):
    with pytest.raises(CertificateError, match=message):
        certified(**changes)


def test_no_guarantee_but_certified_lacks_the_reason_why_there_is_no_epsilon():
    for guarantee in ("exact", "bounded", "heuristic"):
        assert plain(guarantee=guarantee).epsilon is None
        with pytest.raises(CertificateError, match="why there is no epsilon"):
            plain(guarantee=guarantee, why_no_epsilon="")


def test_noise_that_is_not_the_hosts_discrete_gaussian_carries_no_epsilon():
    soft = Noise(stddev=0.1, grid=None, mechanism="jax.random.normal", rng="threefry2x32")
    assert plain(guarantee="bounded", noise=soft).noise == soft
    with pytest.raises(CertificateError, match="bounded"):
        certified(noise=soft)
    with pytest.raises(CertificateError, match='no noise with guarantee="exact"'):
        plain(noise=soft)
    noise = certified().noise
    with pytest.raises(CertificateError, match="Expected grid="):
        certified(noise=dataclasses.replace(noise, grid=noise.grid * 2))


def test_a_text_stays_on_one_line_so_that_it_cannot_imitate_a_heading():
    certificate = plain(not_covered=("Nothing.\n\nASSUMED\n- nothing",))
    assert certificate.not_covered == ("Nothing. ASSUMED - nothing",)


def test_a_certificate_cannot_be_changed():
    certificate = certified()
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.epsilon = 0.1
    with pytest.raises(TypeError):
        certificate.residuals["newton"] = 0.0
    residuals = {"newton": 1.0}
    certificate = certified(residuals=residuals)
    residuals["newton"] = 0.0
    assert certificate.residuals["newton"] == 1.0


def test_a_certificate_hashes_and_becomes_a_dict():
    certificate = certified()
    assert {certificate, Certificate.from_json(certificate.to_json())} == {certificate}
    fields = dataclasses.asdict(certificate)
    assert fields["residuals"] == certificate.residuals
    assert fields["params_after"] == certificate.params_after
    json.dumps(fields)
    fields["residuals"]["newton"] = 0.0
    assert certificate.residuals["newton"] > 0
    assert copy.deepcopy(certificate) == pickle.loads(pickle.dumps(certificate)) == certificate
    assert pickle.loads(pickle.dumps(certificate.residuals)) == certificate.residuals


def test_epsilon_of_a_later_release_covers_the_earlier_ones():
    first = certified(distance=0.25)
    mu = release_mu(sensitivity=0.25, noise_stddev=first.noise.stddev, dimension=1000)
    both = release_epsilon(
        delta=1e-5,
        sensitivity=0.25,
        noise_stddev=first.noise.stddev,
        dimension=1000,
        prior_mu=mu,
        num_releases=2,
    )
    second = certified(distance=0.25, prior_mu=mu, releases_covered=2, epsilon=both)
    assert verify(second).ok
    assert second.epsilon > first.epsilon
    third = compose_gaussian([mu, mu])
    with pytest.raises(CertificateError, match="to be at least"):
        certified(distance=0.25, prior_mu=third, releases_covered=3, epsilon=both)


def mutate(certificate, **changes):
    return json.dumps(json.loads(certificate.to_json()) | changes)


MALFORMED = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "deep": "[" * 100_000,
    "large": plain().to_json() + " " * 1_000_000,
    "not text": None,
    "not UTF-8": b"\xff\xfe",
    "a lone surrogate": '{"a": "\udc80"}',
    "NaN": plain().to_json().replace('"num_forgotten": 3', '"num_forgotten": NaN'),
    "Infinity": plain().to_json().replace('"num_forgotten": 3', '"num_forgotten": Infinity'),
    "1e999": plain().to_json().replace('"num_forgotten": 3', '"num_forgotten": 1e999'),
    "a float": plain().to_json().replace('"num_forgotten": 3', '"num_forgotten": 3.0'),
    "a huge integer": plain().to_json().replace('"num_forgotten": 3', f'"num_forgotten": {10**30}'),
    "an endless integer": plain().to_json().replace(": 3,", ": " + "9" * 5000 + ","),
    "a duplicate": plain().to_json().replace("{", '{"method": "other",', 1),
    "an unknown field": mutate(plain(), extra=1),
    "a missing field": plain().to_json().replace('"scope"', '"scop"'),
    "another version": mutate(plain(), schema_version=2),
    "version true": mutate(plain(), schema_version=True),
    "version as text": mutate(plain(), schema_version="1"),
    "epsilon as integer": mutate(certified(), epsilon=1),
    "epsilon padded": mutate(certified(), epsilon="1.00"),
    "epsilon infinite": mutate(certified(), epsilon="1e999"),
    "epsilon in words": mutate(certified(), epsilon="inf"),
    "epsilon with 17 digits": mutate(certified(), epsilon="1.0000000000000002"),
    "epsilon lowered": mutate(certified(), epsilon="0.5"),
    "epsilon of a heuristic": mutate(certified(), guarantee="heuristic"),
    "no assumptions": mutate(certified(), assumptions=[]),
    "a text with a break": mutate(plain(), method="re\nplay"),
    "a nested unknown": mutate(certified(), assumptions=[{"name": "a", "status": "proven"}]),
    "a list as noise": mutate(certified(), noise=[]),
    "a null assumption": mutate(certified(), assumptions=[None]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_documents_are_refused_with_the_typed_error(kind):
    with pytest.raises(CertificateError):
        Certificate.from_json(MALFORMED[kind])
    report = verify(MALFORMED[kind])
    assert not report.ok
    assert outcome(report, "schema") == "failed"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1.5", "1e999", "1E5", "-0.0"])
def test_numbers_that_are_not_integers_are_refused_before_any_field_is_looked_at(literal):
    with pytest.raises(CertificateError, match="integers and decimal strings"):
        schema.loads_strictly(f'{{"anything": [{literal}]}}')
    with pytest.raises(CertificateError, match="field once"):
        schema.loads_strictly('{"anything": {"a": 1, "a": 1}}')


def test_random_damage_is_refused_or_visible_and_never_understates_epsilon():
    """3000 random edits. Unsigned, so a text may change; an epsilon too low may not."""
    draw, original = random.Random(0), certified().to_json()
    accepted = 0
    for _ in range(3000):
        damaged = bytearray(original.encode())
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(damaged))
            edit = draw.choice(["flip", "delete", "insert", "digit"])
            if edit == "flip":
                damaged[at] ^= 1 << draw.randrange(8)
            elif edit == "delete":
                del damaged[at : at + draw.randint(1, 8)]
            elif edit == "insert":
                damaged[at:at] = draw.choice([b"0", b"9", b'"', b"e", b"-", b"null", b"{", b","])
            else:
                digits = [i for i, byte in enumerate(damaged) if 48 <= byte <= 57]
                damaged[draw.choice(digits)] = 48 + draw.randrange(10)
        try:
            certificate = Certificate.from_json(bytes(damaged))
        except CertificateError:
            continue
        accepted += 1
        assert Certificate.from_json(certificate.to_json()) == certificate
        assert json.loads(certificate.to_json()) == json.loads(bytes(damaged))
        if certificate.epsilon is not None:
            assert certificate.epsilon >= release_epsilon(
                delta=certificate.delta,
                sensitivity=certificate.sensitivity.value,
                noise_stddev=certificate.noise.stddev,
                dimension=certificate.dimension,
                prior_mu=certificate.prior_mu,
                num_releases=certificate.releases_covered,
            )
    assert accepted > 20  # the fuzz reaches past the parser


def test_verification_recomputes_digests_and_notices_one_changed_bit():
    salt = b"s" * 32
    certificate = plain(
        params_before=certificates.seal(digest(STATE), salt),
        state_before=certificates.seal(digest(PARAMS), salt),
    )
    trees = {
        "params_before": STATE,
        "state_before": PARAMS,
        "params_after": PARAMS,
        "state_after": STATE,
    }
    report = verify(certificate, **trees, salt=salt)
    assert report.ok
    assert all(outcome(report, name) == "ok" for name in trees)
    for name in trees:
        changed = copy.deepcopy(trees[name])
        leaf = next(iter(changed.values()))
        leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(9))
        report = verify(certificate, **(trees | {name: changed}), salt=salt)
        assert not report.ok
        assert outcome(report, name) == "failed"


def test_what_was_not_passed_is_not_checked_and_says_so():
    report = verify(plain())
    assert report.ok
    names = ("params_after", "state_after", "forget set", "epsilon", "noise source", "signature")
    assert all(outcome(report, name) == "not checked" for name in names)
    assert "UNSIGNED" in str(report)
    assert outcome(verify(plain(), params_before=PARAMS), "params_before") == "not checked"


def test_noise_from_an_injected_source_fails_verification_unless_allowed():
    certificate = certified(rng="injected")
    assert not verify(certificate).ok
    assert verify(certificate, allow_injected_noise=True).ok
    assert "WARNING" in certificate.summary()
    assert verify(certified()).ok


def test_a_release_fills_a_certificate_that_verifies():
    stddev = certified_noise(epsilon=1.0, delta=1e-5, sensitivity=0.02, dimension=50)
    release = add_grid_noise(np.linspace(0, 1, 50), noise_stddev=stddev, sensitivity=0.02)
    certificate = certified(
        distance=0.02,
        size=release.values.size,
        noise=Noise(
            stddev=release.noise_stddev,
            grid=release.grid,
            mechanism=DISCRETE_GAUSSIAN,
            rng=release.rng,
        ),
        params_after=digest({"w": release.values}),
    )
    assert verify(certificate.to_json(), params_after={"w": release.values}).ok


def test_the_commitment_opens_to_the_ids_and_the_salt_only():
    certificate = plain()
    assert outcome(verify(certificate, ids=[19, 7, 4, 4], salt=SALT), "forget set") == "ok"
    assert outcome(verify(certificate, ids=[19, 7, 5], salt=SALT), "forget set") == "failed"
    assert outcome(verify(certificate, ids=IDS, salt=bytes(32)), "forget set") == "failed"
    assert outcome(verify(certificate, ids=IDS, salt=b"short"), "forget set") == "failed"
    assert commit_ids(IDS)[0] != commit_ids(IDS)[0]
    assert commit_ids(np.array([19, 4, 7], np.int32), SALT)[0] == certificate.forget_set_commitment
    for bad in ([-1], [1.5], ["4"], [True]):
        with pytest.raises(CertificateError):
            commit_ids(bad, SALT)


def test_the_summary_tells_a_stranger_the_promise_and_what_is_not_promised():
    page = certified().summary()
    for words in (
        "UNSIGNED",
        "CERTIFIED",
        "1.0 at delta 1e-05",
        "NOT PROMISED",
        "Copies of the parameters made before.",
        "[proven] convexity",
        "deletion record",
        "oblivious",
        "opens to who holds the salt",
    ):
        assert words in page
    assert "none. exact: equals the oracle" in plain().summary()
    assert "No promise" in plain(guarantee="heuristic").summary()
    assert max(map(len, page.splitlines())) <= 90


def test_the_environment_names_versions_and_devices_and_no_flag_values(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    found = environment()
    assert found["xla_flags"] == "set"
    assert not any("fast_math" in value for value in found.values())
    for name in ("jaxunlearn", "jax", "jaxlib", "numpy", "optax", "python", "backend", "x64"):
        assert found[name]
    assert plain(environment=found).environment == found
