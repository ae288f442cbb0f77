"""A commitment to a forget set, so that a certificate names it without showing it."""

import hashlib
import secrets
from collections.abc import Iterable

import numpy as np

from jaxunlearn.certificates import schema
from jaxunlearn.errors import CertificateError


def seal(digest: str, salt: bytes) -> str:
    """A digest that only who holds the salt can compare: SHA-256 of salt and digest.

    The parameters before a deletion were trained on the forgotten rows. A bare digest of them lets
    anybody with the other rows test a candidate row by retraining; a sealed one does not.

    >>> seal("sha256:00", b"0" * 32) == seal("sha256:00", b"1" * 32)
    False
    """
    return f"sha256:{hashlib.sha256(b'jaxunlearn/seal/v1' + salt + digest.encode()).hexdigest()}"


def commit_ids(ids: Iterable[int], salt: bytes | None = None) -> tuple[str, bytes]:
    """A commitment to a set of ids, and the salt that opens it.

    The commitment is SHA-256 of the salt and the sorted distinct ids. It goes into the
    certificate; the salt does not. Ids are guessable, so whoever has the salt can find them by
    trying: keep it private, and show it only to who may learn the ids. Without the salt nobody,
    the holder of the data included, can prove later which ids were meant.

    Args:
      ids: integers in 0..2^63-1; order and repeats do not matter.
      salt: 32 bytes; fresh ones from the operating system by default. To check a commitment,
        pass the salt that belongs to it and compare.

    Raises:
      CertificateError: an id is not such an integer, or the salt is not 32 bytes.

    >>> commitment, salt = commit_ids([3, 1, 3])
    >>> commit_ids([1, 3], salt)[0] == commitment
    True
    """
    salt = secrets.token_bytes(32) if salt is None else salt
    if not isinstance(salt, bytes) or len(salt) != 32:
        raise CertificateError("Expected a salt of 32 bytes.")
    distinct = sorted({schema.integer("an id", entry, at_least=0) for entry in ids})
    packed = np.asarray(distinct, "<i8").tobytes()
    return f"sha256:{hashlib.sha256(b'jaxunlearn/forget-set/v1' + salt + packed).hexdigest()}", salt
