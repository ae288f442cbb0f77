"""What the deletions of a Memory Pair promise, and what a quote says of them."""

from typing import Any

from jaxunlearn import certificates

PAPER = "Stewart 2025, Memory Pair, arXiv 2508.10193"


def terms(odometer, record, inner, num_requested: int) -> str:
    """What a quote says of capacity and regret."""
    if odometer is None:
        return ""
    spent = int(record.num_deletions)
    told = odometer.quote(spent, num_requested)
    text = f"{told.left} deletions left of {odometer.max_deletions}"
    if odometer.model is None:
        return text
    adaptive = odometer.model.adaptive(float(inner.gradient_square_sum))
    logarithmic = odometer.model.logarithmic(int(record.participation.num_steps))
    return (
        f"{text}; regret bound of the inserts so far {adaptive:.4g} (steps D/sqrt(S_t)) or "
        f"{logarithmic:.4g} (steps 1/(lambda t)), noise of this request adds "
        f"{told.noise_regret:.4g}"
    )


def promise(mode, measured, normalizer, tolerance) -> dict[str, Any]:
    """The fields of the certificate."""
    exact = mode == "replay"
    rounded = measured.get("verified") == "within tolerance"
    how = {"bitwise": "measured", "within tolerance": "measured"}
    fidelity = certificates.Assumption(
        "replay fidelity",
        how.get(measured.get("verified", "no"), "assumed"),
        f"Before deletion the ledger replays to the given state: {measured.get('verified', 'no')}, "
        f"tolerance {tolerance:g}.",
    )
    divided = "the rows that are left" if normalizer == "kept" else "the rows it had"
    return {
        "method": "memory_pair",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "exact" if exact else "heuristic",
        "scope": "full-state" if mode in ("replay", "tangent") else "params",
        "why_no_epsilon": _WHY[mode] if not (exact and rounded) else _WHY_ROUNDED,
        "residuals": {"replay_distance": measured["replay_distance"]} if rounded else {},
        "assumptions": (
            *((fidelity,) if mode in ("replay", "tangent") else ()),
            certificates.Assumption("normalizer", "proven", f"Steps are divided by {divided}."),
            *certificates.assumed(*_ASSUMED),
        ),
        "not_covered": (
            *certificates.excluded("earlier models", "preparation", "copies", "other rows"),
            *(() if exact else ("The distance to a run without the rows, which nothing bounds.",)),
        ),
    }


_WHY = {
    "replay": certificates.WHY_EXACT,
    "tangent": "heuristic: first order in the gradients, whose remainder is not bounded",
    "drop_pair": "heuristic: only the rows' own pairs are dropped, the parameters are unchanged",
    "paper": (
        "heuristic: noise scaled to the step back says nothing of its distance to a run without "
        "the rows, and the pairs are left as they were"
    ),
}
_WHY_ROUNDED = "exact up to the rounding listed as replay_distance, no noise added"
_ASSUMED = (
    "rows unchanged",
    "ids complete",
    "mean loss",
    "oblivious requests",
    "public settings",
    "secret record",
)
