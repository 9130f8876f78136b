"""Cells: a programme of five components that parts into two fates, seen at every second of five times.

The authors take embryoid bodies and embryonic stem cells. The family is the gradient field of a network, as theirs: it can be
the truth's, and has no parameters to compare. Two clouds cannot come out of one by an affine map: drifts have a network on
top of the affine here, for the vanilla bridges as for the refined ones.
"""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import Settings, experiment

PRESETS = {
    "smoke": Settings(
        system="genes", passes=2, sweeps=1, most_sweeps=4, particles=60, dt=0.2, updates=20, transport=1.0
    ),
    "ci": Settings(system="genes", passes=3, dt=0.1, particles=100, regressor="mlp", rate=0.02),
    "bench": Settings(system="genes", passes=8, dt=0.1, particles=150, regressor="mlp", rate=0.02),
    "paper": Settings(
        system="genes", sweeps=10, particles=150, dt=0.05, regressor="gp", centred=False, updates=20, rate=0.01
    ),
}
CLAIMS: dict[str, tuple[Claim, ...]] = {}
EXPERIMENT = experiment("genes", "cells that part into two fates; W2 at times held out", PRESETS, CLAIMS)
