"""Chaotic systems to learn: simulated by Runge-Kutta of fourth order, on their attractor, z-scored."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from affinequant.errors import unknown_name
from affinequant_research.alrnn.model import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """dx/dt = field(x), looked at every `step` units of time.

    Attributes:
        field: of states [dimensions, trajectories].
        start: trajectories start within about one unit of it.
        exponent: the largest Lyapunov exponent per unit of time, as literature has it.
        axes: the two dimensions that pictures show, and their names.
        transient: units of time on the way to the attractor, which are left out.
    """

    field: Callable[[Floats], Floats]
    start: tuple[float, ...]
    step: float
    exponent: float
    axes: tuple[int, int]
    names: tuple[str, str]
    transient: float = 50.0


def lorenz63(x: Floats) -> Floats:
    """Lorenz 1963: sigma 10, rho 28, beta 8/3."""
    a, b, c = x
    return np.array([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])


def roessler(x: Floats) -> Floats:
    """Rössler 1976: a and b .2, c 5.7."""
    a, b, c = x
    return np.array([-b - c, a + 0.2 * b, 0.2 + c * (a - 5.7)])


def lorenz96(x: Floats) -> Floats:
    """Lorenz 1996: a ring of variables under the force 8."""
    ring = np.concatenate([x[-2:], x, x[:1]])
    return (ring[3:] - ring[:-3]) * ring[1:-2] - x + 8


SYSTEMS: Mapping[str, System] = {
    "lorenz63": System(
        field=lorenz63, start=(1.0, 1.0, 25.0), step=0.01, exponent=0.906, axes=(0, 2), names=("x", "z")
    ),
    "roessler": System(
        field=roessler,
        start=(1.0, 1.0, 0.0),
        step=0.08,
        exponent=0.071,
        axes=(0, 1),
        names=("x", "y"),
        transient=200.0,
    ),
    "lorenz96": System(field=lorenz96, start=(8.0,) * 20, step=0.04, exponent=1.7, axes=(0, 1), names=("x1", "x2")),
}
"""Steps of Lorenz-63 and Rössler: by the autocorrelation of the series that the authors trained on."""


def runge_kutta(field: Callable[[Floats], Floats], x: Floats, step: float) -> Floats:
    """The state a step later, of the classical fourth order."""
    first = field(x)
    second = field(x + step / 2 * first)
    third = field(x + step / 2 * second)
    fourth = field(x + step * third)
    return x + step / 6 * (first + 2 * second + 2 * third + fourth)


@functools.lru_cache(maxsize=2)
def trajectories(name: str, steps: int) -> tuple[Floats, Floats]:
    """Two of one system from different starts, the same at every call: to train on and to compare with, [steps, N] each,
    both z-scored by the first one's mean and deviation. Not to be written to.

    Raises:
        AffineQuantError: there is no such system.
    """
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS, where="--set system")
    system = SYSTEMS[name]
    start = np.array(system.start)[:, None]
    x = start + np.random.default_rng(0).uniform(-1, 1, (len(start), 2))
    for _ in range(round(system.transient / system.step)):
        x = runge_kutta(system.field, x, system.step)
    made = np.empty((2, steps, len(start)))
    for now in range(steps):
        made[:, now] = x.T
        x = runge_kutta(system.field, x, system.step)
    train, other = (made - made[0].mean(0)) / made[0].std(0)
    return train, other
