"""One file per published method, each an `Unlearner` or an `ExactLearner`."""

from jaxunlearn.unlearners.newton import NewtonRecord, newton
from jaxunlearn.unlearners.replay import ReplayRecord, replay

__all__ = ["NewtonRecord", "ReplayRecord", "newton", "replay"]
