"""What is drawn lies where the data say: the coordinates in an SVG against the numbers of its figure."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from affinequant.report.axes import SETTINGS, STRONGEST
from affinequant.report.drawing import Drawing, draw
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


def test_names_are_no_mathematics_and_settings_stay_here() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    names = ("$\\frac{1}{$", "<b>&amp;</b>")
    [drawing] = draw(Figure(kind="bars", title="t", series=(Series(y=(1.0, 2.0)),), y=Axis(names=names)))
    assert "$\\frac{1}{$" in drawing.svg and "&lt;b&gt;&amp;amp;&lt;/b&gt;" in drawing.svg
    assert dict(matplotlib.rcParams) == before and before["font.size"] != SETTINGS["font.size"]
