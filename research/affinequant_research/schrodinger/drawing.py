"""Bridges as figures of the report: paths among snapshots, distances by time, parameters over passes.

What a picture keeps is a plain matrix: rows (time, x, y) of particles, or (line, x, y) of points that a line joins.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.experiment import Found, Picture
from affinequant_research.schrodinger.systems import Snapshots
from affinequant_research.series import over_seeds

PARTICLES = 60
"""Of a snapshot that are drawn at most."""
PATHS = 20
"""Of an interval."""
POINTS = 10
"""Of a path, beside its first."""
LABELS = {"w2": "2-Wasserstein distance", "w1": "1-Wasserstein distance", "mmd_rbf": "maximum mean discrepancy"}


def cloud(seen: Snapshots, dims: tuple[int, int] = (0, 1)) -> Picture:
    """The particles of snapshots in two of their coordinates, for `trajectories`."""
    return [
        [time, *particle]
        for time, sample in zip(seen.times, seen.samples, strict=True)
        for particle in sample[:PARTICLES, list(dims)].tolist()
    ]


def lines(paths: Tensor, dims: tuple[int, int] = (0, 1)) -> Picture:
    """Some paths [steps + 1, intervals, particles, d] in two of their coordinates, for `trajectories`."""
    every = max((len(paths) - 1) // POINTS, 1)
    kept = [*range(0, len(paths) - 1, every), len(paths) - 1]
    chosen = paths[kept][:, :, :PATHS, list(dims)].permute(1, 2, 0, 3).flatten(0, 1)
    return [[index, *point] for index, path in enumerate(chosen.tolist()) for point in path]


def trajectories(
    found: Found,
    experiment: str,
    panels: Mapping[str, str],
    seen: str,
    held: str,
    axes: Sequence[str],
    caption: str = "",
) -> Figure:
    """Paths of the first seed among the snapshots trained on and those held out.

    Args:
        panels: what is told of each panel -> the picture of its paths, as `lines` makes it.
        seen, held: pictures of snapshots, as `cloud` makes them.
        axes: names of the two coordinates.
    """
    drawn, pictures = [], found.pictures[0]
    for panel, paths in panels.items():
        x, y = _broken(pictures[paths])
        drawn.append(Line(name="paths", panel=panel, x=x, y=y, joined=True))
        for name, key in (("trained on", seen), ("held out", held)):
            _, across, up = zip(*pictures[key], strict=True)
            drawn.append(Line(name=name, panel=panel, x=tuple(across), y=tuple(up)))
    return Figure(
        kind="scatter",
        key=f"{experiment}_trajectories",
        title=f"{experiment}: paths of the bridges among snapshots, seed {found.seeds[0]}",
        series=tuple(drawn),
        x=Axis(label=axes[0]),
        y=Axis(label=axes[1]),
        caption=caption
        or "A bridge meets what it was trained on; whether it passes through what was held out is the test.",
    )


def distances(
    found: Found, experiment: str, kinds: Mapping[str, str], times: Sequence[float], metric: str = "w2"
) -> Figure:
    """A distance to what was held out by time: the mean over seeds, in a band from the least to the greatest.

    Args:
        kinds: name -> the stage whose metrics `w2@t1`, ... they are, e.g. `vanilla`, `refined`, `oracle`.
    """
    drawn = [
        over_seeds(name, times, [found.values(f"{stage}/{metric}@t{time:g}") for time in times])
        for name, stage in kinds.items()
    ]
    return Figure(
        kind="line",
        key=f"{experiment}_{metric}",
        title=f"{experiment}: how far bridges are from what was held out",
        series=tuple(drawn),
        x=Axis(label="time"),
        y=Axis(label=LABELS.get(metric, metric), better="lower"),
        caption="The oracle is fresh particles of the truth: samples of this size are not nearer to one another.",
    )


def parameters(found: Found, experiment: str, stage: str, true: Mapping[str, float]) -> Figure:
    """Parameters of the reference over passes, a panel for each, beside the true ones.

    Args:
        stage: whose series have the parameters' names.
        true: the values that are known, by name; all that have a series are drawn.
    """
    drawn = []
    names = [key.removeprefix(f"{stage}/") for key in found.series[0] if key.startswith(f"{stage}/")]
    for name in (one for one in true if one in names):
        for series, seed in zip(found.series, found.seeds, strict=True):
            passes, values = series[f"{stage}/{name}"]
            drawn.append(Line(name=f"seed {seed}", panel=name, x=tuple(passes), y=tuple(values)))
        passes = found.series[0][f"{stage}/{name}"][0]
        drawn.append(Line(name="true", panel=name, x=(passes[0], passes[-1]), y=(true[name],) * 2))
    return Figure(
        kind="line",
        key=f"{experiment}_parameters",
        title=f"{experiment}: parameters of the reference over passes",
        series=tuple(drawn),
        x=Axis(label="pass"),
        y=Axis(label="value"),
        caption="Where a family is the truth's own and its parameters can be told apart, each goes to its true value.",
    )


def _broken(points: Picture) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """The coordinates of (line, x, y), a None between two lines."""
    x: list[float | None] = []
    y: list[float | None] = []
    last = points[0][0]
    for line, across, up in points:
        if line != last:
            x.append(None)
            y.append(None)
        x.append(across)
        y.append(up)
        last = line
    return tuple(x), tuple(y)
