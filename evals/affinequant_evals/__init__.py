"""Perplexity, tasks and speed, always next to a baseline. The harness serves every method, not only language models."""

from affinequant_evals.harness import Battery as Battery
from affinequant_evals.harness import Better as Better
from affinequant_evals.harness import Metric as Metric
from affinequant_evals.harness import Row as Row
from affinequant_evals.harness import Scorecard as Scorecard
from affinequant_evals.harness import Suite as Suite
from affinequant_evals.harness import evaluate as evaluate
from affinequant_evals.noise import Noise as Noise
from affinequant_evals.noise import noise_floor as noise_floor
from affinequant_evals.scores import Delta as Delta
from affinequant_evals.scores import Score as Score
from affinequant_evals.scores import exp_mean_score as exp_mean_score
from affinequant_evals.scores import mean_score as mean_score

__all__ = [
    "Battery",
    "Better",
    "Delta",
    "Metric",
    "Noise",
    "Row",
    "Score",
    "Scorecard",
    "Suite",
    "evaluate",
    "exp_mean_score",
    "mean_score",
    "noise_floor",
]
