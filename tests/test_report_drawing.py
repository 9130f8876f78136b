"""What is drawn lies where the data say: the coordinates in an SVG against the numbers of its figure."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from affinequant.report.axes import SETTINGS, STRONGEST
from affinequant.report.drawing import MIDDLE, SMALL, WIDTH, Drawing, draw
from affinequant.report.figure import Axis, Figure, Series

VALUES = (1.0, 3.0, 2.0, 5.0)


def path(drawing: Drawing, style: str) -> np.ndarray:
    """[points, 2] of the first path that is drawn in this style."""
    found = next(d for d, drawn in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawing.svg) if style in drawn)
    return np.array([float(number) for number in re.findall(r"-?\d+\.?\d*", found)]).reshape(-1, 2)


def on_a_line(drawn: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether one is the other, stretched and moved."""
    slope, offset = np.polyfit(wanted, drawn, 1)
    return bool(np.abs(slope * wanted + offset - drawn).max() < 0.02) and abs(slope) > 1


@pytest.mark.parametrize("log", [False, True])
def test_a_line_goes_through_its_points(log: bool) -> None:
    series = (Series(name="a", x=(1, 2, 4, 8), y=VALUES),)
    [drawing] = draw(Figure(kind="line", title="t", series=series, y=Axis(label="loss", log=log)))
    points = path(drawing, "stroke: var(--c1)")
    assert on_a_line(points[:, 0], np.array([1.0, 2, 4, 8]))
    assert on_a_line(-points[:, 1], np.log(VALUES) if log else np.array(VALUES))


def test_bars_are_as_long_as_their_values() -> None:
    names = ("a", "b", "c", "d")
    [drawing] = draw(Figure(kind="bars", title="t", series=(Series(y=VALUES),), y=Axis(names=names)))
    bars = [
        np.array([float(number) for number in re.findall(r"-?\d+\.?\d*", d)]).reshape(-1, 2)
        for d, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawing.svg)
        if "fill: var(--c1)" in style
    ]
    lengths = np.array([bar[:, 0].max() - bar[:, 0].min() for bar in bars])
    assert np.allclose(lengths / lengths[0], VALUES, atol=2e-3)
    tops = [bar[:, 1].min() for bar in bars]
    assert tops == sorted(tops), "the first name stands on top"


@pytest.mark.parametrize("better", ["", "lower", "higher"])
def test_a_cell_has_as_much_colour_as_its_value_is_large_or_bad(better: str) -> None:
    cells = ((1.0, 2.0, None), (3.0, 5.0, 4.0))
    value = Axis(label="SQNR", better=better)  # type: ignore[arg-type]
    [drawing] = draw(Figure(kind="matrix", title="t", series=(Series(cells=cells),), value=value))
    [encoded] = re.findall(r"base64,([^\"]*)", drawing.svg)
    alpha = imread(io.BytesIO(base64.b64decode(encoded)))[..., 3]
    upright = alpha if "scale(1 -1)" not in drawing.svg else alpha[::-1]
    share = (np.array([[1.0, 2, np.nan], [3, 5, 4]]) - 1) / 4
    wanted = STRONGEST * (0.06 + 0.94 * (1 - share if better == "higher" else share))
    assert np.allclose(upright, np.nan_to_num(wanted), atol=0.01)


def test_bins_have_their_widths_and_an_empty_one_stays_empty() -> None:
    series = (Series(name="before", x=(-2.0, -1.0, 1.0, 2.0), y=(10, 0, 1000)),)
    [drawing] = draw(Figure(kind="histogram", title="t", series=series, y=Axis(log=True)))
    points = path(drawing, "stroke: var(--c1)")
    edges = sorted(set(points[:, 0]))
    assert on_a_line(np.array(edges), np.array([-2.0, -1, 1, 2]))
    heights = -np.array(sorted(set(points[:, 1]), reverse=True))
    assert on_a_line(heights, np.log([0.5, 10, 1000]))


def test_points_lie_at_their_places_and_a_line_goes_through_its_own() -> None:
    x, y = np.array([3.0, 1.0, 4.0, 1.5]), np.array(VALUES)
    series = (
        Series(name="points", x=tuple(x), y=tuple(y)),
        Series(name="way", x=(*x, None, 2.0, 2.5), y=(*y, None, 3.0, 3.5), joined=True),
    )
    [drawing] = draw(Figure(kind="scatter", title="t", series=series))
    dots = path(drawing, "stroke: var(--c1)")
    assert len(dots) == 8 and np.array_equal(dots[::2], dots[1::2]), "a dot is a path from a point to itself"
    assert on_a_line(dots[::2, 0], x) and on_a_line(-dots[::2, 1], y)
    way = path(drawing, "stroke: var(--c2)")
    assert on_a_line(way[:, 0], np.array([*x, 2.0, 2.5])) and len(way) == 6
    assert "stroke-linecap: round" in drawing.svg and "2 values from 3 to 3.5" not in drawing.alt


def test_few_panels_of_places_have_more_room_and_what_has_no_name_stands_back() -> None:
    def panels(count: int) -> Figure:
        series = tuple(Series(name="a" * (n > 0), panel=f"p{n}", x=(1.0, 2.0), y=(2.0, 1.0)) for n in range(count))
        return Figure(kind="scatter", title="t", series=series)

    wide = [float(re.findall(r'viewBox="0 0 (\d+)', draw(panels(count))[-1].svg)[0]) for count in (1, 2, 4, 5)]
    assert wide == [WIDTH, MIDDLE, MIDDLE, SMALL]
    unnamed, named = draw(panels(2))
    assert len(path(unnamed, "stroke: var(--c5)")) == len(path(named, "stroke: var(--c1)")) == 4


def test_many_points_take_little_room() -> None:
    cloud = np.random.default_rng(0).standard_normal((4000, 2)).round(3)
    [drawing] = draw(Figure(kind="scatter", title="t", series=(Series(x=tuple(cloud[:, 0]), y=tuple(cloud[:, 1])),)))
    assert len(path(drawing, "stroke: var(--c1)")) == 8000 and len(drawing.svg) < 4000 * 40


def circles(drawing: Drawing, colour: str) -> np.ndarray:
    """Middle and radius of what is drawn round in a colour's outline, [count, 3]."""
    drawn = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--' + colour, drawing.svg)
    ends = [np.array([float(n) for n in re.findall(r"-?\d+\.?\d*", one)]).reshape(-1, 2) for one in drawn]
    return np.array([[*(one.max(0) + one.min(0)) / 2, np.ptp(one[:, 0]) / 2] for one in ends])


def test_nodes_are_where_they_belong_and_as_large_as_their_rows() -> None:
    cells = ((0.5, 0.1, None), (0.0, 0.1, 0.05), (0.25, 0.0, 0.0))
    one = Series(names=("a", "b", "c"), cells=cells, x=(0.0, 4.0, 4.0), y=(0.0, 0.0, 3.0))
    [drawing] = draw(Figure(kind="graph", title="t", series=(one,)))
    nodes = np.concatenate([circles(drawing, colour) for colour in ("c1", "c2", "c3")])
    assert on_a_line(nodes[:, 0], np.array([0.0, 4, 4])) and on_a_line(-nodes[:, 1], np.array([0.0, 0, 3]))
    area = nodes[:, 2] ** 2
    assert area / area[0] == pytest.approx([1, 0.25, 0.25 / 0.6], abs=0.01)
    assert len(circles(drawing, "muted")) == 5, "two loops and three arrows"
    assert "3 nodes, 5 edges; the heaviest: a to a, c to a, a to b." in drawing.alt
    assert all(f">{name}<" in drawing.svg for name in ("a", "b", "c", "0.25", "0.05"))


def test_nodes_without_places_stand_in_a_circle() -> None:
    nowhere = Series(
        name="one", names=("a", "b", "c", "d"), cells=((0.0, 1.0, 0, 0), (0, 0, 1.0, 0), (0,) * 4, (0,) * 4)
    )
    alone = Series(name="two", names=("a",), cells=((1.0,),))
    [drawing, other] = draw(Figure(kind="graph", title="t", series=(nowhere, alone)))
    nodes = np.concatenate([circles(drawing, f"c{index}") for index in (1, 2, 3, 4)])
    spans = np.hypot(*(nodes[:, :2] - nodes[:, :2].mean(0)).T)
    assert spans == pytest.approx([spans[0]] * 4, abs=0.1) and spans[0] > 10
    assert len(circles(other, "c1")) == 1 and other.name == "two"


def test_names_are_no_mathematics_and_settings_stay_here() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    names = ("$\\frac{1}{$", "<b>&amp;</b>")
    [drawing] = draw(Figure(kind="bars", title="t", series=(Series(y=(1.0, 2.0)),), y=Axis(names=names)))
    assert "$\\frac{1}{$" in drawing.svg and "&lt;b&gt;&amp;amp;&lt;/b&gt;" in drawing.svg
    assert dict(matplotlib.rcParams) == before and before["font.size"] != SETTINGS["font.size"]
