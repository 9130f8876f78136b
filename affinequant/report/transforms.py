"""What a page says of the transforms: how far from rotations they are, what they look like, what they do to values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from affinequant.report.blocks import AFTER, BEFORE, heat, short_name
from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.page import Section, Table, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, between, joined, number, numeric

_MATRICES = 6
"""Pictures of one transform over its epochs, at most."""


def transform_section(blocks: Sequence[Object]) -> tuple[Section, ...]:
    """How far from orthogonal each transform is, what was chosen, and the transforms as pictures."""
    condition = Axis(label="condition number", log=True, better="lower")
    return section(
        "The transforms",
        heat(
            blocks,
            _conditions,
            condition,
            "Condition number of each transform",
            "conditions",
            "1 is a rotation; from a few hundred on a transform can magnify the error that it meets.",
        ),
        _choices(blocks),
        *_pictures(blocks),
    )


def value_section(blocks: Sequence[Object]) -> tuple[Section, ...]:
    """Histograms of inputs and weights before and after the transform."""
    return section(
        "What is rounded, before and after",
        _crest(blocks),
        *_said_once(_histograms(blocks, "inputs", "Activations", "what a site's linears read")),
        *_said_once(_histograms(blocks, "weights", "Weights", "a linear's weights")),
        about="Four bits have sixteen values between the two ends: the narrower and the more even a histogram, the finer "
        "they lie. Heights are logarithmic, so that outliers show.",
    )


def _conditions(block: Object) -> dict[str, float]:
    return {name: value for name, value in (block.get("conditions") or {}).items() if numeric(value) and value > 0}


def _choices(blocks: Sequence[Object]) -> Table | None:
    """What blocks chose where they could choose."""
    from affinequant.progress import tally

    rows: list[tuple[Words, ...]] = []
    for what, counts in tally(list(blocks)).items():
        rows.append((what, joined(((f"{name} x ", number(count)) for name, count in counts.items()), ", ")))
    caption = "Each block chose what lost least on held-out text within the cost that was allowed."
    return Table(title="What blocks chose", columns=("", ""), rows=tuple(rows), caption=caption) if rows else None


def _pictures(blocks: Sequence[Object]) -> list[Figure]:
    """A figure for each site: of diagonals a line for each pictured block, of matrices a picture, or several of one whose
    band widens over its epochs."""
    lines, matrices = dict[str, list[Series]](), dict[str, list[Series]]()
    for index, block in enumerate(blocks):
        for name, picture in (block.get("pictures") or {}).items():
            site = re.sub(r" (left|right)$", "", name)  # both factors of a Kronecker product stand together
            for label, cells in _frames(picture):
                words = ", ".join(part for part in (f"block {index}", name[len(site) :].strip(), label) if part)
                if len(cells) == 1:
                    lines.setdefault(site, []).append(Series(name=words, x=tuple(range(len(cells[0]))), y=cells[0]))
                else:
                    matrices.setdefault(site, []).append(Series(name=words, cells=cells))
    return [
        *_said_once(_scaling(site, tuple(series)) for site, series in lines.items()),
        *_said_once(_matrix(site, tuple(series)) for site, series in matrices.items()),
    ]


def _said_once(figures: Iterable[Figure]) -> list[Figure]:
    """The figures, each caption below the first alone that has it."""
    said, found = set[str](), list[Figure]()
    for figure in figures:
        found.append(replace(figure, caption="") if figure.caption in said else figure)
        said.add(figure.caption)
    return found


def _scaling(site: str, series: tuple[Series, ...]) -> Figure:
    """Of a diagonal, or of a shift in front of one."""
    if site.endswith(" shift"):
        return Figure(
            kind="line",
            title=f"The shift at {site.removesuffix(' shift')}",
            series=series,
            x=Axis(label="channel, of each few the largest"),
            y=Axis(label="log10 of its magnitude"),
            caption="Each channel is moved by so much, one way or the other; biases take it up.",
            key=_key("shift", site.removesuffix(" shift")),
        )
    return Figure(
        kind="line",
        title=f"The scaling at {site}",
        series=series,
        x=Axis(label="channel, of each few the largest"),
        y=Axis(label="log10 of the factor"),
        caption="A diagonal: each channel is multiplied by its factor. 0 leaves it as it is, 1 makes it ten times as large.",
        key=_key("scaling", site),
    )


def _matrix(site: str, series: tuple[Series, ...]) -> Figure:
    caption = "Channels go in at the left and come out at the bottom; of large matrices the largest of each few. "
    if any("band" in one.name for one in series):
        caption += "The band about the diagonal widens as the epochs go."
    elif any(one.name.endswith("left") for one in series):
        caption += "Two small factors whose Kronecker product is the transform: what has colour off the diagonal mixes channels."
    else:
        caption += "The diagonal alone would be a scaling; what has colour off it mixes channels."
    return Figure(
        kind="matrix",
        title=f"The transform at {site}",
        series=series,
        value=Axis(label="log10 of |entry|"),
        caption=caption,
        key=_key("picture", site),
    )


def _key(what: str, site: str) -> str:
    return f"{what}-" + re.sub(r"\W+", "-", site)


def _frames(picture: Any) -> list[tuple[str, tuple[tuple[float | None, ...], ...]]]:
    """(what it is, cells): of a banded transform some of its epochs, evenly chosen, else the one matrix."""
    if not isinstance(picture, Mapping):
        return []
    epochs = picture.get("epochs")
    if not (isinstance(epochs, list) and epochs):
        return [("", _cells(picture["cells"]))] if picture.get("cells") else []
    last = len(epochs) - 1
    chosen = [epochs[n] for n in sorted({round(step * last / (_MATRICES - 1)) for step in range(_MATRICES)})]
    return [
        (f"epoch {one.get('epoch', '?')}, band {one.get('band', '?')}", _cells(one["cells"]))
        for one in chosen
        if one.get("cells")
    ]


def _cells(rows: Any) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(value if numeric(value) else None for value in row) for row in rows)


def _crest(blocks: Sequence[Object]) -> Table | None:
    """How far the largest value of a token stands out at each site, before and after."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for index, block in enumerate(blocks):
        for site, one in (block.get("inputs") or {}).items():
            first, last = ((one.get(when) or {}).get("crest") for when in (BEFORE, AFTER))
            if numeric(first) and numeric(last):
                found.setdefault(site, {})[index] = (first, last)
    places = sorted({index for row in found.values() for index in row})
    rows = tuple(
        (site, *(between(*row[index]) if index in row else "" for index in places)) for site, row in found.items()
    )
    caption = (
        "Largest magnitude of a token over its root mean square, before to after: what one grid has to span. Of a "
    )
    caption += "normal distribution over hundreds of channels it is about three."
    columns = ("How far activations stand out", *(f"block {index}" for index in places))
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))), caption=caption) if rows else None


def _histograms(blocks: Sequence[Object], part: str, what: str, of: str) -> list[Figure]:
    """A figure for each pictured block, a panel for each member, before and after in each."""
    figures = []
    for index, block in enumerate(blocks):
        series = [
            Series(name=when, panel=short_name(member), x=_edges(one[when]), y=tuple(one[when]["counts"]))
            for member, one in (block.get(part) or {}).items()
            for when in (BEFORE, AFTER)
            if isinstance(one, Mapping) and isinstance(one.get(when), Mapping) and one[when].get("counts")
        ]
        if series:
            figures.append(
                Figure(
                    kind="histogram",
                    title=f"{what} of block {index}",
                    series=tuple(series),
                    y=Axis(label="how often", log=True),
                    caption=f"Each panel is {of}.",
                    key=f"histogram-{part}-{index}",
                )
            )
    return figures


def _edges(one: Object) -> tuple[float, ...]:
    """Of the bins between `low` and `high`, all of one width."""
    low, high, count = one["low"], one["high"], len(one["counts"])
    return tuple(low + (high - low) * place / count for place in range(count + 1))
