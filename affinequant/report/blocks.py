"""What a page says of each block: its errors, and what learning did."""

import re
from collections.abc import Callable, Mapping, Sequence

from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.page import Section, Table, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, number, numeric

BEFORE, AFTER = "before", "after"
DECIBELS = Axis(label="SQNR", unit="dB", better="higher")
WHOLE, KL = ("finish", "rotation"), "divergence from full precision [nats per token]"
"""What trains the whole network, and what it follows."""


def error_section(blocks: Sequence[Object]) -> tuple[Section, ...]:
    """Where precision is lost: by block, by linear, by what a site's linears read."""
    return section(
        "Where the error is",
        _over_blocks(
            blocks,
            "sqnr",
            DECIBELS,
            "Each block's output against full precision",
            key="sqnr-blocks",
            caption=(
                "Signal over error on calibration text, errors of earlier blocks included; 6 dB are a factor of two. A step "
                "down marks the block to look at."
            ),
        ),
        heat(
            blocks,
            lambda block: _figures(block, "linears", "sqnr"),
            DECIBELS,
            "Each linear's output",
            "sqnr-linears",
            "Of the quantised linear on the inputs that it really sees. What has most colour loses most.",
        ),
        heat(
            blocks,
            lambda block: _figures(block, "inputs", "sqnr"),
            DECIBELS,
            "What the linears read, quantised",
            "sqnr-inputs",
            "Of the activations at each site after their transform. What has most colour loses most.",
        ),
        about="SQNR in decibels: the higher, the less was lost.",
    )


def learning_section(report: Object, blocks: Sequence[Object]) -> tuple[Section, ...]:
    """Losses over epochs, before and after, and of the end-to-end finish."""
    curves = tuple(
        Series(name=f"block {index}", x=tuple(range(1, 1 + len(curve))), y=tuple(curve))
        for index, block in enumerate(blocks)
        if (curve := _curve(block))
    )
    loss = Axis(label="loss", log=_positive(curves), better="lower")
    each = (
        Figure(
            kind="line",
            title="Loss of each block while it learns",
            series=curves,
            x=Axis(label="epoch"),
            y=loss,
            caption="Mean of an epoch. A curve that still falls at its end would gain from more epochs; one that rises was "
            "rolled back to its best.",
            key="curves",
        )
        if curves
        else None
    )
    return section("Learning", each, _before_after(blocks), *_whole(report))


def _over_blocks(
    blocks: Sequence[Object], name: str, axis: Axis, title: str, *, key: str, caption: str
) -> Figure | None:
    y = tuple(block[name] if numeric(block.get(name)) else None for block in blocks)
    if not any(value is not None for value in y):
        return None
    series = (Series(x=tuple(range(len(y))), y=y),)
    return Figure(kind="line", title=title, series=series, x=Axis(label="block"), y=axis, caption=caption, key=key)


def heat(
    blocks: Sequence[Object],
    of: Callable[[Object], Mapping[str, float]],
    axis: Axis,
    title: str,
    key: str,
    caption: str,
) -> Figure | None:
    """Blocks x names; of several members that differ by a number alone (experts), the worst."""
    rows = [of(block) for block in blocks]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return None
    cells = tuple(tuple(row.get(name) for name in names) for row in rows)
    return Figure(
        kind="heat",
        title=title,
        series=(Series(cells=cells),),
        x=Axis(names=tuple(names)),
        y=Axis(label="block", names=tuple(map(str, range(len(rows))))),
        value=axis,
        caption=caption,
        key=key,
    )


def _figures(block: Object, part: str, name: str) -> dict[str, float]:
    """Short name -> a number of each member of a part of a block's report; the lowest where names fall together."""
    found: dict[str, float] = {}
    for member, one in (block.get(part) or {}).items():
        value = one.get(name) if isinstance(one, Mapping) else None
        if numeric(value):
            short = short_name(member)
            found[short] = min(found.get(short, value), value)
    return found


def short_name(linear: str) -> str:
    """`self_attn.q_proj` -> `q`, `mlp.experts.3.up_proj` -> `experts up`."""
    words = [word for word in linear.split(".") if not word.isdigit()]
    parts = [word for word in words if "expert" in word]
    return " ".join([*parts, re.sub(r"_proj$", "", words[-1])]) if words else linear


def _curve(part: Object, name: str = "curve") -> list[float | None]:
    curve = part.get(name)
    return [value if numeric(value) else None for value in curve] if isinstance(curve, list) else []


def _before_after(blocks: Sequence[Object]) -> Figure | None:
    rows = [(block.get("loss_first"), block.get("loss_last")) for block in blocks]
    if not any(numeric(one) for row in rows for one in row):
        return None
    places = tuple(range(len(rows)))
    both = [tuple(row[end] if numeric(row[end]) else None for row in rows) for end in (0, 1)]
    series = (Series(name=BEFORE, x=places, y=both[0]), Series(name=AFTER, x=places, y=both[1]))
    return Figure(
        kind="line",
        title="Loss of each block before and after",
        series=series,
        x=Axis(label="block"),
        y=Axis(label="loss", log=_positive(series), better="lower"),
        key="losses",
        caption="On held-out calibration text where the preset keeps some. The gap is what learning was worth in that block.",
    )


def _whole(report: Object) -> list[Figure | Table]:
    """What trained the whole network: its curves, and first and last in a table."""
    stages = {name: one for name in WHOLE if isinstance(one := report.get(name), Mapping)}
    rows: list[tuple[Words, ...]] = []
    for name, stage in stages.items():
        first, last = stage.get("divergence_first"), stage.get("divergence_last")
        if numeric(first) and numeric(last):
            steps = number(stage.get("steps", 0))
            rows.append((f"{name}, {KL}", number(first), number(last), steps, str(stage.get("stopped", ""))))
    columns = ("over the whole network", BEFORE, AFTER, "steps", "")
    table = [Table(columns=columns, rows=tuple(rows), right=(1, 2, 3), beside=True)] if rows else []
    return [*(figure for name, stage in stages.items() if (figure := _curves(name, stage))), *table]


def _curves(name: str, stage: Object) -> Figure | None:
    """Training loss, finer than epochs where that was kept, and the held-out one at the start and after each epoch."""
    epochs, held = _curve(stage, "curve"), _curve(stage, "divergence")
    steps = _curve(stage, "trace") or epochs
    series = []
    if steps:
        places = tuple(len(epochs or [0]) * (n + 1) / len(steps) for n in range(len(steps)))
        series.append(Series(name="training", x=places, y=tuple(steps)))
    if held:
        series.append(Series(name="held-out", x=tuple(range(len(held))), y=tuple(held)))
    if not series:
        return None
    return Figure(
        kind="line",
        title=f"The {name}, over the whole network",
        series=tuple(series),
        x=Axis(label="epoch"),
        y=Axis(label="divergence", unit="nats per token", log=_positive(series), better="lower"),
        caption="From the next-token distribution of full precision. The epoch with the least held-out divergence stands.",
        key=f"curve-{name}",
    )


def _positive(series: Sequence[Series]) -> bool:
    """Whether a logarithmic scale can hold them."""
    return all(value > 0 for one in series for value in one.y if value is not None)
