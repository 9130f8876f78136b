"""Figures as data: what they must hold, and the way through JSON and back."""

import json
import subprocess
import sys
from typing import Any

import pytest

from affinequant import AffineQuantError
from affinequant.report.figure import Axis, Figure, Series

FIGURES = {
    "line": Figure(
        kind="line",
        title="a line with a band and a gap",
        series=(Series(name="a", x=(1, 2, 3), y=(1.0, None, 4.0), low=(0.5, None, 3.0), high=(2.0, None, 5.0)),),
        x=Axis(label="epoch"),
        y=Axis(label="loss", log=True),
        caption="Falls.",
        key="loss-curve",
    ),
    "bars": Figure(
        kind="bars",
        title="bars",
        series=(Series(name="before", y=(1.0, 2.0)), Series(name="after", y=(2.5, 0.0))),
        x=Axis(label="time", unit="s"),
        y=Axis(names=("load", "learn")),
    ),
    "interval": Figure(
        kind="interval",
        title="intervals",
        series=(Series(y=(1.0, None), low=(0.5, None), high=(2.0, None)),),
        y=Axis(names=("piqa", "boolq")),
    ),
    "heat": Figure(
        kind="heat",
        title="heat",
        series=(Series(cells=((1.0, 2.0, None),)),),
        x=Axis(names=("q", "k", "v")),
        y=Axis(names=("0",)),
        value=Axis(label="SQNR", unit="dB", better="higher"),
    ),
    "matrix": Figure(
        kind="matrix",
        title="matrices",
        series=(Series(name="epoch 1", cells=((0.0, -2.0), (-2.0, 0.0))), Series(name="epoch 2", cells=((0.0, -1.0),))),
    ),
    "histogram": Figure(
        kind="histogram",
        title="histogram",
        series=(
            Series(name="before", panel="q", x=(-1.0, 0.0, 1.0), y=(3, 4)),
            Series(name="after", panel="q", x=(-0.5, 0.0, 0.5), y=(2, 5)),
        ),
    ),
    "scatter": Figure(
        kind="scatter",
        title="snapshots and a way through them",
        series=(
            Series(name="t = 0", panel="a", x=(0.0, 1.0), y=(2.0, 3.0)),
            Series(name="drawn", panel="a", x=(0.0, 1.0, None, 2.0), y=(2.0, 3.0, None, 4.0), joined=True),
        ),
        x=Axis(label="prey"),
        y=Axis(label="hunters"),
    ),
    "graph": Figure(
        kind="graph",
        title="a graph",
        series=(
            Series(name="seed 0", names=("01", "11"), cells=((0.5, 0.1), (None, 0.4)), x=(0.0, 1.0), y=(0.0, 2.0)),
        ),
        value=Axis(label="share of steps"),
    ),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_it_is_the_same_after_json(kind: str) -> None:
    figure = FIGURES[kind]
    again = Figure.from_json(json.loads(json.dumps(figure.to_json())))
    assert again == figure and again.kind == kind


def test_panels() -> None:
    assert [len(series) for series in FIGURES["histogram"].panels.values()] == [2]
    assert list(FIGURES["matrix"].panels) == ["epoch 1", "epoch 2"] and list(FIGURES["graph"].panels) == ["seed 0"]
    assert FIGURES["heat"].value.text == "SQNR [dB]" and FIGURES["line"].x.text == "epoch"


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown kind": ("line", {"kind": "lines"}, "did you mean 'line'"),
    "no series": ("line", {"series": []}, "no series"),
    "no direction": ("line", {"y": {"better": "higer"}}, "did you mean 'higher'"),
    "a missing series": ("line", {"series": None}, "cannot be read"),
    "a word for a number": ("line", {"series": [{"y": ["1"]}]}, "'1' is not a number"),
    "a value without a place": ("bars", {"series": [{"y": [1.0]}]}, "1 values where 2 belong"),
    "half an interval": ("interval", {"series": [{"y": [1, 2], "low": [0, 1]}]}, "intervals for other values"),
    "no number at all": ("line", {"series": [{"y": [float("nan")]}]}, "cannot be drawn"),
    "no logarithm": ("line", {"series": [{"y": [0.0]}]}, "no logarithm"),
    "rows of several lengths": ("matrix", {"series": [{"cells": [[1], [1, 2]]}]}, "no matrix"),
    "cells without names": ("heat", {"series": [{"cells": [[1, 2]]}]}, "1 x 3 names"),
    "counts for other edges": ("histogram", {"series": [{"x": [0, 1], "y": [1, 2]}]}, "2 values where 1 belong"),
    "a point without a place": ("scatter", {"series": [{"x": [1], "y": [1, 2]}]}, "2 values where 1 belong"),
    "a cloud without places": ("scatter", {"series": [{"y": [1, 2]}]}, "2 values where 0 belong"),
    "a node without edges": ("graph", {"series": [{"names": ["a", "b"], "cells": [[1, 2]]}]}, "no graph"),
    "edges without nodes": ("graph", {"series": [{"cells": [[1]]}]}, "no graph"),
    "a place for no node": (
        "graph",
        {"series": [{"names": ["a"], "cells": [[1]], "x": [1, 2], "y": [1, 2]}]},
        "2 places",
    ),
    "less than no edge": ("graph", {"series": [{"names": ["a"], "cells": [[-1]]}]}, "less than nothing"),
    "an edge of infinite weight": (
        "graph",
        {"series": [{"names": ["a"], "cells": [[float("inf")]]}]},
        "cannot be drawn",
    ),
    "an unknown part": ("line", {"series": [{"values": [1]}]}, "no 'values'"),
    "a key that is no name": ("line", {"key": "a b"}, "its key"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_drawn_is_refused(case: str) -> None:
    kind, change, says = BROKEN[case]
    with pytest.raises(AffineQuantError) as caught:
        Figure.from_json(FIGURES[kind].to_json() | change)
    assert says in str(caught.value)


def test_a_missing_part_is_named() -> None:
    value = FIGURES["line"].to_json()
    del value["kind"]
    with pytest.raises(AffineQuantError, match="'kind' is missing"):
        Figure.from_json(value)


def test_data_need_no_plotting_library() -> None:
    code = "import sys, affinequant.report.figure; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
