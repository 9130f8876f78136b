"""Motion: two masses on springs, seen at every second of nine times; theta are two stiffnesses and the drag.

The authors take motion capture, and a spring to the origin as the family. Here places and speeds of masses on a line are
seen; the law is linear, so bridges that are affine at each time are exact and theta has a closed form.
"""

from affinequant_research.experiment import Claim
from affinequant_research.schrodinger.refine import AUTHORS, SMOKE, Settings, experiment

PRESETS = {
    "smoke": Settings(system="springs", **SMOKE, estimator="least-squares"),
    "ci": Settings(system="springs", passes=8, dt=0.1, estimator="least-squares"),
    "bench": Settings(system="springs", passes=20, estimator="least-squares"),
    "paper": Settings(system="springs", particles=80, dt=0.02, **AUTHORS),
}
BEATS = "derived: a reference of the right family; measured on seed 0"
CLAIMS = {
    "ci": (Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.5, source=f"{BEATS}, .34"),),
    "bench": (Claim(metric="refined/w2", op="<=", than="vanilla/w2", factor=0.35, source=f"{BEATS}, .24"),),
}
EXPERIMENT = experiment("springs", "masses on springs; W2 at times held out", PRESETS, CLAIMS)
