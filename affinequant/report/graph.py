"""A graph as a picture: its nodes, the arrows between them, a loop at each that leads to itself."""

from collections.abc import Sequence
from math import cos, hypot, pi, sin, sqrt
from typing import TYPE_CHECKING

from affinequant.report.axes import MUTED, drawn_colour, shortened
from affinequant.report.figure import Figure, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST, SMALLEST = 0.2, 0.1
"""Radii of nodes, where the farthest one is 1 from the middle."""
WIDEST, FINEST = 3.0, 0.6
"""Widths of edges."""
BEND = 0.16
"""Of an arrow from the straight line, so that one there and one back are two."""
RING = 0.11
"""Radius of a loop."""
EDGE = 1.55
"""Of the picture, from its middle, where there are labels."""
LABELLED = 12
"""Nodes up to which there is room for their names and for the weights of edges."""
Place = tuple[float, float]
Edge = tuple[int, int, float]


def draw_graph(axes: "Axes", figure: Figure, series: Sequence[Series], small: bool) -> None:
    """The graph of one series: a node's area is its row's sum, an edge's width its weight."""
    one, few = series[0], len(series[0].names) <= LABELLED
    places, radii, edges = places_of(one), _radii(one), edges_of(one)
    for loops in (True, False):
        kind = [edge for edge in edges if (edge[0] == edge[1]) == loops]
        most = max((weight for *_, weight in kind), default=1.0)
        for i, j, weight in kind:
            width = FINEST + (WIDEST - FINEST) * weight / most
            if loops:
                where = _loop(axes, places[i], radii[i], width)
            else:
                where = _arrow(axes, (places[i], places[j]), (radii[i], radii[j]), width)
            if few and not small:
                axes.text(*where, f"{weight:.2g}", ha="center", va="center", fontsize=8)
    for name, place, radius in zip(one.names, places, radii, strict=True):
        _node(axes, place, radius, drawn_colour(figure, name))
        if few:
            axes.text(*place, shortened(name, 8), ha="center", va="center", fontsize=8 if small else 10)
    edge = EDGE - 0.2 * small
    axes.set_xlim(-edge, edge)
    axes.set_ylim(-edge, edge)
    axes.set_aspect("equal")
    axes.set_axis_off()


def edges_of(one: Series) -> list[Edge]:
    """Source, target, weight, the heaviest first."""
    found = [(i, j, weight) for i, row in enumerate(one.cells) for j, weight in enumerate(row) if weight]
    return sorted(found, key=lambda edge: -edge[2])


def places_of(one: Series) -> list[Place]:
    """Where the nodes are: in the middle of the picture, the farthest at 1; on a circle where nothing is given."""
    count = len(one.names)
    given = [(x, y) for x, y in zip(one.x, one.y, strict=True) if x is not None and y is not None]
    if not given:
        given = [(sin(2 * pi * n / count), cos(2 * pi * n / count)) for n in range(count)]
    middle = tuple((max(axis) + min(axis)) / 2 for axis in zip(*given, strict=True))
    moved = [(x - middle[0], y - middle[1]) for x, y in given]
    far = max(hypot(*place) for place in moved) or 1.0
    return [(x / far, y / far) for x, y in moved]


def _radii(one: Series) -> list[float]:
    sums = [sum(weight or 0.0 for weight in row) for row in one.cells]
    most = max(sums) or 1.0
    return [max(LARGEST * sqrt(total / most), SMALLEST) for total in sums]


def _node(axes: "Axes", place: Place, radius: float, colour: str) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle(place, radius, facecolor=colour, alpha=0.3, linewidth=0))
    axes.add_patch(Circle(place, radius, fill=False, edgecolor=colour, linewidth=1.5))


def _arrow(axes: "Axes", ends: tuple[Place, Place], radii: tuple[float, float], width: float) -> Place:
    """A bent arrow from rim to rim, each way on its own side; where its label goes."""
    from matplotlib.patches import FancyArrowPatch

    x, y = (there - here for here, there in zip(*ends, strict=True))
    length = hypot(x, y) or 1.0
    along, side = (x / length, y / length), (y / length, -x / length)
    rims: list[Place] = [
        (end[0] + radius * (way * along[0] + BEND * side[0]), end[1] + radius * (way * along[1] + BEND * side[1]))
        for end, radius, way in zip(ends, radii, (1, -1), strict=True)
    ]
    bent = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={BEND}", "mutation_scale": 9, "shrinkA": 1, "shrinkB": 1}
    axes.add_patch(FancyArrowPatch(rims[0], rims[1], color=MUTED, linewidth=width, **bent))
    away = BEND * length / 2 + 0.08 + 0.08 * abs(side[0])  # numbers are wider than high
    middle = [(here + there) / 2 for here, there in zip(*rims, strict=True)]
    return middle[0] + away * side[0], middle[1] + away * side[1]


def _loop(axes: "Axes", place: Place, radius: float, width: float) -> Place:
    """A ring behind the node, on its far side from the middle; where its label goes."""
    from matplotlib.patches import Circle

    length = hypot(*place)
    out = (place[0] / length, place[1] / length) if length > 1e-9 else (0.0, 1.0)
    x, y = (at + (radius + 0.6 * RING) * away for at, away in zip(place, out, strict=True))
    axes.add_patch(Circle((x, y), RING, fill=False, edgecolor=MUTED, linewidth=width))
    return x + 2.8 * RING * out[0], y + 2 * RING * out[1]
