"""Cells: a programme of five components that parts into two fates, seen at every second of five times.

The authors take embryoid bodies and embryonic stem cells. The family is the gradient field of a network, as theirs: it can be
the truth's, and has no parameters to compare. Two clouds cannot come out of one by an affine map: drifts have a network on
top of the affine here, for the vanilla bridges as for the refined ones.
"""

from dataclasses import replace

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import AUTHORS, Settings, experiment

BENCH = Settings(
    system="genes",
    passes=6,
    sweeps=3,
    most_sweeps=6,
    particles=150,
    dt=0.1,
    regressor="mlp",
    ridge=0.1,
    rate=0.02,
    transport=0.9,
)
"""Fates move by less from the third snapshot to the fifth than they are apart: hence the `transport`."""
PRESETS = {
    # Affine maps are quick, do not part a cloud, and are let off.
    "smoke": replace(
        BENCH, passes=2, sweeps=1, most_sweeps=4, particles=60, dt=0.2, updates=20, regressor="affine", transport=2.0
    ),
    "ci": replace(BENCH, passes=3, sweeps=2, particles=100, increments=3000),
    "bench": BENCH,
    "paper": Settings(system="genes", particles=150, dt=0.05, **AUTHORS, rate=0.01),
}
BEATS = "derived: a reference that learns beats none"
CLAIMS = {
    "ci": (Claim(metric="refined/w2", op="<=", than="vanilla/w2", source=BEATS),),
    "bench": (
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", source=BEATS),
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.75, source="measured: .57 on seed 0"),
    ),
}
EXPERIMENT = experiment("genes", "cells that part into two fates; W2 at times held out", PRESETS, CLAIMS)
