"""Audits: models in, measurements with error bars out. They know nothing of the unlearners."""

from jaxunlearn.audits.intervals import Interval, clopper_pearson, mean_interval
from jaxunlearn.audits.residue import Residue, residue
from jaxunlearn.audits.state import StateAlignment, make_state_alignment, state_alignment

__all__ = [
    "Interval",
    "Residue",
    "StateAlignment",
    "clopper_pearson",
    "make_state_alignment",
    "mean_interval",
    "residue",
    "state_alignment",
]
