"""One file per published method, each an `Unlearner` or an `ExactLearner`."""

from jaxunlearn.unlearners.deltagrad import DeltaGradRecord, deltagrad
from jaxunlearn.unlearners.fixed_path import FixedPathRecord, fixed_path
from jaxunlearn.unlearners.newton import NewtonRecord, newton
from jaxunlearn.unlearners.recollect import Recollector, RecollectRecord, recollect
from jaxunlearn.unlearners.replay import ReplayRecord, replay

__all__ = [
    "DeltaGradRecord",
    "FixedPathRecord",
    "NewtonRecord",
    "ReplayRecord",
    "deltagrad",
    "fixed_path",
    "newton",
    "replay",
]
