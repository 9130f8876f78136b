"""Attractors learnt from one trajectory each (arXiv 2410.14240): Lorenz-63, Rössler, Lorenz-96; how many ReLUs it takes.

With a ReLU too few there is no attractor at all, however many linear units there are beside it; with enough of them a free
run visits few of the regions that there could be.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from affinequant_evals import Score, Suite, mean_score
from affinequant_evals.harness import Battery

from affinequant.errors import AffineQuantError
from affinequant.fit import FitReport
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.alrnn.freerun import Scores, distance, of_run, one_of
from affinequant_research.alrnn.measures import short
from affinequant_research.alrnn.quantised import BITS, PARTS, by_bits
from affinequant_research.alrnn.systems import SYSTEMS, trajectories
from affinequant_research.alrnn.training import Learner, Training, phase_of
from affinequant_research.experiment import Claim, Experiment, Found, Series, Trial, arms


@dataclass(frozen=True, slots=True, kw_only=True)
class Attractors(Training):
    """Settings of an attractor's experiment.

    Attributes:
        system: a name of `SYSTEMS`.
        arms: `P2` is the training with two ReLUs.
        steps: of the trajectories to learn and to compare with, and of each free run.
        bits: that what was learnt is rounded to.
    """

    system: str = "lorenz63"
    arms: tuple[str, ...] = ("P2",)
    steps: int = 100_000
    bits: tuple[int, ...] = BITS


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
        limits = (
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


def relus_of(arm: str) -> int:
    """2 for `P2`.

    Raises:
        AffineQuantError: it is not written like that (exit 2).
    """
    if arm[:1] != "P" or not arm[1:].isdecimal():
        raise AffineQuantError(f"{arm!r} names no number of ReLUs", "--set arms", "write P2 for two")
    return int(arm[1:])


def build(config: Attractors, seed: int, arm: str) -> Trial:
    """The training of one arm."""
    train, other = trajectories(config.system, config.steps)
    learner, step = Learner(config, relus_of(arm), train.shape[1], seed), SYSTEMS[config.system].step
    bounds = BOUNDS.get(config.system)

    def free(learner: Learner) -> Scores:
        found = of_run(learner.model(), other, config.steps, step)
        return found | ({"faithful": ("higher", one_of(kept_to(found, bounds, config.steps)))} if bounds else {})

    def rounded(learner: Learner) -> Scores:
        return by_bits(learner.model(), config.bits, other, config.steps, step)

    return Trial(
        phase=phase_of(learner, train, seed, partial(distance, truth=train, steps=config.steps)),
        subject=learner,
        suite=Suite(
            name="attractor",
            metrics=(Battery(name="free run", function=free), Battery(name="bits", function=rounded)),
        ),
        outcome=partial(way, within=bounds.d_stsp if bounds else 0.0),
        tensors=lambda: {name: getattr(learner, name).detach() for name in "AWhL"},
    )


def kept_to(found: Scores, bounds: Bounds, steps: int) -> bool:
    """Whether a free run keeps to all of the bounds."""
    values = {f"this/{name}": score.value for name, (_, score) in found.items()}
    return all(one.holds(values) for one in bounds.claims("this", steps, source=""))


def way(fitted: FitReport, series: Mapping[str, Series], within: float) -> dict[str, Score]:
    """What the checkpoints were: which one was kept, how far off the last one was, and the share of them that is `within`."""
    updates, judged = series["d_stsp"]
    return {
        "kept_update": one_of(updates[int(np.argmin(judged))]),
        "d_stsp_last": one_of(judged[-1]),
        "within": Score(value=float(np.mean(np.array(judged) <= within)), stderr=None, n=len(judged)),
        "ms_per_update": one_of(1000 * fitted.seconds / fitted.steps),
    }


def figures(found: Found, name: str) -> list[Figure]:
    """Checkpoints on the way, and what rounding does."""
    letters = {"w": "W", "wah": "W, A and h"}
    rows = {
        "d_stsp": ("divergence of states", "nats"),
        "exponent": ("largest Lyapunov exponent", "per unit of time"),
        "regions": ("regions with 1 % of the steps", ""),
    }
    drawn = [_checkpoints(found, name)]
    for key, (label, unit) in rows.items():
        drawn.append(
            Figure(
                kind="line",
                key=f"{name}_{key}_bits",
                title=f"{name}: {label} with weights in few bits",
                series=tuple(
                    Line(
                        name=f"{arm}, {letters[part]}",
                        x=tuple(map(float, found.config.bits)),
                        y=tuple(_mean(found, f"{arm}/{key}@{part}{bits}") for bits in found.config.bits),
                    )
                    for arm in found.config.arms
                    for part in PARTS
                ),
                x=Axis(label="weights", unit="bits"),
                y=Axis(label=f"{label}, mean over seeds", unit=unit),
                caption="To nearest, without training after. Where a run diverges there is no exponent.",
            )
        )
    return drawn


def _checkpoints(found: Found, name: str) -> Figure:
    lines = [
        Line(name=f"{arm}, seed {seed}", x=tuple(series[f"{arm}/d_stsp"][0]), y=tuple(series[f"{arm}/d_stsp"][1]))
        for series, seed in zip(found.series, found.seeds, strict=True)
        for arm in found.config.arms
    ]
    return Figure(
        kind="line",
        key=f"{name}_checkpoints",
        title=f"{name}: divergence of states of each checkpoint's free run",
        series=tuple(lines),
        x=Axis(label="updates"),
        y=Axis(label="divergence of states", unit="nats", better="lower"),
        caption="Runs flip between an attractor and a fixed point from one checkpoint to the next while rates are high: "
        "without choosing among checkpoints results look random.",
    )


def _by_relus(found: Found) -> Figure:
    names = [name for name in found.scores[0] if "/d_stsp@bins" in name or "/d_stsp@gmm" in name]
    by_arm = {name.split("/")[0]: found.values(name) for name in names}
    scored = [mean_score(values) for values in by_arm.values()]
    return Figure(
        kind="line",
        key="relus",
        title="divergence of states against the number of ReLUs",
        series=(
            Line(
                name="mean over seeds",
                x=tuple(float(relus_of(arm)) for arm in by_arm),
                y=tuple(score.value for score in scored),
                low=tuple(min(values) for values in by_arm.values()),
                high=tuple(max(values) for values in by_arm.values()),
            ),
        ),
        x=Axis(label="ReLUs of all units"),
        y=Axis(label="divergence of states", unit="nats", better="lower"),
        caption="The band is from the least to the largest of the seeds.",
    )


def _mean(found: Found, name: str) -> float | None:
    values = found.values(name)
    return mean_score(values).value if values else None


SHOWN = (
    "d_hellinger@s20,T1e4", "regions", "apart", "settled", "exponent", "faithful", "kept_update", "d_stsp_last", "within",
    "ms_per_update", *(f"d_stsp@w{bits}" for bits in BITS),
)  # fmt: skip
SMOKE: dict[str, Any] = {"T": 20, "batch": 4, "updates": 20, "check_every": 10, "steps": 2000, "bits": (8, 4)}


def experiment(name: str, about: str, bench: Attractors, **how: Any) -> Experiment:
    """An experiment on a system, with the settings of a smoke test beside its presets."""
    states = "bins30,T1e5" if bench.system in BOUNDS else "gmm1,T1e4"
    smoke = dataclasses.replace(bench, **SMOKE, **how.pop("smoke", {}))
    return Experiment(
        name=name,
        about=about,
        source="arXiv 2410.14240",
        presets={"smoke": smoke, "bench": bench, **how.pop("presets", {})},
        stages=lambda config: arms(config.arms),
        build=build,
        figures=how.pop("figures", lambda found: figures(found, name)),
        shown=(f"d_stsp@{states}", *SHOWN),
        **how,
    )


LORENZ = Attractors(arms=("P2", "P1"), rate=5e-3, last_rate=1e-4)
ROESSLER = Attractors(system="roessler", arms=("P1",), T=300, tau=8, rate=5e-3)
LORENZ96 = Attractors(system="lorenz96", arms=("P50",), M=100, T=50, tau=20)
EXPERIMENTS = (
    experiment(
        "lorenz",
        "Lorenz-63 of two ReLUs, and of one too few",
        LORENZ,
        presets={"paper": dataclasses.replace(LORENZ, updates=100_000, rate=1e-3, last_rate=1e-5, check_every=1250)},
    ),
    experiment(
        "roessler",
        "Rössler's attractor of one ReLU",
        ROESSLER,
        presets={"paper": dataclasses.replace(ROESSLER, updates=150_000, rate=5e-3, last_rate=1e-5, check_every=1250)},
    ),
    experiment(
        "lorenz96",
        "Lorenz-96 in twenty dimensions",
        LORENZ96,
        smoke={"arms": ("P4",), "M": 28},
        presets={"paper": dataclasses.replace(LORENZ96, updates=150_000, rate=1e-3, last_rate=1e-5, check_every=1250)},
    ),
    experiment(
        "relus",
        "Lorenz-63 against the number of ReLUs",
        dataclasses.replace(LORENZ, arms=("P0", "P1", "P2", "P3", "P5", "P10")),
        smoke={"arms": ("P0", "P1")},
        figures=lambda found: [_by_relus(found)],
    ),
)
