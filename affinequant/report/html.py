"""A page as one HTML file: no script, no network, light and dark. All that it says is escaped by the template."""

import json
from pathlib import Path
from typing import Any

from affinequant.report.axes import colour_of, is_ramp, scale_of
from affinequant.report.drawing import Drawing, draw
from affinequant.report.figure import Figure, Series
from affinequant.report.page import Code, Page, Table, Text
from affinequant.report.words import Value, Words, number, pieces
from affinequant.run.pages import PAGE_MARK

TEMPLATE = "page.html.jinja"
MOST_CELLS = 1200
"""Cells of the table of a figure's numbers; figures of more (matrices, histograms) carry them as data alone."""


def to_html(page: Page) -> str:
    """The page, figures drawn."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    given = {"pieces": _pieces, "figure": _figure, "kind": _kind, "mark": PAGE_MARK}
    return environment.get_template(TEMPLATE).render(page=page, **given).lstrip()


def numbers_of(figure: Figure) -> Table | None:
    """A figure's numbers as a table, for who cannot see it or wants to know; None where they are too many to read."""
    if figure.kind in ("matrix", "histogram"):
        return None
    if figure.kind == "heat":
        columns = (figure.y.label, *figure.x.names)
        rows = tuple(
            (name, *map(_shown, row)) for name, row in zip(figure.y.names, figure.series[0].cells, strict=True)
        )
    elif figure.kind == "line":
        columns = ("series", figure.x.text or "x", figure.y.text or "y", *_ends(figure))
        rows = tuple(
            (one.name, _shown(x), *row)
            for one in figure.series
            for x, row in zip(one.x or range(1, len(one.y) + 1), _values(one, figure), strict=True)
        )
    else:
        columns = (
            "",
            *(part for one in figure.series for part in (one.name or figure.x.text or "value", *_ends(figure))),
        )
        each = [_values(one, figure) for one in figure.series]
        rows = tuple(
            (name, *(cell for values in each for cell in values[place])) for place, name in enumerate(figure.y.names)
        )
    if sum(map(len, rows)) > MOST_CELLS:
        return None
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))))


def _ends(figure: Figure) -> tuple[str, ...]:
    return ("from", "to") if any(one.low for one in figure.series) else ()


def _values(one: Series, figure: Figure) -> list[tuple[Words, ...]]:
    empty = (None,) * len(one.y)
    columns = (one.y, one.low or empty, one.high or empty) if _ends(figure) else (one.y,)
    return [tuple(map(_shown, row)) for row in zip(*columns, strict=True)]


def _shown(value: float | None) -> Words:
    return "" if value is None else number(value)


def _pieces(words: Words) -> list[dict[str, Any]]:
    """Text and numbers for the template, which has no types."""
    return [
        {"text": part.text, "value": repr(part.number)} if isinstance(part, Value) else {"text": part}
        for part in pieces(words)
    ]


def _kind(part: Any) -> str:
    return {Text: "text", Table: "table", Code: "code", Figure: "figure"}[type(part)]


def _figure(figure: Figure) -> dict[str, Any]:
    """What the template needs of a figure: panels, legend, scale of colours, numbers, and its data for programs."""
    import markupsafe

    drawings: tuple[Drawing, ...] = draw(figure)
    names = list(dict.fromkeys(one.name for one in figure.series if one.name))
    ends = scale_of(figure)
    wide = len(drawings) > 1
    return {
        "panels": [{"name": one.name, "svg": markupsafe.Markup(one.svg), "alt": one.alt} for one in drawings],
        "wide": wide,
        "small": wide or figure.kind == "matrix",
        "ramp": (names[0], names[-1]) if is_ramp(figure) else None,
        "legend": [(name, colour_of(figure, name)) for name in names]
        if len(names) > 1 and figure.kind != "matrix" and not is_ramp(figure)
        else [],
        "scale": [number(end, 3) for end in ends] if ends else None,
        "bad": bool(figure.value.better),
        "reverse": figure.value.better == "higher",
        "better": next((axis.better for axis in (figure.value, figure.y, figure.x) if axis.better), ""),
        "data": json.dumps(figure.to_json(), separators=(",", ":"), ensure_ascii=False),
        "numbers": numbers_of(figure),
    }
