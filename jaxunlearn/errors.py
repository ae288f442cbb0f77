"""Typed errors. Catch `JaxUnlearnError` to catch them all; inputs are untouched by any of them."""


class JaxUnlearnError(Exception):
    """Base class of every error this library raises on purpose."""


class IdError(JaxUnlearnError, ValueError):
    """An example id cannot be used for this request."""


class IdTypeError(IdError, TypeError):
    """An id is not an integer: bool, float, NaN, text, or an array of any of these."""


class IdRangeError(IdError):
    """An id is negative or not below `num_examples`."""


class NeverSeenError(IdError):
    """An id was never passed to `update` in this run, so there is nothing to forget."""


class AlreadyForgottenError(IdError):
    """An id was forgotten before. Ids are never reused."""


class NotTrackedError(IdError):
    """Training carried no tangent for this unit."""


class WrongStateError(JaxUnlearnError, TypeError):
    """The optimizer state is not the `UnlearnerState` of this unlearner."""


class WrongNestingError(WrongStateError):
    """The unlearner stands inside another transform, where it cannot see what that one did."""


class UnknownStateError(JaxUnlearnError, TypeError):
    """A part of an optimizer's state of which nobody has said how it could be made again."""


class RetainSetEmptyError(JaxUnlearnError, ValueError):
    """A method that fits the retain set was asked to forget all of it."""


class MissingDataError(JaxUnlearnError, ValueError):
    """`forget` needs `data` and got none, or got data that breaks the protocol."""


class LossSignatureError(JaxUnlearnError, TypeError):
    """`loss_fn` does not have the form `loss_fn(params, batch[, key]) -> scalar`."""


class CoupledLossError(JaxUnlearnError, ValueError):
    """The loss is not the mean of per-example losses: some rows change the loss of others."""


class TrainingRecordError(JaxUnlearnError, RuntimeError):
    """Something went wrong during a traced `update`; the record cannot support a deletion."""


class VerificationError(JaxUnlearnError, RuntimeError):
    """Replaying the recorded run without a deletion did not reproduce it."""


class NonFiniteError(JaxUnlearnError, ArithmeticError):
    """A deletion produced a value that is not finite; nothing was released."""


class RoughRunError(JaxUnlearnError, RuntimeError):
    """The run is not linear enough for a first-order deletion; nothing was released."""


class RecordTooLargeError(JaxUnlearnError, ValueError):
    """The deletion record would take more memory than was allowed."""


class SumOverflowError(JaxUnlearnError, OverflowError):
    """An exact sum, or a value on its grid, does not fit its integers; nothing was changed."""


class SolverError(JaxUnlearnError, ArithmeticError):
    """A linear solve met a matrix it must not meet (negative curvature); nothing was released."""


class AssumptionError(JaxUnlearnError, ValueError):
    """A constant that a guarantee was to rest on is refuted by the rows."""


class BudgetExhaustedError(JaxUnlearnError, RuntimeError):
    """The deletion does not fit the budget that is left: retrain instead."""


class QuotaExceededError(JaxUnlearnError, RuntimeError):
    """One request, or one requester, asked for more than its share. Not a reason to retrain."""


class CertificateError(JaxUnlearnError, ValueError):
    """A certificate is malformed, of an unknown schema, or contradicts itself."""


class DatasetMissingError(JaxUnlearnError, FileNotFoundError):
    """A data set is not where `JAXUNLEARN_DATA` says it is."""


class DatasetChecksumError(JaxUnlearnError, ValueError):
    """A data file is not the one its checksum names."""


class UsageError(JaxUnlearnError, ValueError):
    """The command line was asked for something that does not exist."""


class MissingExtraError(JaxUnlearnError, ImportError):
    """An optional dependency is not installed."""
