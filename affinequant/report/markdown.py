"""A page as Markdown, short enough for a pull request: the verdict, the tables, of figures what they range over."""

import re
from dataclasses import replace

from affinequant.report.figure import Figure
from affinequant.report.page import Code, Page, Part, Table, Text
from affinequant.report.tabled import numbers_of
from affinequant.report.words import Words, number, plain
from affinequant.run.pages import PAGE_MARK

MARK = f"<!-- {PAGE_MARK} -->"
"""The first line, by which a file is known as one of these."""
MOST_EDGES = 24
"""Of graphs that are told edge by edge."""


def to_markdown(page: Page) -> str:
    """The page without its pictures; what a name or a text brings along of Markdown or HTML stays text."""
    lines = [MARK, f"# {escaped(page.title)}", ""]
    lines += [escaped(page.subtitle), ""] if page.subtitle else []
    verdict = escaped(plain(page.verdict))
    lines += [f"**{verdict}**", ""] if verdict else []
    if page.tiles:
        tiles = tuple((tile.label, tile.words, tile.about) for tile in page.tiles)
        lines += [*_table(Table(columns=("", "", ""), rows=tiles, right=(1,))), ""]
    for one in page.sections:
        parts = [_part(part) for part in one.parts]
        if any(parts):
            lines += [f"## {escaped(one.title)}", ""]
            lines += [line for part in parts if part for line in (*part, "")]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for its own."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    text = re.sub(r"(?<![\w/])([@#])(?=\w)", r"\1&#8203;", text)  # names nobody, refers to no issue
    return re.sub(r"(?i)\b(https?|www)(:|\.)", r"\1&#8203;\2", text)


def _part(part: Part) -> list[str]:
    if isinstance(part, Text):
        return [f"{'> ' if part.warns else ''}{escaped(plain(part.words))}"]
    if isinstance(part, Table):
        return _table(part) if part.brief else []
    if isinstance(part, Code):
        return _code(part) if part.brief else []
    return _edges(part) if part.kind == "graph" else _ranges(part)


def _table(table: Table) -> list[str]:
    head = [f"**{escaped(table.title)}**", ""] if table.title else []
    rule = ["---:" if place in table.right else "---" for place in range(len(table.columns))]
    return [*head, _row(table.columns), _row(rule, plain_row=True), *(_row(row) for row in table.rows)]


def _row(cells: tuple[Words, ...] | list[str], *, plain_row: bool = False) -> str:
    shown = cells if plain_row else [escaped(plain(cell)) for cell in cells]
    return f"| {' | '.join(map(str, shown))} |"


def _code(code: Code) -> list[str]:
    """Fenced by more backticks than stand in it in a row."""
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, code.text.rstrip("\n"), fence]


def _edges(figure: Figure) -> list[str]:
    """A graph has no ends to tell: its edges, where they are few."""
    table = numbers_of(figure)
    return _table(replace(table, title=figure.title)) if table and len(table.rows) <= MOST_EDGES else []


def _ranges(figure: Figure) -> list[str]:
    """A figure in a line: from where to where its values go, and the worst where it says which end is good."""
    axis = (
        figure.value
        if figure.kind in ("heat", "matrix")
        else figure.x
        if figure.kind in ("bars", "interval")
        else figure.y
    )
    if figure.kind in (
        "matrix",
        "histogram",
        "interval",
        "scatter",
    ):  # pictures, or values that stand in a table as well
        return []
    unit = f" {axis.unit}" if axis.unit else ""
    said = []
    for one in figure.series:
        values = [value for row in one.cells for value in row if value is not None]
        values = values or [value for value in one.y if value is not None]
        if values:
            ends = f"{_shown(min(values))} to {_shown(max(values))}{unit}"
            said.append(f"{one.name}: {ends}" if one.name and len(figure.series) > 1 else ends)
    if len(said) > 4:
        said = [*said[:2], f"{len(said) - 3} more", said[-1]]
    return [f"{escaped(figure.title)}: {escaped('; '.join(said))}."] if said else []


def _shown(value: float) -> str:
    return number(value).text
