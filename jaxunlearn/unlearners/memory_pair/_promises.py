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
    verified = measured.get("verified", "no")
    rounded = verified == "within tolerance"
    compared = (
        "measured",
        f"Before deletion the ledger replays to the given state: {verified}, tolerance "
        f"{tolerance:g}.",
    )
    told = "assumed", "The ledger replays to the given state: this was not verified."
    how = told if verified == "no" else compared
    fidelity = certificates.Assumption("replay fidelity", *how)
    nothing_left = bool(measured.get("nothing_left"))
    case = "nothing_left" if nothing_left else mode
    followed = certificates.Assumption(
        "ledger fidelity", "assumed", "The ledger leads to the given state: this was not verified."
    )
    return {
        "method": "memory_pair",
        "paper": PAPER,
        "target": "counterfactual",
        "guarantee": "exact" if exact else "heuristic",
        # The scope is what the deletion had a hand in: the published step moves nothing else.
        "scope": "params" if case == "paper" else "full-state",
        "why_no_epsilon": _WHY[case] if not (exact and rounded) else _WHY_ROUNDED,
        "residuals": {"replay_distance": measured["replay_distance"]} if rounded else {},
        "assumptions": (
            *((fidelity,) if mode in ("replay", "tangent") else ()),
            *((followed,) if nothing_left else ()),
            certificates.divided(normalizer),
            *certificates.assumed(*certificates.RECORDED),
        ),
        "not_covered": (
            *_LEFT.get(case, ()),
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
    "nothing_left": (
        "heuristic: to first order, a run without the rows had the same parameters to rounding "
        "since before the oldest pair; parameters and pairs are as given, the counters and the sum "
        "of squares are those of that run, and no noise was added"
    ),
}
_LEFT = {
    "drop_pair": (
        "The parameters: they are bitwise those given, and carry the rows as before.",
        "Pairs of other rows, made at parameters that carry the rows.",
        "The counters and the sum of squares S_t: unchanged, the rows are in them.",
    ),
    "paper": (
        "The curvature pairs: unchanged, those made from the rows among them.",
        "The sum of squares S_t, and with it later step sizes: unchanged, the rows are in it.",
        "The counters: unchanged, they count the steps of the rows.",
    ),
    "nothing_left": (
        "What first order does not see: its remainder is not bounded, in S_t neither.",
        "Differences below rounding in parameters and pairs, and the slots that the pairs take.",
    ),
}
_WHY_ROUNDED = "exact up to the rounding listed as replay_distance, no noise added"
