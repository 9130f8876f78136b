"""Systems biology: three genes that repress one another in a ring, seen at every second of eleven times.

Its parameters are not identified by so few snapshots (the strength of a promoter, what represses it and how steeply make up
for one another), so nothing is claimed of them. Its dynamics contract, and its clouds are bent along a cycle: theta is fitted
on forward paths alone, and drifts have bumps on top of the affine.
"""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import AUTHORS, SMOKE, Settings, experiment

BENCH = Settings(
    system="repressilator",
    passes=30,
    particles=400,
    dt=0.02,
    regressor="bent",
    updates=150,
    increments=12_000,
    both_ways=False,
    relax=1.8,
)
PRESETS = {
    "smoke": Settings(system="repressilator", **SMOKE, updates=20),
    "ci": Settings(
        system="repressilator",
        passes=8,
        dt=0.05,
        updates=40,
        increments=4000,
        both_ways=False,
        relax=1.8,
        regressor="bent",
    ),
    "bench": BENCH,
    "paper": Settings(system="repressilator", particles=50, dt=0.01, **AUTHORS),
}
CLAIMS = {
    "ci": (
        Claim(
            metric="refined/w2", op="<=", than="vanilla/w2", factor=0.5, source="derived: fewer passes, longer steps"
        ),
    ),
    "bench": (
        Claim(metric="refined/w2", op="<=", than=0.3, source="target; a prototype on the authors' data had .407"),
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.45, source="measured: a prototype, .34"),
    ),
}
EXPERIMENT = experiment("repressilator", "three genes in a ring; W2 at times held out", PRESETS, CLAIMS)
