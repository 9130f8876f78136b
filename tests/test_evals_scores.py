"""Intervals and verdicts: how often they hold the truth, and what is said where they cannot tell."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from affinequant_evals.scores import Delta, Score, difference, exp_mean_score, flips, mean_of, mean_score

from affinequant.cli.output import between

QUANTILES = {1: 12.706, 5: 2.5706, 9: 2.2622, 49: 2.0096}
"""Of Student's t at 97.5 %, from any table."""


@pytest.mark.parametrize(("dof", "quantile"), QUANTILES.items())
def test_an_interval_is_student_s(dof: int, quantile: float) -> None:
    values = np.random.default_rng(dof).normal(size=dof + 1)
    score = mean_score(list(values))
    low, high = score.interval or pytest.fail("no interval")
    reach = quantile * values.std(ddof=1) / math.sqrt(dof + 1)
    assert low == pytest.approx(score.value - reach, rel=1e-4) and high == pytest.approx(score.value + reach, rel=1e-4)


def test_one_observation_has_none() -> None:
    one, two = mean_score([3.0], key="a"), mean_score([2.0], key="a")
    assert one.interval is None and difference(one, two).interval is None
    assert difference(one, two).verdict("lower") == ""


def test_a_perplexity_is_never_below_zero() -> None:
    score = exp_mean_score([0.5, 7.0])
    low, high = score.interval or pytest.fail("no interval")
    assert score.stderr and score.value - QUANTILES[1] * score.stderr < 0 < low < score.value < high
    assert math.log(low * high) / 2 == pytest.approx(3.75)  # the mean loss is in the middle


def losses(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Losses of full precision and of a copy on as many windows: difficulty differs from window to window as much as in
    the demo's text, with a heavy tail, and what the copy loses is skewed."""
    full = 3 + 0.1 * rng.standard_t(4, size=count)
    return full, full + 0.05 * rng.gamma(4.0, size=count)


def share(count: int, covers: Callable[[np.ndarray, np.ndarray], bool], repeats: int = 800) -> float:
    """How often an interval over `count` windows covers."""
    rng = np.random.default_rng(count)
    return sum(covers(*losses(count, rng)) for _ in range(repeats)) / repeats


POPULATION = losses(400_000, np.random.default_rng(7))
PERPLEXITIES = [float(np.exp(part.mean())) for part in POPULATION]


def holds(interval: tuple[float, float] | None, value: float) -> bool:
    low, high = interval or pytest.fail("no interval")
    return low <= value <= high


def increase(full: np.ndarray, copy: np.ndarray) -> Delta:
    return difference(exp_mean_score(list(copy), key="same"), exp_mean_score(list(full), key="same"))


@pytest.mark.parametrize("count", [6, 50])
def test_intervals_cover(count: int) -> None:
    true, difference = PERPLEXITIES[0], PERPLEXITIES[1] - PERPLEXITIES[0]
    assert 0.90 <= share(count, lambda full, copy: holds(exp_mean_score(list(full)).interval, true)) <= 0.99
    assert 0.90 <= share(count, lambda full, copy: holds(increase(full, copy).interval, difference)) <= 0.99


def test_the_normal_distribution_s_would_not() -> None:
    true = PERPLEXITIES[1] - PERPLEXITIES[0]

    def normal(full: np.ndarray, copy: np.ndarray) -> bool:
        delta = increase(full, copy)
        return abs(delta.value - true) <= 1.96 * (delta.stderr or 0.0)

    assert share(6, normal) < 0.90


def test_identical_models_differ_by_nothing() -> None:
    score = exp_mean_score([3.1, 2.9, 3.3], key="same")
    delta = difference(score, score)
    assert (delta.value, delta.interval, delta.verdict("lower")) == (0.0, (0.0, 0.0), "no difference seen")
    assert delta.to_json() == {"value": 0.0, "stderr": 0.0, "paired": True, "dof": 2, "interval": [0.0, 0.0]}


def test_verdicts() -> None:
    delta = Delta(value=3.2, stderr=0.4, paired=True, dof=5, n=6)
    assert between(delta.interval, sign=True) == "[+2.172, +4.228]"
    assert (delta.verdict("lower"), delta.verdict("higher")) == ("worse", "better")
    assert Delta(value=3.2, stderr=1.3, paired=True, dof=5, n=6).verdict("lower") == "no difference seen"
    assert Delta(value=3.2, stderr=0.4, paired=False, dof=5, n=6).verdict("lower") == ""


@pytest.mark.parametrize(("count", "said"), [(2, "no difference seen"), (5, "no difference seen"), (6, "worse")])
def test_few_documents_that_agree_tell_little(count: int, said: str) -> None:
    wrong, right = mean_score([0.0] * count, key="docs"), mean_score([1.0] * count, key="docs")
    assert difference(wrong, right).verdict("higher") == said


def test_unpaired_is_welch_s() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    mine, other = rng.normal(1, 3, size=8), rng.normal(0, 0.5, size=40)
    delta = difference(mean_score(list(mine), key="here"), mean_score(list(other), key="there"))
    theirs: Any = stats.ttest_ind(mine, other, equal_var=False)
    assert not delta.paired and delta.dof == pytest.approx(float(theirs.df), rel=1e-9)
    assert delta.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-6)


def test_unpaired_without_spread() -> None:
    mine, other = (Score(value=value, stderr=0.0, n=3) for value in (1.0, 2.0))
    assert difference(mine, other).interval == (-1.0, -1.0)


def apart(values: list[list[float]]) -> list[Score]:
    return [mean_score(each, key=f"task {index}") for index, each in enumerate(values)]


def test_a_mean_over_tasks_adds_their_errors() -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(index, 1 + index, size).tolist() for index, size in enumerate((5, 9, 40))]
    score = mean_of(apart(values))
    tasks = [(np.mean(each), np.var(each, ddof=1) / len(each), len(each) - 1) for each in values]
    assert score.value == pytest.approx(sum(mean for mean, _, _ in tasks) / 3) and score.n == 54
    assert score.stderr == pytest.approx(math.sqrt(sum(square for _, square, _ in tasks)) / 3)
    below = sum(square**2 / dof for _, square, dof in tasks)
    assert score.dof == pytest.approx(sum(square for _, square, _ in tasks) ** 2 / below)
    assert min(dof for _, _, dof in tasks) <= (score.dof or 0) <= 51


def test_a_mean_over_tasks_differs_over_pairs() -> None:
    rng = np.random.default_rng(0)
    mine = [rng.normal(0, 1, size).tolist() for size in (6, 30)]
    other = [
        [value + 0.1 * noise for value, noise in zip(each, rng.normal(1, 1, len(each)), strict=True)] for each in mine
    ]
    delta = difference(mean_of(apart(mine)), mean_of(apart(other)))
    pairs = [difference(left, right) for left, right in zip(apart(mine), apart(other), strict=True)]
    assert delta.paired and delta.value == pytest.approx(sum(pair.value for pair in pairs) / 2)
    assert delta.stderr == pytest.approx(math.hypot(*(pair.stderr or 0 for pair in pairs)) / 2)
    alone = difference(mean_of(apart(mine)), mean_of([replace(score, key="") for score in apart(other)]))
    assert not alone.paired and (alone.stderr or 0) > 5 * (delta.stderr or 0)
    single = mean_of([mean_score([1.0]), mean_score([0.0, 1.0])])
    assert (single.value, single.stderr, single.dof, single.interval) == (0.75, None, None, None)


def test_answers_flip_both_ways() -> None:
    mine, other = (mean_score(values, key="k") for values in ([1, 0, 1, 0], [0, 1, 1, 0]))
    assert difference(mine, other).value == 0
    score = flips(mine, other)
    assert score and (score.value, score.n, score.about) == (0.5, 4, {"lost": 1, "won": 1})
    assert flips(mine, replace(other, key="others")) is None
    assert flips(mean_score([0.5, 1], key="k"), mean_score([0, 1], key="k")) is None
