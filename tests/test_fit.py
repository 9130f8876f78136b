"""The training loop: a known minimum, non-finite losses, and everything that a report promises."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor, nn

from affinequant.fit import FitConfig, Group, fit
from affinequant.learning.phases import Phase, fit_durably
from affinequant.run.run import Run

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Problem:
    """Minimise `of(w, batch)`; remembers what it was asked."""

    def __init__(
        self, of: Callable[[Tensor, Any], Any], start: Sequence[float] = (0.0, 0.0, 0.0), lr: float = 0.1
    ) -> None:
        self.w = nn.Parameter(torch.tensor(start))
        self.of, self.lr = of, lr
        self.times: list[float] = []
        self.calls = 0
        self.reset_at: Callable[[float], bool] = lambda t: False

    def groups(self) -> Sequence[Group]:
        return [Group(name="w", parameters=[self.w], lr=self.lr), Group(name="nothing", parameters=[], lr=1.0)]

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        return self.of(self.w, batch)

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        self.times.append(t)
        return [self.w] if self.reset_at(t) else []


def quadratic(w: Tensor, batch: Any) -> Tensor:
    return (w - TARGET).square().sum()


def batches(count: int) -> Callable[[int], Sequence[int]]:
    return lambda epoch: range(count)


def config(**fields: Any) -> FitConfig:
    return FitConfig(**{"epochs": 4, "steps_per_epoch": 1, "optimizer": "sgd"} | fields)


def run(
    problem: Problem, count: int = 1, probes: Mapping[str, Callable[[], float]] | None = None, **fields: Any
) -> Any:
    return fit(problem, batches(count), config(steps_per_epoch=count, **fields), probes)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adam", 0.05), ("adamw", 0.05)])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_quadratic_is_solved(optimizer: str, lr: float, schedule: str) -> None:
    problem = Problem(quadratic, lr=lr)
    report = run(problem, 10, epochs=40, optimizer=optimizer, schedule=schedule)
    torch.testing.assert_close(problem.w.detach(), TARGET, rtol=0, atol=2e-3)
    assert (report.stopped, report.steps, report.non_finite) == ("done", 400, 0)
    assert report.best <= report.last < 1e-3 < report.first
    assert len(report.series["loss"]) == 40 and report.series["loss"][-1] == report.last


def test_one_step_of_plain_descent_is_the_textbook_s() -> None:
    problem = Problem(quadratic, lr=0.25)
    run(problem, epochs=1)
    torch.testing.assert_close(problem.w.detach(), 0.25 * 2 * TARGET)


def test_the_cosine_falls_from_the_whole_rate_towards_nothing() -> None:
    steps: list[float] = []

    def slope(w: Tensor, batch: Any) -> Tensor:
        steps.append(float(w.detach()[0]))
        return -w[0]  # each step moves by exactly the rate

    run(Problem(slope, lr=1.0), 2, epochs=2, schedule="cosine")
    moves = [after - before for before, after in itertools.pairwise(steps)]
    assert moves == pytest.approx([0.5 * (1 + math.cos(math.pi * t)) for t in (0, 0.25, 0.5, 0.75)][: len(moves)])


def test_progress_runs_from_zero_towards_one() -> None:
    problem = Problem(quadratic)
    run(problem, 5, epochs=2)
    assert problem.times == pytest.approx([step / 10 for step in range(10)])


def test_named_terms_are_summed_and_logged_apart() -> None:
    def two(w: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"near": (w - TARGET).square().sum(), "small": 0.1 * w.square().sum()}

    problem = Problem(two)
    report = run(problem, 3, epochs=60)
    torch.testing.assert_close(problem.w.detach(), TARGET / 1.1, rtol=0, atol=1e-4)
    assert set(report.series) == {"loss", "near", "small"}
    for total, near, small in zip(*(report.series[name] for name in ("loss", "near", "small")), strict=True):
        assert total == pytest.approx(near + small, rel=1e-5)


def test_clipping_bounds_a_step() -> None:
    problem = Problem(lambda w, _: 1e6 * w.sum(), lr=1.0)
    run(problem, epochs=1, clip_norm=0.5)
    assert float(problem.w.detach().norm()) == pytest.approx(0.5, rel=1e-4)


def test_nothing_to_train() -> None:
    problem = Problem(quadratic)
    report = run(problem, epochs=0)
    assert (report.stopped, report.steps, problem.calls) == ("nothing to train", 0, 0)
    assert math.isnan(report.first) and math.isnan(report.last)


@pytest.mark.parametrize("count", [4, 5])
def test_accumulating_equals_a_larger_batch(count: int) -> None:
    """Means over pairs; with an odd number of batches the last one steps alone and leaks into no other epoch."""
    data = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def whole(w: Tensor, rows: Tensor) -> Tensor:
        return (w - rows).square().sum(-1).mean()

    pairs = [data[start : start + 2] for start in range(0, count, 2)]
    small, large = Problem(whole, lr=0.2), Problem(whole, lr=0.2)
    one = fit(small, lambda _: list(data.split(1)), config(epochs=3, steps_per_epoch=count, accumulate=2))
    two = fit(large, lambda _: pairs, config(epochs=3, steps_per_epoch=len(pairs)))
    torch.testing.assert_close(small.w, large.w)
    assert one.steps == two.steps == 3 * len(pairs)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_one_bad_step_backs_off_to_the_start_of_its_epoch_and_recovers(where: str) -> None:
    problem = Problem(quadratic, lr=0.1)
    seen: list[Tensor] = []

    def sometimes(w: Tensor, batch: Any) -> Tensor:
        seen.append(w.detach().clone())
        loss = quadratic(w, batch)
        if problem.calls != 8:  # the third step of epoch 1
            return loss
        # A loss that is not finite, or a finite one with the infinite slope of a root at 0.
        return loss * math.nan if where == "loss" else loss + (w - w.detach()).abs().sqrt().sum()

    problem.of = sometimes
    report = run(problem, 5, epochs=30)
    assert torch.equal(seen[8], seen[5]), "not taken back to the start of the epoch"
    first, halved = seen[1] - seen[0], seen[9] - seen[8]
    torch.testing.assert_close(first, 0.1 * 2 * (TARGET - seen[0]))
    torch.testing.assert_close(halved, 0.05 * 2 * (TARGET - seen[8]))
    assert (report.non_finite, report.stopped) == (1, "done")
    assert len(report.series["loss"]) == 30 and all(map(math.isfinite, report.series["loss"]))
    torch.testing.assert_close(problem.w.detach(), TARGET, rtol=0, atol=1e-4)


def test_always_nan_stops_and_leaves_the_start() -> None:
    problem = Problem(lambda w, _: quadratic(w, 0) * math.nan, start=(1.0, 2.0, 3.0))
    report = run(problem, 3, max_backoffs=4)
    assert (report.stopped, report.non_finite, report.steps) == ("non-finite", 5, 0)
    assert problem.w.tolist() == [1.0, 2.0, 3.0]
    assert problem.w.grad is None


def test_nan_from_some_point_on_leaves_the_last_good_state() -> None:
    problem = Problem(quadratic, lr=0.1)
    problem.of = lambda w, _: quadratic(w, 0) * (math.nan if problem.calls > 6 else 1.0)
    seen: list[Tensor] = []
    report = run(problem, 3, {"w": lambda: float(seen.append(problem.w.detach().clone()) or 0)}, probe_every=1)
    assert report.stopped == "non-finite" and report.non_finite == 9
    assert any(torch.equal(problem.w.detach(), w) for w in seen)
    assert bool(problem.w.isfinite().all())


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_step_into_non_finite_land_is_noticed_and_undone(epochs: int) -> None:
    """The root of a negative number: the step itself is finite, only the next evaluation shows the damage."""
    problem = Problem(lambda w, _: ((w - 0.5).square() + 0 * w.sqrt()).sum(), start=(1.0,), lr=10.0)
    report = run(problem, epochs=epochs)
    assert (report.stopped, report.non_finite) == ("done", 4)  # 10, 5, 2.5 and 1.25 overshoot zero, 0.625 does not
    assert abs(float(problem.w.detach()) - 0.5) < 0.2


def test_a_step_that_overflows_the_parameters_is_undone() -> None:
    problem = Problem(lambda w, _: (1e30 * w).sum(), start=(1.0,), lr=1e20)
    report = run(problem, epochs=2, max_backoffs=3)
    assert report.stopped == "non-finite"
    assert problem.w.tolist() == [1.0]


def test_the_best_parameters_come_back_on_request() -> None:
    """w -> w - lr * 2 w with lr 1.1: each epoch is worse than the one before."""
    kept = Problem(lambda w, _: w.square().sum(), start=(1.0,), lr=1.1)
    report = run(kept, epochs=3, keep_best=True)
    losses = [1.0, 1.2**2, 1.2**4, 1.2**6]
    assert report.series["loss"] == pytest.approx(losses[:3], rel=1e-5)
    assert float(kept.w.detach().square()) == pytest.approx(report.best, rel=1e-5)
    assert report.best == pytest.approx(losses[1], rel=1e-5)
    left = Problem(lambda w, _: w.square().sum(), start=(1.0,), lr=1.1)
    run(left, epochs=3)
    assert float(left.w.detach().square()) == pytest.approx(losses[3], rel=1e-5)


def test_probes_are_taken_at_their_interval() -> None:
    problem = Problem(quadratic)
    report = run(problem, 2, {"first": lambda: float(problem.w.detach()[0])}, epochs=7, probe_every=3)
    assert len(report.series["first"]) == 2
    assert report.series["first"][0] < report.series["first"][1] < 1


def test_probes_of_epochs_that_are_done_again_are_not_counted_twice() -> None:
    problem = Problem(quadratic)
    problem.of = lambda w, _: quadratic(w, 0) * (math.nan if problem.calls == 5 else 1.0)  # judges the end of epoch 4
    report = run(problem, probes={"p": lambda: 0.0}, epochs=4, probe_every=2)
    assert report.non_finite == 1 and len(report.series["loss"]) == 4
    assert len(report.series["p"]) == 2


def test_released_parameters_start_with_a_fresh_optimizer_state() -> None:
    """Adam's first step is one whole rate: so is the one after a reset, and only then."""

    def moves(reset: bool) -> list[float]:
        seen: list[float] = []

        def slope(w: Tensor, batch: Any) -> Tensor:
            seen.append(float(w.detach()[0]))
            return w[0] * (1.0 if len(seen) <= 4 else 100.0)

        problem = Problem(slope, lr=0.1)
        problem.reset_at = lambda t: reset and t == pytest.approx(0.5)
        run(problem, 2, epochs=4, optimizer="adam")
        return [before - after for before, after in itertools.pairwise(seen)]

    assert moves(True)[4] == pytest.approx(0.1, rel=1e-4)
    assert moves(False)[4] != pytest.approx(0.1, rel=1e-2)


def test_the_same_twice() -> None:
    def noisy(epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(epoch)
        return [torch.randn(3, generator=generator) for _ in range(4)]

    results = []
    for _ in range(2):
        problem = Problem(lambda w, x: (w * x - 1).square().sum())
        report = fit(problem, noisy, config(epochs=5, steps_per_epoch=4, optimizer="adamw"))
        results.append((problem.w.detach(), report.series["loss"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_weight_decay_is_the_group_s() -> None:
    problem = Problem(lambda w, _: 0.0 * w.sum(), start=(1.0,), lr=0.1)
    problem.groups = lambda: [Group(name="w", parameters=[problem.w], lr=0.1, weight_decay=0.5)]
    run(problem, epochs=1, optimizer="adamw")
    assert float(problem.w.detach()) == pytest.approx(1 - 0.1 * 0.5)


def test_a_probe_can_judge_and_the_start_is_judged_too() -> None:
    """It judges by the distance from another point than the one that is minimised."""

    def run_with(judge: Callable[[Tensor], Tensor], **fields: Any) -> tuple[Any, Tensor]:
        problem = Problem(quadratic)
        probes = {"held-out": lambda: float(judge(problem.w.detach()))}
        return run(problem, probes=probes, judge="held-out", **fields), problem.w.detach()

    report, w = run_with(lambda w: w.square().sum())
    assert report.series["held-out"][0] == 0.0 == report.best and len(report.series["held-out"]) == 5
    assert torch.equal(w, torch.zeros(3))
    report, w = run_with(lambda w: (w - TARGET / 2).square().sum(), epochs=8)
    values = report.series["held-out"]
    assert report.best == min(values) not in (values[0], values[-1])
    torch.testing.assert_close(float((w - TARGET / 2).square().sum()), report.best)
    with pytest.raises(KeyError, match="nobody"):
        run(Problem(quadratic), judge="nobody")


def test_what_trains_worse_retreats_and_goes_on_more_slowly() -> None:
    """At a rate of 1.2 every step takes w past the minimum and 1.4 times as far away; at a quarter of that it comes to .4."""

    def values(**fields: Any) -> list[float]:
        problem = Problem(quadratic, lr=1.2)
        report = run(
            problem, probes={"p": lambda: float(quadratic(problem.w.detach(), 0))}, judge="p", epochs=3, **fields
        )
        torch.testing.assert_close(float(quadratic(problem.w.detach(), 0)), report.best)
        return [value / 14 for value in report.series["p"]]

    assert values() == pytest.approx([1, 1.4**2, 1.4**4, 1.4**6], rel=1e-4)
    assert values(retreat=True) == pytest.approx([1, 1.4**2, 0.4**2, 0.4**4], rel=1e-4)


def test_a_judge_sees_an_epoch_that_is_done_again_once() -> None:
    bad = iter([False, False, True, False, False, False])

    def of(w: Tensor, batch: Any) -> Tensor:
        return quadratic(w, batch) * (float("nan") if next(bad, False) else 1.0)

    problem = Problem(of)
    report = run(problem, probes={"p": lambda: float(quadratic(problem.w.detach(), 0))}, judge="p")
    assert report.non_finite == 1 and len(report.series["p"]) == 5


def test_what_was_judged_best_stands_where_training_gives_up() -> None:
    calls = itertools.count()
    problem = Problem(lambda w, batch: quadratic(w, batch) * (1.0 if next(calls) < 3 else math.nan))
    report = run(problem, probes={"p": lambda: float(problem.w.detach().square().sum())}, judge="p", epochs=8)
    assert report.stopped == "non-finite" and report.best == report.series["p"][0] == 0.0
    assert torch.equal(problem.w.detach(), torch.zeros(3))


@pytest.mark.parametrize("probe_every", [0, 1])
def test_a_probe_that_has_reached_its_value_ends_training(probe_every: int) -> None:
    """Whether it is logged alone or judges too; what was reached stands, and a budget that ends first is `done`."""
    for threshold, stopped in ((4.0, "probe"), (1e-9, "done")):
        problem = Problem(quadratic)
        probes = {"far": lambda problem=problem: float(quadratic(problem.w.detach(), 0))}
        fields: dict[str, Any] = {"probe_every": probe_every} if probe_every else {"judge": "far"}
        report = run(problem, probes=probes, epochs=20, stop_when=("far", "<", threshold), **fields)
        far = [value for value in report.series["far"] if value < threshold]
        assert report.stopped == stopped and far == report.series["far"][-1:] * (stopped == "probe")
        assert float(quadratic(problem.w.detach(), 0)) == report.series["far"][-1]
        assert report.steps == len(report.series["loss"]) == (3 if stopped == "probe" else 20)
    with pytest.raises(KeyError, match="nothing"):
        run(Problem(quadratic), stop_when=("nothing", "<", 1.0))


def test_one_that_is_never_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="probe_every"):
        run(Problem(quadratic), probes={"p": lambda: 0.0}, stop_when=("p", "<", 1.0))


class Pair(Problem):
    """Two groups, each with a loss of its own: the second reads what the first has moved."""

    def __init__(self) -> None:
        super().__init__(quadratic, lr=0.25)
        self.v = nn.Parameter(torch.zeros(3))
        self.seen: list[Tensor] = []

    def groups(self) -> Sequence[Group]:
        return [Group(name="w", parameters=[self.w], lr=0.25), Group(name="v", parameters=[self.v], lr=0.5)]

    def loss(self, batch: Any) -> Any:
        yield ["w"], quadratic(self.w, batch)
        self.seen.append(self.w.detach().clone())
        yield ["v"], {"follow": (self.v - self.w).square().sum(), "rest": 0 * self.v.sum()}


def test_one_batch_may_make_several_updates_each_of_its_own_groups() -> None:
    pair = Pair()
    report = run(pair, epochs=1)
    torch.testing.assert_close(pair.seen[0], 0.5 * TARGET)
    torch.testing.assert_close(pair.w.detach(), 0.5 * TARGET)  # the second loss, which holds it too, has not moved it
    torch.testing.assert_close(pair.v.detach(), 0.5 * TARGET)
    assert report.steps == 2 and report.series.keys() == {"loss", "w", "follow", "rest"}
    assert report.series["loss"][0] == pytest.approx(report.series["w"][0] + report.series["follow"][0])
    with pytest.raises(ValueError, match="cannot be accumulated"):
        run(Pair(), 2, epochs=1, accumulate=2)


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_loss_may_hold_derivatives(keep_best: bool) -> None:
    """A penalty on the slope of attention: measured with gradients on, by a kernel that can be derived twice."""
    query = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))

    def slope(w: Tensor, batch: Any) -> Tensor:
        x = query.clone().requires_grad_()
        value = torch.nn.functional.scaled_dot_product_attention(x, x * w, x * w).square().sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return gradient.square().sum()

    problem = Problem(slope, start=(1.0, 1.0, 1.0), lr=1e-3)
    report = run(problem, epochs=3, keep_best=keep_best, double_backward=True)
    assert report.stopped == "done" and report.series["loss"][-1] < report.series["loss"][0]
    with pytest.raises(RuntimeError):
        run(Problem(slope, start=(1.0, 1.0, 1.0)), epochs=3, keep_best=keep_best)


class Noisy(Problem):
    """Draws from every global generator, and remembers more than its parameters."""

    def __init__(self) -> None:
        super().__init__(quadratic, lr=0.05)
        self.mean = torch.zeros(3)

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        noise = torch.randn(3) + torch.from_numpy(numpy.random.randn(3)).float()
        self.mean = 0.9 * self.mean + 0.1 * noise
        return (self.w * noise - self.mean - batch).square().sum()

    def state(self) -> Mapping[str, Any]:
        return {"mean": self.mean}

    def load(self, state: Mapping[str, Any]) -> None:
        self.mean = state["mean"]


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "schedule": "cosine"},
        {"judge": "p", "retreat": True},
        {"keep_best": True, "probe_every": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_interrupted_and_taken_up_it_gives_the_same_bytes(tmp_path: Path, fields: dict[str, Any]) -> None:
    """As another process would: a new objective, other generators, and the state out of a run's folder."""

    def trained(**more: Any) -> tuple[Any, Noisy]:
        torch.manual_seed(1)
        numpy.random.seed(1)
        store, problem, state = Run.open(tmp_path, {}), Noisy(), None
        while True:
            probes = {"p": lambda problem=problem: float(problem.w.detach().square().sum())}
            report = fit(problem, batches(3), config(epochs=7, steps_per_epoch=3, **fields, **more), probes, state)
            if report.state is None:
                return report, problem
            assert report.stopped == "paused"
            store.keep("training", report.state)
            torch.manual_seed(99)
            numpy.random.seed(99)
            store, problem = Run.open(tmp_path, {}), Noisy()
            state = store.kept("training")

    (whole, straight), (parts, taken_up) = trained(), trained(pause_after=2)
    assert torch.equal(straight.w, taken_up.w) and torch.equal(straight.mean, taken_up.mean)
    assert whole.series == parts.series and (whole.steps, whole.best) == (parts.steps, parts.best) and parts.steps == 21


@pytest.mark.parametrize("call", [1, 5, 8])
def test_a_durable_fit_goes_on_where_it_was_cut_short(tmp_path: Path, call: int) -> None:
    """From the last epoch that was whole, to the bytes of one that was not cut short."""

    def phase(stop: int = 0) -> Phase:
        torch.manual_seed(1)
        numpy.random.seed(1)
        problem = Noisy()

        def cut(epoch: int) -> Iterator[int]:
            for batch in range(3):
                if epoch * 3 + batch == stop - 1:
                    raise KeyboardInterrupt
                yield batch

        return Phase(problem, cut, config(epochs=4, steps_per_epoch=3))

    whole = phase()
    fit(*whole)
    with pytest.raises(KeyboardInterrupt):
        fit_durably(phase(stop=call), Run.open(tmp_path, {}), "training")
    rest = phase()
    report = fit_durably(rest, Run.open(tmp_path, {}), "training")
    problem: Any = rest.objective
    assert torch.equal(problem.w, cast("Noisy", whole.objective).w) and report.stopped == "done" and report.steps == 12
    assert problem.calls == 12 - (call - 1) // 3 * 3 + 1  # and once more at the end


@pytest.mark.parametrize("name", ["radam", "nadam", "rmsprop", "adagrad"])
def test_any_optimizer_of_torch_by_its_name(name: str) -> None:
    problem = Problem(quadratic, lr=0.1)
    run(problem, 10, epochs=3, optimizer=name)
    by_hand = nn.Parameter(torch.zeros(3))
    known = {key.lower(): one for key, one in vars(torch.optim).items()}
    optimizer = known[name]([by_hand], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        quadratic(by_hand, 0).backward()
        optimizer.step()
    assert torch.equal(problem.w, by_hand)
    for wrong in ("radom", "optimizer", "lbfgs"):
        with pytest.raises(ValueError, match=wrong):
            run(Problem(quadratic), optimizer=wrong)


def test_a_group_has_its_own_options() -> None:
    """Momentum carries on in one group alone: the second step of a constant slope is longer there."""
    problem = Problem(quadratic)
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    problem.groups = lambda: [
        Group(name="slow", parameters=[slow], lr=1.0),
        Group(name="fast", parameters=[fast], lr=1.0, options={"momentum": 0.5}),
    ]
    problem.of = lambda w, _: -(slow + fast).sum()
    run(problem, 2, epochs=1)
    assert (slow.item(), fast.item()) == (2.0, 2.5)
    for options, decay in (({"betas": (0.9, 0.9)}, 0.0), ({"moment": 0.5}, 0.0), ({}, 0.1)):
        name = "rprop" if decay else "sgd"  # rprop knows no weight decay
        wrong = Group(name="slow", parameters=[slow], lr=1.0, weight_decay=decay, options=options)
        problem.groups = lambda wrong=wrong: [wrong]
        with pytest.raises(ValueError, match=r"takes no .* for the group slow"):
            run(problem, optimizer=name)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"schedule": "exponential", "last_rate": 1e-4}, [1.0, 0.1, 0.01, 0.001]),
        ({"schedule": "step", "last_rate": 0.1, "step_at": 0.5}, [1.0, 1.0, 0.1, 0.1]),
    ],
    ids=["exponential", "step"],
)
def test_rates_fall_to_the_last_one(how: dict[str, Any], expected: list[float]) -> None:
    steps: list[float] = []

    def slope(w: Tensor, batch: Any) -> Tensor:
        steps.append(float(w.detach()[0]))
        return -w[0]

    run(Problem(slope, lr=1.0), 2, epochs=2, **how)
    moves = [after - before for before, after in itertools.pairwise(steps)]
    assert moves == pytest.approx(expected, rel=1e-3)
