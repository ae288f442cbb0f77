"""The words that several methods' certificates share, so that one thing is said in one way."""

from jaxunlearn.certificates.certificate import Assumption

ASSUMPTIONS = {
    "convexity": "The loss is convex in the parameters; l2 makes the objective strongly convex.",
    "rows unchanged": "data[ids] returns the rows that training used.",
    "ids complete": "Every use of a row in training went through update with its id.",
    "mean loss": "The loss is the mean of per-example losses: no row changes another's loss.",
    "oblivious requests": "Requests do not depend on released models.",
    "public settings": "Hyperparameters, schedule, batch order and keys do not depend on the data.",
    "one lineage": (
        "No other result of the same state is released, and no older state is restored: each "
        "would be one more release than the budget knows."
    ),
    "secret record": "The deletion record, and the noise where there is any, are never revealed.",
}
RECORDED = (
    *("rows unchanged", "ids complete", "mean loss", "oblivious requests"),
    *("public settings", "secret record"),
)
"""What a deletion from a recorded run assumes."""
DIVIDED = {
    "batch": "Sums over rows stay divided by the scheduled number of rows.",
    "kept": "Sums over rows are divided by the number of rows that are left.",
}
MEASURED = {
    "data-dependent bound": (
        "The bound is evaluated on the data at hand, and whether a release happens depends on it; "
        "the proof of Guo et al. treats it as a constant."
    ),
    "arithmetic": (
        "Every operation of the loss was seen to run in float64; residuals have an estimate of "
        "their rounding added."
    ),
}
NOT_COVERED = {
    "earlier models": "The model as published before this deletion: it was trained on the rows.",
    "optimizer state": (
        "The optimizer state: it is made afresh from the released parameters and carries nothing "
        "over."
    ),
    "preparation": "Features, normalisation, hyperparameters and stopping rules chosen with them.",
    "copies": "Copies, backups, logs, predictions and models derived from earlier parameters.",
    "adaptive requests": "Deletion requests chosen after looking at released models.",
    "this page": (
        "This page itself: its measured figures are exact functions of the data. Show it to "
        "auditors, not to the public."
    ),
    "other rows": "What the retained rows, or rows like the forgotten ones, reveal about them.",
}


def assumed(*names: str, **others: str) -> tuple[Assumption, ...]:
    """The named assumptions, and others by their text, all with status "assumed".

    >>> assumed("convexity")[0].status
    'assumed'
    """
    texts = {name: ASSUMPTIONS[name] for name in names} | others
    return tuple(
        Assumption(name.replace("_", " "), "assumed", text) for name, text in texts.items()
    )


def divided(normalizer: str) -> Assumption:
    """By what the sums over rows are divided, which holds by construction."""
    return Assumption("normalizer", "proven", DIVIDED[normalizer])


def measured(*names: str) -> tuple[Assumption, ...]:
    """The named assumptions with status "measured"."""
    return tuple(Assumption(name, "measured", MEASURED[name]) for name in names)


def excluded(*names: str) -> tuple[str, ...]:
    """The named lines of what a certificate does not cover."""
    return tuple(NOT_COVERED[name] for name in names)
