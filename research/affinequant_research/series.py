"""What a series tells: when a value was reached, and what stood there at some update."""

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
    index = sum(at <= update for at in updates) - 1
    return Score(value=measured[max(index, 0)], stderr=None, n=1, about={"update": updates[max(index, 0)]})
