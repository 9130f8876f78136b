"""A figure as data: what is shown, in which units, and what to look for. Whoever measures makes it; the page draws it.

Nothing here draws, so that a method of research or an evaluation can hand figures on in its JSON without a plotting library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from affinequant.errors import AffineQuantError, unknown_name

Kind = Literal["line", "bars", "interval", "heat", "matrix", "histogram", "scatter", "graph"]
Better = Literal["", "lower", "higher"]
Numbers = tuple[float | None, ...]
"""None where nothing was measured: a gap in a line, an empty cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of a figure, or its colours.

    Attributes:
        label: what it is.
        unit: of its numbers, e.g. `dB`; "" for none.
        log: whether the scale is logarithmic. Values must be positive then.
        names: of the categories that stand there in place of numbers, in order.
        better: which end of it is the good one, if any: it is said, and what is bad gets the colour in a heat map.
    """

    label: str = ""
    unit: str = ""
    log: bool = False
    names: tuple[str, ...] = ()
    better: Better = ""

    @property
    def text(self) -> str:
        """Label and unit: `SQNR [dB]`."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What belongs together in a figure: a line, the bars of one colour, one matrix.

    Attributes:
        name: for the legend.
        panel: the small picture of its own that it belongs to; series of the same panel share axes.
        x: positions of `y`, or (histogram) the edges of the bins, one more than there are counts. Empty: 1, 2, 3, ...,
            or one value for each name of the axis of categories.
        y: the values: heights, counts.
        low, high: ends of an interval about each of `y`.
        cells: rows of values (heat, matrix), the first row on top; weights of the edges of a graph, row -> column, 0 or None
            where there is none.
        names: of a graph's nodes.
        joined: a line goes through the points of a scatter in their order, in place of marks; a None breaks it.
    """

    name: str = ""
    panel: str = ""
    x: Numbers = ()
    y: Numbers = ()
    low: Numbers = ()
    high: Numbers = ()
    cells: tuple[Numbers, ...] = ()
    names: tuple[str, ...] = ()
    joined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure.

    | kind | shows | of a series |
    |---|---|---|
    | line | y over x, a band where `low` and `high` are given | x, y, low, high |
    | bars | a bar a name of `y`, side by side for several series | y (lengths along x) |
    | interval | a point and its interval a name of `y` | y, low, high (along x) |
    | heat | a coloured cell for each name of `y` and of `x`; of a second series those that are marked as bad | cells |
    | matrix | a matrix as a picture, each series its own | cells |
    | histogram | how often, over x | x (edges), y (counts) |
    | scatter | points, or lines through them | x, y, joined |
    | graph | nodes and the edges between them, each series its own | cells, names; x, y of the nodes, else a circle |

    The area of a graph's node is what its row sums to, the width of an edge its weight, beside the largest of its kind.

    Attributes:
        key: names it among the figures of a page; letters, digits, - and _.
        x, y: the axes. Categories (`names`) of bars and intervals stand at `y`.
        value: what the colours of heat and matrix are.
        caption: what to look for, in a sentence or two.

    Raises:
        AffineQuantError: lengths that do not fit, numbers that are not finite, or a logarithm of one that is not positive.
    """

    kind: Kind
    title: str
    series: tuple[Series, ...]
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    value: Axis = field(default_factory=Axis)
    caption: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_name("kind of figure", self.kind, get_args(Kind), where=f"figure {self.title!r}")
        if not self.series:
            raise self._wrong("it has no series", "give at least one")
        if not all(letter.isalnum() or letter in "-_" for letter in self.key):
            raise self._wrong(f"its key is {self.key!r}", "use letters, digits, - and _")
        for axis in (self.x, self.y, self.value):
            if axis.better not in get_args(Better):
                raise unknown_name("better", axis.better, get_args(Better)[1:], where=f"figure {self.title!r}")
        for one in self.series:
            self._check(one)

    @property
    def panels(self) -> dict[str, tuple[Series, ...]]:
        """Panel -> its series, in the order of their first ones; each matrix is a panel of its own."""
        found: dict[str, tuple[Series, ...]] = {}
        for one in self.series:
            name = one.panel or one.name if self.kind in ("matrix", "graph") else one.panel
            found[name] = (*found.get(name, ()), one)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is empty is left out."""
        value = {"kind": self.kind, "title": self.title, "series": [_plain(one) for one in self.series]}
        value |= {name: _plain(getattr(self, name)) for name in ("x", "y", "value")}
        return {name: part for name, part in (value | {"caption": self.caption, "key": self.key}).items() if part}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Figure":
        """The figure again.

        Raises:
            AffineQuantError: the value does not describe a figure, with what is wrong.
        """
        where = f"figure {value.get('title', '?')!r}" if isinstance(value, Mapping) else "figures"
        try:
            return Figure(
                kind=value["kind"],
                title=str(value["title"]),
                series=tuple(_series(one) for one in value["series"]),
                x=_axis(value.get("x", {})),
                y=_axis(value.get("y", {})),
                value=_axis(value.get("value", {})),
                caption=str(value.get("caption", "")),
                key=str(value.get("key", "")),
            )
        except KeyError as problem:
            raise AffineQuantError(f"{problem} is missing", where, "give kind, title and series") from None
        except (TypeError, ValueError, AttributeError) as problem:
            raise AffineQuantError(f"it cannot be read: {problem}", where, "see affinequant.report.figure") from None

    def _check(self, one: Series) -> None:
        self._check_lengths(one)
        self._check_numbers(one.x, self.x.log)
        # An empty bin, or a cell of a heat map that counts nothing, is nothing to take a logarithm of: it stays empty.
        values = [v for v in one.y if v != 0] if self.kind == "histogram" else (*one.y, *one.low, *one.high)
        self._check_numbers(values, self._along.log)
        for row in one.cells:
            self._check_numbers([v for v in row if v != 0] if self.kind == "heat" else row, self.value.log)

    @property
    def _along(self) -> Axis:
        """The axis that `y` of a series is measured on."""
        return self.x if self.kind in ("bars", "interval") else self.y

    def _check_lengths(self, one: Series) -> None:
        name = f"series {one.name!r}"
        if self.kind == "graph":
            self._check_graph(one, name)
            return
        if self.kind in ("heat", "matrix"):
            widths = {len(row) for row in one.cells}
            if len(widths) != 1 or widths == {0}:
                raise self._wrong(f"{name} is no matrix", "give `cells`: rows of one length")
            shape = (len(self.y.names), len(self.x.names))
            if self.kind == "heat" and shape != (len(one.cells), *widths):
                raise self._wrong(f"{name} does not fit its {shape[0]} x {shape[1]} names", "name each row and column")
            return
        wanted = len(self.y.names) if self.kind in ("bars", "interval") else len(one.x) - (self.kind == "histogram")
        if not one.y or (len(one.y) != wanted and (one.x or self.kind != "line")):
            raise self._wrong(f"{name} has {len(one.y)} values where {wanted} belong", "give one for each place")
        if len(one.low) != len(one.high) or len(one.low) not in (0, len(one.y)):
            raise self._wrong(f"{name} has intervals for other values", "give low and high for each value, or neither")

    def _check_graph(self, one: Series, name: str) -> None:
        count = len(one.names)
        if not count or len(one.cells) != count or any(len(row) != count for row in one.cells):
            raise self._wrong(f"{name} is no graph", "give `names` and `cells`: a row and a column for each node")
        if len(one.x) != len(one.y) or len(one.x) not in (0, count) or None in (*one.x, *one.y):
            raise self._wrong(f"{name} has {len(one.x)} places for {count} nodes", "give x and y of each, or neither")
        if any(weight is not None and weight < 0 for row in one.cells for weight in row):
            raise self._wrong(f"{name} has an edge of less than nothing", "give weights of 0 or more")

    def _check_numbers(self, numbers: Sequence[float | None], log: bool) -> None:
        for number in numbers:
            if number is not None and not math.isfinite(number):
                raise self._wrong(f"{number} cannot be drawn", "leave it out: null in its place")
            if number is not None and log and number <= 0:
                raise self._wrong(f"{number} has no logarithm", "use a linear scale, or leave it out")

    def _wrong(self, what: str, fix: str) -> AffineQuantError:
        return AffineQuantError(what, f"figure {self.title!r}", fix)


def _plain(value: Axis | Series) -> dict[str, Any]:
    filled = {name: part for name, part in asdict(value).items() if part}
    return {name: _lists(part) for name, part in filled.items()}


def _lists(part: Any) -> Any:
    return [_lists(one) for one in part] if isinstance(part, tuple) else part


def _axis(value: Mapping[str, Any]) -> Axis:
    names = tuple(str(name) for name in value.get("names", ()))
    return Axis(
        label=str(value.get("label", "")),
        unit=str(value.get("unit", "")),
        log=bool(value.get("log", False)),
        names=names,
        better=value.get("better", ""),
    )


def _series(value: Mapping[str, Any]) -> Series:
    unknown = set(value) - {one.name for one in fields(Series)}
    if unknown:
        raise ValueError(f"a series has no {sorted(unknown)[0]!r}")
    return Series(
        name=str(value.get("name", "")),
        panel=str(value.get("panel", "")),
        x=_numbers(value.get("x", ())),
        y=_numbers(value.get("y", ())),
        low=_numbers(value.get("low", ())),
        high=_numbers(value.get("high", ())),
        cells=tuple(_numbers(row) for row in value.get("cells", ())),
        names=tuple(str(name) for name in value.get("names", ())),
        joined=bool(value.get("joined", False)),
    )


def _numbers(values: Sequence[Any]) -> Numbers:
    for one in values:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int | float)):
            raise ValueError(f"{one!r} is not a number")
    return tuple(values)
