"""Currents: drifters in a vortex, seen at every second of nine times; theta are its circulation, core and centre.

The authors take drifters in the Gulf of Mexico. Here they float in a vortex of Lamb and Oseen, which is also the family: how
far a family is from currents as they are is not to be seen.
"""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import AUTHORS, SMOKE, Settings, experiment

PRESETS = {
    "smoke": Settings(system="vortex", **SMOKE, updates=20),
    "ci": Settings(system="vortex", passes=5, dt=0.1),
    "bench": Settings(system="vortex", passes=12),
    "paper": Settings(system="vortex", particles=50, dt=0.02, **AUTHORS),
}
BEATS = "derived: a reference of the right family; measured on seed 0"
CLAIMS = {
    "ci": (Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.85, source=f"{BEATS}, .48"),),
    "bench": (Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.65, source=f"{BEATS}, .49"),),
}
EXPERIMENT = experiment("vortex", "drifters in a vortex; W2 at times held out", PRESETS, CLAIMS)
