"""The numbers of a figure as a table."""

from affinequant.report.figure import Figure, Series
from affinequant.report.graph import edges_of
from affinequant.report.page import Table
from affinequant.report.words import Words, number

MOST_CELLS = 1200
"""Cells of the table of a figure's numbers; figures of more (matrices, histograms) carry them as data alone."""


def numbers_of(figure: Figure) -> Table | None:
    """A figure's numbers as a table, for who cannot see it or wants to know; None where they are too many to read."""
    if figure.kind in ("matrix", "histogram"):
        return None
    if figure.kind == "heat":
        columns = (figure.y.label, *figure.x.names)
        rows = tuple(
            (name, *map(_shown, row)) for name, row in zip(figure.y.names, figure.series[0].cells, strict=True)
        )
    elif figure.kind == "graph":
        columns = ("from", "to", figure.value.text or "weight")
        rows = tuple((one.names[i], one.names[j], number(w)) for one in figure.series for i, j, w in edges_of(one))
        if len(figure.series) > 1:
            named = (one.name or one.panel for one in figure.series for _ in edges_of(one))
            columns, rows = ("graph", *columns), tuple((name, *row) for name, row in zip(named, rows, strict=True))
    elif figure.kind in ("line", "scatter"):
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
    words = len(columns) - 1 if figure.kind == "graph" else 1
    return Table(columns=columns, rows=rows, right=tuple(range(words, len(columns))))


def _ends(figure: Figure) -> tuple[str, ...]:
    return ("from", "to") if any(one.low for one in figure.series) else ()


def _values(one: Series, figure: Figure) -> list[tuple[Words, ...]]:
    empty = (None,) * len(one.y)
    columns = (one.y, one.low or empty, one.high or empty) if _ends(figure) else (one.y,)
    return [tuple(map(_shown, row)) for row in zip(*columns, strict=True)]


def _shown(value: float | None) -> Words:
    return "" if value is None else number(value)
