"""What the experiments train: a small network whose output is read as rotations, in blocks of updates."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.fit import FitConfig, Group

BLOCK = 100
"""Updates in an epoch of `fit`: batches are made for so many at once, and progress is told after as many."""
KEPT = 20
"""Epochs between two states on disk: a minute of work at most is lost."""


class Learner:
    """The objective: what `measure` makes of a batch, to be less with the network's weights."""

    def __init__(self, net: nn.Module, rate: float, measure: Callable[[Any], Tensor]) -> None:
        self.net, self.rate, self.measure = net, rate, measure

    def groups(self) -> Sequence[Group]:
        """All weights, by the fused form of the optimizer: networks this small cost what calls cost."""
        return [Group(name="net", parameters=list(self.net.parameters()), lr=self.rate, options={"fused": True})]

    def loss(self, batch: Any) -> Tensor:
        """What is measured."""
        return self.measure(batch)


def perceptron(*widths: int) -> nn.Sequential:
    """Linears with leaky ReLUs of slope 0.01 between them, as the paper's code has them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def start_at(linear: nn.Linear, numbers: Tensor) -> None:
    """Give the last layer a bias at which the identity stands: far from where directions are not defined."""
    linear.bias.copy_(numbers)


def in_blocks(updates: int, schedule: Literal["cosine", "step"] = "cosine", **how: float) -> FitConfig:
    """Adam for so many updates.

    Raises:
        AffineQuantError: they are no whole number of blocks (exit 2).
    """
    if updates <= 0 or updates % BLOCK:
        raise AffineQuantError(f"updates is {updates}", "--set", f"give a positive multiple of {BLOCK}")
    options: dict[str, Any] = {"schedule": schedule, **how}
    return FitConfig(epochs=updates // BLOCK, steps_per_epoch=BLOCK, optimizer="adam", pause_after=KEPT, **options)


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of an epoch; -1 for those that are tested on, which are the same for all seeds."""
    return torch.Generator().manual_seed(0x5EED if epoch < 0 else 1_000_003 * (seed + 1) + epoch)
