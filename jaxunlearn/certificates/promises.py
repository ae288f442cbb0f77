"""What the methods that delete from stored sums promise alike."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.accounting import LossConstants, Release
from jaxunlearn.certificates.certificate import (
    DISCRETE_GAUSSIAN,
    Assumption,
    Noise,
    Sensitivity,
)
from jaxunlearn.certificates.wording import assumed, excluded, measured
from jaxunlearn.types import Budget

_ASSUMED = (
    *("convexity", "rows unchanged", "oblivious requests", "public settings"),
    *("one lineage", "secret record"),
)
_DATA_DEPENDENT = (
    "The bound contains the gradient that training left and residuals of sums and solver, as "
    "measured on the data, and whether a release happens depends on it; the proof treats it as a "
    "constant."
)
_EXCLUDED = (
    *("earlier models", "optimizer state", "preparation", "copies", "adaptive requests"),
    *("other rows", "this page"),
)


def stored_sums(
    *,
    distance: float,
    terms: Mapping[str, float],
    release: Release,
    constants: LossConstants,
    budget: Budget,
    is_measured: bool,
    rebuilt: str | None,
    **told: str,
) -> dict[str, Any]:
    """The fields of a certificate for a step from stored sums, but for method and paper.

    Args:
      distance: to the retain-set minimiser.  terms: of it, by name.
      is_measured: whether the gradient in the bound is that of the rows to forget.
      rebuilt: what `Rebuild.assumption` says, where the state is remade.
      told: constants that the bound takes on trust, by name.
    """
    told["declared_capacity"] = (
        f"The noise was fixed before any request, for at most {budget.max_forget} rows."
    )
    if rebuilt:
        told["public rebuild"] = rebuilt
    seen = f"Every row's gradient at the minimiser was seen to be within {constants.lipschitz:g}"
    norms = f", its features within {constants.feature_norm:g}" if constants.feature_norm else ""
    return {
        "target": "minimiser",
        "guarantee": "certified",
        "scope": "full-state" if rebuilt else "params",
        "sensitivity": Sensitivity(
            value=distance,
            status="measured" if is_measured else "assumed",
            text="one step from stored sums, by the constants of the Hessian",
        ),
        "noise": noise_on_grid(release),
        "dimension": release.values.size,
        "residuals": terms,
        "assumptions": (
            *assumed(*_ASSUMED, **told),
            *measured("arithmetic"),
            Assumption("data-dependent bound", "measured", _DATA_DEPENDENT),
            Assumption("gradient norms", "measured", f"{seen}{norms}."),
        ),
        "not_covered": excluded(
            *(name for name in _EXCLUDED if not (rebuilt and name == "optimizer state"))
        ),
    }


def noise_on_grid(release: Release) -> Noise:
    """The noise of a release as its certificate states it."""
    return Noise(
        stddev=release.noise_stddev,
        grid=release.grid,
        mechanism=DISCRETE_GAUSSIAN,
        rng=release.rng,
    )
