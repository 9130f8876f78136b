"""The reference's theta by maximum likelihood of paths: least squares of their increments on b_theta.

With sigma known that is the theta of least KL(Q || P_theta) up to a constant, by Girsanov. Each increment carries noise of
sigma / sqrt(dt), of which most of the loss consists: it is the parameters that tell how far a fit is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.fit import FitConfig, FitReport, Group, fit
from affinequant_research.schrodinger.bridge import Bridges, Intervals, Paths
from affinequant_research.schrodinger.references import Family, Theta, Velocity


@dataclass(frozen=True, slots=True)
class Increments:
    """Increments of paths: states [n, d], times and lengths of steps [n, 1], velocities [n, d]."""

    x: Tensor
    t: Tensor
    dt: Tensor
    velocity: Tensor

    def some(self, count: int, generator: torch.Generator) -> "Increments":
        """`count` of them at random, or all."""
        picked = torch.randperm(len(self.x), generator=generator)[:count]
        return Increments(*(one[picked] for one in (self.x, self.t, self.dt, self.velocity)))


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted theta, the loss there, and the report of its training (none of a closed form)."""

    theta: dict[str, Tensor]
    loss: float
    report: FitReport | None = None
    config: FitConfig | None = None


def increments(intervals: Intervals, *several: Paths) -> Increments:
    """All increments of paths, forward in time whichever way these were simulated."""
    parts = []
    for paths in several:
        here = paths[:-1]
        at = intervals.time(torch.arange(intervals.steps, dtype=here.dtype)[:, None, None, None])
        shape = (*here.shape[:-1], 1)
        columns = here, at.expand(shape), intervals.dt.expand(shape), (paths[1:] - here) / intervals.dt
        parts.append([one.flatten(0, -2) for one in columns])
    return Increments(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Likelihood:
    """The objective of `fit`: mean square of velocity - b_theta, steps weighted by their length, of the same for all batches."""

    def __init__(self, family: Family, theta: Theta, rate: float) -> None:
        self.family, self.rate = family, rate
        self.free = {
            name: nn.Parameter(value.log() if name in family.positive else value.clone())
            for name, value in theta.items()
        }

    @property
    def theta(self) -> dict[str, Tensor]:
        """Theta as it is now."""
        return {name: one.exp() if name in self.family.positive else one for name, one in self.free.items()}

    def groups(self) -> Sequence[Group]:
        """All of it."""
        return [Group(name="theta", parameters=list(self.free.values()), lr=self.rate)]

    def loss(self, batch: Increments) -> Tensor:
        """What is minimised."""
        return squared(self.family.drift(batch.x, batch.t, self.theta), batch)


def squared(drift: Tensor, seen: Increments) -> Tensor:
    """Mean over time of |velocity - drift|^2."""
    return ((seen.velocity - drift).square().sum(-1, keepdim=True) * seen.dt).sum() / seen.dt.sum()


def maximise(
    family: Family,
    theta: Theta,
    seen: Increments,
    *,
    updates: int,
    rate: float,
    starts: Sequence[Mapping[str, float]] = (),
) -> Fit:
    """Theta by Adam from `theta`, and from each of `starts` as well, of which the best is kept."""
    found = []
    config = FitConfig(epochs=math.ceil(updates / 20), steps_per_epoch=20, optimizer="adam", schedule="cosine")
    for start in ({}, *starts):
        begin = {name: torch.full_like(value, start[name]) if name in start else value for name, value in theta.items()}
        objective = Likelihood(family, begin, rate)
        report = fit(objective, lambda epoch: [seen] * 20, config)
        with torch.no_grad():
            values = {name: value.detach().clone() for name, value in objective.theta.items()}
            found.append(Fit(values, float(objective.loss(seen)), report, config))
    return min(found, key=lambda one: one.loss)


@torch.no_grad()
def least_squares(family: Family, seen: Increments) -> Fit:
    """Theta of a linear family in closed form; a positive parameter that comes out below 0 is the least positive number."""
    none = {name: torch.zeros_like(value) for name, value in family.start.items()}
    shift = family.drift(seen.x, seen.t, none)
    columns = [
        family.drift(seen.x, seen.t, none | {name: torch.ones_like(value)}) - shift
        for name, value in family.start.items()
    ]
    features, weight = torch.stack(columns, dim=-1), seen.dt.sqrt()[..., None]
    design = (features * weight).flatten(0, 1)
    left = ((seen.velocity - shift)[..., None] * weight).flatten(0, 1)
    values = torch.linalg.solve(design.mT @ design, design.mT @ left)[:, 0]
    least = torch.finfo(values.dtype).tiny
    theta = {
        name: value.clamp(min=least) if name in family.positive else value
        for name, value in zip(family.start, values, strict=True)
    }
    return Fit(theta, float(squared(family.drift(seen.x, seen.t, theta), seen)))


@torch.no_grad()
def path_kl(bridges: Bridges, reference: Velocity) -> Float[Tensor, " intervals"]:
    """KL(Q || P) of each interval's forward half-bridge: the mean of integral |b_Q - b_P|^2 dt / (2 sigma^2) on its paths.

    Both start at the same marginal. What the regression's noise adds to b_Q adds to this."""
    intervals, total = bridges.forward.intervals, torch.zeros(())
    for step, x in enumerate(bridges.ahead[:-1]):
        gap = bridges.forward(step, x) - reference(x, intervals.time(step))
        total = total + gap.square().sum(-1).mean(-1) * intervals.dt[:, 0, 0]
    return total / (2 * intervals.sigma**2)


def as_numbers(theta: Theta) -> dict[str, float]:
    """The parameters that are numbers, to print."""
    return {name: float(value) for name, value in theta.items() if not value.ndim}
