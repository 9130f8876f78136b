"""Gates: which value decides, what is said, and that nothing passes which could not be judged."""

import math
from typing import Any

import pytest
from affinequant_evals.gates import Gate, Limits, failure, judge
from affinequant_evals.harness import Row, Scorecard
from affinequant_evals.scores import Score, exp_mean_score, mean_score

from affinequant.errors import PREFLIGHT, QUALITY, USAGE, AffineQuantError

FULL = [3.0, 2.8, 3.2, 3.1, 2.9, 3.0]
WORSE = [0.1, 0.12, 0.08, 0.11, 0.09, 0.1]
TEXT = "perplexity@demo,seq64"


def card(**scores: Score | str) -> Scorecard:
    """A scorecard of these; words are an error."""
    rows = [
        Row(name=name, better="lower", score=None, error=score)
        if isinstance(score, str)
        else Row(name=name, better="lower", score=score)
        for name, score in scores.items()
    ]
    return Scorecard(subject="model", rows=tuple(rows), env={}, seconds=1.0)


def pair(**more: Score | str) -> Scorecard:
    """A checkpoint whose perplexity on the demo's text is e^3.1, beside its baseline's e^3."""
    mine = exp_mean_score([loss + add for loss, add in zip(FULL, WORSE, strict=True)], key="same")
    return card(**{TEXT: mine}, **more).against(card(**{TEXT: exp_mean_score(FULL, key="same")}))


def only(gates: tuple[Gate, ...]) -> Gate:
    (gate,) = gates
    return gate


def test_an_increase() -> None:
    true = math.exp(3.1) - math.exp(3)
    gate = only(judge(pair(), Limits.read("2.5", None)))
    assert gate.passed and gate.value == pytest.approx(true) and gate.limit == 2.5
    assert gate.interval and gate.interval[0] < true < gate.interval[1]
    gate = only(judge(pair(), Limits.read("2", None)))
    assert not gate.passed and gate.said.startswith(f"{TEXT}: increase +2.11 [")
    assert gate.said.endswith("limit 2, over by 0.112")


def test_a_relative_increase_has_the_interval_of_the_ratio() -> None:
    gate = only(judge(pair(), Limits.read("10.6%", None)))
    assert gate.passed and gate.value == pytest.approx(math.exp(0.1) - 1) and gate.limit == pytest.approx(0.106)
    spread = 2.5706 * math.sqrt(sum((one - 0.1) ** 2 for one in WORSE) / 5 / 6)
    assert gate.interval == pytest.approx((math.exp(0.1 - spread) - 1, math.exp(0.1 + spread) - 1), rel=1e-3)
    gate = only(judge(pair(), Limits.read("5 %", None)))
    assert not gate.passed and "relative increase +10.5 % [" in gate.said and "over by 5.52 %" in gate.said


def test_the_value_decides_and_not_the_interval() -> None:
    inside = only(judge(pair(), Limits.read("2.2", None)))
    assert inside.passed and inside.interval and inside.interval[1] > 2.2


def test_kl() -> None:
    rows: dict[str, Any] = {"kl@demo,seq64": mean_score([0.2, 0.3]), "kl@c4,seq64": mean_score([0.1, 0.1])}
    gates = judge(pair(**rows), Limits.read(None, "0.2"))
    assert [(gate.metric, gate.passed) for gate in gates] == [("kl@demo,seq64", False), ("kl@c4,seq64", True)]
    assert gates[0].to_json() == {
        "metric": "kl@demo,seq64",
        "kind": "kl",
        "value": 0.25,
        "interval": list(mean_score([0.2, 0.3]).interval or ()),
        "limit": 0.2,
        "passed": False,
        "said": gates[0].said,
    }


@pytest.mark.parametrize(
    ("scored", "why"),
    [
        (card(**{TEXT: exp_mean_score(FULL)}), "there is no baseline"),
        (card(**{TEXT: "RuntimeError: no luck"}).against(card(**{TEXT: exp_mean_score(FULL)})), "no luck"),
        (card(**{TEXT: exp_mean_score(FULL)}).against(card(**{TEXT: "the value is inf"})), "the value is inf"),
        (card(piqa=mean_score([1.0, 0.0])).against(card(piqa=mean_score([1.0, 0.0]))), "no text was scored"),
    ],
)
def test_what_cannot_be_judged_has_not_passed(scored: Scorecard, why: str) -> None:
    for increase in ("1000", "1000%"):
        gate = only(judge(scored, Limits.read(increase, None)))
        assert not gate.passed and gate.value is None and why in gate.why
    gate = only(judge(scored, Limits.read(None, "1000")))
    assert not gate.passed and gate.value is None
    problem = failure([gate.to_json()], "model")
    assert problem.exit_code == QUALITY and "cannot be judged" in problem.what and "kept" in problem.fix


def test_what_is_said_of_a_failure() -> None:
    gates = judge(pair(**{"kl@demo,seq64": mean_score([0.2, 0.3])}), Limits.read("2", "0.5"))
    problem = failure([gate.to_json() for gate in gates], "out")
    assert TEXT in problem.what and "over by 0.112" in problem.what and "kl@" not in problem.what
    assert (problem.where, problem.exit_code) == ("out", QUALITY)


@pytest.mark.parametrize("typed", ["", "a", "-1", "nan", "inf", "5%%", "%", "-1%"])
def test_no_limit(typed: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        Limits.read(typed, None)
    assert (caught.value.exit_code, caught.value.where) == (USAGE, "--max-ppl-increase")
    with pytest.raises(AffineQuantError) as caught:
        Limits.read(None, typed)
    assert caught.value.where == "--max-kl"


def test_limits() -> None:
    assert Limits.read("0", None) == Limits(increase=0.0) and Limits.read(None, "0") == Limits(kl=0.0)
    assert Limits.read("5%", "0.1") == Limits(increase=0.05, relative=True, kl=0.1)


@pytest.mark.parametrize(
    ("there", "code", "words"),
    [
        ({"texts": False}, USAGE, "about text"),
        ({"baseline": False, "why": "--baseline none"}, PREFLIGHT, "there is none (--baseline none)"),
        ({"kl": False}, PREFLIGHT, "not compared (--no-kl)"),
    ],
)
def test_what_could_not_be_judged_is_refused_before(there: dict[str, Any], code: int, words: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        found: dict[str, Any] = {"texts": True, "baseline": True, "kl": True}
        Limits.read("1", "1").check(**found | there)
    assert caught.value.exit_code == code and words in caught.value.what
    Limits.read("1", None).check(texts=True, baseline=True, kl=False)
