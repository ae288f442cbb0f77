"""One file or package per published method, each an `Unlearner` or an `ExactLearner`."""

from jaxunlearn.unlearners.deltagrad import DeltaGradRecord, deltagrad, trajectory_bytes
from jaxunlearn.unlearners.fixed_path import FixedPathRecord, fixed_path
from jaxunlearn.unlearners.memory_pair import (
    Event,
    EventKind,
    MemoryPairRecord,
    Outcome,
    Stream,
    StreamOutput,
    StreamState,
    StreamUnlearner,
    memory_pair,
)
from jaxunlearn.unlearners.newton import NewtonRecord, newton
from jaxunlearn.unlearners.recollect import Recollector, RecollectRecord, recollect
from jaxunlearn.unlearners.replay import ReplayRecord, replay
from jaxunlearn.unlearners.statistical_queries import (
    StatisticalQueryRecord,
    Summation,
    gaussian_naive_bayes,
    multinomial_naive_bayes,
    ridge,
    statistical_queries,
    summation,
)

__all__ = [
    "DeltaGradRecord",
    "Event",
    "EventKind",
    "FixedPathRecord",
    "MemoryPairRecord",
    "NewtonRecord",
    "Outcome",
    "RecollectRecord",
    "Recollector",
    "ReplayRecord",
    "StatisticalQueryRecord",
    "Stream",
    "StreamOutput",
    "StreamState",
    "StreamUnlearner",
    "Summation",
    "deltagrad",
    "fixed_path",
    "gaussian_naive_bayes",
    "memory_pair",
    "multinomial_naive_bayes",
    "newton",
    "recollect",
    "replay",
    "ridge",
    "statistical_queries",
    "summation",
    "trajectory_bytes",
]
