"""What one `forget` promises, written for a reader who was not there."""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping

from jaxunlearn.accounting import grid_of, release_epsilon, round_down, round_up
from jaxunlearn.certificates import schema
from jaxunlearn.certificates.deferred import Deferred, is_on_its_way
from jaxunlearn.errors import CertificateError

SCHEMA_VERSION = 1
DISCRETE_GAUSSIAN = "discrete-gaussian"
TARGETS = ("counterfactual", "minimiser", "fixed_path")
GUARANTEES = ("exact", "certified", "bounded", "heuristic")
SCOPES = ("params", "full-state")
STATUSES = ("proven", "measured", "assumed")
WHY_EXACT = "exact: equals the oracle, no noise needed"
RECORD_STATEMENT = (
    "The deletion record, which later deletions need, is kept apart from the parameters and the "
    "optimizer state. It may still depend on the forgotten examples, must never be released, and "
    "is not covered by this certificate."
)
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclasses.dataclass(frozen=True)
class Assumption:
    """One thing the guarantee rests on. status: "proven", "measured" or "assumed"."""

    name: str
    status: str
    text: str

    def __post_init__(self):
        _put(self, "name", schema.text("an assumption's name", self.name))
        _put(self, "status", schema.choice(f"the status of {self.name}", self.status, STATUSES))
        _put(self, "text", schema.text(f"the text of {self.name}", self.text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """L2 distance to the oracle before noise and grid. status: how it was bounded."""

    value: float
    status: str
    text: str

    def __post_init__(self):
        _put(self, "value", schema.number("sensitivity", self.value, round_up))
        _put(self, "status", schema.choice("the sensitivity's status", self.status, STATUSES))
        _put(self, "text", schema.text("the sensitivity's text", self.text))
        if self.value < 0:
            raise CertificateError(f"Expected sensitivity={self.value} >= 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise added. stddev: per coordinate.  grid: a power of two, None if on no grid.

    mechanism: "discrete-gaussian" for what `accounting.add_grid_noise` adds, else a description.
    rng: "os-entropy", "injected", or the generator's name.
    """

    stddev: float
    grid: float | None
    mechanism: str
    rng: str

    def __post_init__(self):
        _put(self, "stddev", schema.number("the noise's stddev", self.stddev, round_down))
        if self.grid is not None:
            _put(self, "grid", schema.number("the noise's grid", self.grid, float))
        _put(self, "mechanism", schema.text("the noise's mechanism", self.mechanism))
        _put(self, "rng", schema.text("the noise's rng", self.rng))
        if self.stddev <= 0 or (self.grid is not None and self.grid <= 0):
            raise CertificateError(
                f"Expected a noise stddev and grid > 0, got {self.stddev}, {self.grid}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What one `forget` promises, under which assumptions, and what it does not promise.

    Checked when made: an epsilon needs `guarantee="certified"`, a delta, noise from
    `accounting.add_grid_noise`, a sensitivity, at least one assumption, and must not be below what
    `accounting.release_epsilon` computes from the figures stated here. `not_covered` is never
    empty. Figures are kept to 12 digits: epsilon, delta, sensitivity, `prior_mu` and residuals
    rounded up, noise rounded down.

    Args:
      method, paper: the unlearner's name and its reference.
      target: "counterfactual", "minimiser" or "fixed_path".
      guarantee: "exact", "certified", "bounded" or "heuristic".
      scope: "params" or "full-state".
      epsilon, delta: None unless certified; then `why_no_epsilon` says why.
      sensitivity, noise: None where the method has none.
      dimension: number of coordinates released; wanted with an epsilon.
      prior_mu: total mu of the earlier releases that epsilon covers too (`release_mu`, composed).
      releases_covered: this release and those earlier ones.
      residuals: measured solver and replay residuals by name.
      assumptions, not_covered: what the guarantee rests on, what it leaves out.
      num_forgotten, num_duplicates: distinct ids, and repeats in the request.
      forget_set_commitment: from `commit_ids`; opens only to who holds the salt.
      requests: "oblivious" (chosen without seeing released models) or "adaptive".
      adjacency: "remove" or "replace".
      params_after, state_after: `tree.digest`, or None.
      params_before, state_before: the same, sealed with the salt of the commitment, or None.
        All four may be futures of such digests; then whoever reads the field waits.
      environment: from `environment()`.
      created: UTC, "2030-01-31T12:00:00Z"; the present time by default.

    Raises:
      CertificateError: a field is malformed or contradicts another.
    """

    method: str
    paper: str
    target: str
    guarantee: str
    scope: str
    num_forgotten: int
    forget_set_commitment: str
    not_covered: tuple[str, ...]
    environment: Mapping[str, str]
    epsilon: float | None = None
    delta: float | None = None
    why_no_epsilon: str = ""
    sensitivity: Sensitivity | None = None
    noise: Noise | None = None
    dimension: int | None = None
    prior_mu: float = 0.0
    releases_covered: int = 1
    residuals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    assumptions: tuple[Assumption, ...] = ()
    record_statement: str = RECORD_STATEMENT
    num_duplicates: int = 0
    requests: str = "oblivious"
    adjacency: str = "remove"
    params_before: Deferred = Deferred()  # noqa: RUF009 (a descriptor)
    params_after: Deferred = Deferred()  # noqa: RUF009 (a descriptor)
    state_before: Deferred = Deferred()  # noqa: RUF009 (a descriptor)
    state_after: Deferred = Deferred()  # noqa: RUF009 (a descriptor)
    created: str = dataclasses.field(default_factory=lambda: _now())
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self):
        for name, value in _checked(self).items():
            _put(self, name, value)
        _check_guarantee(self)

    def __hash__(self):
        return hash(self.forget_set_commitment)  # salted, so no two are alike

    def __reduce__(self):
        return Certificate.from_json, (self.to_json(),)

    def to_json(self) -> str:
        """Deterministic JSON: sorted fields, figures as decimal strings, no NaN or Infinity."""
        return json.dumps(schema.to_plain(self), sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, document: str | bytes) -> "Certificate":
        """Reads what `to_json` wrote, and nothing else.

        Unsigned: that it parses says that it is consistent, not who wrote it. Accepted is only a
        document of the same fields and values as the `to_json` of the certificate it describes.

        Raises:
          CertificateError: not JSON, over 1 MB, repeated, unknown or missing fields, NaN or float
            literals, wrong types, figures of more than 12 digits, an unknown schema version, or
            contents that `Certificate` refuses.
        """
        parsed = schema.loads_strictly(document)
        if isinstance(parsed, dict) and parsed.get("schema_version") != SCHEMA_VERSION:
            raise CertificateError(
                f"Expected schema_version 1, got {parsed.get('schema_version')!r:.40}. "
                "Read it with the version of jaxunlearn that wrote it."
            )
        fields = dict(schema.exact_fields("the certificate", parsed, cls.__dataclass_fields__))
        for name in ("epsilon", "delta", "prior_mu"):
            if fields[name] is not None:
                fields[name] = schema.from_decimal(name, fields[name])
        fields["residuals"] = schema.mapping("residuals", fields["residuals"], schema.from_decimal)
        fields["sensitivity"] = _part(Sensitivity, "sensitivity", fields, ("value",))
        fields["noise"] = _part(Noise, "noise", fields, ("stddev", "grid"))
        fields["assumptions"] = schema.sequence(
            "assumptions",
            fields["assumptions"],
            lambda name, entry: _part(Assumption, name, {name: entry}, ()),
        )
        certificate = cls(**fields)
        if schema.to_plain(certificate) != parsed:
            raise CertificateError(
                "Expected the form that to_json writes: texts on one line, figures of 12 digits."
            )
        return certificate

    def summary(self) -> str:
        """A page of plain text for people, including what is not promised."""
        from jaxunlearn.certificates.summary import page

        return page(self)


def _checked(certificate):
    """Every field of `certificate`, type-checked, rounded and read-only."""
    get = lambda name: getattr(certificate, name)
    optional = lambda check, name: None if get(name) is None else check(name, get(name))
    figure = lambda name, value: schema.number(name, value, round_up)
    whole = lambda least: lambda name, value: schema.integer(name, value, at_least=least)
    one_of = lambda name, allowed: schema.choice(name, get(name), allowed)
    if schema.integer("schema_version", certificate.schema_version, at_least=1) != SCHEMA_VERSION:
        raise CertificateError(f"Expected schema_version 1, got {certificate.schema_version}.")
    for name, kind in (("sensitivity", Sensitivity), ("noise", Noise)):
        if not isinstance(get(name), kind | None):
            raise CertificateError(
                f"Expected {name} to be a {kind.__name__}, got {get(name)!r:.80}."
            )
    return {
        "target": one_of("target", TARGETS),
        "guarantee": one_of("guarantee", GUARANTEES),
        "scope": one_of("scope", SCOPES),
        "requests": one_of("requests", ("oblivious", "adaptive")),
        "adjacency": one_of("adjacency", ("remove", "replace")),
        "method": schema.text("method", certificate.method),
        "paper": schema.text("paper", certificate.paper),
        "record_statement": schema.text("record_statement", certificate.record_statement),
        "why_no_epsilon": schema.text("why_no_epsilon", certificate.why_no_epsilon, empty=True),
        "not_covered": schema.sequence("not_covered", certificate.not_covered, schema.text),
        "assumptions": schema.sequence("assumptions", certificate.assumptions, _assumption),
        "environment": schema.mapping("environment", certificate.environment, schema.text),
        "residuals": schema.mapping("residuals", certificate.residuals, figure),
        "epsilon": optional(figure, "epsilon"),
        "delta": optional(figure, "delta"),
        "prior_mu": figure("prior_mu", certificate.prior_mu),
        "dimension": optional(whole(1), "dimension"),
        "num_forgotten": whole(1)("num_forgotten", certificate.num_forgotten),
        "num_duplicates": whole(0)("num_duplicates", certificate.num_duplicates),
        "releases_covered": whole(1)("releases_covered", certificate.releases_covered),
        "forget_set_commitment": schema.digest(
            "forget_set_commitment", certificate.forget_set_commitment
        ),
        **{
            name: optional(schema.digest, name)
            for name in ("params_before", "params_after", "state_before", "state_after")
            if not is_on_its_way(certificate, name)
        },
        "created": _timestamp(certificate.created),
    }


def _check_guarantee(certificate):
    """Raises where the guarantee and the other fields contradict each other."""
    if certificate.prior_mu < 0:
        raise CertificateError(f"Expected prior_mu={certificate.prior_mu} >= 0.")
    if not certificate.not_covered:
        raise CertificateError("Expected at least one line in not_covered, got none.")
    if certificate.guarantee == "certified":
        _check_certified(certificate)
        return
    if certificate.epsilon is not None or certificate.delta is not None:
        raise CertificateError(
            f'Expected no epsilon and no delta with guarantee="{certificate.guarantee}", got '
            f"{certificate.epsilon}, {certificate.delta}. Only a certified release has them."
        )
    if not certificate.why_no_epsilon:
        raise CertificateError("Expected why_no_epsilon to say why there is no epsilon.")
    if certificate.guarantee == "exact" and certificate.noise is not None:
        raise CertificateError('Expected no noise with guarantee="exact".')


def _check_certified(certificate):
    """Raises unless the stated epsilon follows from the stated figures."""
    wanted = ("epsilon", "delta", "sensitivity", "noise", "dimension", "assumptions")
    missing = [name for name in wanted if getattr(certificate, name) in (None, ())]
    if missing:
        raise CertificateError(f"Expected {', '.join(missing)} with an epsilon, got none.")
    if certificate.why_no_epsilon:
        raise CertificateError("Expected why_no_epsilon empty where there is an epsilon.")
    if not (certificate.epsilon > 0 and 0 < certificate.delta < 1):
        raise CertificateError(
            f"Expected epsilon={certificate.epsilon} > 0 and delta={certificate.delta} in (0, 1)."
        )
    noise = certificate.noise
    if noise.mechanism != DISCRETE_GAUSSIAN or noise.rng not in ("os-entropy", "injected"):
        raise CertificateError(
            f"Expected noise from accounting.add_grid_noise, got {noise.mechanism} from "
            f'{noise.rng}. Other noise makes the guarantee "bounded" at most.'
        )
    try:
        grid, _ = grid_of(noise.stddev)
    except ValueError as error:
        raise CertificateError(str(error)) from None
    if noise.grid != grid:
        raise CertificateError(f"Expected grid={grid} for stddev={noise.stddev}, got {noise.grid}.")
    least = recomputed_epsilon(certificate)
    if not certificate.epsilon >= least:
        raise CertificateError(
            f"Expected epsilon={certificate.epsilon} to be at least {round_up(least)}, which "
            "sensitivity, noise, delta, dimension and earlier releases imply."
        )


def recomputed_epsilon(certificate) -> float:
    """`release_epsilon` of the figures a certified release states; inf where they make no sense."""
    return release_epsilon(
        delta=certificate.delta,
        sensitivity=certificate.sensitivity.value,
        noise_stddev=certificate.noise.stddev,
        dimension=certificate.dimension,
        prior_mu=certificate.prior_mu,
        num_releases=certificate.releases_covered,
    )


def _part(kind, name, fields, decimals):
    """The nested dataclass `kind` from its JSON object, None from null."""
    if fields[name] is None and kind is not Assumption:
        return None
    inner = dict(schema.exact_fields(name, fields[name], kind.__dataclass_fields__))
    for entry in decimals:
        if inner[entry] is not None:
            inner[entry] = schema.from_decimal(f"{name}.{entry}", inner[entry])
    return kind(**inner)


def _assumption(name, value):
    """`value` if it is an Assumption."""
    if not isinstance(value, Assumption):
        raise CertificateError(f"Expected {name} to be an Assumption, got {value!r:.80}.")
    return value


def _timestamp(value):
    """`value` if it is a UTC time to the second that exists."""
    if isinstance(value, str) and _CREATED.fullmatch(value):
        try:
            datetime.datetime.fromisoformat(value)
        except ValueError:
            pass
        else:
            return value
    raise CertificateError(f'Expected created as "2030-01-31T12:00:00Z", got {value!r:.80}.')


def _now():
    """The present UTC time to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _put(frozen, name, value):
    """Sets a field while a frozen dataclass is being made."""
    object.__setattr__(frozen, name, value)
