"""What a training loop is told, and what it tells: an objective, how to minimise it, and what came of that."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from affinequant.learning.optimizers import Group

Loss = Tensor | Mapping[str, Tensor]  # named scalars are summed, and logged apart
Outcome = Literal["done", "nothing to train", "non-finite", "probe", "paused"]


class Objective(Protocol):
    """Something to minimise. If it has `progress(t)`, that is told before each step how far training is, 0 to 1, and returns
    the parameters whose optimizer state starts afresh. `state()` and `load(state)`, if it has them, are for what it knows
    beside its parameters."""

    def groups(self) -> Sequence[Group]:
        """What is trained."""
        ...

    def loss(self, batch: Any) -> Loss | Iterator[tuple[Sequence[str], Loss]]:
        """What is minimised. An iterator makes several updates of one batch: each item names groups and gives a loss that
        moves them alone, and the next is asked for when they have moved."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to minimise. `steps_per_epoch` is the number of batches that `batches(epoch)` gives.

    `optimizer` is a class of torch.optim in lower case. The exponential schedule ends at `last_rate` times the rates, the
    step is there from `step_at` of training on. `keep_best` puts back the parameters of the epoch with the least loss over
    its batches. `judge` names a probe that judges instead, after every epoch; then the start is judged as well, and what
    trains worse than nothing is undone; with `retreat` at once, and the next epoch sets out from the best one at a quarter
    of the rates. `stop_when` ends training once a probe has reached a value: `("accuracy", ">", 1)`.
    After `pause_after` epochs `fit` comes back with a state to go on from. `double_backward` is for losses that hold
    derivatives: gradients stay on where they are only measured, and fused attention, which has none twice, is not used.
    """

    epochs: int
    steps_per_epoch: int
    optimizer: str = "adamw"
    schedule: Literal["constant", "cosine", "exponential", "step"] = "constant"
    last_rate: float = 0.01
    step_at: float = 0.5
    clip_norm: float | None = None
    accumulate: int = 1
    keep_best: bool = False
    judge: str = ""
    retreat: bool = False
    probe_every: int = 0
    stop_when: tuple[str, Literal["<", "<=", ">", ">="], float] | None = None
    pause_after: int = 0
    double_backward: bool = False
    max_backoffs: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What happened. Losses are means over an epoch, steps are updates; `stopped` says why training ended. `state`: where
    it was paused, in tensors and plain values, as `Run.keep` takes them."""

    stopped: Outcome
    first: float = math.nan
    last: float = math.nan
    best: float = math.nan
    steps: int = 0
    seconds: float = 0.0
    non_finite: int = 0
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None
