"""The one training loop. An objective says what to minimise; everything else is data."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    parameters: Sequence[torch.nn.Parameter]
    lr: float
    weight_decay: float = 0.0


class Objective(Protocol):
    """Something to minimise."""

    def groups(self) -> Sequence[Group]:
        """What is trained."""
        ...

    def loss(self, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """A scalar, or named scalars that are summed and logged apart."""
        ...

    def progress(self, t: float) -> Sequence[torch.nn.Parameter]:
        """Told before each step how far training is, 0 to 1; returns parameters whose optimizer state starts afresh."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to minimise. `steps_per_epoch` is the number of batches that `batches(epoch)` gives.

    `keep_best` puts back the parameters of the epoch with the least loss over its batches. `judge` names a probe that
    judges instead, after every epoch; then the start is judged as well, and what trains worse than nothing is undone.
    """

    epochs: int
    steps_per_epoch: int
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None
    accumulate: int = 1
    keep_best: bool = False
    judge: str = ""
    probe_every: int = 0
    max_backoffs: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What happened. Losses are means over an epoch; `stopped` says why training ended."""

    first: float
    last: float
    best: float
    steps: int
    seconds: float
    non_finite: int
    stopped: Literal["done", "nothing to train", "non-finite"]
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)


_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def fit(
    objective: Objective,
    batches: Callable[[int], Iterable[Any]],
    config: FitConfig,
    probes: Mapping[str, Callable[[], float]] | None = None,
) -> FitReport:
    """Minimise `objective` over `batches(epoch)` for every epoch.

    A non-finite loss or gradient takes the parameters back to the last good state (the start of an epoch whose loss was
    finite), forgets the optimizer's state and halves every rate; after `max_backoffs` of these the last good state
    stands and the report says so. No printing, no file access, no choice of device.

    Args:
        probes: named measurements, taken every `probe_every` epochs and logged as series; the one that judges is taken
            at the start and after every epoch.

    Raises:
        KeyError: `config.judge` names no probe.
    """
    probes = dict(probes or {})
    judge = probes.pop(config.judge) if config.judge else None
    groups = [group for group in objective.groups() if group.parameters]
    parameters = [parameter for group in groups for parameter in group.parameters]
    if not parameters or config.epochs == 0:
        return FitReport(
            first=math.nan, last=math.nan, best=math.nan, steps=0, seconds=0.0, non_finite=0, stopped="nothing to train"
        )
    state = _State(objective, groups, parameters, config)
    began = time.perf_counter()
    if judge is not None:
        state.judge(judge())
    while state.non_finite <= config.max_backoffs:
        if state.epoch == config.epochs:
            if state.judge_end():
                break
            state.back_off()
            continue
        mean = state.run_epoch(batches(state.epoch))
        if mean is None:
            state.back_off()
            continue
        state.finish_epoch(mean, probes)
        if judge is not None:
            state.judge(judge())
        else:
            state.judge(state.evaluate(batches(state.epoch - 1)) if config.keep_best else mean)
    return state.report(time.perf_counter() - began)


class _State:
    """One fit's moving parts. `good`: the newest parameters, at an epoch's start, whose loss was seen to be finite."""

    def __init__(
        self, objective: Objective, groups: list[Group], parameters: list[torch.nn.Parameter], config: FitConfig
    ) -> None:
        self.objective, self.groups, self.parameters, self.config = objective, groups, parameters, config
        self.rate, self.epoch, self.steps, self.non_finite = 1.0, 0, 0, 0
        self.series: dict[str, list[float]] = {"loss": []}
        self.good, self.good_epoch = self._copies(), 0
        self.best, self.best_values = math.inf, self.good
        self.last_batch: Any = None
        self.probe_names: set[str] = set()
        self.optimizer = self._new_optimizer()

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return _OPTIMIZERS[self.config.optimizer](
            [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay} for g in self.groups]
        )

    def run_epoch(self, batches: Iterable[Any]) -> float | None:
        """Mean loss of the epoch, or None at the first non-finite value."""
        start, total, terms = self._copies(), 0.0, {}
        count = self.config.steps_per_epoch
        span = max(1, self.config.epochs * count)
        for index, batch in enumerate(batches):
            t = min(1.0, (self.epoch * count + index) / span)
            for parameter in self.objective.progress(t):
                self.optimizer.state.pop(parameter, None)
            loss, parts = _summed(self.objective.loss(batch))
            size = min(self.config.accumulate, count - index // self.config.accumulate * self.config.accumulate)
            (loss / size).backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                return None
            if index == 0:
                self.good, self.good_epoch = start, self.epoch
            ends = (index + 1) % self.config.accumulate == 0 or index + 1 == count
            if ends and not self._step(t):
                return None
            self.last_batch = batch
            total += value
            for name, part in parts.items():
                terms[name] = terms.get(name, 0.0) + part / count
        for name, part in terms.items():
            self.series.setdefault(name, []).append(part)
        return total / count

    def _step(self, t: float) -> bool:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return False
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        factor = self.rate * (0.5 * (1 + math.cos(math.pi * t)) if self.config.schedule == "cosine" else 1.0)
        for entry, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            entry["lr"] = group.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return True

    def judge_end(self) -> bool:
        """Whether the parameters after the last step still give a finite loss."""
        return math.isfinite(self.evaluate([self.last_batch]))

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Mean loss at the present parameters."""
        with torch.no_grad():
            losses = [float(_summed(self.objective.loss(batch))[0]) for batch in batches]
        return sum(losses) / len(losses)

    def back_off(self) -> None:
        """Back to the last good parameters at half the rates; epochs after them are done again."""
        self.non_finite += 1
        self.rate /= 2
        self._restore(self.good)
        for name, values in self.series.items():
            every = self.config.probe_every if name in self.probe_names else 1
            del values[self.good_epoch // every + (name == self.config.judge) :]
        self.epoch = self.good_epoch
        self.optimizer = self._new_optimizer()

    def judge(self, score: float) -> None:
        """Remember the present parameters if `score` is the least so far."""
        if self.config.judge:
            self.series.setdefault(self.config.judge, []).append(score)
        if score < self.best:
            self.best = score
            if self.config.keep_best or self.config.judge:
                self.best_values = self._copies()

    def finish_epoch(self, mean: float, probes: Mapping[str, Callable[[], float]]) -> None:
        """Log the epoch."""
        self.epoch += 1
        self.series["loss"].append(mean)
        if self.config.probe_every and self.epoch % self.config.probe_every == 0:
            self.probe_names = set(probes)
            for name, probe in probes.items():
                self.series.setdefault(name, []).append(probe())

    def report(self, seconds: float) -> FitReport:
        """The report, with the best parameters put back where that was asked for."""
        losses = self.series["loss"]
        done = self.epoch == self.config.epochs and self.non_finite <= self.config.max_backoffs
        if self.config.keep_best or self.config.judge:
            self._restore(self.best_values)
        elif not done:
            self._restore(self.good)
        self.optimizer.zero_grad(set_to_none=True)
        return FitReport(
            first=losses[0] if losses else math.nan,
            last=losses[-1] if losses else math.nan,
            best=self.best if losses else math.nan,
            steps=self.steps,
            seconds=seconds,
            non_finite=self.non_finite,
            stopped="done" if done else "non-finite",
            series=self.series,
        )

    def _restore(self, values: list[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def _summed(loss: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    if isinstance(loss, Tensor):
        return loss, {}
    return torch.stack(list(loss.values())).sum(), {name: float(term.detach()) for name, term in loss.items()}
