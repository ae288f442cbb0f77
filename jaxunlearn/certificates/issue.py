"""Issuing a certificate: what every method fills in alike."""

from collections.abc import Iterable, Mapping
from typing import Any

import optax

from jaxunlearn import tree
from jaxunlearn.certificates.certificate import Certificate
from jaxunlearn.certificates.commitment import commit_ids, seal
from jaxunlearn.certificates.environment import environment
from jaxunlearn.types import ForgetInfo, Forgotten, Params, Request, UnlearnerState


def issue(
    ids: Iterable[int],
    num_duplicates: int,
    before: tuple[Params, optax.OptState],
    after: tuple[Params, optax.OptState],
    **promise: Any,
) -> tuple[Certificate, bytes]:
    """A `Certificate` of one deletion, and the salt that opens its commitment to the ids.

    Args:
      ids: the forgotten ids.  num_duplicates: repeats in the request.
      before, after: parameters and optimizer state, without the record.
      promise: the other fields of `Certificate`.
    """
    ids = [int(i) for i in ids]
    commitment, salt = commit_ids(ids)
    certificate = Certificate(
        num_forgotten=len(ids),
        num_duplicates=num_duplicates,
        forget_set_commitment=commitment,
        params_before=seal(tree.digest(before[0]), salt),
        params_after=tree.digest(after[0]),
        state_before=seal(tree.digest(before[1]), salt),
        state_after=tree.digest(after[1]),
        environment=environment(),
        **promise,
    )
    return certificate, salt


def concluded(
    request: Request,
    before: tuple[Params, UnlearnerState],
    after: tuple[Params, UnlearnerState],
    measurements: Mapping[str, Any],
    **promise: Any,
) -> Forgotten:
    """What `forget` returns: `after`, with the certificate of the deletion and its figures.

    promise: as in `issue`.
    """
    pair = lambda state: (state[0], state[1].inner)
    certificate, salt = issue(
        request.ids, request.num_duplicates, pair(before), pair(after), **promise
    )
    info = ForgetInfo.of(
        promise["method"],
        request,
        requester=request.requester,
        certificate=certificate,
        commitment_salt=salt,
        measurements=measurements,
    )
    return Forgotten(*after, info)
