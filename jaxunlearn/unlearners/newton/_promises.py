"""What a certificate of newton says, and what `forget` reports."""

from typing import Any

from jaxunlearn import accounting, certificates
from jaxunlearn.records import Rebuild

PAPER = "Guo et al. 2020, arXiv 1911.03030; Sekhari et al. 2021, arXiv 2103.03279"


def promise(bound, release, rebuild: Rebuild | None) -> dict[str, Any]:
    """The fields of the certificate that say what is promised, and what is not."""
    remade = {"public rebuild": rebuild.assumption} if rebuild else {}
    excluded = [name for name in _EXCLUDED if not (rebuild and name == "optimizer state")]
    return {
        "method": "newton",
        "paper": PAPER,
        "target": "minimiser",
        "guarantee": "certified",
        "scope": "full-state" if rebuild else "params",
        "sensitivity": certificates.Sensitivity(
            value=bound.distance, status=bound.status, text=bound.text
        ),
        "noise": certificates.Noise(
            stddev=release.noise_stddev,
            grid=release.grid,
            mechanism=certificates.DISCRETE_GAUSSIAN,
            rng=release.rng,
        ),
        "dimension": release.values.size,
        "residuals": bound.terms,
        "assumptions": (
            *certificates.assumed(*_ASSUMED, **bound.assumptions, **remade),
            *certificates.measured("data-dependent bound", "arithmetic"),
        ),
        "not_covered": certificates.excluded(*excluded),
    }


_ASSUMED = (
    *("convexity", "rows unchanged", "oblivious requests", "public settings"),
    *("one lineage", "secret record"),
)
_EXCLUDED = (
    "earlier models",
    "optimizer state",
    "preparation",
    "copies",
    "adaptive requests",
    "other rows",
    "this page",
)


def measurements(figures, bound, iterations, stddev, charge) -> dict[str, Any]:
    """The figures that `forget` reports."""
    return {
        "residual_bound": bound.residual,
        "true_residual": figures.final_residual,
        "distance_bound": bound.distance,
        "start_residual": figures.start_residual,
        "solver_iterations": iterations,
        "noise_stddev": stddev,
        "budget_spent": charge.spent_units / accounting.BUDGET_UNITS,
        "num_non_finite_rows": figures.num_non_finite,
        **{f"bound_{name}": value for name, value in bound.terms.items()},
    }
