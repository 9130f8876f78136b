"""Processes whose particles are seen now and then, and never twice: what they obey, and snapshots of them.

Lotka-Volterra and the repressilator have the parameters that the authors' own data were made with, so snapshots of these
are theirs in law. The vortex, the gene programme and the springs stand where the authors take measured data: currents of
the Gulf of Mexico, cells, and motion capture.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from affinequant.errors import AffineQuantError, unknown_name

STEP = 0.002
"""Of Euler-Maruyama, in units of time."""
SPARED = 1e-9
"""Taken from a number of steps before it is rounded up: (1.5 - 0) / 0.01 may come out above 150."""

Law = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""(states [n, d], parameters by name: numbers or tensors) -> drift [n, d]. A parameter's gradient passes through."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshots:
    """Particles at some times, those of one time not linked to those of another.

    Attributes:
        times: ascending.
        samples: a tensor [particles, d] in float64 for each time; their number may differ.
        sigma: of the noise `sigma dW` in every coordinate, which is known.

    Raises:
        AffineQuantError: it is not that, with what is wrong (exit 2).
    """

    times: tuple[float, ...]
    samples: tuple[Tensor, ...]
    sigma: float

    def __post_init__(self) -> None:
        if len(self.times) != len(self.samples) or not self.times:
            raise _no_snapshots(f"there are {len(self.times)} times and {len(self.samples)} samples")
        if not all(map(math.isfinite, self.times)) or any(a >= b for a, b in pairwise(self.times)):
            raise _no_snapshots(f"the times are {self.times}, which do not ascend")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise _no_snapshots(f"sigma is {self.sigma}, and is to be above 0")
        for time, one in zip(self.times, self.samples, strict=True):
            fits = one.ndim == 2 and len(one) and one.shape[1:] == self.samples[0].shape[1:]
            if one.dtype != torch.float64 or not fits:
                raise _no_snapshots(f"what was seen at {time:g} is {one.dtype} of the shape {tuple(one.shape)}")
            if not bool(torch.isfinite(one).all()):
                raise _no_snapshots(f"what was seen at {time:g} is not finite")

    @property
    def dims(self) -> int:
        """How many coordinates a particle has."""
        return self.samples[0].shape[1]

    def split(self, held_out: Sequence[float] = ()) -> "tuple[Snapshots, Snapshots]":
        """(those to train on, those held out): the times given, or every second one; the ends are always trained on.

        Raises:
            AffineQuantError: a time at which nothing was seen, or an end of the series (exit 2).
        """
        held = {float(time) for time in held_out} or set(self.times[1:-1:2])
        if strange := sorted(held - set(self.times[1:-1])):
            inner = ", ".join(f"{time:g}" for time in self.times[1:-1])
            raise AffineQuantError(
                f"{strange[0]:g} cannot be held out",
                "--set held_out",
                f"choose among the inner times: {inner or 'none'}",
            )
        if not held:
            raise AffineQuantError(f"{len(self.times)} times leave none to hold out", "snapshots", "give three or more")
        return self._only(set(self.times) - held), self._only(held)

    def _only(self, times: set[float]) -> "Snapshots":
        kept = [(time, one) for time, one in zip(self.times, self.samples, strict=True) if time in times]
        return Snapshots(times=tuple(t for t, _ in kept), samples=tuple(one for _, one in kept), sigma=self.sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A process dX = law(X) dt + sigma dW and how it is looked at.

    Attributes:
        true: the parameters of the law.
        low, high: the box in which particles start, uniformly, at the first time.
        times: of the snapshots.
        particles: in a snapshot.
        axes: names of the coordinates.
    """

    name: str
    about: str
    law: Law
    true: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    low: tuple[float, ...]
    high: tuple[float, ...]
    times: tuple[float, ...]
    particles: int
    sigma: float = 0.1
    axes: tuple[str, ...]

    def snapshots(
        self, seed: int, purpose: str, times: Sequence[float] = (), particles: int = 0, step: float = STEP
    ) -> Snapshots:
        """What is seen at these times (empty: the system's own), each time of particles that no other time sees.

        Args:
            purpose: what they are for: the same seed gives other particles for another purpose, e.g. `data` and `oracle`.
            particles: of each time; 0 for as many as the system has.

        Raises:
            AffineQuantError: times that do not ascend or begin before the process does (exit 2).
        """
        seen = tuple(float(time) for time in times or self.times)
        if seen[0] < self.times[0]:
            raise AffineQuantError(
                f"{self.name} begins at {self.times[0]:g}, and is to be seen at {seen[0]:g}",
                "times",
                "ask for later ones",
            )
        generator, count = seeded(seed, f"{self.name}/{purpose}"), particles or self.particles
        box = torch.tensor([self.low, self.high], dtype=torch.float64)
        drawn = torch.rand(len(seen), count, len(self.low), generator=generator, dtype=torch.float64)
        state, at, samples = box[0] + drawn * (box[1] - box[0]), self.times[0], []
        for time in seen:
            state = self._onwards(state, at, time, step, generator)
            samples.append(state[0])
            state, at = state[1:], time
        return Snapshots(times=seen, samples=tuple(samples), sigma=self.sigma)

    def _onwards(self, state: Tensor, start: float, end: float, step: float, generator: torch.Generator) -> Tensor:
        """Every particle from one time to another by Euler-Maruyama; [groups, n, d]."""
        groups, flat = state.shape[:2], state.flatten(0, 1)
        steps = math.ceil((end - start) / step - SPARED)
        dt = (end - start) / max(steps, 1)
        for _ in range(steps):
            noise = torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
            flat = flat + self.law(flat, self.true) * dt + self.sigma * math.sqrt(dt) * noise
        return flat.unflatten(0, groups)


def seeded(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of a seed for one purpose, which have nothing to do with those for another."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def lotka_volterra(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Prey and predators: linear in the parameters alpha, beta (prey), gamma, delta (predators)."""
    prey, predators = x[..., 0], x[..., 1]
    met = prey * predators
    return torch.stack([p["alpha"] * prey - p["beta"] * met, p["delta"] * met - p["gamma"] * predators], -1)


def repressilator(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Three genes, each made at a rate beta that the one before it represses, with Hill's exponent n about k; gamma is
    the rate at which they decay."""
    repressor = x.clamp_min(0).roll(1, -1) + 1e-8  # what noise has taken below 0 represses as nothing does
    return p["beta"] / (1 + (repressor / p["k"]) ** p["n"]) - p["gamma"] * x


def vortex(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Lamb and Oseen's: about a centre (x0, y0) the speed at distance r is circulation / (2 pi r) (1 - exp(-r^2 / core^2)),
    against the clock where the circulation is positive. [..., 2]."""
    across, up = x[..., 0] - p["x0"], x[..., 1] - p["y0"]
    squared = across.square() + up.square() + 1e-12  # the limit at the centre, where the speed is 0
    turning = p["circulation"] / (2 * math.pi) * -torch.expm1(-squared / p["core"] ** 2) / squared
    return torch.stack([-turning * up, turning * across], -1)


def springs(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Unit masses on a line: states are their displacements and then their velocities. The first hangs on a wall by a
    spring of stiffness `wall`, each of the others on the one before it by one of stiffness `link`; `drag` brakes all."""
    place, speed = x.chunk(2, -1)
    stretched = place - torch.nn.functional.pad(place[..., :-1], (1, 0))
    wall, links = p["wall"] * stretched[..., :1], p["link"] * stretched[..., 1:]
    pull = torch.cat([wall, links], -1)
    onwards = torch.nn.functional.pad(pull[..., 1:], (0, 1))
    return torch.cat([speed, onwards - pull - p["drag"] * speed], -1)


FATES = ((2.0, 1.2, 0.6, -0.4, 0.2), (2.0, -1.2, -0.2, 0.4, 0.6))
"""Where the branches of the gene programme end, in five components of expression."""


def genes(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Minus the gradient of -rate width^2 log(a Gaussian of that width at each of `FATES`, added up): every cell is drawn
    to the mean of the fates, and from there to the nearer one."""
    fates = torch.tensor(FATES, dtype=x.dtype)
    weights = (-(x[..., None, :] - fates).square().sum(-1) / (2 * p["width"] ** 2)).softmax(-1)
    return p["rate"] * (weights @ fates - x)


def system(name: str) -> System:
    """The system of that name.

    Raises:
        AffineQuantError: there is none, with the nearest spelling.
    """
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS, where="schrodinger")
    return SYSTEMS[name]


@functools.lru_cache(maxsize=8)
def simulated(name: str, seed: int) -> Snapshots:
    """The data of a system and a seed. They are kept: every pass of a refinement looks at them, and they take a second."""
    return system(name).snapshots(seed, "data")


def _no_snapshots(what: str) -> AffineQuantError:
    return AffineQuantError(what, "snapshots", "give ascending times and particles [n, d] of one d for each of them")


def _times(count: int, spacing: float) -> tuple[float, ...]:
    return tuple(spacing * index for index in range(count))


def _table(*systems: System) -> Mapping[str, System]:
    return MappingProxyType({one.name: one for one in systems})


def _frozen(**values: float) -> Mapping[str, float]:
    return MappingProxyType(values)


SYSTEMS = _table(
    System(
        name="lotka-volterra",
        about="prey and predators",
        law=lotka_volterra,
        true=_frozen(alpha=1.0, beta=0.4, gamma=0.4, delta=0.1),
        low=(5.0, 4.0),
        high=(5.1, 4.1),
        times=_times(9, 1.0),
        particles=50,
        axes=("prey", "predators"),
    ),
    System(
        name="repressilator",
        about="three genes that repress one another in a ring",
        law=repressilator,
        true=_frozen(beta=10.0, n=3.0, k=1.0, gamma=1.0),
        low=(1.0, 1.0, 2.0),
        high=(1.1, 1.1, 2.1),
        times=_times(11, 0.75),
        particles=50,
        axes=("gene 1", "gene 2", "gene 3"),
    ),
    System(
        name="vortex",
        about="drifters in a vortex of Lamb and Oseen",
        law=vortex,
        true=_frozen(circulation=-6.0, core=1.0, x0=0.1, y0=0.1),
        low=(-0.05, -0.8),
        high=(0.05, -0.7),
        times=_times(9, 1.0),
        particles=111,
        axes=("x", "y"),
    ),
    System(
        name="genes",
        about="cells that part into two fates, five components of expression",
        law=genes,
        true=_frozen(rate=1.0, width=0.9),
        low=(-0.1,) * 5,
        high=(0.1,) * 5,
        times=_times(5, 1.0),
        particles=300,
        axes=tuple(f"component {index}" for index in range(1, 6)),
    ),
    System(
        name="springs",
        about="two masses on springs",
        law=springs,
        true=_frozen(wall=1.0, link=2.0, drag=0.1),
        low=(0.9, 1.9, -0.1, -0.1),
        high=(1.1, 2.1, 0.1, 0.1),
        times=_times(9, 0.75),
        particles=100,
        axes=("place 1", "place 2", "speed 1", "speed 2"),
    ),
)
"""Name -> system."""
