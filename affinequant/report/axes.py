"""What stands on the axes, for each kind of figure, by matplotlib; and the colours that all of them share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from affinequant.report.figure import Axis, Figure, Series

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

RAMP_FROM = 6
"""Series from which on a line's or a cloud's place in the order shows in its strength, in place of a colour each."""
MARKED = 31
"""Points up to which each of a line is marked."""
FEW_DOTS = 60
"""Points up to which those of one colour are drawn large."""
PRINTED = 10
"""Columns up to which there is room for a number in each cell."""
NAMED = 16
"""Columns up to which there is room for the name of each."""
_INK, MUTED, _RULE = "#010101", "#010102", "#010103"
_COLOURS = tuple(f"#0202{index:02d}" for index in range(1, 6))
VARIABLES = {_INK: "ink", MUTED: "muted", _RULE: "rule"} | {
    colour: f"c{index}" for index, colour in enumerate(_COLOURS, start=1)
}
"""Stand-in -> the variable of the page's style."""
GOOD, BAD = (64, 136, 216), (213, 94, 0)
"""Red, green and blue of pictures: of what is neither, and of what is bad."""
STRONGEST = 0.8
"""Of a picture's colour, so that a number in its cell can be read in either theme."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": _INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": _RULE,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": False,
    "text.parse_math": False,
    "image.composite_image": False,
}


def colour_of(figure: Figure, name: str) -> str:
    """The CSS colour of the series of that name."""
    return f"var(--{VARIABLES[drawn_colour(figure, name)]})"


def drawn_colour(figure: Figure, name: str) -> str:
    """The stand-in colour of the series, or of the node of a graph, of that name; what has none stands back behind the others."""
    names = list(dict.fromkeys(name for one in figure.series for name in one.names or (one.name,) if name))
    if is_ramp(figure) or not names:
        return _COLOURS[0]
    return _COLOURS[names.index(name) % len(_COLOURS) if name else -1]


def is_ramp(figure: Figure) -> bool:
    """Whether series are told apart by strength, the last being the strongest."""
    return figure.kind in ("line", "scatter") and len({one.name for one in figure.series} - {""}) >= RAMP_FROM


def scale_of(figure: Figure) -> tuple[float, float] | None:
    """The values that the palest and the strongest colour of a picture stand for; None for other kinds."""
    every = [v for one in figure.series for row in one.cells for v in row if v is not None]
    numbers = [v for v in every if v or not figure.value.log]
    return (min(numbers), max(numbers)) if numbers else None


def shortened(name: str, most: int = 30) -> str:
    """A name with room on an axis."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _gaps(numbers: Sequence[float | None]) -> list[float]:
    return [float("nan") if number is None else number for number in numbers]


def _line(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    for number, one in enumerate(series):
        x = _gaps(one.x) or [float(place) for place in range(1, len(one.y) + 1)]
        alpha = 0.25 + 0.75 * number / (len(series) - 1) if is_ramp(figure) and len(series) > 1 else 1.0
        marker = "o" if len(one.y) <= MARKED and len(series) < RAMP_FROM else None
        colour = drawn_colour(figure, one.name)
        axes.plot(x, _gaps(one.y), color=colour, alpha=alpha, marker=marker, markersize=3.5)
        if one.low:
            axes.fill_between(x, _gaps(one.low), _gaps(one.high), color=colour, alpha=0.15, linewidth=0)
    axes.grid(axis="y")
    whole = all(float(v).is_integer() for one in series for v in one.x if v is not None)
    _scales(axes, figure, small, whole=whole)


def _scatter(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    names = list(dict.fromkeys(one.name for one in figure.series))
    for one in series:
        colour, place = drawn_colour(figure, one.name), names.index(one.name)
        alpha = 0.25 + 0.75 * place / (len(names) - 1) if is_ramp(figure) else 1.0
        if one.joined:
            axes.plot(_gaps(one.x), _gaps(one.y), color=colour, alpha=alpha, linewidth=0.8)
            continue
        # Marks of one path each a point take ten times the room of one path that has a dot for each.
        dots = [(x, y) for x, y in zip(one.x, one.y, strict=True) if x is not None and y is not None]
        wide = 4.0 if len(dots) <= FEW_DOTS else 1.6
        both = [value for x, y in dots for value in (x, x, None)], [value for x, y in dots for value in (y, y, None)]
        [line] = axes.plot(*map(_gaps, both), color=colour, alpha=alpha, linewidth=wide, solid_capstyle="round")
        line.get_path().should_simplify = False
    axes.grid()
    axes.margins(0.04)
    _scales(axes, figure, small)


def _histogram(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    from matplotlib.ticker import NullLocator

    least = 0.5 if figure.y.log else 0.0
    for one in series:
        counts, colour = [max(count or 0.0, least) for count in one.y], drawn_colour(figure, one.name)
        axes.stairs(counts, _gaps(one.x), color=colour, linewidth=1.2, baseline=least)
        axes.stairs(counts, _gaps(one.x), color=colour, fill=True, alpha=0.18, baseline=least)
    if figure.y.log:
        axes.set_yscale("log")
    axes.set_ylim(bottom=least)
    axes.set_yticks([])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    _scales(axes, figure, small, y=False)


def _bars(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    thick = 0.8 / len(series)
    for number, one in enumerate(series):
        places = [place + (number - (len(series) - 1) / 2) * thick for place in range(len(one.y))]
        axes.barh(places, _gaps(one.y), height=thick * 0.85, color=drawn_colour(figure, one.name))
    axes.grid(axis="x")
    _named_rows(axes, figure, small)


def _interval(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    apart = 0.36 / max(len(series) - 1, 1)
    for number, one in enumerate(series):
        colour = drawn_colour(figure, one.name)
        places = [place + (number - (len(series) - 1) / 2) * apart for place in range(len(one.y))]
        if one.low:
            axes.hlines(places, _gaps(one.low), _gaps(one.high), color=colour, linewidth=2.2, alpha=0.55)
        axes.plot(_gaps(one.y), places, "o", color=colour, markersize=5)
    ends = [v for one in series for v in (*one.low, *one.high, *one.y) if v is not None]
    if not figure.x.log and min(ends, default=1) <= 0:
        axes.axvline(0, color=MUTED, linewidth=1)  # differences: from here they are more than nothing
    axes.grid(axis="x")
    _named_rows(axes, figure, small)


def _named_rows(axes: "Axes", figure: Figure, small: bool) -> None:
    names = figure.y.names
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _scales(axes, figure, small, y=False)


def _heat(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    one, *marked = series
    shades = _shades(one.cells, figure.value, scale_of(figure))
    for other in marked:  # what is marked is bad, and the worse the less there is
        bad = _shades(other.cells, replace(figure.value, better="higher"), scale_of(figure))
        there = [[value is not None for value in row] for row in other.cells]
        shades[there] = bad[there]
    axes.imshow(shades, aspect="auto", interpolation="none")
    if len(figure.x.names) <= PRINTED:
        for row, values in enumerate(one.cells):
            for column, value in enumerate(values):
                if value is not None:
                    plain = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
                    shown = plain if abs(value) < 10_000 else f"{value:.0e}"
                    axes.text(column, row, shown, ha="center", va="center_baseline", fontsize=10)
    step = -(-len(figure.x.names) // NAMED)
    places = range(0, len(figure.x.names), step)
    axes.set_xticks(places, [figure.x.names[place].replace(" ", "\n") for place in places])
    axes.set_yticks(range(len(figure.y.names)), list(figure.y.names))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(figure.y.text)


def _matrix(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    axes.imshow(_shades(series[0].cells, figure.value, scale_of(figure)), interpolation="none")
    axes.set_axis_off()


def _shades(cells: Sequence[Sequence[float | None]], axis: Axis, ends: tuple[float, float] | None) -> "np.ndarray":
    """Red, green, blue and strength of every cell, between the ends of the whole figure; nothing where nothing is."""
    import numpy as np

    values = np.array([_gaps(row) for row in cells], dtype=float)
    low, high = ends or ((1.0, 1.0) if axis.log else (0.0, 1.0))
    if axis.log:
        least = low if axis.better == "higher" else np.nan  # where nothing is is nothing to see, unless that is bad
        values = np.log(np.where(values == 0, least, values))
        low, high = float(np.log(low)), float(np.log(high))
    strength = (values - low) / ((high - low) or 1.0)
    if axis.better == "higher":
        strength = 1 - strength
    picture = np.zeros((*values.shape, 4))
    picture[..., :3] = np.array(BAD if axis.better else GOOD) / 255
    picture[..., 3] = np.nan_to_num(STRONGEST * (0.06 + 0.94 * strength), nan=0.0)
    return picture


def _scales(axes: "Axes", figure: Figure, small: bool, *, whole: bool = False, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(figure.x.text)
    if figure.x.log:
        _logarithmic(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if small else 6, integer=whole))
    if y:
        axes.set_ylabel(figure.y.text)
        if figure.y.log:
            _logarithmic(axes, "y")
    axes.tick_params(length=3)


def _logarithmic(axes: "Axes", which: str) -> None:
    """A scale whose ticks are plain numbers, and more than powers of ten where there are few of those."""
    from math import log10

    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
    axis: Any = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if low > 0 and log10(high / low) < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


DRAWN = {
    "line": _line,
    "bars": _bars,
    "interval": _interval,
    "heat": _heat,
    "matrix": _matrix,
    "histogram": _histogram,
    "scatter": _scatter,
}
"""Kind of figure -> what draws one of its panels; of graphs see `affinequant.report.graph`."""
