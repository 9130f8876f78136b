"""The training loop: it minimises, backs off from non-finite losses, keeps the best, and repeats itself."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from affinequant.fit import FitConfig, FitReport, Group, fit


class Quadratic:
    """sum (w - target)^2, with a loss that can be replaced."""

    def __init__(self, lr: float = 0.1, change: Callable[[Tensor, int], Tensor] = lambda loss, _: loss) -> None:
        self.w = nn.Parameter(torch.zeros(3))
        self.lr, self.change, self.calls = lr, change, 0
        self.seen: list[float] = []

    def groups(self) -> Sequence[Group]:
        return [Group(name="w", parameters=[self.w], lr=self.lr)]

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        self.seen.append(t)
        return ()

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"near": self.change((self.w - batch).square().sum(), self.calls)}


TARGET = torch.tensor([1.0, -2.0, 3.0])


def run(objective: Quadratic, epochs: int, batches: int = 4, **config: object) -> FitReport:
    settings = FitConfig(epochs=epochs, steps_per_epoch=batches, **config)  # pyright: ignore[reportArgumentType]
    return fit(objective, lambda _: [TARGET] * batches, settings)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_quadratic_is_solved(optimizer: str) -> None:
    objective = Quadratic()
    report = run(objective, 60, optimizer=optimizer, schedule="cosine")
    assert torch.allclose(objective.w, TARGET, atol=1e-2)
    assert report.stopped == "done" and report.steps == 240 and report.non_finite == 0
    assert report.last < 1e-3 < report.first
    assert report.series["near"] == pytest.approx(report.series["loss"])
    assert objective.seen[:240] == pytest.approx([i / 240 for i in range(240)])


def test_one_nan_halves_the_rate_and_training_goes_on() -> None:
    objective = Quadratic(change=lambda loss, call: loss * math.nan if call == 11 else loss)
    report = run(objective, 60, optimizer="sgd")
    assert report.non_finite == 1 and report.stopped == "done"
    assert torch.allclose(objective.w, TARGET, atol=1e-2)


def test_only_nans_end_at_the_start_and_say_so() -> None:
    objective = Quadratic(change=lambda loss, _: loss * math.nan)
    report = run(objective, 5, max_backoffs=3)
    assert report.stopped == "non-finite" and report.non_finite == 4
    assert torch.equal(objective.w, torch.zeros(3))


def test_a_last_step_into_the_void_is_seen() -> None:
    objective = Quadratic(lr=1e30)
    report = run(objective, 1, batches=1, optimizer="sgd", max_backoffs=2)
    assert report.stopped == "non-finite"
    assert bool(objective.w.isfinite().all()) and torch.equal(objective.w, torch.zeros(3))


def test_keep_best_keeps_the_best_end_of_an_epoch() -> None:
    objective = Quadratic(lr=1.2)  # overshoots further with each step
    report = run(objective, 4, batches=1, optimizer="sgd", keep_best=True)
    loss = float((objective.w.detach() - TARGET).square().sum())
    assert loss == pytest.approx(report.best)
    assert loss < float((0 - TARGET).square().sum()) * 2


def test_accumulated_batches_act_as_one() -> None:
    one, many = Quadratic(), Quadratic()
    run(one, 5, batches=1, optimizer="sgd")
    run(many, 5, batches=3, optimizer="sgd", accumulate=3)
    assert torch.allclose(one.w, many.w)
    uneven = Quadratic()
    assert run(uneven, 1, batches=3, optimizer="sgd", accumulate=2).steps == 2


def test_probes_are_series_and_nothing_to_train_is_no_error() -> None:
    objective = Quadratic()
    settings = FitConfig(epochs=4, steps_per_epoch=1, probe_every=2)
    report = fit(objective, lambda _: [TARGET], settings, {"norm": lambda: float(objective.w.detach().norm())})
    assert len(report.series["norm"]) == 2
    assert run(Quadratic(), 0).stopped == "nothing to train"


def test_the_same_twice() -> None:
    first, second = Quadratic(), Quadratic()
    run(first, 7)
    run(second, 7)
    assert torch.equal(first.w, second.w)
