"""Research on the quantiser's harness: settings, stages that resume to the same bytes, claims, one schema."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from affinequant_evals import Metric, Score, Suite
from affinequant_research import experiment as experiments
from affinequant_research.experiment import Claim, Experiment, Found, Method, Trial, arms, find_experiments
from affinequant_research.running import run_experiment
from affinequant_research.series import first_update, value_at
from torch import Tensor

from affinequant.cli import main
from affinequant.cli.arguments import seeds_of
from affinequant.errors import AffineQuantError
from affinequant.fit import FitConfig, Group
from affinequant.learning.phases import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    epochs: int = 3
    rate: float = 0.1
    arms: tuple[str, ...] = ("slow", "quick")


class Square:
    """Minimises (w - batch)^2."""

    def __init__(self, rate: float) -> None:
        self.w, self.rate = torch.nn.Parameter(torch.ones(())), rate

    def groups(self) -> list[Group]:
        return [Group(name="w", parameters=[self.w], lr=self.rate)]

    def loss(self, batch: Tensor) -> Tensor:
        return (self.w - batch).square().mean()


def build(config: Settings, seed: int, arm: str) -> Trial:
    objective = Square(config.rate if arm == "quick" else config.rate / 100)

    def batches(epoch: int) -> Iterator[Tensor]:
        yield from torch.randn(2, 4, generator=torch.Generator().manual_seed(1000 * seed + epoch)) + 5

    def error(subject: Square) -> Score:
        return Score(value=abs(float(subject.w.detach()) - 5), stderr=None, n=1)

    suite = Suite(name="toy", metrics=(Metric(name="error", better="lower", function=error),))
    phase = Phase(objective, batches, FitConfig(epochs=config.epochs, steps_per_epoch=2), None)
    return Trial(
        phase=phase,
        subject=objective,
        suite=suite,
        outcome=lambda fitted, series: {"near": first_update(series["loss"], "<=", 2.0)},
        pictures=lambda: {"w": [[float(objective.w.detach())]]},
        tensors=lambda: {"w": objective.w.detach()},
    )


TOY = Experiment(
    name="toy",
    about="a parabola",
    source="no paper",
    presets={"smoke": Settings(), "ci": Settings(epochs=50)},
    stages=lambda config: arms(config.arms),
    build=build,
    claims={"ci": (Claim(metric="quick/error", op="<=", than="slow/error", factor=0.5, source="derived"),)},
)
METHOD = Method(name="toy", about="parabolas", source="no paper", experiments=(TOY,))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "METHODS", {"toy": f"{__name__}:METHOD"})


def test_results_hold_what_was_run_and_what_came_of_it(tmp_path: Path) -> None:
    results = run_experiment("toy", TOY, TOY.presets["ci"], (0, 1), "ci", tmp_path)
    first = json.loads((tmp_path / "seed-0/result.json").read_text())
    assert first == json.loads(json.dumps(results[0]))
    assert first["config"] == {"epochs": 50, "rate": 0.1, "arms": ["slow", "quick"]} and first["seed"] == 0
    assert [one["stage"] for one in first["fit"]] == ["slow", "quick"] and first["fit"][0]["steps"] == 100
    updates, losses = first["series"]["quick/loss"]
    assert updates == list(range(2, 101, 2)) and losses[-1] < losses[0]
    assert first["metrics"]["quick/error"]["value"] < first["metrics"]["slow/error"]["value"]
    near = first["metrics"]["quick/near"]
    assert losses[updates.index(near["value"])] <= 2 < losses[updates.index(near["value"]) - 1]
    assert near["about"] == {} and first["metrics"]["slow/near"]["about"] == {"censored": True}
    assert abs(first["pictures"]["quick/w"][0][0] - 5) == first["metrics"]["quick/error"]["value"]
    assert [claim["pass"] for claim in first["expect"]] == [True]
    assert first["metrics"] != results[1]["metrics"]


def test_a_series_says_when_and_what() -> None:
    series = ([2, 4, 6], [0.5, 0.9, 0.7])
    assert first_update(series, ">=", 0.9, per_update=0.5).value == 2
    assert first_update(series, ">=", 1.0).value == 6 and first_update(series, ">=", 1.0).about["censored"]
    assert [value_at(series, at).value for at in (1, 2, 5, 99)] == [0.5, 0.5, 0.9, 0.7]


def test_what_was_cut_short_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run_experiment("toy", TOY, Settings(epochs=4), (0,), "ci", tmp_path / "whole")

    def dies(config: Settings, seed: int, arm: str) -> Trial:
        trial, seen = build(config, seed, arm), 0

        def batches(epoch: int) -> Iterator[Tensor]:
            nonlocal seen
            seen += 1
            if arm == "quick" and seen == 3:
                raise KeyboardInterrupt
            yield from trial.phase.batches(epoch)

        return dataclasses.replace(trial, phase=trial.phase._replace(batches=batches))

    with pytest.raises(KeyboardInterrupt):
        run_experiment("toy", dataclasses.replace(TOY, build=dies), Settings(epochs=4), (0,), "ci", tmp_path / "cut")
    again = run_experiment("toy", TOY, Settings(epochs=4), (0,), "ci", tmp_path / "cut")
    assert again[0]["metrics"] == whole[0]["metrics"] and again[0]["series"] == whole[0]["series"]
    tensors = [(tmp_path / name / "seed-0/stages/quick/tensors.safetensors").read_bytes() for name in ("whole", "cut")]
    assert tensors[0] == tensors[1]


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    run_experiment("toy", TOY, Settings(), (0,), "smoke", tmp_path)
    with pytest.raises(AffineQuantError, match=r"config\.rate: 0\.1 there, 0\.2 now"):
        run_experiment("toy", TOY, Settings(rate=0.2), (0,), "smoke", tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epoch": "3"}, "did you mean 'epochs'"),
        ({"epochs": "many"}, "no int"),
        ({"rate": "true"}, "no float"),
    ],
)
def test_settings_that_are_none_are_refused(changed: dict[str, str], says: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        TOY.settings("smoke", changed)
    assert says in str(caught.value) and caught.value.exit_code == 2


def test_settings_are_typed() -> None:
    assert TOY.settings("smoke", {"rate": "1", "arms": "quick"}) == Settings(rate=1.0, arms=("quick",))


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("0-2", (0, 1, 2)), ("4,0-1", (4, 0, 1))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "2-0", "0,0-1", "-1"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(AffineQuantError):
        seeds_of(text)


def test_a_claim_needs_its_measurements() -> None:
    claim = Claim(metric="a/x", op=">=", than="b/x", factor=2, source="paper")
    assert str(claim) == "a/x >= 2 x b/x"
    assert claim.holds({"a/x": 4, "b/x": 2}) and not claim.holds({"a/x": 3.9, "b/x": 2})
    assert not claim.holds({"a/x": 4}) and not claim.holds({"b/x": 4})


@pytest.mark.parametrize(
    ("share", "code", "outcome"), [(2 / 3, 0, "pass, 2 of 3"), (0.7, 4, "FAIL, 2 of 3"), (1.0, 4, "FAIL")]
)
def test_a_claim_may_be_of_a_share_of_the_seeds(
    share: float,
    code: int,
    outcome: str,
    registered: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = [
        run_experiment("toy", TOY, TOY.presets["ci"], (seed,), "ci", tmp_path / "before")[0]["metrics"]["slow/error"]
        for seed in range(3)
    ]
    second = sorted(error["value"] for error in errors)[1]
    claim = Claim(metric="slow/error", op="<=", than=second, source="derived", share=share)
    some = dataclasses.replace(TOY, claims={"ci": (claim,)})
    monkeypatch.setitem(globals(), "METHOD", dataclasses.replace(METHOD, experiments=(some,)))
    words = ["research", "run", "toy.toy", "--seeds", "0-2", "-o", str(tmp_path / "out"), "--json"]
    assert main(words) == code
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["passed"] == (code == 0) and report["claims"][0]["held"] == 2
    assert report["tables"][1]["rows"][0][3] == outcome
    assert ("share of them" in report["verdict"]) == (share < 1) == ("of seeds" in report["claims"][0]["claim"])


def test_a_claim_of_no_seeds_is_none() -> None:
    with pytest.raises(ValueError, match="share"):
        Claim(metric="a/x", op=">=", than=1.0, source="paper", share=0.0)


def test_the_command_lists_runs_and_judges(
    registered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["research", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["toy"]["experiments"]["toy"]["presets"] == ["smoke", "ci"]
    words = ["research", "run", "toy.toy", "--seeds", "0-2", "-o", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["passed"] and report["verdict"].startswith("1 of 1 claims hold") and len(report["results"]) == 3
    assert report["tables"][0]["columns"] == ["", "error", "near"] and [
        row[0] for row in report["tables"][0]["rows"]
    ] == [
        "slow",
        "quick",
    ]
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    errors = [result["metrics"]["quick/error"]["value"] for result in report["results"]]
    assert report["tables"][0]["rows"][1][1] == f"{fmean(errors):.4g} ({min(errors):.4g} to {max(errors):.4g})"
    impossible = Claim(metric="quick/error", op="<=", than=0.0, source="derived")

    harder = dataclasses.replace(TOY, claims={"ci": (impossible,)})
    monkeypatch.setitem(globals(), "METHOD", dataclasses.replace(METHOD, experiments=(harder,)))
    assert main(words) == 4


@pytest.mark.parametrize(
    "words", [[], ["run"], ["runn", "toy"], ["run", "toi"], ["run", "toy.tooy"], ["run", "toy", "--preset", "paper"]]
)
def test_mistakes_are_said(registered: None, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["research", *words]) == 2
    assert "affinequant: " in capsys.readouterr().err


def test_found_lists_the_seeds_values() -> None:
    scores: Any = ({"a/x": Score(value=1.0, stderr=None, n=1)}, {})
    assert Found(config=None, seeds=(0, 1), scores=scores, series=({}, {})).values("a/x") == [1.0]
    with pytest.raises(AffineQuantError):
        find_experiments("nothing")
