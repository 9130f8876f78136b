"""How far rotations are from the true ones: the figures measured of every network, and how they are drawn."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from affinequant_evals import Score
from affinequant_evals.scores import Better
from jaxtyping import Float
from torch import Tensor

from affinequant.report.figure import Axis, Figure, Series
from affinequant_research.experiment import Found
from affinequant_research.rotations.representations import REPRESENTATIONS

LARGE = 5.0
"""Degrees above which an error counts as large."""
PERCENTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
BITS = (8, 6, 5, 4, 3, 2)
GAP = """Rotations have no continuous representation in four dimensions or fewer: there is always a rotation at which the \
network is as wrong as it can be, however long it is trained. From five on there is one."""
Scores = Mapping[str, tuple[Better, Score]]


def spread_scores(errors: Float[Tensor, "values"]) -> Scores:
    """Of errors: mean, max, standard deviation and percentiles."""
    values = errors.double()
    spread = values.std()
    found = {"mean": _score(values.mean(), spread, len(values)), "max": _score(values.max()), "std": _score(spread)}
    ordered = values.sort().values  # `quantile` takes no more than 16 million
    found |= {name: _score(ordered[int(share * (len(values) - 1))]) for name, share in PERCENTILES.items()}
    return {name: ("lower", score) for name, score in found.items()}


def angle_scores(radians: Float[Tensor, "values"]) -> Scores:
    """`spread_scores` in degrees, and the share above `LARGE`."""
    degrees = radians.double().rad2deg()
    large = (degrees > LARGE).double()
    return {**spread_scores(degrees), f"over{LARGE:g}": ("lower", _score(large.mean(), large.std(), len(large)))}


def _score(value: Tensor, spread: Tensor | None = None, count: int = 1) -> Score:
    stderr = None if spread is None else float(spread) / math.sqrt(count)
    return Score(value=float(value), stderr=stderr, n=count)


def by_dimension(found: Found, arms: Sequence[str], unit: str = "degrees", caption: str = GAP) -> Figure:
    """The largest and the mean error of each representation, sorted by its dimension."""
    drawn = sorted(arms, key=lambda arm: REPRESENTATIONS[arm].dims)
    series = tuple(
        Series(name=name, y=tuple(found.mean(f"{arm}/{metric}") for arm in drawn))
        for name, metric in (("largest", "max"), ("mean", "mean"))
    )
    return Figure(
        kind="bars",
        title="largest and mean error by the dimension of the representation",
        series=series,
        x=Axis(label="error on what was not trained on", unit=unit, log=True),
        y=Axis(label="dimension and name", names=tuple(f"{REPRESENTATIONS[arm].dims}  {arm}" for arm in drawn)),
        caption=caption,
    )


def by_percentile(found: Found, arms: Sequence[str], unit: str = "degrees") -> Figure:
    """Errors from the median to the largest."""
    names = (*PERCENTILES, "max")
    series = tuple(
        Series(name=arm, x=(1, 2, 3, 4, 5), y=tuple(found.mean(f"{arm}/{name}") for name in names)) for arm in arms
    )
    return Figure(
        kind="line",
        title="errors from the median to the largest",
        series=series,
        x=Axis(label="1: half, 2: 90 %, 3: 99 %, 4: 99.9 %, 5: all"),
        y=Axis(label="error that so many stay below", unit=unit, log=True),
        caption="What tells continuous representations from the others is the tail: where the map to a representation jumps, "
        "a network passes through everything in between.",
    )


def over_updates(found: Found, arms: Sequence[str]) -> Figure:
    """The training loss of the first seed."""
    series = []
    for arm in arms:
        x, y = found.series[0][f"{arm}/loss"]
        thin = max(1, len(x) // 200)
        series.append(Series(name=arm, x=tuple(x[::thin]), y=tuple(y[::thin])))
    return Figure(
        kind="line",
        title="training loss",
        series=tuple(series),
        x=Axis(label="updates"),
        y=Axis(label="loss", log=True),
        caption=f"Seed {found.seeds[0]}, means of blocks of updates.",
    )


def by_bits(found: Found, arms: Sequence[str]) -> Figure:
    """The mean error of networks whose weights are rounded."""
    x = tuple(map(float, BITS))
    return Figure(
        kind="line",
        title="error of the network with rounded weights",
        series=tuple(
            Series(name=arm, x=x, y=tuple(found.mean(f"{arm}/mean@w{bits}") for bits in BITS)) for arm in arms
        ),
        x=Axis(label="weights", unit="bits"),
        y=Axis(label="mean error", unit="degrees", log=True),
        caption="To the nearest value, one scale an output, without training after. What a representation gains in full "
        "precision is gone where rounding costs more.",
    )


def figures(
    found: Found, name: str, arms: Sequence[str], draw: Iterable[Callable[[Found, Sequence[str]], Figure]]
) -> tuple[Figure, ...]:
    """Those figures of the arms that were measured, if any were, each with the experiment's name in its title."""
    drawn = [arm for arm in arms if found.values(f"{arm}/mean")]
    made = [one(found, drawn) for one in draw] if drawn else []
    return tuple(
        replace(figure, title=f"{name}: {figure.title}", key=f"{name}-{index}") for index, figure in enumerate(made)
    )
