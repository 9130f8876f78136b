"""Rotations as networks give them: which representations are continuous, and what that is worth (arXiv 1812.07035)."""

from affinequant_research.experiment import Method
from affinequant_research.rotations import charts, ik, pointcloud, sanity

METHOD = Method(
    name="rotations",
    about="continuous representations of rotations beside those that jump",
    source="arXiv 1812.07035",
    experiments=(sanity.EXPERIMENT, pointcloud.EXPERIMENT, ik.EXPERIMENT, charts.EXPERIMENT),
)
