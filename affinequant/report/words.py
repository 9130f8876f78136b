"""Numbers in words, as every command and the page show them; a number on the page keeps its exact value beside the text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True, slots=True)
class Value:
    """A number, and how it is written."""

    number: float
    text: str


Words = str | Value | tuple[str | Value, ...]
"""Text with numbers in it."""


def plain(words: Words) -> str:
    """The text alone."""
    return "".join(part.text if isinstance(part, Value) else part for part in pieces(words))


def pieces(words: Words) -> tuple[str | Value, ...]:
    """The text and the numbers one after the other."""
    return words if isinstance(words, tuple) else (words,)


def joined(parts: Iterable[Words], between: str) -> Words:
    """Texts one after the other."""
    found: list[str | Value] = []
    for part in parts:
        found += ([between] if found else []) + list(pieces(part))
    return tuple(found)


def number(value: float, digits: int = 4, *, sign: bool = False) -> Value:
    """`18.37`, `0.2500`, `1,234,567`, `3.100e-05`."""
    plus = "+" if sign else ""
    if float(value).is_integer() and abs(value) < 1e15:
        return Value(value, f"{value:{plus},.0f}")
    return Value(value, f"{value:{plus}#.{digits}g}".removesuffix("."))


def fixed(value: float, digits: int = 1, *, sign: bool = False) -> Value:
    """With so many digits behind the point: decibels, percentages."""
    return Value(value, f"{value:{'+' if sign else ''},.{digits}f}")


def between(low: float, high: float, digits: int = 3, *, sign: bool = False) -> Words:
    """`17.1 to 19.6`."""
    return (number(low, digits, sign=sign), " to ", number(high, digits, sign=sign))


def stored(count: float) -> Value:
    """Bytes: `107 MB`."""
    return Value(count, size(count))


def lasting(seconds: float) -> Value:
    """Seconds: `5.1 min`."""
    return Value(seconds, f"{seconds:.2g} s" if seconds < 1 else minutes(seconds / 60))


def size(count: float) -> str:
    """Bytes for people: `269 MB`, `1.34 GB`."""
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.{0 if count >= 2**24 else 2}f} MB"


def minutes(value: float) -> str:
    """Minutes for people: `40 s`, `3.5 min`, `6 h 20 min`."""
    if value < 1.5:
        return f"{max(value * 60, 1):.0f} s"
    return f"{value:.1f} min" if value < 90 else f"{value // 60:.0f} h {value % 60:.0f} min"


def numeric(value: Any) -> TypeGuard[float]:
    """Whether a value out of a JSON file is a number that can be shown; true and false are none."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
    )
