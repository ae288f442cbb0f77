"""Checks a certificate against itself and against what it speaks of."""

import dataclasses
from collections.abc import Iterable

from jaxtyping import PyTree

from jaxunlearn.certificates.certificate import Certificate, recomputed_epsilon
from jaxunlearn.certificates.commitment import commit_ids, seal
from jaxunlearn.errors import CertificateError
from jaxunlearn.tree import digest


@dataclasses.dataclass(frozen=True)
class Check:
    """One check. outcome: "ok", "failed" or "not checked"."""

    name: str
    outcome: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """All checks of one certificate. UNSIGNED: they show consistency, never who wrote it."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. UNSIGNED: says nothing of its author, nor of checks not made."""
        return all(check.outcome != "failed" for check in self.checks)

    def __str__(self):
        head = f"{'no check failed' if self.ok else 'FAILED'} (UNSIGNED certificate)"
        return "\n".join([head, *(f"{c.outcome:<12} {c.name}: {c.detail}" for c in self.checks)])


def verify(
    certificate: Certificate | str | bytes,
    *,
    params_before: PyTree = None,
    state_before: PyTree = None,
    params_after: PyTree = None,
    state_after: PyTree = None,
    ids: Iterable[int] | None = None,
    salt: bytes | None = None,
    allow_injected_noise: bool = False,
) -> Verification:
    """Recomputes what can be recomputed: the schema, epsilon, digests, the forget set.

    Does not check the assumptions, the sensitivity, or that the noise was drawn: those need the
    run itself. A check whose object was not passed is "not checked".

    Args:
      certificate: a `Certificate`, or its JSON, which may be malformed.
      params_before, params_after, state_before, state_after: pytrees for `tree.digest`; those
        before need the salt.
      ids, salt: the forget set and the salt of `commit_ids`.
      allow_injected_noise: accept noise that did not come from the operating system's entropy.

    Returns:
      A `Verification`; `.ok` where nothing failed. Never raises on a bad certificate.

    >>> verify("{}").ok
    False
    """
    try:
        if not isinstance(certificate, Certificate):
            certificate = Certificate.from_json(certificate)
        else:
            certificate = Certificate.from_json(certificate.to_json())
    except CertificateError as error:
        return Verification((Check("schema", "failed", str(error)),))
    trees = {
        "params_before": params_before,
        "params_after": params_after,
        "state_before": state_before,
        "state_after": state_after,
    }
    return Verification(
        (
            Check("schema", "ok", "version 1, consistent in itself"),
            _epsilon(certificate),
            _noise_source(certificate, allow_injected_noise),
            *(
                _digest(name, getattr(certificate, name), tree, salt)
                for name, tree in trees.items()
            ),
            _forget_set(certificate, ids, salt),
            Check("signature", "not checked", "UNSIGNED: anybody could have written this"),
        )
    )


def _epsilon(certificate):
    """The stated epsilon against the one its figures imply."""
    if certificate.epsilon is None:
        return Check("epsilon", "not checked", "none is claimed")
    least = recomputed_epsilon(certificate)
    outcome = "ok" if certificate.epsilon >= least else "failed"
    return Check("epsilon", outcome, f"stated {certificate.epsilon!r}, implied {least!r}")


def _noise_source(certificate, allow_injected_noise):
    """Where the noise behind an epsilon came from."""
    if certificate.epsilon is None:
        return Check("noise source", "not checked", "no epsilon rests on noise")
    trusted = certificate.noise.rng == "os-entropy" or allow_injected_noise
    return Check("noise source", "ok" if trusted else "failed", certificate.noise.rng)


def _digest(name, stated, tree, salt):
    """A tree against its stated digest, which is sealed where it is of the time before."""
    if tree is None:
        return Check(name, "not checked", "no tree was passed")
    sealed = name.endswith("_before")
    if sealed and salt is None:
        return Check(name, "not checked", "sealed: needs the salt")
    actual = seal(digest(tree), salt) if sealed else digest(tree)
    if stated is None:
        return Check(name, "failed", f"the certificate states no digest; the tree has {actual}")
    return Check(name, "ok" if actual == stated else "failed", f"stated {stated}, found {actual}")


def _forget_set(certificate, ids, salt):
    """The forget set against its commitment."""
    if ids is None or salt is None:
        return Check("forget set", "not checked", "needs both the ids and the salt")
    ids = set(ids)
    try:
        commitment, _ = commit_ids(ids, salt)
    except CertificateError as error:
        return Check("forget set", "failed", str(error))
    opens = commitment == certificate.forget_set_commitment
    counts = len(ids) == certificate.num_forgotten
    outcome = "ok" if opens and counts else "failed"
    return Check(
        "forget set", outcome, f"{len(ids)} ids, commitment {'opens' if opens else 'differs'}"
    )
