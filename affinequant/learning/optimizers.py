"""Optimizers: torch's own, by name, each group of parameters with its own options; and how their rates fall."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda t, last, at: 1.0,
    "cosine": lambda t, last, at: 0.5 * (1 + math.cos(math.pi * t)),
    "exponential": lambda t, last, at: last**t,
    "step": lambda t, last, at: last if t >= at else 1.0,
}
"""(How far training is, 0 to 1; `FitConfig.last_rate`; `FitConfig.step_at`) -> what the rates are multiplied with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share a learning rate, and whatever else the optimizer takes: `options={"betas": (0.9, 0.95)}`."""

    name: str
    parameters: Sequence[torch.nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def new_optimizer(name: str, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The class of torch.optim that is called `name` in lower case, on the groups.

    Raises:
        ValueError: there is none that takes one step at a time, or it does not take what a group gives.
    """
    known: dict[str, Any] = {key.lower(): one for key, one in vars(torch.optim).items() if inspect.isclass(one)}
    if name not in known or name in ("optimizer", "lbfgs"):  # the base of all; one that calls the loss itself
        raise ValueError(f"torch has no optimizer {name!r} that takes one step at a time")
    takes, entries = inspect.signature(known[name]).parameters.keys(), []
    for group in groups:
        decay = {"weight_decay": group.weight_decay} if "weight_decay" in takes or group.weight_decay else {}
        entry = {**group.options, **decay, "lr": group.lr, "params": list(group.parameters)}
        if unknown := entry.keys() - takes:
            raise ValueError(f"{name} takes no {', '.join(sorted(unknown))} for the group {group.name}")
        entries.append(entry)
    return known[name](entries)
