"""Scores as the page reads them: which there are, their intervals, and both in words and in figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from affinequant.report.figure import Numbers, Series
from affinequant.report.reading import Object
from affinequant.report.words import Words, between, joined, number, numeric

FULL, SHORT = "full precision", "quantised"
LEVEL = 0.95


def gather(scores: Sequence[Object]) -> dict[str, Object]:
    """Metric -> what is known of it, those of the last scores first; of one that several have, what the last say."""
    found: dict[str, Object] = {}
    for card in reversed(scores):
        for name, one in card["metrics"].items():
            if isinstance(one, Mapping):
                found.setdefault(name, one)
    return found


def interval_of(
    value: Any, stderr: Any, dof: Any, stated: Any = None, *, ratio: bool = False
) -> tuple[float, float] | None:
    """Ends of the 95 % interval: as stated, or from a standard error and its degrees of freedom; None where neither is.

    Args:
        ratio: the value is an exponential of a mean, as a perplexity is: the interval is that of the mean.
    """
    if isinstance(stated, list) and len(stated) == 2 and all(map(numeric, stated)):
        return stated[0], stated[1]
    if not (numeric(value) and numeric(stderr) and numeric(dof) and dof > 0):
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(dof, (1 + LEVEL) / 2)) * stderr
    return (value * math.exp(-half / value), value * math.exp(half / value)) if ratio else (value - half, value + half)


def is_perplexity(name: str) -> bool:
    """Whether a metric is one."""
    return name.startswith("perplexity@")


def own_interval(name: str, one: Object) -> tuple[float, float] | None:
    """Of the checkpoint's own value."""
    return interval_of(*map(one.get, ("value", "stderr", "dof", "interval")), ratio=is_perplexity(name))


def baseline_interval(name: str, one: Object) -> tuple[float, float] | None:
    """Of the baseline's value, which was measured on as many observations."""
    keys = ("baseline", "baseline_stderr", "dof", "baseline_interval")
    return interval_of(*map(one.get, keys), ratio=is_perplexity(name))


def delta_interval(one: Object) -> tuple[float, float] | None:
    """Of the difference."""
    return interval_of(*map((one.get("delta") or {}).get, ("value", "stderr", "dof", "interval")))


def series_of(name: str, rows: Sequence[tuple[Any, tuple[float, float] | None]]) -> Series:
    """Values with the ends of their intervals, as a figure takes them."""
    y: Numbers = tuple(value if numeric(value) else None for value, _ in rows)
    ends = [found for _, found in rows]
    low: Numbers = tuple(found[0] if found else None for found in ends) if any(ends) else ()
    high: Numbers = tuple(found[1] if found else None for found in ends) if any(ends) else ()
    return Series(name=name, y=y, low=low, high=high)


def shown_with(value: float, ends: tuple[float, float] | None, *, sign: bool = False) -> Words:
    """A value and its interval: `18.36 (15.8 to 21.3)`."""
    shown = number(value, 3 if sign else 4, sign=sign)
    return joined((shown, " (", between(*ends, sign=sign), ")"), "") if ends else shown
