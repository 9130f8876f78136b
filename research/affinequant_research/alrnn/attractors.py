"""Attractors learnt from one trajectory each (arXiv 2410.14240): Lorenz-63, Rössler, Lorenz-96; how many ReLUs it takes.

With a ReLU too few there is no attractor at all, however many linear units there are beside it; with enough of them a free
run visits few of the regions that there could be.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from affinequant_evals import Score, Suite
from affinequant_evals.harness import Battery

from affinequant.fit import FitReport
from affinequant.report.figure import Figure
from affinequant_research.alrnn.curves import by_relus, figures
from affinequant_research.alrnn.drawing import pictures_of
from affinequant_research.alrnn.freerun import Scores, distance, free_run, of_run, simplest
from affinequant_research.alrnn.measures import short
from affinequant_research.alrnn.model import AlmostLinear
from affinequant_research.alrnn.quantised import BITS, by_bits
from affinequant_research.alrnn.systems import SYSTEMS, trajectories
from affinequant_research.alrnn.training import Learner, Training, phase_of, probes_of, relus_of
from affinequant_research.experiment import Claim, Experiment, Found, Op, Picture, Series, Trial, arms
from affinequant_research.series import one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Attractors(Training):
    """Settings of an attractor's experiment.

    Attributes:
        system: a name of `SYSTEMS`.
        arms: `P2` is the training with two ReLUs.
        steps: of the trajectories to learn and to compare with, and of each free run.
        bits: that what was learnt is rounded to.
        simplest_within: of the checkpoints within that divergence of the training data the one whose regions follow one
            another in the fewest ways is kept; 0: the one with the least divergence, whatever its regions, as the authors do.
    """

    system: str = "lorenz63"
    arms: tuple[str, ...] = ("P2",)
    steps: int = 100_000
    bits: tuple[int, ...] = BITS
    simplest_within: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a free run keeps to that has the attractor; `exponent` is per unit of time."""

    d_stsp: float
    d_hellinger: float
    regions: int
    exponent: tuple[float, float]

    def claims(self, arm: str, steps: int, **how: Any) -> tuple[Claim, ...]:
        """Each of them of an arm whose free runs have so many steps. Codes of two units never change both at once, and no
        fixed point of a region that is visited attracts."""
        limits: tuple[tuple[str, Op, float], ...] = (
            (f"d_stsp@bins30,T{short(steps)}", "<=", self.d_stsp),
            (f"d_hellinger@s20,T{short(min(steps, 10_000))}", "<=", self.d_hellinger),
            ("regions", ">=", float(self.regions)),
            ("regions", "<=", float(self.regions)),
            ("apart", "<=", 0.0),
            ("settled", "<=", 0.0),
            ("exponent", ">=", self.exponent[0]),
            ("exponent", "<=", self.exponent[1]),
        )
        return tuple(Claim(metric=f"{arm}/{name}", op=op, than=than, **how) for name, op, than in limits)


BOUNDS = {
    "lorenz63": Bounds(d_stsp=5.0, d_hellinger=0.2, regions=3, exponent=(0.6, 1.1)),
    "roessler": Bounds(d_stsp=1.5, d_hellinger=0.1, regions=2, exponent=(0.05, 0.11)),
}


def build(config: Attractors, seed: int, arm: str) -> Trial:
    """The training of one arm."""
    train, other = trajectories(config.system, config.steps)
    learner, system = Learner(config, relus_of(arm), train.shape[1], seed), SYSTEMS[config.system]
    bounds, names = BOUNDS.get(config.system), ("d_stsp", "rank") if config.simplest_within else ("d_stsp",)

    def judged(model: AlmostLinear) -> Mapping[str, float]:
        if config.simplest_within:
            return simplest(model, train, config.steps, config.simplest_within)
        return {"d_stsp": distance(model, train, config.steps)}

    def free(learner: Learner) -> Scores:
        found = of_run(learner.model(), other, config.steps, system.step)
        if bounds:
            found["faithful"] = ("higher", one_of(kept_to(found, bounds, config.steps)))
        return found

    def rounded(learner: Learner) -> Scores:
        return by_bits(learner.model(), config.bits, other, config.steps, system.step)

    def pictures() -> Mapping[str, Picture]:
        latent = free_run(learner.model(), other, config.steps)
        return pictures_of(learner.model(), latent, other, interval=config.tau, axes=system.axes)

    return Trial(
        phase=phase_of(learner, train, seed, probes_of(learner, judged, names), names[-1]),
        subject=learner,
        suite=Suite(
            name="attractor",
            metrics=(Battery(name="free run", function=free), Battery(name="bits", function=rounded)),
        ),
        outcome=partial(way, within=bounds.d_stsp if bounds else 0.0),
        pictures=pictures,
        tensors=lambda: {name: getattr(learner, name).detach() for name in "AWhL"},
    )


def kept_to(found: Scores, bounds: Bounds, steps: int) -> bool:
    """Whether a free run keeps to all of the bounds."""
    values = {f"this/{name}": score.value for name, (_, score) in found.items()}
    return all(one.holds(values) for one in bounds.claims("this", steps, source=""))


def way(fitted: FitReport, series: Mapping[str, Series], within: float) -> dict[str, Score]:
    """What the checkpoints were: which one was kept, how far off the last one was, and the share of them that is `within`."""
    updates, judged = series.get("rank", series["d_stsp"])
    apart = series["d_stsp"][1]
    return {
        "kept_update": one_of(updates[int(np.argmin(judged))]),
        "d_stsp_last": one_of(apart[-1]),
        "within": Score(value=float(np.mean(np.array(apart) <= within)), stderr=None, n=len(apart)),
        "ms_per_update": one_of(1000 * fitted.seconds / fitted.steps),
    }


SHOWN = (
    "d_hellinger@s20,T1e4", "regions", "apart", "settled", "exponent", "faithful", "kept_update", "d_stsp_last", "within",
    "ms_per_update", *(f"d_stsp@w{bits}" for bits in BITS),
)  # fmt: skip
MOST: dict[str, Any] = {"source": "measured: a prototype with the paper's settings but for the rates", "share": 2 / 3}
AUTHORS: tuple[tuple[str, Op, float], ...] = (
    ("d_stsp@bins30,T1e5", "<=", 3.5),
    ("exponent", ">=", 0.8),
    ("exponent", "<=", 1.0),
)
"""What their weights for Lorenz-63 do: 3.27 and .917."""
SMOKE: dict[str, Any] = {"T": 20, "batch": 4, "updates": 20, "check_every": 10, "steps": 2000, "bits": (8, 4)}


def experiment(
    name: str,
    about: str,
    presets: Mapping[str, Attractors],
    *,
    claims: Mapping[str, tuple[Claim, ...]] | None = None,
    draw: Callable[[Found], Sequence[Figure]] | None = None,
) -> Experiment:
    """An experiment on a system."""
    states = "bins30,T1e5" if presets["bench"].system in BOUNDS else "gmm1,T1e4"
    return Experiment(
        name=name,
        about=about,
        source="arXiv 2410.14240",
        presets=presets,
        stages=lambda config: arms(config.arms),
        build=build,
        claims=claims or {},
        figures=draw or (lambda found: figures(found, name)),
        shown=(f"d_stsp@{states}", *SHOWN),
    )


LORENZ = Attractors(arms=("P2", "P1"), rate=5e-3, last_rate=1e-4)
ROESSLER = Attractors(system="roessler", arms=("P1",), T=300, tau=8, rate=5e-3, last_rate=1e-4, updates=10_000)
ROESSLER_CI = dataclasses.replace(ROESSLER, updates=3000, bits=(8, 4))
LOOSE = Bounds(d_stsp=6.0, d_hellinger=0.2, regions=2, exponent=(0.02, 0.15))
LORENZ96 = Attractors(
    system="lorenz96", arms=("P50",), M=100, T=50, tau=20, rate=2e-3, last_rate=1e-4, updates=10_000, check_every=1000
)
RELUS = dataclasses.replace(LORENZ, arms=("P0", "P1", "P2", "P3", "P5", "P10"), updates=10_000, bits=(8,))
LONG: dict[str, Any] = {"updates": 150_000, "last_rate": 1e-5, "check_every": 1250}
"""What the authors' settings have in common: a checkpoint every 25 of their epochs."""
EXPERIMENTS = (
    experiment(
        "lorenz",
        "Lorenz-63 of two ReLUs, and of one too few",
        {
            "smoke": dataclasses.replace(LORENZ, **SMOKE),
            "bench": dataclasses.replace(LORENZ, simplest_within=BOUNDS["lorenz63"].d_stsp),
            "paper": dataclasses.replace(LORENZ, **{**LONG, "updates": 100_000}, rate=1e-3),
        },
        claims={
            "bench": (
                *BOUNDS["lorenz63"].claims("P2", LORENZ.steps, **MOST),
                Claim(metric="P2/faithful", op=">=", than=1.0, **MOST),
                Claim(metric="P1/d_stsp@bins30,T1e5", op=">=", than=8.0, source="derived: the paper has P = 1 fail"),
            ),
            "paper": tuple(
                Claim(metric=f"P2/{metric}", op=op, than=than, share=0.5, source="measured: the authors' weights")
                for metric, op, than in AUTHORS
            ),
        },
    ),
    experiment(
        "roessler",
        "Rössler's attractor of one ReLU",
        {
            "smoke": dataclasses.replace(ROESSLER, **SMOKE),
            "ci": ROESSLER_CI,
            "bench": ROESSLER,
            "paper": dataclasses.replace(ROESSLER, **LONG),
        },
        claims={
            "ci": LOOSE.claims("P1", ROESSLER_CI.steps, source="measured: seeds 0 to 2, with room"),
            "bench": (
                *BOUNDS["roessler"].claims("P1", ROESSLER.steps, **MOST),
                Claim(metric="P1/faithful", op=">=", than=1.0, **MOST),
            ),
        },
    ),
    experiment(
        "lorenz96",
        "Lorenz-96 in twenty dimensions",
        {
            "smoke": dataclasses.replace(LORENZ96, **{**SMOKE, "arms": ("P4",), "M": 28}),
            "bench": LORENZ96,
            "paper": dataclasses.replace(LORENZ96, **LONG, rate=1e-3),
        },
    ),
    experiment(
        "relus",
        "Lorenz-63 against the number of ReLUs",
        {"smoke": dataclasses.replace(RELUS, **{**SMOKE, "arms": ("P0", "P3")}), "bench": RELUS},
        draw=lambda found: [by_relus(found)],
    ),
)
