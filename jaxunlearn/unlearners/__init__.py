"""One file or package per published method, each an `Unlearner` or an `ExactLearner`."""

from jaxunlearn.unlearners.certified_finetuning import (
    FinetuningRecord,
    Tuning,
    certified_finetuning,
)
from jaxunlearn.unlearners.certified_removal import CertifiedRemovalRecord, certified_removal
from jaxunlearn.unlearners.deltagrad import DeltaGradRecord, deltagrad, trajectory_bytes
from jaxunlearn.unlearners.fixed_path import FixedPathRecord, fixed_path
from jaxunlearn.unlearners.infinitesimal_jackknife import JackknifeRecord, infinitesimal_jackknife
from jaxunlearn.unlearners.kmeans import (
    DividedKMeansRecord,
    QuantisedKMeansRecord,
    divided_kmeans,
    quantised_kmeans,
)
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
from jaxunlearn.unlearners.noisy_sgd import NoisySGDRecord, noisy_sgd
from jaxunlearn.unlearners.recollect import Recollector, RecollectRecord, recollect
from jaxunlearn.unlearners.replay import ReplayRecord, replay
from jaxunlearn.unlearners.sisa import SisaRecord, sisa
from jaxunlearn.unlearners.statistical_queries import (
    StatisticalQueryRecord,
    Summation,
    gaussian_naive_bayes,
    multinomial_naive_bayes,
    ridge,
    statistical_queries,
    summation,
)
from jaxunlearn.unlearners.stored_newton import StoredNewtonRecord, stored_newton

__all__ = [
    "CertifiedRemovalRecord",
    "DeltaGradRecord",
    "DividedKMeansRecord",
    "Event",
    "EventKind",
    "FinetuningRecord",
    "FixedPathRecord",
    "JackknifeRecord",
    "MemoryPairRecord",
    "NewtonRecord",
    "NoisySGDRecord",
    "Outcome",
    "QuantisedKMeansRecord",
    "RecollectRecord",
    "Recollector",
    "ReplayRecord",
    "SisaRecord",
    "StatisticalQueryRecord",
    "StoredNewtonRecord",
    "Stream",
    "StreamOutput",
    "StreamState",
    "StreamUnlearner",
    "Summation",
    "Tuning",
    "certified_finetuning",
    "certified_removal",
    "deltagrad",
    "divided_kmeans",
    "fixed_path",
    "gaussian_naive_bayes",
    "infinitesimal_jackknife",
    "memory_pair",
    "multinomial_naive_bayes",
    "newton",
    "noisy_sgd",
    "quantised_kmeans",
    "recollect",
    "replay",
    "ridge",
    "sisa",
    "statistical_queries",
    "stored_newton",
    "summation",
    "trajectory_bytes",
]
