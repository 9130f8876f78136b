"""Schroedinger bridges between neighbouring snapshots by iterative proportional fitting (Vargas et al., arXiv 2106.02081).

For a Markov reference the bridge over all snapshots falls apart into one for each interval; all of them are done as one
batch. Time is physical everywhere: index k of a path is time start + k dt, whichever way it was simulated, and a backward
drift is the velocity in reversed time at the state that is left. An interval's two half-bridges are fitted in turn: paths
of the one, from its marginal, are what the drift of the other is regressed on. The reference enters through the first
backward drift, and as what a regression is centred on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.errors import QUALITY, AffineQuantError
from affinequant_research.schrodinger.measures import w2
from affinequant_research.schrodinger.references import Velocity, still
from affinequant_research.schrodinger.regression import REGRESSORS, Fitted, How

Samples = Float[Tensor, "n d"]
Paths = Float[Tensor, "steps+1 intervals particles d"]
MEASURED = 250
"""Particles that the ends of bridges are measured by: the cost of W2 grows faster than their square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """The intervals between snapshots, each cut into the same number of steps of its own length.

    Attributes:
        start, dt: [intervals, 1, 1].
        sigma: of the noise, sigma dW.
    """

    start: Tensor
    dt: Tensor
    steps: int
    sigma: float

    @staticmethod
    def between(times: Sequence[float], dt: float, sigma: float) -> "Intervals":
        """Those between times: `dt` at most for a step."""
        at = torch.tensor(list(times), dtype=torch.float64)[:, None, None]
        spans = at[1:] - at[:-1]
        steps = math.ceil(float(spans.max()) / dt - 1e-9)
        return Intervals(start=at[:-1], dt=spans / steps, steps=steps, sigma=sigma)

    def time(self, step: Tensor | int) -> Tensor:
        """Of an index of paths: [intervals, 1, 1]; of several [steps, 1, 1, 1], a dimension in front."""
        return self.start + step * self.dt

    def said(self, interval: int) -> str:
        """From when to when one of them is."""
        start, dt = float(self.start[interval]), float(self.dt[interval])
        return f"{start:g} to {start + self.steps * dt:g}"

    def only(self, interval: int) -> "Intervals":
        """One of them."""
        one = slice(interval, interval + 1)
        return replace(self, start=self.start[one], dt=self.dt[one])


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The drift of half-bridges: `sign` times a reference's velocity, and what was regressed beside it.

    Attributes:
        sign: 1 forward, -1 backward in time.
        fitted: None for the reference itself.
    """

    intervals: Intervals
    sign: int
    base: Velocity = still
    fitted: Fitted | None = None

    def __call__(self, step: int, x: Tensor) -> Tensor:
        """The velocity at index `step` of paths [intervals, particles, d], along the drift's own direction of time."""
        velocity = self.sign * self.base(x, self.intervals.time(step))
        return velocity if self.fitted is None else velocity + self.fitted.at(step - (self.sign < 0), x)

    def only(self, interval: int) -> "Drift":
        """That of one interval."""
        fitted = None if self.fitted is None else self.fitted.only(interval)
        return replace(self, intervals=self.intervals.only(interval), fitted=fitted)


@torch.no_grad()
def simulate(drift: Drift, start: Float[Tensor, "intervals n d"], generator: torch.Generator) -> Paths:
    """Euler-Maruyama from `start`, which stands at the end of the interval where the drift leads backward.

    Raises:
        AffineQuantError: particles leave all bounds (exit 4).
    """
    intervals, paths = drift.intervals, [start]
    noise = torch.randn(intervals.steps, *start.shape, generator=generator, dtype=start.dtype)
    noise *= intervals.sigma * intervals.dt.sqrt()
    order = range(intervals.steps) if drift.sign > 0 else range(intervals.steps, 0, -1)
    for step, shock in zip(order, noise, strict=True):
        paths.append(paths[-1] + drift(step, paths[-1]) * intervals.dt + shock)
    lost = (~paths[-1].isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if lost:
        raise AffineQuantError(
            f"particles of a {'forward' if drift.sign > 0 else 'backward'} drift leave all bounds",
            ", ".join(intervals.said(index) for index in lost),
            "use a smaller dt, a larger ridge, more particles, or snapshots in between",
            exit_code=QUALITY,
        )
    return torch.stack(paths if drift.sign > 0 else paths[::-1])


@torch.no_grad()
def regress(paths: Paths, intervals: Intervals, sign: int, base: Velocity, how: How) -> Drift:
    """The drift in direction `sign` of paths, whichever way they were simulated, centred on that of `base`."""
    here, there = (paths[:-1], paths[1:]) if sign > 0 else (paths[1:], paths[:-1])
    steps = torch.arange(intervals.steps, dtype=paths.dtype) + (sign < 0)
    velocity = (there - here) / intervals.dt
    if base is not still:
        velocity = velocity - sign * base(here, intervals.time(steps[:, None, None, None]))
    fitted = REGRESSORS[how.name](here, velocity, steps * intervals.dt[..., 0], how)
    return Drift(intervals=intervals, sign=sign, base=base, fitted=fitted)


class Ends(NamedTuple):
    """W2 of each interval's half-bridges to the marginals that they should end in."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bridges:
    """The bridges of all intervals.

    Attributes:
        forward, backward: their half-bridges.
        ahead, back: paths of each from its own marginal.
        ends: how far these end from the other.
        distances: W2 between the marginals of each interval, and the spread of its end: what `ends` are small beside.
    """

    forward: Drift
    backward: Drift
    ahead: Paths
    back: Paths
    ends: Ends
    distances: tuple[tuple[float, float], ...]


def drawn(samples: Samples, count: int, generator: torch.Generator) -> Samples:
    """`count` particles of a marginal: each sample as often as any other, those left over at random."""
    turns = math.ceil(count / len(samples))
    order = [torch.randperm(len(samples), generator=generator) for _ in range(turns)]
    return samples[torch.cat(order)[:count]]


def bridge(
    intervals: Intervals,
    marginals: Sequence[Samples],
    reference: Velocity,
    how: How,
    *,
    sweeps: int,
    particles: int,
    generator: torch.Generator,
    centred: bool = True,
    most_sweeps: int = 0,
    share: float = 0.75,
) -> Bridges:
    """Bridges over a reference between marginals, by `sweeps` of proportional fitting, and up to `most_sweeps` while there
    are half-bridges that are `stalled` by `share`: those converge the slower, the less noise a marginal's spread is of.

    Args:
        marginals: samples at the intervals' ends, one more than there are intervals.
        particles: simulated for each half-bridge.
        centred: whether a regression gives what is to be added to the reference's drift, or the whole of it.
    """
    base = reference if centred else still

    def start(which: slice) -> Tensor:
        return torch.stack([drawn(one, particles, generator) for one in marginals[which]])

    left, right = slice(None, -1), slice(1, None)
    forward = Drift(intervals=intervals, sign=1, base=reference)
    ahead = simulate(forward, start(left), generator)
    backward = regress(ahead, intervals, -1, base, how)
    distances = tuple(
        (_apart(one, other), float(other.var(0).sum().sqrt()))
        for one, other in zip(marginals[left], marginals[right], strict=True)
    )
    for sweep in range(1, max(sweeps, most_sweeps) + 1):
        back = simulate(backward, start(right), generator)
        forward = regress(back, intervals, 1, base, how)
        ahead = simulate(forward, start(left), generator)
        if sweep >= sweeps:
            ends = Ends(
                tuple(map(_apart, ahead[-1], marginals[right])),
                tuple(map(_apart, back[0], marginals[left])),
            )
            found = Bridges(forward, backward, ahead, back, ends, distances)
            if sweep >= most_sweeps or not stalled(found, share):
                return found
        backward = regress(ahead, intervals, -1, base, how)
    raise AssertionError("the last sweep returns")


def _apart(one: Samples, other: Samples) -> float:
    """W2 of the first of both, which are in no order."""
    return w2(one[:MEASURED], other[:MEASURED])


def stalled(bridges: Bridges, share: float) -> list[int]:
    """The intervals with a half-bridge that does not get to its marginal: it ends farther from it than `share` of the
    distance between both, and than a quarter of the marginal's spread."""
    worst = [max(pair) for pair in zip(*bridges.ends, strict=True)]
    return [
        index
        for index, (end, (distance, spread)) in enumerate(zip(worst, bridges.distances, strict=True))
        if not end <= max(share * distance, spread / 4)
    ]


def refuse_stalled(bridges: Bridges, share: float, where: str) -> None:
    """Do not go on from bridges that transport nothing: proportional fitting says nothing itself when supports are too far
    apart for its regression, and a reference fitted to such paths is that of particles that stay where they are.

    Raises:
        AffineQuantError: naming the intervals (exit 4).
    """
    if found := stalled(bridges, share):
        said = "; ".join(
            f"{bridges.forward.intervals.said(index)}: forward {bridges.ends.forward[index]:.3g}, "
            f"backward {bridges.ends.backward[index]:.3g} of {bridges.distances[index][0]:.3g}"
            for index in found
        )
        raise AffineQuantError(
            f"bridges that end too far from their marginals (W2 at the end, of the distance between them: {said})",
            where,
            "use regressor=affine, more particles or sweeps, a smaller dt, a larger ridge, or snapshots in between",
            exit_code=QUALITY,
        )
