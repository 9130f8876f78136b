"""What a page says of drift: how far texts are from the calibration text, and at which sites."""

from collections.abc import Mapping

from affinequant.report.blocks import heat
from affinequant.report.figure import Axis, Figure
from affinequant.report.page import Section, Table, Text, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, number, numeric

_TIMES = Axis(label="distance, of that between halves", log=True, better="lower")


def is_drift(name: str) -> bool:
    """Whether a metric of that name is a drift."""
    return name.startswith(("drift@", "drift_gaussian@"))


def drift_section(metrics: Mapping[str, Object]) -> tuple[Section, ...]:
    """The ratios of all texts, and of each text in words and where it is far, by block and site."""
    of_drift = {name: one for name, one in metrics.items() if is_drift(name)}
    known = {name: one for name, one in of_drift.items() if numeric(one.get("value"))}
    told = [Text(words=str(one["about"]["said"]) + ".") for name, one in known.items() if _is_score(name)]
    maps = [_map(name, one) for name, one in known.items() if _is_score(name)]
    failed = [Text(words=f"{n} failed: {one['error']}", warns=True) for n, one in of_drift.items() if one.get("error")]
    return section(
        "Drift from the calibration text",
        _table(known),
        *told,
        *maps,
        *failed,
        about="2-Wasserstein distance of what the linears of the full-precision model read, divided by that of two halves of "
        "the calibration text: 1 is more of the same text, and the higher, the less the calibration text stands for it.",
    )


def _is_score(name: str) -> bool:
    return name.startswith("drift@")


def _table(known: Mapping[str, Object]) -> Table | None:
    rows: list[tuple[Words, ...]] = []
    for name, one in known.items():
        ends = one["about"].get("halves") or ()
        halves: Words = (number(ends[0]), " to ", number(ends[1])) if len(ends) == 2 else ""
        rows.append((name, number(one["value"]), halves))
    columns = ("metric", "x the halves' distance", "halves themselves")
    return Table(columns=columns, rows=tuple(rows), right=(1, 2)) if rows else None


def _map(name: str, one: Object) -> Figure | None:
    """Blocks x sites."""
    blocks: dict[int, dict[str, float]] = {}
    for site in one["about"].get("sites") or ():
        if numeric(site.get("ratio")) and site["ratio"] > 0:
            blocks.setdefault(site["block"], {})[site["site"]] = site["ratio"]
    rows = [blocks.get(block, {}) for block in range(max(blocks, default=-1) + 1)]
    text = str(one["about"].get("text", name))
    key = "drift-" + "".join(letter if letter.isalnum() else "-" for letter in text)
    caption = f"How many times as far {text} is as two halves of the calibration text are from each other."
    return heat(rows, lambda row: row, _TIMES, f"Where {text} is far from the calibration text", key, caption)
