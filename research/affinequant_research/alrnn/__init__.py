"""Almost-linear RNNs: dynamical systems as few affine maps, learnt from their trajectories (arXiv 2410.14240)."""

from affinequant_research.alrnn import attractors, empirical
from affinequant_research.experiment import Method

METHOD = Method(
    name="alrnn",
    about="almost-linear RNNs of few regions that run like the system that they were trained on",
    source="arXiv 2410.14240",
    experiments=(*attractors.EXPERIMENTS, *empirical.EXPERIMENTS),
)
