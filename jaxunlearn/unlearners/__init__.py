"""One file per published method, each an `Unlearner` or an `ExactLearner`."""

from jaxunlearn.unlearners.deltagrad import DeltaGradRecord, deltagrad
from jaxunlearn.unlearners.fixed_path import FixedPathRecord, fixed_path
from jaxunlearn.unlearners.memory_pair import MemoryPairRecord, memory_pair
from jaxunlearn.unlearners.newton import NewtonRecord, newton
from jaxunlearn.unlearners.recollect import Recollector, RecollectRecord, recollect
from jaxunlearn.unlearners.replay import ReplayRecord, replay

__all__ = [
    "DeltaGradRecord",
    "FixedPathRecord",
    "MemoryPairRecord",
    "NewtonRecord",
    "RecollectRecord",
    "Recollector",
    "ReplayRecord",
    "deltagrad",
    "fixed_path",
    "memory_pair",
    "newton",
    "recollect",
    "replay",
]
