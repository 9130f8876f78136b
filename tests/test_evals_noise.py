"""The noise over seeds: what is told apart, what is not, and how often either is wrong."""

import json
import math

import numpy as np
import pytest
from affinequant_evals.noise import NOT_APART, noise_floor
from scipy import stats

from affinequant.errors import AffineQuantError


def test_two_methods_as_scipy_compares_them() -> None:
    fast, default = [1.277, 1.296, 1.270], [1.181, 1.174, 1.192]
    found = noise_floor({"fast": fast, "default": default})
    verdict = found.verdicts["default"]
    theirs = stats.ttest_ind(default, fast, equal_var=False)
    assert verdict.difference == pytest.approx(np.mean(default) - np.mean(fast))
    low, high = theirs.confidence_interval(0.95)
    assert verdict.floor == pytest.approx((high - low) / 2)
    assert found.deviation == pytest.approx(math.sqrt((np.var(fast, ddof=1) + np.var(default, ddof=1)) / 2))
    assert found.dof == 4 and found.reference == "fast" and set(found.verdicts) == {"default"}
    assert found.words("default", "x") == "better than fast by 0.099 x" and found.words("fast") == ""
    assert noise_floor({"default": default, "fast": fast}).words("fast", "x") == "worse than default by 0.099 x"
    assert json.loads(json.dumps(found.to_json()))["verdicts"]["default"]["said"] == "better"


def test_more_comparisons_raise_the_floor() -> None:
    fast, default, third = [1.277, 1.296, 1.270], [1.181, 1.174, 1.192], [1.28, 1.29, 1.27]
    alone = noise_floor({"fast": fast, "default": default}).verdicts["default"]
    among = noise_floor({"fast": fast, "default": default, "third": third}).verdicts["default"]
    assert alone.floor and among.floor and among.floor > alone.floor and among.dof == alone.dof


def test_directions_and_noise() -> None:
    values = {"first": [0.50, 0.52, 0.51], "second": [0.60, 0.62, 0.61]}
    assert noise_floor(values, better="higher").words("second", "of 1") == "better than first by 0.1 of 1"
    assert noise_floor(values).words("second") == "worse than first by 0.1"
    values = {"first": [0.50, 0.52, 0.51], "second": [0.60, 0.42, 0.49]}
    assert noise_floor(values, better="higher").words("second") == "not told apart from first"


def test_what_never_varies_has_no_noise_and_makes_none_smaller() -> None:
    found = noise_floor({"fast": [1.277, 1.296, 1.270], "rtn": [79.1] * 3, "same": [79.1] * 3})
    assert found.spreads["rtn"].deviation == 0 and found.dof == 2
    assert found.deviation == found.spreads["fast"].deviation
    assert found.words("rtn", "x") == "worse than fast by 78 x" and found.verdicts["rtn"].dof == pytest.approx(2)
    still = noise_floor({"rtn": [0.1] * 3, "same": [0.1] * 3, "other": [0.2] * 3})
    assert still.deviation is None and still.dof == 0
    assert still.words("same") == "not told apart from rtn" and still.words("other") == "worse than rtn by 0.1"


def test_one_seed_tells_nothing() -> None:
    found = noise_floor({"fast": [1.28], "default": [1.18, 1.17]})
    assert found.verdicts["default"].floor is None and found.words("default") == ""
    assert found.verdicts["default"].difference == pytest.approx(-0.105)
    assert found.spreads["fast"].deviation is None and found.dof == 1


@pytest.mark.parametrize("values", [{}, {"a": []}, {"a": [1.0], "b": [1.0, math.nan]}, {"a": [math.inf]}], ids=str)
def test_values_that_cannot_be_compared(values: dict[str, list[float]]) -> None:
    with pytest.raises(AffineQuantError):
        noise_floor(values)


TABLES = 500


def shares(deviations: list[float], *, seeds: int, common: float = 0.0, shift: float = 0.0) -> tuple[float, float]:
    """The share of made-up tables in which any method is told apart from the first, and of such verdicts among all.

    `common` is the share of the variance that a seed brings to all methods alike; `shift` is added to all but the first.
    """
    rng = np.random.default_rng(7)
    scale = np.array(deviations)[:, None]
    tables, verdicts = 0, 0
    for _ in range(TABLES):
        drawn = math.sqrt(common) * rng.standard_normal((1, seeds))
        drawn = (drawn + math.sqrt(1 - common) * rng.standard_normal((len(deviations), seeds))) * scale
        drawn[1:] += shift
        found = noise_floor({str(number): row.tolist() for number, row in enumerate(drawn)})
        apart = sum(one.said != NOT_APART for one in found.verdicts.values())
        tables += apart > 0
        verdicts += apart
    return tables / TABLES, verdicts / TABLES / (len(deviations) - 1)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("common", [0.0, 0.7])
@pytest.mark.parametrize("deviations", [[1, 1, 1, 1, 1], [1, 5], [1, 1, 1, 8], [5, 1, 1, 1]], ids=str)
def test_methods_that_do_not_differ_are_rarely_told_apart(deviations: list[float], common: float, seeds: int) -> None:
    # 5 % is meant. Welch's test itself is up to 5.8 % at such numbers of seeds; four standard errors of a share are 3.9 %.
    assert shares(deviations, seeds=seeds, common=common)[0] <= 0.095


def test_a_clear_difference_is_seen() -> None:
    assert shares([1, 1], seeds=3, shift=5)[1] > 0.9
    assert shares([1, 1, 1], seeds=3, shift=10)[1] > 0.95
    assert shares([8, 1, 1], seeds=3, shift=5)[1] < 0.2  # the noisier reference hides what a quiet one shows
