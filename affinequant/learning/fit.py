"""The one training loop. An objective says what to minimise; everything else is data."""

import contextlib
import copy
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from affinequant.learning.optimizers import SCHEDULES, Group, new_optimizer
from affinequant.learning.training import FitConfig, FitReport, Loss, Objective, Outcome
from affinequant.run.generators import generator_states, set_generators

_FIXED = {"objective", "groups", "config", "parameters", "last_batch"}
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def fit(
    objective: Objective,
    batches: Callable[[int], Iterable[Any]],
    config: FitConfig,
    probes: Mapping[str, Callable[[], float]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> FitReport:
    """Minimise `objective` over `batches(epoch)` for every epoch.

    A non-finite loss or gradient takes the parameters back to the last good state (the start of an epoch whose loss was
    finite), forgets the optimizer's state and halves every rate; after `max_backoffs` of these the last good state
    stands and the report says so. No printing, no file access, no choice of device.

    Args:
        probes: named measurements, taken every `probe_every` epochs and logged as series; the one that judges is taken
            at the start and after every epoch.
        state: of a report that was paused, to go on from to the same bytes: random generators are put where they were.

    Raises:
        KeyError: `config.judge` or `config.stop_when` names no probe.
        ValueError: that probe is never taken; torch has no such optimizer, or it does not take a group's options.
    """
    probes = dict(probes or {})
    for name in config.stop_when[:1] if config.stop_when else ():
        if not (probes[name] and (config.probe_every or name == config.judge)):
            raise ValueError(f"the probe {name} is never taken: give probe_every")
    judge = probes.pop(config.judge) if config.judge else None
    groups = [group for group in objective.groups() if group.parameters]
    if not groups or config.epochs == 0:
        return FitReport(stopped="nothing to train")
    run = _State(objective, groups, config)
    began = time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH) if config.double_backward else contextlib.nullcontext():
        if state is not None:
            run.load(state)
        elif judge:
            run.judge(judge())
        pause = run.epoch + config.pause_after if config.pause_after else math.inf
        while (stopped := run.stopped(pause)) is None:
            # Behind the last epoch, where its last step has led into non-finite land, there is only the way back.
            mean = run.run_epoch(batches(run.epoch)) if run.epoch < config.epochs else None
            if mean is None:
                run.back_off()
                continue
            run.finish_epoch(mean, probes)
            least = run.evaluate(batches(run.epoch - 1)) if config.keep_best and not judge else mean
            run.judge(judge() if judge else least)
    return run.report(stopped, time.perf_counter() - began)


class _State:
    """One fit's moving parts. `good`: the newest parameters, at an epoch's start, whose loss was seen to be finite."""

    def __init__(self, objective: Objective, groups: list[Group], config: FitConfig) -> None:
        self.objective, self.groups, self.config = objective, groups, config
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.rate, self.epoch, self.steps, self.non_finite, self.seconds = 1.0, 0, 0, 0, 0.0
        self.series: dict[str, list[float]] = {"loss": []}
        self.good, self.good_epoch = self._copies(), 0
        self.best, self.best_values = math.inf, self.good
        self.last_batch: Any = None
        self.probe_names: list[str] = []
        self.optimizer = new_optimizer(config.optimizer, groups)

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def run_epoch(self, batches: Iterable[Any]) -> float | None:
        """Mean loss of the epoch, or None at the first non-finite value."""
        start, total, terms = self._copies(), 0.0, {}
        count, accumulate = self.config.steps_per_epoch, self.config.accumulate
        progress = getattr(self.objective, "progress", lambda t: ())
        span = max(1, self.config.epochs * count)
        for index, batch in enumerate(batches):
            t = min(1.0, (self.epoch * count + index) / span)
            for parameter in progress(t):
                self.optimizer.state.pop(parameter, None)
            size = min(accumulate, count - index // accumulate * accumulate)
            ends = (index + 1) % accumulate == 0 or index + 1 == count
            for moved, loss, parts in self._updates(batch):
                (loss / size).backward(inputs=moved)
                value = float(loss.detach())
                if not math.isfinite(value):
                    return None
                if index == 0:
                    self.good, self.good_epoch = start, self.epoch
                if ends and not self._step(t):
                    return None
                total += value
                for name, part in parts.items():
                    terms[name] = terms.get(name, 0.0) + part / count
            self.last_batch = batch
        for name, part in terms.items():
            self.series.setdefault(name, []).append(part)
        return total / count

    def _updates(self, batch: Any) -> Iterator[tuple[list[torch.nn.Parameter] | None, Tensor, dict[str, float]]]:
        """Of each update that a batch makes: what moves (None: everything), its loss, the terms to log."""
        found = self.objective.loss(batch)
        if isinstance(found, Tensor | Mapping):
            yield None, *_summed(found)
            return
        if self.config.accumulate > 1:
            raise ValueError("several updates of one batch cannot be accumulated over batches")
        chosen = {group.name: group.parameters for group in self.groups}
        for names, loss in found:
            value, parts = _summed(loss)
            moved = [parameter for name in names for parameter in chosen[name] if parameter.requires_grad]
            yield moved, value, parts or {"+".join(names): float(value.detach())}

    def _step(self, t: float) -> bool:
        grads = [one.grad for one in self.parameters if one.grad is not None]
        if not all(torch.stack(grad.aminmax()).isfinite().all() for grad in grads):  # `isfinite` of all is five passes
            return False
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        factor = self.rate * SCHEDULES[self.config.schedule](t, self.config.last_rate, self.config.step_at)
        for entry, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            entry["lr"] = group.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return True

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Mean loss at the present parameters."""
        with torch.set_grad_enabled(self.config.double_backward):
            losses = [sum(float(loss.detach()) for _, loss, _ in self._updates(batch)) for batch in batches]
        return sum(losses) / len(losses)

    def back_off(self) -> None:
        """Back to the last good parameters at half the rates; epochs after them are done again."""
        self.non_finite += 1
        self._set_out(self.good, 2)
        for name, values in self.series.items():
            every = self.config.probe_every if name in self.probe_names else 1
            del values[self.good_epoch // every + (name == self.config.judge) :]
        self.epoch = self.good_epoch

    def judge(self, score: float) -> None:
        """Remember the present parameters if `score` is the least so far."""
        if self.config.judge:
            self.series.setdefault(self.config.judge, []).append(score)
        if score < self.best:
            self.best = score
            if self.config.keep_best or self.config.judge:
                self.best_values = self._copies()
        elif self.config.retreat:
            self._set_out(self.best_values, 4)

    def finish_epoch(self, mean: float, probes: Mapping[str, Callable[[], float]]) -> None:
        """Log the epoch."""
        self.epoch += 1
        self.series["loss"].append(mean)
        if self.config.probe_every and self.epoch % self.config.probe_every == 0:
            self.probe_names = list(probes)
            for name, probe in probes.items():
                self.series.setdefault(name, []).append(probe())

    def stopped(self, pause: float) -> Outcome | None:
        """Why training ends here, if it does. The parameters after the last step have to give a finite loss yet."""
        name, sign, value = self.config.stop_when or ("", "<", 0.0)
        if self.non_finite > self.config.max_backoffs:
            return "non-finite"
        if any(_SIGNS[sign](newest, value) for newest in self.series.get(name, [])[-1:]):
            return "probe"
        if self.epoch == self.config.epochs:
            return "done" if math.isfinite(self.evaluate([self.last_batch])) else None
        return "paused" if self.epoch >= pause else None

    def save(self) -> dict[str, Any]:
        """A copy of all that decides how training goes on."""
        parts = {name: getattr(self, name) for name in vars(self).keys() - _FIXED}
        parts |= {"values": self._copies(), "optimizer": self.optimizer.state_dict(), "generators": generator_states()}
        return copy.deepcopy(parts | {"own": getattr(self.objective, "state", dict)()})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        parts = copy.deepcopy(dict(state))
        self._restore(parts.pop("values"))
        self.optimizer.load_state_dict(parts.pop("optimizer"))
        set_generators(parts.pop("generators"))
        getattr(self.objective, "load", dict)(parts.pop("own"))
        vars(self).update(parts)

    def report(self, stopped: Outcome, seconds: float) -> FitReport:
        """The report; training that is over leaves the best parameters where these were asked for."""
        self.seconds += seconds
        losses = self.series["loss"]
        if stopped != "paused" and (self.config.keep_best or self.config.judge):
            self._restore(self.best_values)
        elif stopped == "non-finite":
            self._restore(self.good)
        seen = {"first": losses[0], "last": losses[-1], "best": self.best} if losses else {}
        return FitReport(
            **seen,
            steps=self.steps,
            seconds=self.seconds,
            non_finite=self.non_finite,
            stopped=stopped,
            series=self.series,
            state=self.save() if stopped == "paused" else None,
        )

    def _set_out(self, values: list[Tensor], slower: float) -> None:
        self.rate /= slower
        self._restore(values)
        self.optimizer = new_optimizer(self.config.optimizer, self.groups)

    def _restore(self, values: list[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def _summed(loss: Loss) -> tuple[Tensor, dict[str, float]]:
    if isinstance(loss, Tensor):
        return loss, {}
    return torch.stack(list(loss.values())).sum(), {name: float(term.detach()) for name, term in loss.items()}
