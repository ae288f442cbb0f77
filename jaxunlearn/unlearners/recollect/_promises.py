"""What a certificate of recollect says."""

import math
from typing import Any

from jaxunlearn import certificates

PAPER = "Qiao et al. 2025, arXiv 2404.01712, for the whole state of any optimizer"


def promise(
    measured, normalizer: str, joint: bool, is_partial: bool, num_units: int, verify: str
) -> dict[str, Any]:
    """The fields of the certificate. num_units: how many first order has left out so far."""
    if measured["route"] == "replay":
        return _replay_promise(measured, normalizer, joint, verify)
    figures = {k: v for k, v in measured.items() if k.startswith("linearity") and math.isfinite(v)}
    seen = (
        certificates.Assumption(
            "linearity", "measured" if num_units == 1 else "assumed",
            "The run is as linear for the forgotten rows as it was measured to be for the probes, "
            "each one unit by itself: the relative errors listed. What several units, forgotten "
            "together or in turn, leave beyond the sum of their effects is not measured.",
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


def _replay_promise(measured, normalizer: str, joint: bool, verify: str) -> dict[str, Any]:
    is_exact, distance = verify != "off", measured.get("replay_distance", 0.0)
    return {
        "method": "recollect",
        "paper": "exact replay of the recorded run, where first order could not be trusted",
        "target": "counterfactual",
        "guarantee": "exact" if is_exact else "heuristic",
        "scope": "full-state",
        "why_no_epsilon": (
            _WHY_UNVERIFIED
            if not is_exact
            else _WHY_ROUNDED
            if distance
            else certificates.WHY_EXACT
        ),
        "residuals": {"replay_distance": distance} if distance else {},
        "assumptions": (
            certificates.Assumption("replay fidelity", *_fidelity(measured, joint, verify)),
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "other rows"
        ),
    }


def _fidelity(measured, joint: bool, verify: str) -> tuple[str, str]:
    """Whether the run that was replayed is known to be that of training: a status and a text."""
    if verify == "off":
        return "assumed", "Replaying reproduces the run on this device; this was not verified."
    if not joint:
        return "assumed", (
            "Replaying reproduces the run on this device: the gradients of training were compared "
            "with those of the loss, the state it reached was not."
        )
    if "verified" not in measured:
        return "assumed", (
            "Replaying reproduces the run on this device; the first deletion compares its end with "
            "the given state, this later one could not."
        )
    return "measured", "The run replayed to the given state before deletion: " + (
        "bit for bit." if measured["verified"] == "bitwise" else "as replay_distance."
    )


_WHY_UNVERIFIED = "heuristic: that the replayed run is the one that was trained was not verified"
_WHY_ROUNDED = "exact up to the rounding listed as replay_distance, no noise added"
