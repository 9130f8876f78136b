"""Ecology: prey and predators, seen at every second of nine times; theta are the four rates of Lotka and Volterra.

The drift is linear in them, so that likelihood has a closed form; `--set estimator=adam` climbs to the same.
"""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import AUTHORS, SMOKE, Settings, experiment

BENCH = Settings(system="lotka-volterra", passes=16, particles=400, estimator="least-squares", relax=1.5)
PRESETS = {
    "smoke": Settings(system="lotka-volterra", **SMOKE, updates=20),
    "ci": Settings(system="lotka-volterra", passes=10, estimator="least-squares", relax=1.5),
    "bench": BENCH,
    "paper": Settings(system="lotka-volterra", particles=50, dt=0.02, **AUTHORS),
}
CLAIMS = {
    "ci": (
        Claim(
            metric="refined/w2", op="<=", than="vanilla/w2", factor=0.5, source="derived: fewer passes and particles"
        ),
        Claim(metric="refined/theta_error", op="<=", than=0.3, source="derived: fewer passes and particles"),
    ),
    "bench": (
        Claim(metric="refined/w2", op="<=", than=0.15, source="measured: a prototype on the authors' data, .144"),
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.4, source="measured: a prototype, .26"),
        Claim(metric="refined/theta_error", op="<=", than=0.15, source="measured: a prototype, .10"),
    ),
}
EXPERIMENT = experiment("ecology", "prey and predators; W2 at times held out", PRESETS, CLAIMS)
