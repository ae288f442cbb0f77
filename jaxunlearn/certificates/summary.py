"""A certificate as a page of plain text."""

import textwrap
from collections.abc import Iterable

_PROMISES = {
    "exact": "What was released equals what the target describes, computed without the forgotten "
    "examples.",
    "certified": "What was released cannot be told from the target's outcome, made without the "
    "forgotten examples, beyond epsilon and delta: no test gains more than a factor e^epsilon in "
    "odds, except with probability delta. It holds if every assumption below holds.",
    "bounded": "What was released lies within a bounded distance of the target. That is no privacy "
    "guarantee: there is no epsilon.",
    "heuristic": "No promise. The method is known from experiments only.",
}
_TARGETS = {
    "counterfactual": "the state that the same training run reaches with the forgotten examples' "
    "weight set to zero",
    "minimiser": "the minimiser of the training objective over the retained examples",
    "fixed_path": "the recorded training path with the forgotten examples' contributions removed",
}
_SCOPES = {
    "params": "the parameters only; the optimizer state is not covered",
    "full-state": "the parameters and the wrapped optimizer's state",
}


def page(certificate) -> str:
    """`Certificate.summary`."""
    c = certificate
    lines = [f"DELETION CERTIFICATE, schema {c.schema_version}, {c.created}, UNSIGNED", ""]
    lines += _entry("Method", f"{c.method} ({c.paper})")
    repeats = f" ({c.num_duplicates} repeats in the request)" if c.num_duplicates else ""
    lines += _entry("Forgotten", f"{c.num_forgotten} examples{repeats}")
    lines += _entry("Commitment", f"{c.forget_set_commitment} (opens to who holds the salt)")
    lines += _entry("Target", _TARGETS[c.target])
    lines += _entry("Scope", _SCOPES[c.scope])
    lines += _entry("Guarantee", f"{c.guarantee.upper()}. {_PROMISES[c.guarantee]}")
    lines += ["", *_figures(c)]
    lines += _section("ASSUMED", [f"[{a.status}] {a.name}: {a.text}" for a in c.assumptions])
    lines += _section("NOT PROMISED", c.not_covered)
    lines += _section("THE RECORD", [c.record_statement])
    lines += _section("MEASURED", [f"{name}: {value!r}" for name, value in c.residuals.items()])
    digests = ("params_before", "params_after", "state_before", "state_after")
    lines += _section("DIGESTS", [f"{d}: {getattr(c, d) or 'not stated'}" for d in digests])
    lines += _section("WHERE IT RAN", [", ".join(f"{k} {v}" for k, v in c.environment.items())])
    return "\n".join(lines) + "\n"


def _figures(c) -> list[str]:
    """Epsilon and what it follows from, or why there is none."""
    if c.epsilon is None:
        lines = _entry("Epsilon", f"none. {c.why_no_epsilon}")
    else:
        lines = _entry("Epsilon", f"{c.epsilon!r} at delta {c.delta!r}")
        covers = f"{c.releases_covered} releases together" if c.releases_covered > 1 else "one"
        prior = f"; earlier ones spent mu {c.prior_mu!r}" if c.prior_mu else ""
        lines += _entry("Releases", f"{covers}{prior}")
        lines += _entry("Requests", f"{c.requests}; adjacency: {c.adjacency}")
    if c.sensitivity is not None:
        s = c.sensitivity
        lines += _entry("Sensitivity", f"{s.value!r} in L2, {s.status}: {s.text}")
    if c.noise is not None:
        n = c.noise
        where = "" if n.grid is None else f" on a grid of {n.grid!r}"
        size = "" if c.dimension is None else f" in each of {c.dimension} coordinates"
        lines += _entry("Noise", f"{n.mechanism}, stddev {n.stddev!r}{size}{where}, from {n.rng}")
        if n.rng == "injected":
            lines += _entry("WARNING", "whoever supplied the noise can remove it.")
    return lines


def _entry(title: str, content: str) -> list[str]:
    """One labelled paragraph."""
    return textwrap.wrap(
        content, 88, initial_indent=f"{title + ':':<13}", subsequent_indent=" " * 13
    )


def _section(title: str, items: Iterable[str]) -> list[str]:
    """A heading and one paragraph per item; nothing where there is none."""
    wrapped = [
        line
        for item in items
        for line in textwrap.wrap(item, 88, initial_indent="- ", subsequent_indent="  ")
    ]
    return ["", title, *wrapped] if wrapped else []
