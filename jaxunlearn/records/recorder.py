"""What methods that log a run do alike: note its steps, check a request, open the data."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records.checkpoints import (
    Checkpoints,
    init_checkpoints,
    num_slots,
    take_checkpoint,
)
from jaxunlearn.records.ids import validate_ids
from jaxunlearn.records.log import (
    StepLog,
    check_logged_step,
    get_settings,
    init_log,
    write_step,
)
from jaxunlearn.records.options import check_integers
from jaxunlearn.records.participation import (
    Participation,
    check_num_examples,
    check_participation,
    init_participation,
    observe,
)
from jaxunlearn.records.rows import RowReader
from jaxunlearn.records.states import check_params, check_state, check_update
from jaxunlearn.types import LossFn, Params, Quote, Request, Status, UnlearnerState

_RECOMPUTED = {"value", "grad", "value_fn"}


class Recorder:
    """Keeps the record of a run.

    keyed: whether the loss takes a key.  every: steps between candidate checkpoints.
    extras_seen: names of the extra arguments that `update` got and no replay knows.

    Args:
      method: the unlearner's name, for messages.
      record_type: its record, a NamedTuple whose first fields are participation, log, checkpoints.
      loss_fn, num_examples, batch_size, max_steps, num_checkpoints, max_checkpoint_bytes,
        checkpoint_every: as in `unlearners.replay`.
      num_units, examples_of: where a request is for units of examples: how many there are, and
        (u,) unit ids -> ids of their examples.
    """

    def __init__(
        self,
        method: str,
        record_type: type,
        loss_fn: LossFn,
        *,
        num_examples: int,
        batch_size: int,
        max_steps: int,
        num_checkpoints: int = 16,
        max_checkpoint_bytes: int | None = None,
        checkpoint_every: int | None = None,
        num_units: int | None = None,
        examples_of: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        check_num_examples(num_examples)
        self.every = max(1, max_steps // 256) if checkpoint_every is None else checkpoint_every
        check_integers(
            batch_size=batch_size, max_steps=max_steps, num_checkpoints=num_checkpoints,
            checkpoint_every=self.every,
        )  # fmt: skip
        self._method, self._record_type, self._loss_fn = method, record_type, loss_fn
        self._num_examples, self._batch_size = num_examples, batch_size
        self._max_steps, self._num_checkpoints = max_steps, num_checkpoints
        self._max_checkpoint_bytes = max_checkpoint_bytes
        self._num_ids = num_units or num_examples
        self._examples_of = examples_of
        self.keyed = kernels.takes_key(loss_fn)
        self.extras_seen: set[str] = set()
        self._is_loss_checked = False

    def start(
        self, params: Params, inner: optax.OptState
    ) -> tuple[Participation, StepLog, Checkpoints]:
        """The first fields of a record before the first step."""
        slots = num_slots(
            params, inner,
            num_checkpoints=self._num_checkpoints, max_bytes=self._max_checkpoint_bytes,
        )  # fmt: skip
        return (
            init_participation(self._num_examples),
            init_log(self._max_steps, self._batch_size, has_key=self.keyed, inner=inner),
            init_checkpoints(params, inner, slots=slots, every=self.every),
        )

    def note(self, updates, opt_state: UnlearnerState, params, ids, key, extra) -> Any:
        """The record after a call of `update` with these arguments, which are checked.

        Raises:
          WrongStateError, ValueError, IdTypeError: at trace time.
        """
        check_update(opt_state, params, ids, self._record_type, self._method)
        check_logged_step(ids, key, self._batch_size, self.keyed)
        ids = None if ids is None else jnp.asarray(ids)
        self.extras_seen.update(name for name in extra if name not in _RECOMPUTED)
        record, inner = opt_state.record, opt_state.inner
        step = record.participation.num_steps
        seen = observe(record.participation, ids, self._num_examples)
        overrun = jnp.where(step >= self._max_steps, int(Status.TOO_MANY_STEPS), 0)
        return record._replace(
            participation=seen._replace(status=seen.status | overrun.astype(jnp.int32)),
            log=write_step(
                record.log, step, ids=ids, key=key, settings=get_settings(inner),
                non_finite=~tree.all_finite(updates),
            ),
            checkpoints=take_checkpoint(
                record.checkpoints, step, params, inner, every=self.every
            ),
        )  # fmt: skip

    def request(
        self, params: Params, opt_state: UnlearnerState, ids: Any, requester: str | None = None
    ) -> Request:
        """A request that this state can serve; host work.

        Raises:
          WrongStateError, IdError, TrainingRecordError.
        """
        begun = time.perf_counter()
        check_state(opt_state, self._record_type, self._method)
        ids, num_duplicates = validate_ids(ids, self._num_ids)
        record = opt_state.record
        check_participation(record.participation, ids, self._examples_of)
        one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        like = jax.tree.map(one, record.checkpoints.checkpoint_params)
        check_params(params, like, self._method)
        return Request(ids, num_duplicates, begun, requester)

    def open(self, data: Any, retained: np.ndarray, params: Params) -> RowReader:
        """A reader of the rows, and the first time a look at the loss on a few of `retained`.

        Raises:
          MissingDataError, CoupledLossError.
        """
        reader = RowReader(data)
        reader.prepare(retained, may_be_empty=True)
        if retained.size and not self._is_loss_checked:
            few = reader(np.unique(retained)[:8])
            key = jax.random.key(0) if self.keyed else None
            kernels.check_loss(self._loss_fn, params, few, key=key)
            self._is_loss_checked = True
        return reader


def refusals_as_quotes(**terms: Any):
    """Makes of a `quote` that raises what `forget` would raise one that says so. terms: of it."""

    def decorate(quote: Callable[..., Quote]) -> Callable[..., Quote]:
        def quoted(params, opt_state, ids):
            try:
                return quote(params, opt_state, ids)
            except (
                errors.IdError, errors.TrainingRecordError, errors.BudgetExhaustedError,
            ) as error:  # fmt: skip
                return Quote(feasible=False, reason=str(error), **terms)

        return quoted

    return decorate
