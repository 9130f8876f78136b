"""What a series tells: when a value was reached, what stood there at some update, what several seeds say together."""

import bisect
from collections.abc import Sequence
from statistics import fmean

from affinequant_evals import Score

from affinequant.report.figure import Series as Line
from affinequant_research.experiment import OPS, Op, Series


def one_of(value: float, **about: object) -> Score:
    """A number of which there is one."""
    return Score(value=float(value), stderr=None, n=1, about=about)


def over_seeds(name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Line:
    """The mean over seeds at each x, a gap where none has one; a band from the least to the greatest where all have several."""
    band = all(len(each) > 1 for each in values)
    return Line(
        name=name,
        x=tuple(x),
        y=tuple(fmean(each) if each else None for each in values),
        low=tuple(map(min, values)) if band else (),
        high=tuple(map(max, values)) if band else (),
    )


def first_update(series: Series, op: Op, value: float, per_update: float = 1.0) -> Score:
    """The first update (or second: `per_update` of them an update) where `measured op value`; where the series ends before
    that, its end, which `about` calls censored: `> N`."""
    updates, measured = series
    hits = [at for at, one in zip(updates, measured, strict=True) if OPS[op](one, value)]
    about = {} if hits else {"censored": True}
    return one_of((hits or updates[-1:])[0] * per_update, **about)


def value_at(series: Series, update: float) -> Score:
    """What was measured last until that update, or first of all."""
    updates, measured = series
    index = max(bisect.bisect_right(updates, update) - 1, 0)
    return one_of(measured[index], update=updates[index])


def side_by_side(several: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """Every update at which any of the series was measured, and of each of them what stood there, as `value_at` has it."""
    updates = sorted({at for found, _ in several for at in found})
    return updates, [[value_at(series, at).value for at in updates] for series in several]
