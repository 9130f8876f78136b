"""Lines of several arms over a clock, as figures of the report."""

from affinequant.report.figure import Axis, Figure
from affinequant_research.experiment import Found
from affinequant_research.series import over_seeds, side_by_side

LABELS = {
    "test_acc": "test accuracy",
    "noise_acc": "test accuracy under noise",
    "pgd_acc": "test accuracy under attack",
    "jac_fro": "mean norm of the Jacobian",
    "centroid_cos": "cosine of centroid and input",
    "row_alignment": "alignment of rows and input",
}
_LOG = ("jac_fro",)


def over(found: Found, experiment: str, name: str, caption: str, *, seconds: bool = False) -> Figure:
    """A probe over updates or, at the mean rate of an arm's trainings, over seconds: for each arm a line, the mean over
    seeds, and a band from the least to the largest of them. A seed whose training has ended stays at its last value."""
    lines = []
    for arm in found.config.arms:
        updates, rows = side_by_side([series[f"{arm}/{name}"] for series in found.series])
        rates = found.values(f"{arm}/ms_per_update")
        rate = sum(rates) / len(rates) / 1000 if seconds else 1.0
        kept = [index for index, at in enumerate(updates) if at > 0]  # the clock is logarithmic
        at_once = [[row[index] for row in rows] for index in kept]
        lines.append(over_seeds(arm, [rate * updates[index] for index in kept], at_once))
    clock = "seconds" if seconds else "updates"
    spread = " The band is from the lowest to the highest seed." if len(found.seeds) > 1 else ""
    return Figure(
        kind="line",
        key=f"{experiment}_{name}_{clock}",
        title=f"{experiment}: {LABELS[name]} over {clock}",
        series=tuple(lines),
        x=Axis(label="time" if seconds else "updates", unit="s" if seconds else "", log=True),
        y=Axis(label=LABELS[name], log=name in _LOG),
        caption=caption + spread,
    )
