"""Scores, their errors, paired differences, and what happens when a metric fails."""

import json
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals import (
    Battery,
    Better,
    Metric,
    Score,
    Scorecard,
    Suite,
    evaluate,
    exp_mean_score,
    mean_score,
)

from affinequant.errors import AffineQuantError
from affinequant.run.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A subject without language: some numbers."""

    values: tuple[float, ...]
    name: str = "numbers"


def mean_metric(key: str = "same") -> Metric[Numbers]:
    return Metric(name="mean", better="higher", function=lambda subject: mean_score(subject.values, key=key))


def suite(*metrics: Any) -> Suite[Numbers]:
    return Suite(name="test", metrics=metrics)


def test_mean_score() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    score = mean_score(values)
    assert (score.value, score.n, score.parts) == (0.6, 5, tuple(values))
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5), rel=1e-12)
    assert score.dof == 4
    assert mean_score([3.0]).stderr is None and mean_score([3.0]).dof is None


def test_exp_mean_score_is_the_delta_method() -> None:
    draws = random.Random(0)
    losses = [draws.gauss(3, 0.05) for _ in range(400)]
    score = exp_mean_score(losses)
    assert score.value == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-12)
    assert score.stderr == pytest.approx(score.value * statistics.stdev(losses) / 20, rel=1e-9)
    resampled = [math.exp(statistics.mean(draws.choices(losses, k=400))) for _ in range(500)]
    assert score.stderr == pytest.approx(statistics.stdev(resampled), rel=0.15)


def test_paired_difference_is_that_of_the_pairs() -> None:
    draws = random.Random(1)
    before = tuple(draws.gauss(0, 10) for _ in range(50))
    after = tuple(value + draws.gauss(1, 0.1) for value in before)
    mine, other = (evaluate(Numbers(values=values), suite(mean_metric())) for values in (after, before))
    delta = mine.compare(other)["mean"]
    assert delta.paired
    assert delta.value == pytest.approx(statistics.mean(after) - statistics.mean(before))
    differences = [new - old for new, old in zip(after, before, strict=True)]
    assert delta.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(50))
    assert delta.stderr and delta.stderr < 0.1 and delta.dof == 49
    assert all(row.score and row.score.stderr and row.score.stderr > 1 for row in mine.rows)


def test_paired_difference_of_two_perplexities() -> None:
    draws = random.Random(2)
    before = [draws.gauss(3, 0.3) for _ in range(40)]
    after = [loss + draws.gauss(0.5, 0.02) for loss in before]

    def measure(subject: Numbers) -> Score:
        return exp_mean_score(subject.values, key="the same windows")

    metric = Metric(name="ppl", better="lower", function=measure)
    mine, other = (evaluate(Numbers(values=tuple(losses)), suite(metric)) for losses in (after, before))
    delta = mine.compare(other)["ppl"]
    resampled = []
    for _ in range(2000):
        chosen = draws.choices(range(40), k=40)
        new, old = (math.exp(statistics.mean(losses[index] for index in chosen)) for losses in (after, before))
        resampled.append(new - old)
    assert delta.paired and delta.stderr == pytest.approx(statistics.stdev(resampled), rel=0.15)


def test_other_observations_are_not_paired() -> None:
    mine = evaluate(Numbers(values=(1.0, 2.0, 3.0)), suite(mean_metric("here")))
    other = evaluate(Numbers(values=(1.0, 2.0, 4.0)), suite(mean_metric("there")))
    delta = mine.compare(other)["mean"]
    errors = [row.score.stderr or 0.0 for row in (*mine.rows, *other.rows) if row.score]
    assert (
        not delta.paired
        and delta.stderr == pytest.approx(math.hypot(*errors))
        and delta.dof == pytest.approx(3.448, abs=1e-3)
    )


def test_a_difference_without_errors() -> None:
    def measure(subject: Numbers) -> Score:
        return Score(value=subject.values[0], stderr=None, n=1)

    metric = Metric(name="x", better="lower", function=measure)
    mine, other = (evaluate(Numbers(values=(value,)), suite(metric)) for value in (3.0, 1.0))
    assert mine.compare(other)["x"].value == 2.0 and mine.compare(other)["x"].stderr is None


def test_a_failure_is_a_row_and_the_rest_still_run() -> None:
    def broken(subject: Numbers) -> Score:
        raise ZeroDivisionError("by nothing")

    def refused(subject: Numbers) -> dict[str, tuple[Better, Score]]:
        raise AffineQuantError("no rows", "here", "bring some")

    def infinite(subject: Numbers) -> Score:
        return Score(value=math.inf, stderr=None, n=1)

    card = evaluate(
        Numbers(values=(1.0, 2.0)),
        suite(
            Metric(name="broken", better="lower", function=broken),
            Battery(name="refused", function=refused),
            Metric(name="infinite", better="lower", function=infinite),
            mean_metric(),
        ),
    )
    assert [row.name for row in card.rows] == ["broken", "refused", "infinite", "mean"]
    assert [row.error for row in card.failed] == [
        "ZeroDivisionError: by nothing",
        "no rows; bring some",
        "the value is inf",
    ]
    assert (card.score("mean") or pytest.fail("no score")).value == 1.5
    metrics = json.loads(json.dumps(card.to_json(), allow_nan=False))["metrics"]
    assert metrics["broken"]["value"] is None and metrics["broken"]["error"] == "ZeroDivisionError: by nothing"
    assert "error" not in metrics["mean"]


def test_an_interrupt_is_no_failure() -> None:
    def interrupted(subject: Numbers) -> Score:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Numbers(values=()), suite(Metric(name="x", better="lower", function=interrupted)))


def test_a_battery_gives_several_rows() -> None:
    def both(subject: Numbers) -> dict[str, tuple[Better, Score]]:
        return {"low": ("lower", mean_score(subject.values)), "high": ("higher", mean_score(subject.values))}

    card = evaluate(Numbers(values=(1.0, 3.0)), suite(Battery(name="both", function=both)))
    assert [(row.name, row.better) for row in card.rows] == [("low", "lower"), ("high", "higher")]


def test_json_schema() -> None:
    said: list[str] = []
    mine = evaluate(Numbers(values=(1.0, 2.0), name="mine"), suite(mean_metric()), say=said.append)
    assert said == ["1/1 mean"]
    other = evaluate(Numbers(values=(0.0, 2.0), name="theirs"), suite(mean_metric()))
    value = json.loads(json.dumps(mine.against(other).to_json(), allow_nan=False))
    assert (value["schema"], value["checkpoint"], value["baseline"]["checkpoint"]) == (1, "mine", "theirs")
    entry = value["metrics"]["mean"]
    assert {"value", "stderr", "n", "better", "baseline"} <= set(entry)
    assert (entry["value"], entry["n"], entry["better"], entry["baseline"]) == (1.5, 2, "higher", 1.0)
    interval = entry["delta"].pop("interval")
    assert entry["delta"] == {"value": 0.5, "stderr": 0.5, "paired": True, "dof": 1} and entry["dof"] == 1
    assert interval == pytest.approx([0.5 - 0.5 * 12.706, 0.5 + 0.5 * 12.706], rel=1e-4)
    assert len(entry["interval"]) == 2
    assert {"python", "torch", "platform", "cpus"} <= set(value["env"])
    assert mine.to_json()["baseline"] is None and mine.to_json()["metrics"]["mean"]["baseline"] is None


def test_every_metric_starts_from_the_same_random_state() -> None:
    import torch

    def draw(subject: Numbers) -> Score:
        return mean_score([random.random(), torch.rand(1).item()])

    metrics = [Metric(name=name, better="lower", function=draw) for name in ("first", "second")]
    random.seed(5)
    torch.manual_seed(5)
    card = evaluate(Numbers(values=()), suite(*metrics))
    after = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    assert after == (random.random(), torch.rand(1).item()), "the caller's random state was changed"
    assert card.score("first") == card.score("second")


def test_a_run_keeps_what_was_measured(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str, fails: bool = False) -> Metric[Numbers]:
        def measure(subject: Numbers) -> Score:
            calls.append(name)
            if fails and calls.count(name) == 1:
                raise RuntimeError("the first time")
            return exp_mean_score(subject.values, key="k", about={"text": "demo"})

        return Metric(name=name, better="lower", function=measure)

    def scored() -> Scorecard:
        run = Run.open(tmp_path, {"subject": "numbers"})
        metrics = [counted("perplexity@a b.txt,seq8"), counted("flaky", fails=True)]
        return evaluate(Numbers(values=(1.0, 2.0)), suite(*metrics), run=run)

    first, second, third = scored(), scored(), scored()
    assert calls == ["perplexity@a b.txt,seq8", "flaky", "flaky"]
    assert [row.name for row in first.failed] == ["flaky"] and not second.failed
    assert second.rows == third.rows and second.rows[0] == first.rows[0]
