"""Certificates: what a deletion promises, in a form that can be read, stored and checked."""

from jaxunlearn.certificates.certificate import (
    DISCRETE_GAUSSIAN,
    RECORD_STATEMENT,
    WHY_EXACT,
    Assumption,
    Certificate,
    Noise,
    Sensitivity,
)
from jaxunlearn.certificates.commitment import commit_ids, seal
from jaxunlearn.certificates.environment import environment
from jaxunlearn.certificates.issue import concluded, issue
from jaxunlearn.certificates.promises import noise_on_grid, stored_sums
from jaxunlearn.certificates.verify import Check, Verification, verify
from jaxunlearn.certificates.wording import RECORDED, assumed, divided, excluded, measured

__all__ = [
    "DISCRETE_GAUSSIAN",
    "RECORDED",
    "RECORD_STATEMENT",
    "WHY_EXACT",
    "Assumption",
    "Certificate",
    "Check",
    "Noise",
    "Sensitivity",
    "Verification",
    "assumed",
    "commit_ids",
    "concluded",
    "divided",
    "environment",
    "excluded",
    "issue",
    "measured",
    "noise_on_grid",
    "seal",
    "stored_sums",
    "verify",
]
