"""Issuing a certificate: what every method fills in alike."""

from collections.abc import Iterable, Mapping
from typing import Any

import optax

from jaxunlearn import tree
from jaxunlearn.certificates.certificate import Certificate
from jaxunlearn.certificates.commitment import commit_ids, seal
from jaxunlearn.certificates.deferred import deferred
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

    The digests are of the trees as they are now, and are computed on another thread, SHA-256 being
    slower than an addition: what reads them waits for them. A second call waits for those of the
    first.

    Args:
      ids: the forgotten ids.  num_duplicates: repeats in the request.
      before, after: parameters and optimizer state, without the record.
      promise: the other fields of `Certificate`.
    """
    ids = [int(i) for i in ids]
    commitment, salt = commit_ids(ids)
    before, after = map(tree.on_host, (before, after))
    digests = deferred(
        params_before=lambda: seal(tree.digest(before[0]), salt),
        params_after=lambda: tree.digest(after[0]),
        state_before=lambda: seal(tree.digest(before[1]), salt),
        state_after=lambda: tree.digest(after[1]),
    )
    certificate = Certificate(
        num_forgotten=len(ids),
        num_duplicates=num_duplicates,
        forget_set_commitment=commitment,
        environment=environment(),
        **digests,
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
