"""Ecology: prey and predators, seen at every second of nine times; theta are the four rates of Lotka and Volterra."""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import Settings, experiment

PRESETS = {
    "smoke": Settings(system="lotka-volterra", passes=2, sweeps=2, most_sweeps=20, particles=60, dt=0.1, updates=20),
    "ci": Settings(system="lotka-volterra", passes=8),
    "bench": Settings(system="lotka-volterra", passes=20),
    "paper": Settings(
        system="lotka-volterra", sweeps=10, particles=50, dt=0.02, regressor="gp", centred=False, updates=20
    ),
}
CLAIMS = {
    "bench": (
        Claim(metric="refined/w2", op="<=", than=0.2, source="measured: a prototype on the authors' data reached .144"),
        Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.4, source="measured: a prototype, .26"),
        Claim(metric="refined/theta_error", op="<=", than=0.15, source="measured: a prototype, .10"),
    )
}
EXPERIMENT = experiment("ecology", "prey and predators; W2 at times held out", PRESETS, CLAIMS)
