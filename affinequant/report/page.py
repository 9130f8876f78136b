"""A page as data: what it says, in which order. It is made from JSON by pure functions, and written as HTML or Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass

from affinequant.report.figure import Figure
from affinequant.report.words import Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A paragraph; `warns` where it must not be overlooked."""

    words: Words
    warns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under names of columns; `right`: the columns of numbers, set flush right. `brief`: it belongs into a short form
    of the page too; `beside`: it is narrow, and stands next to a figure."""

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[Words, ...], ...]
    right: tuple[int, ...] = ()
    caption: str = ""
    brief: bool = True
    beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Something to type, or a file as it is. `brief` as of a table."""

    title: str = ""
    text: str
    brief: bool = True


Part = Text | Table | Code | Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: tuple[Part, ...]
    about: str = ""

    @property
    def key(self) -> str:
        """For links into the page."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One of the few numbers that stand on top."""

    label: str
    words: Words
    about: Words = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A verdict in one sentence, a few numbers, and the sections. `bad`: something failed that was checked."""

    title: str
    subtitle: str = ""
    verdict: Words
    bad: bool = False
    tiles: tuple[Tile, ...] = ()
    sections: tuple[Section, ...] = ()
    version: str = ""

    @property
    def figures(self) -> Iterator[Figure]:
        """Every figure, in order."""
        return (part for section in self.sections for part in section.parts if isinstance(part, Figure))


def section(title: str, *parts: Part | None, about: str = "") -> tuple[Section, ...]:
    """A section of the parts that there are, or none where there are none."""
    there = tuple(part for part in parts if part is not None)
    return (Section(title=title, parts=there, about=about),) if there else ()
