"""Figures of how attractors were learnt: checkpoints over updates, what rounding leaves, how many ReLUs it takes."""

from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.alrnn.drawing import drawn
from affinequant_research.alrnn.quantised import PARTS
from affinequant_research.alrnn.systems import SYSTEMS
from affinequant_research.alrnn.training import relus_of
from affinequant_research.experiment import Found
from affinequant_research.series import over_seeds


def figures(found: Found, name: str) -> list[Figure]:
    """The attractor, its regions and spectra, checkpoints on the way, and what rounding does."""
    system = SYSTEMS[found.config.system]
    letters = {"w": "W", "wah": "W, A and h"}
    rows = {
        "d_stsp": ("divergence of states", "nats"),
        "exponent": ("largest Lyapunov exponent", "per unit of time"),
        "regions": ("regions with 1 % of the steps", ""),
    }
    shown = drawn(found, name, found.config.arms, step=system.step, unit="time", labels=system.names)
    shown.append(_checkpoints(found, name))
    for key, (label, unit) in rows.items():
        shown.append(
            Figure(
                kind="line",
                key=f"{name}_{key}_bits",
                title=f"{name}: {label} with weights in few bits",
                series=tuple(
                    Line(
                        name=f"{arm}, {letters[part]}",
                        x=tuple(map(float, found.config.bits)),
                        y=tuple(found.mean(f"{arm}/{key}@{part}{bits}") for bits in found.config.bits),
                    )
                    for arm in found.config.arms
                    for part in PARTS
                ),
                x=Axis(label="weights", unit="bits"),
                y=Axis(label=f"{label}, mean over seeds", unit=unit),
                caption="To nearest, without training after. Where a run diverges there is no exponent.",
            )
        )
    return shown


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


def by_relus(found: Found) -> Figure:
    """The divergence of states of each arm over its number of ReLUs."""
    names = [name for name in found.scores[0] if "/d_stsp@bins" in name or "/d_stsp@gmm" in name]
    by_arm = {relus_of(name.split("/")[0]): found.values(name) for name in names}
    return Figure(
        kind="line",
        key="relus",
        title="divergence of states against the number of ReLUs",
        series=(over_seeds("mean over seeds", list(map(float, by_arm)), list(by_arm.values())),),
        x=Axis(label="ReLUs of all units"),
        y=Axis(label="divergence of states", unit="nats", better="lower"),
        caption="The band, of several seeds, is from the least to the largest.",
    )
