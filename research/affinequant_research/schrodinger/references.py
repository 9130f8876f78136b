"""Families of reference dynamics: dX = b(X, t; theta) dt + sigma dW, and what theta may be.

A family is data: a drift, the parameters with where they start, which of them are positive. What is trained is the
logarithm of a positive parameter, so that it can neither change its sign nor stick to 0. The Brownian reference has no
drift and no family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from affinequant_research.schrodinger import systems

Theta = Mapping[str, Tensor]
"""Name -> value of each parameter."""
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(States x [*batch, d], times that broadcast against x[..., :1]) -> velocities [*batch, d]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of drifts.

    Attributes:
        start: theta where a fit begins.
        drift: (x [*batch, d], times, theta) -> [*batch, d]; see `Velocity`.
        positive: the parameters that are trained as logarithms.
        linear: whether the drift is affine in theta, all of it numbers: theta has a closed form then.
        starts: other places for some parameters to begin at, tried beside `start` at the first fit.
    """

    name: str
    start: Theta
    drift: Callable[[Tensor, Tensor, Theta], Tensor]
    positive: frozenset[str] = frozenset()
    linear: bool = False
    starts: tuple[Mapping[str, float], ...] = ()

    def at(self, theta: Theta) -> Velocity:
        """The drift of one theta."""
        return lambda x, t: self.drift(x, t, theta)


def still(x: Tensor, t: Tensor) -> Tensor:
    """No drift: the Brownian reference."""
    return torch.zeros_like(x)


def timeless(law: systems.Law) -> Callable[[Tensor, Tensor, Theta], Tensor]:
    """A law that is the same at all times as a family's drift."""
    return lambda x, t, theta: law(x, theta)


def numbers(**values: float) -> dict[str, Tensor]:
    """A theta of plain numbers, float64."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def gradient_field(name: str, dims: int, *widths: int, seed: int = 0) -> Family:
    """The field -grad U of a potential U that is a perceptron of softplus layers.

    Args:
        dims: of the state.
        widths: of the hidden layers.
        seed: of the weights at the start.
    """
    generator, start = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    sizes = (dims, *widths)
    for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
        normal = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        start[f"weight.{layer}"] = normal * inputs**-0.5
        start[f"bias.{layer}"] = torch.zeros(outputs, dtype=torch.float64)
    start["out"] = torch.randn(sizes[-1], generator=generator, dtype=torch.float64) * 0.1 * sizes[-1] ** -0.5

    def drift(x: Tensor, t: Tensor, theta: Theta) -> Tensor:
        slopes = []
        for layer in range(len(widths)):
            before = x @ theta[f"weight.{layer}"] + theta[f"bias.{layer}"]
            slopes.append(torch.sigmoid(before))
            x = torch.nn.functional.softplus(before)
        back = theta["out"].expand_as(x)
        for layer in reversed(range(len(widths))):
            back = (back * slopes[layer]) @ theta[f"weight.{layer}"].mT
        return -back

    return Family(name=name, start=start, drift=drift)


FAMILIES: Mapping[str, Family] = {
    one.name: one
    for one in (
        Family(
            name="lotka-volterra",
            start=numbers(alpha=0.1, beta=0.1, gamma=0.1, delta=0.1),
            drift=timeless(systems.lotka_volterra),
            positive=frozenset({"alpha", "beta", "gamma", "delta"}),
            linear=True,
        ),
        Family(
            name="repressilator",
            start=numbers(beta=1.0, n=1.0, k=1.0, gamma=1.0),
            drift=timeless(systems.repressilator),
            positive=frozenset({"beta", "n", "k", "gamma"}),
            starts=({"beta": 5.0, "n": 3.0}, {"beta": 20.0, "n": 2.0}),
        ),
        Family(
            name="vortex",
            start=numbers(circulation=-0.5, core=1.0, x0=0.0, y0=0.0),
            drift=timeless(systems.vortex),
            positive=frozenset({"core"}),
            starts=({"circulation": 0.5},),
        ),
        Family(
            name="springs",
            start=numbers(wall=0.1, link=0.1, drag=0.1),
            drift=timeless(systems.springs),
            positive=frozenset({"wall", "link", "drag"}),
            linear=True,
        ),
        gradient_field("genes", 5, 64, 64),
    )
}
"""By the name of the system that they are for; parameters that the system has too have its names."""
