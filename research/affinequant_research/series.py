"""What a series tells: when a value was reached, and what stood there at some update."""

import bisect
from collections.abc import Sequence

from affinequant_evals import Score

from affinequant_research.experiment import OPS, Op, Series


def first_update(series: Series, op: Op, value: float, per_update: float = 1.0) -> Score:
    """The first update (or second: `per_update` of them an update) where `measured op value`; where the series ends before
    that, its end, which `about` calls censored: `> N`."""
    updates, measured = series
    hits = [at for at, one in zip(updates, measured, strict=True) if OPS[op](one, value)]
    about = {} if hits else {"censored": True}
    return Score(value=(hits or updates[-1:])[0] * per_update, stderr=None, n=1, about=about)


def value_at(series: Series, update: float) -> Score:
    """What was measured last until that update, or first of all."""
    updates, measured = series
    index = max(bisect.bisect_right(updates, update) - 1, 0)
    return Score(value=measured[index], stderr=None, n=1, about={"update": updates[index]})


def side_by_side(several: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """Every update at which any of the series was measured, and of each of them what stood there, as `value_at` has it."""
    updates = sorted({at for found, _ in several for at in found})
    return updates, [[value_at(series, at).value for at in updates] for series in several]
