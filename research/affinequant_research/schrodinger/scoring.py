"""What a pass is scored by: distances at times held out, of paths of each interval alone and of chains through all."""

from collections.abc import Callable, Mapping, Sequence

import torch
from affinequant_evals import Score
from torch import Tensor

from affinequant_research.experiment import Series
from affinequant_research.schrodinger.bridge import Bridges, Intervals, Samples, drawn, simulate
from affinequant_research.schrodinger.likelihood import as_numbers
from affinequant_research.schrodinger.measures import apart
from affinequant_research.schrodinger.references import Theta
from affinequant_research.schrodinger.systems import Snapshots
from affinequant_research.series import one_of


def measured(
    bridges: Bridges, train: Snapshots, held: Snapshots, particles: int, generator: torch.Generator
) -> tuple[dict[str, Score], dict[str, Series]]:
    """Scores and series of the bridges of one pass."""
    intervals = bridges.forward.intervals
    scores = apart([torch.cat(_at(bridges, when)) for when in held.times], held)
    chains = chained(bridges, train.samples, particles, generator)
    for name, ways in (("w2_chained", slice(2)), ("w2_ahead", slice(1))):
        made = [torch.cat(chains(when)[ways]) for when in held.times]
        scores |= {key.replace("w2", name): score for key, score in apart(made, held, ("w2",)).items()}
    ends = [*bridges.ends.forward, *bridges.ends.backward]
    scores["end_mean"] = one_of(sum(ends) / len(ends))
    series: dict[str, Series] = {}
    for name, values in bridges.ends._asdict().items():
        scores[f"end_{name}"] = one_of(max(values))
        series[f"end_{name}"] = (intervals.start.flatten().tolist(), list(values))
    return scores, series


def _place(intervals: Intervals, when: float) -> tuple[int, int]:
    """(interval, index of its paths) that is nearest to a time."""
    starts = intervals.start.flatten()
    index = max(int((starts <= when + 1e-9).sum()) - 1, 0)
    return index, min(round(float((when - starts[index]) / intervals.dt.flatten()[index])), intervals.steps)


def _at(bridges: Bridges, when: float) -> tuple[Tensor, Tensor]:
    interval, step = _place(bridges.forward.intervals, when)
    return bridges.ahead[step, interval], bridges.back[step, interval]


def chained(
    bridges: Bridges, marginals: Sequence[Samples], particles: int, generator: torch.Generator
) -> Callable[[float], tuple[Tensor, Tensor]]:
    """Particles from every snapshot, forward through all later intervals and backward through all earlier ones.

    Returns:
        Time -> those that came forward and those that came backward, [n, d] each.
    """
    count = len(marginals) - 1
    ways = []
    for drift, order in ((bridges.forward, range(count)), (bridges.backward, range(count - 1, -1, -1))):
        cloud, paths = marginals[0][:0], dict[int, Tensor]()
        for interval in order:
            new = drawn(marginals[interval + (drift.sign < 0)], particles, generator)
            paths[interval] = simulate(drift.only(interval), torch.cat([cloud, new])[None], generator)[:, 0]
            cloud = paths[interval][-1 if drift.sign > 0 else 0]
        ways.append(paths)

    def at(when: float) -> tuple[Tensor, Tensor]:
        interval, step = _place(bridges.forward.intervals, when)
        return ways[0][interval][step], ways[1][interval][step]

    return at


def about_theta(theta: Theta, true: Mapping[str, float]) -> dict[str, Score]:
    """The parameters that are numbers, and the worst relative error of those that the truth has."""
    values = as_numbers(theta)
    scores = {f"theta.{name}": one_of(value) for name, value in values.items()}
    errors = [abs(values[name] / known - 1) for name, known in true.items() if name in values and known]
    return scores | ({"theta_error": one_of(max(errors))} if errors else {})
