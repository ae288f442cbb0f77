"""What a certificate of recollect says."""

import math
from typing import Any

from jaxunlearn import certificates

PAPER = "Qiao et al. 2025, arXiv 2404.01712, for the whole state of any optimizer"


def promise(
    measured, normalizer: str, joint: bool, is_partial: bool, num_units: int
) -> dict[str, Any]:
    """The fields of the certificate. num_units: how many are forgotten together."""
    if measured["route"] == "replay":
        return _exact_promise(normalizer)
    figures = {k: v for k, v in measured.items() if k.startswith("linearity") and math.isfinite(v)}
    seen = (
        certificates.Assumption(
            "linearity", "measured" if num_units == 1 else "assumed",
            "The run is as linear for the forgotten rows as it was measured to be for the probes, "
            "each one unit by itself: the relative errors listed. What several units forgotten "
            "together leave beyond the sum of their effects is not measured.",
        )
        if figures
        else certificates.Assumption("linearity", "assumed", "The run is linear; not measured.")
    )  # fmt: skip
    path = (
        "The record: tangents of the other units were taken on the path with the forgotten rows in "
        "it, and remain until refresh; those of the forgotten units until the next update."
    )
    left_out = (
        ("Leaves that track_leaves leaves out: they still carry the forgotten rows.",)
        if is_partial
        else ()
    )
    return {
        "method": "recollect",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "heuristic",
        "scope": "params" if is_partial else "full-state",
        "why_no_epsilon": "a first-order prediction: its distance to the oracle is not bounded",
        "residuals": figures,
        "assumptions": (
            seen,
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": (
            *(() if joint else (path,)),
            *left_out,
            "Second order: what remains of the rows after a linear correction.",
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
        ),
    }


def _exact_promise(normalizer: str) -> dict[str, Any]:
    return {
        "method": "recollect",
        "paper": "exact replay of the recorded run, where first order could not be trusted",
        "target": "counterfactual",
        "guarantee": "exact",
        "scope": "full-state",
        "why_no_epsilon": certificates.WHY_EXACT,
        "assumptions": (
            certificates.Assumption(
                "replay fidelity", "assumed",
                "Replaying reproduces the run on this device: the gradients of training were "
                "compared with those of the loss, the state it reached was not.",
            ),
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }  # fmt: skip
