"""The one shape: an Optax optimizer with a third function, and what goes in and out of it."""

import dataclasses
import enum
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import optax
from jaxtyping import Array, PyTree

if TYPE_CHECKING:
    from jaxunlearn.certificates import Certificate

Params = PyTree
Batch = PyTree
LossFn = Callable[..., Array]
"""`loss_fn(params, batch) -> scalar` or `loss_fn(params, batch, key) -> scalar`: the mean of
per-example losses over the leading axis of `batch`, for any batch size, without the L2 term."""


@runtime_checkable
class Data(Protocol):
    """Random access by id: `data[ids]`, int32 NumPy ids of shape (B,), gives a batch pytree whose
    leaves have leading axis B, in that order. A pytree of arrays is accepted in its place."""

    def __getitem__(self, ids: np.ndarray) -> Batch: ...


class Status(enum.IntFlag):
    """What went wrong inside a traced step; several flags can stand at once. OK is 0."""

    OK = 0
    ID_OUT_OF_RANGE = 1
    """`update` saw an id that is neither -1 nor in 0..num_examples-1."""
    TOO_MANY_STEPS = 2
    """`update` ran more often than `max_steps`."""
    IDS_MISSING = 4
    """`update` got ids on some steps and none on others."""
    FORGOTTEN_ID_USED = 8
    """`update` trained on an id that had been forgotten."""
    NON_FINITE = 16
    """A deletion step produced a value that is not finite."""
    SOLVER_FAILED = 32
    """A linear solve met negative curvature or did not converge."""
    BUDGET_EXHAUSTED = 64
    """`forget_step` had no deletion left, or its step exceeded what the noise was made for."""
    NOT_IN_THE_MODEL = 128
    """`forget_step` got an id that was forgotten already or that training never saw."""

    @property
    def story(self) -> str:
        """The flags in plain words, for an error message."""
        return (
            "; ".join(_STORIES[flag] for flag in Status if flag and flag in self) or "all is well"
        )


_STORIES = {
    Status.ID_OUT_OF_RANGE: "an id outside 0..num_examples-1 was passed to update",
    Status.TOO_MANY_STEPS: "update ran more often than max_steps",
    Status.IDS_MISSING: "ids were passed to update on some steps and not on others",
    Status.FORGOTTEN_ID_USED: "update trained on an id that had already been forgotten",
    Status.NON_FINITE: "a deletion step produced a value that is not finite",
    Status.SOLVER_FAILED: "a linear solve met negative curvature or did not converge",
    Status.BUDGET_EXHAUSTED: "a deletion exceeded the capacity or the sensitivity of its noise",
    Status.NOT_IN_THE_MODEL: "deletion was asked for an id already forgotten or never seen",
}


class UnlearnerState(NamedTuple):
    """State of an `Unlearner`.

    inner: exactly the wrapped optimizer's state; all that `released` returns.
    record: what deletion itself needs. Kept apart, never released.
    """

    inner: optax.OptState
    record: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What all deletions together may cost, fixed before the first request.

    epsilon: > 0.  delta: in (0, 1).  max_forget: the most ids that may ever be forgotten, >= 1.

    >>> Budget(epsilon=1.0, delta=1e-5, max_forget=100).max_forget
    100
    """

    epsilon: float
    delta: float
    max_forget: int

    def __post_init__(self):
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"Expected a finite epsilon={self.epsilon} > 0.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected delta={self.delta} strictly between 0 and 1.")
        if isinstance(self.max_forget, bool) or not isinstance(self.max_forget, int | np.integer):
            raise ValueError(f"Expected an integer max_forget, got {self.max_forget!r}.")
        if self.max_forget < 1:
            raise ValueError(f"Expected max_forget={self.max_forget} >= 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quote:
    """What `forget` would cost, before any work. Nothing is spent by asking.

    feasible: whether `forget` would accept the request; `reason` says why not.
    num_gradients: batch gradients (or Hessian products counted as two) that it would evaluate.
    num_steps: training steps it would replay, or linear solves.
    memory_bytes: extra memory at its peak, beside the arguments.
    retrain_gradients: the same figure for retraining from scratch.
    guarantee: "exact", "certified", "bounded" or "heuristic".
    epsilon, delta: what the release would be certified at; None where there is no such claim.
    seconds: an estimate, or None where nothing has been timed yet.
    """

    feasible: bool
    reason: str
    guarantee: str
    num_forgotten: int = 0
    num_steps: int = 0
    num_gradients: int = 0
    retrain_gradients: int = 0
    memory_bytes: int = 0
    seconds: float | None = None
    epsilon: float | None = None
    delta: float | None = None


class Request(NamedTuple):
    """What `forget` was asked, once it has been checked.

    ids: sorted, each once.  num_duplicates: repeats in the request.
    begun: `time.perf_counter()` when it came.  requester: whoever asked.
    """

    ids: np.ndarray
    num_duplicates: int
    begun: float
    requester: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetInfo:
    """What a person wants to know about a deletion; strings live here, never in a state.

    ids: the forgotten ids, sorted, each once.  num_duplicates: repeats in the request.
    status: `Status.OK`, always, on a returned info: every other status raises.
    commitment_salt: opens the certificate's commitment to the ids; keep it private.
    requester: whoever asked, as passed to `forget`; stays on this side.
    certificate: None when nothing was forgotten.
    measurements: figures of the method by name (residuals, replayed steps, distances).
    """

    method: str
    ids: tuple[int, ...]
    num_duplicates: int
    status: Status
    seconds: float
    certificate: "Certificate | None" = None
    requester: str | None = None
    commitment_salt: bytes | None = None
    measurements: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, method: str, request: "Request", **rest: Any) -> "ForgetInfo":
        """An info with status OK, timed since the request."""
        return cls(
            method=method,
            ids=tuple(int(i) for i in request.ids),
            num_duplicates=request.num_duplicates,
            status=Status.OK,
            seconds=time.perf_counter() - request.begun,
            **rest,
        )

    @property
    def num_forgotten(self) -> int:
        """How many ids this call forgot."""
        return len(self.ids)


class Forgotten(NamedTuple):
    """What `forget` returns: parameters and optimizer state without the forgotten ids."""

    params: Params
    opt_state: UnlearnerState
    info: ForgetInfo


class Unlearner(optax.GradientTransformationExtraArgs):
    """An Optax optimizer with a third function, `forget`.

    A 2-tuple `(init, update)` to Optax, with `forget`, `quote` and `forget_step` as attributes.
    A subclass of `GradientTransformationExtraArgs`, because `optax.chain` drops the extra args of
    anything else. It stands outermost: `replay(optax.chain(clip, adamw), ...)`.

      init(params) -> UnlearnerState(inner, record)
      update(updates, opt_state, params, *, batch=None, ids=None, key=None, **extra)
      forget(params, opt_state, ids, *, data=None, requester=None) -> Forgotten
      quote(params, opt_state, ids) -> Quote
      forget_step(params, state, rows, ids, weights) -> (params, state, arrays), pure
    """

    forget: Callable[..., Forgotten]
    quote: Callable[..., Quote]
    forget_step: Callable[..., tuple[Params, UnlearnerState, dict[str, Array]]]

    _names: tuple[str, ...] = ("init", "update", "forget", "quote", "forget_step")
    """A subclass adds the names of what it has beside these."""

    def __new__(cls, init, update, forget, quote, forget_step, **more):
        if (*Unlearner._names, *more) != cls._names:
            raise TypeError(f"Expected {cls._names}, got {(*Unlearner._names, *more)}.")
        self = super().__new__(cls, init, update)
        self.forget, self.quote, self.forget_step = forget, quote, forget_step
        self.__dict__.update(more)
        return self

    @classmethod
    def _make(cls, fields):
        fields = tuple(fields)
        if len(fields) != len(cls._names):
            raise TypeError(
                f"Expected {len(cls._names)} functions ({', '.join(cls._names)}), got "
                f"{len(fields)}. An Unlearner is not a pytree: keep it out of jax.tree functions."
            )
        return cls(**dict(zip(cls._names, fields)))

    def _replace(self, **changes):
        return type(self)(**(self._asdict() | changes))

    def _asdict(self):
        return {name: getattr(self, name) for name in self._names}

    def __reduce__(self):
        return type(self)._make, (tuple(self._asdict().values()),)

    def __copy__(self):
        return self._replace()


class ExactLearner(NamedTuple):
    """A learner that takes no Optax steps, with the `forget` and `quote` of an `Unlearner`.

      fit(data, ids=None, **options) -> (params, state)
      predict(params, batch) -> outputs, pure
      forget(params, state, ids, *, data=None, requester=None) -> Forgotten
      quote(params, state, ids) -> Quote

    `state` is an `UnlearnerState`: `inner` is an optimizer's state where the learner has one and
    `()` elsewhere, `record` is never released. `fit` starts from the beginning each time.
    """

    fit: Callable[..., tuple[Params, UnlearnerState]]
    predict: Callable[..., PyTree]
    forget: Callable[..., Forgotten]
    quote: Callable[..., Quote]


def released(opt_state: UnlearnerState) -> optax.OptState:
    """The part of an unlearner's state that may leave the house: the wrapped optimizer's state.

    The deletion record stays: it holds what deletion needs, which is more than the optimizer knows.

    >>> released(UnlearnerState(inner=(1, 2), record="never released"))
    (1, 2)
    """
    return opt_state.inner
