"""Regressions of a drift on particles' paths: for each step an affine map, a Gaussian process, a network on top of the affine.

Everything is done for all intervals between snapshots at once, the first dimension of a batch. Velocities at a step k of
an interval are regressed on the states there; what comes out is asked for step k again. Affine maps are exact for bridges
between Gaussians, and go on straight where no particle was: a half-bridge has to get to a marginal that it has not seen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.fit import FitConfig, Group, fit

States = Float[Tensor, "steps intervals particles d"]
JITTER = 1e-6
"""On the diagonal of the Gaussian process, as the authors have it."""
WIDTH = 1.5
"""Of a bump, in standard deviations of the particles."""
POINTS = 8000
"""Most points of an exact Gaussian process: its kernel takes 8 n^2 bytes, twice."""


class Fitted(Protocol):
    """A regressed velocity."""

    def at(self, step: int, x: Tensor) -> Tensor:
        """At step `step`, of x [intervals, particles, d]."""
        ...

    def only(self, interval: int) -> "Fitted":
        """That of one interval."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that it consists of."""
        ...


@dataclass(frozen=True, slots=True)
class Affine:
    """A map for each step and interval: slope [steps, intervals, d, d] of row vectors, shift [steps, intervals, 1, d]."""

    slope: Tensor
    shift: Tensor

    def at(self, step: int, x: Tensor) -> Tensor:
        """The velocity."""
        return torch.baddbmm(self.shift[step], x, self.slope[step])

    def only(self, interval: int) -> "Affine":
        """That of one interval."""
        return Affine(self.slope[:, interval : interval + 1], self.shift[:, interval : interval + 1])

    def tensors(self) -> dict[str, Tensor]:
        """Slopes and shifts."""
        return {"slope": self.slope, "shift": self.shift}


def affine(x: States, velocity: States, ridge: float) -> Affine:
    """Ridge regression of velocities on states for each step: the slope is drawn to 0 as by `ridge` x the mean variance of
    the states at that step, the shift is not."""
    centre, middle = x.mean(-2, keepdim=True), velocity.mean(-2, keepdim=True)
    away = x - centre
    spread = away.mT @ away / x.shape[-2]
    # Particles that start at one point have no spread: the least number keeps their slope at 0.
    amount = ridge * spread.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    spread = spread + amount[..., None, None] * torch.eye(x.shape[-1], dtype=x.dtype)
    slope = torch.linalg.solve(spread, away.mT @ (velocity - middle) / x.shape[-2])
    return Affine(slope, middle - centre @ slope)


@dataclass(frozen=True, slots=True)
class Bumps:
    """Gaussian bumps for each step and interval on top of affine maps, in states that `map` has made white: for marginals
    that are bent. Far from the particles nothing of them is left.

    Attributes:
        map: [steps, intervals, d, d]. centres: [steps, intervals, m, d]. weights: [steps, intervals, m, d].
    """

    below: Affine
    map: Tensor
    centres: Tensor
    weights: Tensor

    def at(self, step: int, x: Tensor) -> Tensor:
        """The velocity."""
        return self.below.at(step, x) + _bumps(x @ self.map[step], self.centres[step]) @ self.weights[step]

    def only(self, interval: int) -> "Bumps":
        """That of one interval."""
        parts = (part[:, interval : interval + 1] for part in (self.map, self.centres, self.weights))
        return Bumps(self.below.only(interval), *parts)

    def tensors(self) -> dict[str, Tensor]:
        """The affine's and the bumps'."""
        return self.below.tensors() | {"map": self.map, "centres": self.centres, "weights": self.weights}


def _bumps(white: Tensor, centres: Tensor) -> Tensor:
    return torch.exp(torch.cdist(white, centres).square() * (-0.5 / WIDTH**2))


def bent(x: States, velocity: States, ridge: float, *, count: int = 40, ratio: float = 0.3) -> Bumps:
    """The affine fit, then bumps about `count` of the particles on what it leaves: the mean of a Gaussian process that is
    made of those bumps, with `ratio` of its variance to that of the noise."""
    below = affine(x, velocity, ridge)
    away = x - x.mean(-2, keepdim=True)
    spread = away.mT @ away / x.shape[-2]
    amount = ridge * spread.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    white = torch.linalg.inv(torch.linalg.cholesky(spread + amount[..., None, None] * eye)).mT
    seen = x @ white
    centres = seen[..., :count, :]
    features, kernel = _bumps(seen, centres), _bumps(centres, centres)
    left = features.mT @ (velocity - (x @ below.slope + below.shift))
    matrix = features.mT @ features + (kernel + JITTER * torch.eye(kernel.shape[-1], dtype=x.dtype)) / ratio
    return Bumps(below, white, centres, torch.cholesky_solve(left, torch.linalg.cholesky(matrix)))


@dataclass(frozen=True, slots=True)
class Process:
    """The mean of a Gaussian process: points [intervals, n, d + 1] (state and elapsed time), weights [intervals, n, d]."""

    points: Tensor
    weights: Tensor
    times: Tensor
    """[intervals, steps]"""

    def at(self, step: int, x: Tensor) -> Tensor:
        """The velocity."""
        time = self.times[:, step, None, None].expand(*x.shape[:-1], 1)
        return torch.exp(-torch.cdist(torch.cat([x, time], dim=-1), self.points)) @ self.weights

    def only(self, interval: int) -> "Process":
        """That of one interval."""
        one = slice(interval, interval + 1)
        return Process(self.points[one], self.weights[one], self.times[one])

    def tensors(self) -> dict[str, Tensor]:
        """Points, weights, times."""
        return {"points": self.points, "weights": self.weights, "times": self.times}


def process(x: States, velocity: States, times: Tensor, sigma: float) -> Process:
    """The exact Gaussian process of the authors: kernel exp(-r) of length 1 and variance 1/dt, noise sigma^2/dt, hence the
    mean K* (K + sigma^2 I)^-1 v with a kernel of variance 1; by Cholesky, one inverse for all outputs.

    Args:
        times: [intervals, steps], of each step.

    Raises:
        AffineQuantError: more than `POINTS` points an interval (exit 2).
    """
    steps, intervals, particles, _ = x.shape
    count = steps * particles
    if count > POINTS:
        raise AffineQuantError(
            f"{steps} steps of {particles} particles are {count} points for an exact Gaussian process",
            "--set regressor",
            f"take at most {POINTS}: fewer particles, a longer dt, or regressor=affine",
        )
    time = times.mT[:, :, None, None].expand(steps, intervals, particles, 1)
    points = torch.cat([x, time], dim=-1).transpose(0, 1).reshape(intervals, count, -1)
    values = velocity.transpose(0, 1).reshape(intervals, count, -1)
    weights = torch.empty_like(values)
    for index in range(intervals):  # one kernel in memory at a time
        kernel = torch.exp(-torch.cdist(points[index], points[index]))
        kernel.diagonal().add_(sigma**2 + JITTER)
        weights[index] = torch.cholesky_solve(values[index], torch.linalg.cholesky(kernel))
    return Process(points, weights, times)


@dataclass(frozen=True, slots=True)
class Residual:
    """A perceptron of one hidden layer for each interval on top of affine maps; it sees states in the units of its interval
    and how far of it is gone, and gives nothing but what the affine left."""

    below: Affine
    weights: tuple[Tensor, ...]
    """Into the hidden layer [intervals, d + 1, width], its bias [intervals, 1, width], out of it [intervals, width, d]."""
    scale: tuple[Tensor, ...]
    """Mean and spread of states, spread of what is left: [intervals, 1, d]."""

    def at(self, step: int, x: Tensor) -> Tensor:
        """The velocity."""
        done = torch.full_like(x[..., :1], step / len(self.below.slope))
        return self.below.at(step, x) + _perceptron(self.weights, self.scale, x, done)

    def only(self, interval: int) -> "Residual":
        """That of one interval."""
        one = slice(interval, interval + 1)
        weights, scale = (tuple(part[one] for part in parts) for parts in (self.weights, self.scale))
        return Residual(self.below.only(interval), weights, scale)

    def tensors(self) -> dict[str, Tensor]:
        """The affine's, and the network's."""
        named = zip(("in", "bias", "out", "mean", "spread", "unit"), (*self.weights, *self.scale), strict=True)
        return self.below.tensors() | dict(named)


def _perceptron(weights: Sequence[Tensor], scale: Sequence[Tensor], x: Tensor, done: Tensor) -> Tensor:
    inside = torch.cat([(x - scale[0]) / scale[1], 2 * done - 1], dim=-1)
    hidden = torch.tanh(torch.baddbmm(weights[1], inside, weights[0]))
    # Bounded: far from its particles the affine alone should speak.
    return scale[2] * (hidden @ weights[2])


@dataclass(kw_only=True)
class _Left:
    """What the perceptrons of all intervals minimise; a batch is (x, share of the interval that is gone, what is left)."""

    weights: list[nn.Parameter]
    scale: tuple[Tensor, ...]
    rate: float

    def groups(self) -> list[Group]:
        return [Group(name="residual", parameters=self.weights, lr=self.rate)]

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, done, left = batch
        return ((_perceptron(self.weights, self.scale, x, done) - left) / self.scale[2]).square().mean()


def residual(
    x: States, velocity: States, ridge: float, generator: torch.Generator, *, width: int = 32, updates: int = 200
) -> Residual:
    """The affine fit, then a perceptron for each interval on what it leaves, trained by Adam on random points."""
    below = affine(x, velocity, ridge)
    steps, intervals, particles, dims = x.shape
    left = velocity - (x @ below.slope + below.shift)
    done = (torch.arange(steps, dtype=x.dtype) / steps)[:, None, None, None].expand(steps, intervals, particles, 1)
    flat = [one.transpose(0, 1).reshape(intervals, steps * particles, -1) for one in (x, done, left)]
    scale = flat[0].mean(1, keepdim=True), flat[0].std(1, keepdim=True) + 1e-9, flat[2].std(1, keepdim=True) + 1e-9
    drawn = torch.randn(intervals, dims + 1, width, generator=generator, dtype=x.dtype) * (dims + 1) ** -0.5
    start = drawn, torch.zeros(intervals, 1, width, dtype=x.dtype), torch.zeros(intervals, width, dims, dtype=x.dtype)
    objective = _Left(weights=[nn.Parameter(one) for one in start], scale=scale, rate=1e-2)

    def batches(epoch: int) -> list[tuple[Tensor, ...]]:
        picked = torch.randint(steps * particles, (1024,), generator=generator)
        return [tuple(one[:, picked] for one in flat)]

    with torch.enable_grad():
        fit(objective, batches, FitConfig(epochs=updates, steps_per_epoch=1, optimizer="adam", schedule="cosine"))
    return Residual(below, tuple(one.detach() for one in objective.weights), scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How drifts are regressed. `name`: of `REGRESSORS`."""

    name: str = "affine"
    ridge: float = 0.01
    sigma: float = 0.1
    generator: torch.Generator = dataclasses.field(default_factory=torch.Generator)


REGRESSORS: Mapping[str, Callable[[States, States, Tensor, How], Fitted]] = {
    "affine": lambda x, velocity, times, how: affine(x, velocity, how.ridge),
    "bent": lambda x, velocity, times, how: bent(x, velocity, how.ridge),
    "gp": lambda x, velocity, times, how: process(x, velocity, times, how.sigma),
    "mlp": lambda x, velocity, times, how: residual(x, velocity, how.ridge, how.generator),
}
"""Name -> (states, velocities, elapsed times [intervals, steps], how) -> what was fitted."""
