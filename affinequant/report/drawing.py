"""From a figure to SVG, by matplotlib. What takes its colour from the page's theme is drawn in stand-in colours, which
become CSS variables in the SVG's text; pictures have one colour, as much of it as the value is large, over any ground.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from affinequant.report.axes import DRAWN, SETTINGS, VARIABLES, shortened
from affinequant.report.figure import Figure, Series
from affinequant.report.graph import draw_graph, edges_of

WIDTH, MIDDLE, SMALL = 400, 280, 160
"""Of a figure, of one of few panels in which places are to be seen, and of one of several, in the units of the SVG: pixels
where it is shown in its own size."""
FEW = 4
"""Panels of places that are so many at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One panel: its name, its SVG, and the same in words for who cannot see it."""

    name: str
    svg: str
    alt: str


def draw(figure: Figure) -> tuple[Drawing, ...]:
    """Each panel as an SVG of its own, so that a page can set them side by side or one below the other."""
    import matplotlib

    width, drawings = width_of(figure), []
    for name, series in figure.panels.items():
        # Names inside an SVG are the whole page's; those of matplotlib are hashes of this.
        with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": f"{figure.key}/{figure.title}/{name}"}):
            drawings.append(Drawing(name=name, svg=_svg(figure, series, width), alt=alternative(figure, name, series)))
    return tuple(drawings)


def width_of(figure: Figure) -> int:
    """Of each of its panels."""
    if len(figure.panels) == 1 and figure.kind != "matrix":
        return WIDTH
    return MIDDLE if figure.kind in ("scatter", "graph") and len(figure.panels) <= FEW else SMALL


def alternative(figure: Figure, panel: str, series: Sequence[Series]) -> str:
    """A panel in words: what it shows, and from where to where each series goes."""
    about = ": ".join(part for part in (figure.title, panel) if part)
    axes = " over ".join(axis.text for axis in (figure.y, figure.x) if axis.text) or figure.value.text
    said = [f"{about} ({figure.kind} figure{', ' + axes if axes else ''})."]
    for one in series:
        if figure.kind == "graph":
            named = (f"{one.names[i]} to {one.names[j]}" for i, j, _ in edges_of(one)[:3])
            said.append(f"{len(one.names)} nodes, {len(edges_of(one))} edges; the heaviest: {', '.join(named)}.")
            continue
        numbers = [v for row in one.cells for v in row if v is not None] or [v for v in one.y if v is not None]
        if numbers:
            name = f"{one.name}: " if one.name and one.name != panel else ""
            said.append(f"{name}{len(numbers)} values from {min(numbers):.4g} to {max(numbers):.4g}.")
    return " ".join(said)


def _svg(figure: Figure, series: Sequence[Series], width: int) -> str:
    from io import StringIO

    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    small, height = width == SMALL, _height(figure, series, width)
    left, bottom, right, top = _margins(figure, small)
    canvas = Canvas(figsize=(width / 72, height / 72))
    FigureCanvasSVG(canvas)
    # Measuring texts to place them costs as much as drawing: the room that they need is known well enough.
    room = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    draws = draw_graph if figure.kind == "graph" else DRAWN[figure.kind]
    draws(canvas.add_axes(room), figure, series, small)
    out = StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(out.getvalue())


def _themed(svg: str) -> str:
    """The <svg>, with variables for stand-in colours and the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    return re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", lambda tag: _themed_tag(tag[0]), svg)).strip()


def _themed_tag(tag: str) -> str:
    tag = re.sub(r'<(g|image)\b([^>]*?) id="[^"]*"', r"<\1\2", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag))
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag))
    for colour, name in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{name})")
    return " ".join(tag.split()) if "base64" not in tag else tag


def _height(figure: Figure, series: Sequence[Series], width: int) -> float:
    small = width == SMALL
    _, bottom, _, top = _margins(figure, small)
    if figure.kind == "heat":
        return len(figure.y.names) * 16 + bottom + top
    if figure.kind == "matrix":
        cells = series[0].cells
        return min(max(SMALL * len(cells) / len(cells[0]), 40), 2 * SMALL)
    if figure.kind in ("bars", "interval"):
        return len(figure.y.names) * (10 + 13 * len(series)) + bottom + top
    if figure.kind in ("scatter", "graph"):
        return {WIDTH: 300, MIDDLE: 220}.get(width, 140)
    return 95 if small else 235


def _margins(figure: Figure, small: bool) -> tuple[float, float, float, float]:
    """Room at the left, the bottom, the right and the top for what stands around the axes, by the length of its text."""
    if figure.kind in ("matrix", "graph"):
        return 1, 1, 1, 1
    longest = max((len(shortened(name)) for name in figure.y.names), default=6)
    left = 6.0 * longest + 8 if figure.y.names else 36
    bottom = 20 if figure.kind != "heat" else 2
    top = 8
    if figure.kind == "heat":
        top = 32 if any(" " in name for name in figure.x.names) else 19
    if figure.kind == "histogram":
        left = 6
    label = 16 if figure.x.text and figure.kind != "heat" else 0
    beside = 16 if figure.y.text and figure.kind != "histogram" else 0
    return left + beside, bottom + label, 14, top
