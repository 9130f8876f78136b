"""Methods beside quantisation that train through `affinequant.fit` and are judged by `affinequant_evals`."""

from affinequant_research.experiment import METHODS as METHODS
from affinequant_research.experiment import Claim as Claim
from affinequant_research.experiment import Experiment as Experiment
from affinequant_research.experiment import Found as Found
from affinequant_research.experiment import Method as Method
from affinequant_research.experiment import Trial as Trial

__all__ = ["METHODS", "Claim", "Experiment", "Found", "Method", "Trial"]
