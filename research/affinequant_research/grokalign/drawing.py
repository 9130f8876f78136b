"""Lines of several arms and seeds over a clock, as figures of the report."""

from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.experiment import Found

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
    """A probe over updates or, at the mean rate of each training, over seconds; a line for each arm and seed."""
    lines = []
    for scores, series, seed in zip(found.scores, found.series, found.seeds, strict=True):
        for arm in found.config.arms:
            updates, values = series[f"{arm}/{name}"]
            rate = scores[f"{arm}/ms_per_update"].value / 1000 if seconds else 1.0
            label = arm if len(found.seeds) == 1 else f"{arm}, seed {seed}"
            lines.append(Line(name=label, x=tuple(rate * at for at in updates), y=tuple(values)))
    clock = "seconds" if seconds else "updates"
    return Figure(
        kind="line",
        key=f"{experiment}_{name}_{clock}",
        title=f"{experiment}: {LABELS[name]} over {clock}",
        series=tuple(lines),
        x=Axis(label="time" if seconds else "updates", unit="s" if seconds else "", log=True),
        y=Axis(label=LABELS[name], log=name in _LOG),
        caption=caption,
    )
