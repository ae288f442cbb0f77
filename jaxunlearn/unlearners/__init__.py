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
    "Stream",
    "StreamOutput",
    "StreamState",
    "StreamUnlearner",
    "deltagrad",
    "fixed_path",
    "memory_pair",
    "newton",
    "recollect",
    "replay",
    "trajectory_bytes",
]
