"""A page as one HTML file: no script, no network, light and dark. All that it says is escaped by the template."""

import json
from pathlib import Path
from typing import Any

from affinequant.report.axes import colour_of, is_ramp, scale_of
from affinequant.report.drawing import MIDDLE, Drawing, draw, width_of
from affinequant.report.figure import Figure
from affinequant.report.page import Code, Page, Table, Text
from affinequant.report.tabled import numbers_of
from affinequant.report.words import Value, Words, number, pieces
from affinequant.run.pages import PAGE_MARK

TEMPLATE = "page.html.jinja"
LARGE = 3
"""Pictures up to which each has a third of the page."""


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
        "large": width_of(figure) == MIDDLE or (figure.kind == "matrix" and wide and len(drawings) <= LARGE),
        "ramp": (names[0], names[-1]) if is_ramp(figure) else None,
        "legend": [(name, colour_of(figure, name)) for name in names]
        if len(names) > 1 and figure.kind not in ("matrix", "graph") and not is_ramp(figure)
        else [],
        "scale": [number(end, 3) for end in ends] if ends and figure.kind != "graph" else None,
        "bad": bool(figure.value.better),
        "reverse": figure.value.better == "higher",
        "better": next((axis.better for axis in (figure.value, figure.y, figure.x) if axis.better), ""),
        "data": json.dumps(figure.to_json(), separators=(",", ":"), ensure_ascii=False),
        "numbers": numbers_of(figure),
    }
