"""Systems biology: three genes that repress one another in a ring, seen at every second of eleven times."""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import Settings, experiment

PRESETS = {
    "smoke": Settings(system="repressilator", passes=2, sweeps=2, most_sweeps=20, particles=60, dt=0.1, updates=20),
    "ci": Settings(system="repressilator", passes=8),
    "bench": Settings(system="repressilator", passes=20, regressor="bent"),
    "paper": Settings(
        system="repressilator", sweeps=10, particles=50, dt=0.01, regressor="gp", centred=False, updates=20
    ),
}
CLAIMS = {
    "bench": (
        Claim(metric="refined/w2", op="<=", than=0.5, source="measured: a prototype on the authors' data, .407"),
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.45, source="measured: a prototype, .34"),
    )
}
EXPERIMENT = experiment("repressilator", "three genes in a ring; W2 at times held out", PRESETS, CLAIMS)
