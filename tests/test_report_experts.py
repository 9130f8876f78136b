"""Experts on the page: the tokens of the JSON, cell by cell, the starved in the other colour, and how many they are."""

import base64
import io
import re
from typing import Any

import numpy as np
from matplotlib.image import imread

from affinequant.report.axes import BAD, GOOD, NAMED
from affinequant.report.building import build_page
from affinequant.report.drawing import draw
from affinequant.report.experts import expert_section
from affinequant.report.markdown import to_markdown
from affinequant.report.words import plain
from tests.reports import made_report
from tests.test_report import Seen, close, html_of, sources

TOKENS = [[37, 0, 911, 64], [501, 63, 12, 128]]
STARVED = [
    ["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.1.down_proj"],
    ["mlp.experts.2.down_proj"],
]
MARKED = [[37, 0, None, None], [None, None, 12, None]]


def mixture(starved: list[list[str]]) -> dict[str, Any]:
    """A run whose blocks, but for a dense one in the middle, have experts."""
    report = made_report()
    first, last = report["blocks"]
    report["blocks"] = [first, dict(first), last]
    for block, tokens, few in zip((first, last), TOKENS, starved, strict=True):
        block["experts"] = {"tokens": tokens, "starved": few}
    return report


def parts(report: dict[str, Any]) -> tuple[Any, Any]:
    """The figure, and what is said below it."""
    [section] = expert_section(report["blocks"])
    figure, text = section.parts
    return figure, text


def test_the_figure_is_the_json() -> None:
    seen = Seen(html_of(mixture(STARVED)))
    figure = seen.figures["experts"]
    assert close(figure["series"], [{"cells": TOKENS}, {"name": "starved", "cells": MARKED}])
    assert figure["y"]["names"] == ["0", "2"] and figure["x"]["names"] == ["0", "1", "2", "3"]
    assert figure["value"] == {"label": "tokens", "log": True}
    text = "".join(seen.text)
    assert "3 of 8 experts saw fewer tokens" in text and "--samples" in text


def test_without_starved_ones_and_without_experts() -> None:
    figure, text = parts(mixture([[], []]))
    assert close(figure.to_json()["series"], [{"cells": TOKENS}])
    assert plain(text.words).startswith("0 of 8 experts") and "--samples" not in plain(text.words)
    assert expert_section(made_report()["blocks"]) == ()


def test_markdown_says_how_many() -> None:
    assert "3 of 8 experts saw fewer tokens" in to_markdown(build_page(sources(mixture(STARVED))))


def test_a_broken_report_has_no_figure_of_it() -> None:
    report = mixture(STARVED)
    for block, broken in zip(report["blocks"], ({"tokens": ["many"]}, "none", {"tokens": []}), strict=True):
        block["experts"] = broken
    assert expert_section(report["blocks"]) == ()


def drawn(report: dict[str, Any]) -> tuple[np.ndarray, str]:
    """(red, green, blue and strength of every cell, the SVG)."""
    [drawing] = draw(parts(report)[0])
    [encoded] = re.findall(r"base64,([^\"]*)", drawing.svg)
    cells = imread(io.BytesIO(base64.b64decode(encoded)))
    return cells if "scale(1 -1)" not in drawing.svg else cells[::-1], drawing.svg


def test_more_tokens_are_more_colour_and_the_starved_have_the_other_the_more_the_fewer() -> None:
    cells, _ = drawn(mixture(STARVED))
    starved = np.array([[value is not None for value in row] for row in MARKED])
    for place, colour in ((~starved, GOOD), (starved, BAD)):
        assert np.allclose(cells[place][:, :3], np.array(colour) / 255, atol=0.03)
    strength = cells[..., 3]
    assert strength[0, 2] > strength[1, 0] > strength[1, 3] > strength[0, 3] > strength[1, 1] > 0
    assert strength[0, 1] >= strength[1, 2] > strength[0, 0] > 0


def test_of_many_experts_some_have_their_number() -> None:
    report = mixture([[], []])
    for block in (report["blocks"][0], report["blocks"][2]):
        block["experts"]["tokens"] = [1 + 7 * number % 90 for number in range(128)]
    cells, svg = drawn(report)
    assert cells.shape[:2] == (2, 128)
    named = [int(text) for text in re.findall(r">(\d+)</text>", svg)]
    assert {0, 8, 120} <= set(named) and 1 not in named and len(named) <= NAMED + 2
