"""`affinequant demo` with a tiny model and a short text in place of the wheels, which test_demo.py has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from affinequant.cli import demo as command
from affinequant.cli import main
from affinequant.data import demo, text
from affinequant.data import tokens as data


@pytest.fixture(autouse=True)
def small(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [f"{number} green bottles hang on wall {number % 7}." for number in range(1200)]
    for module in (data, text):
        monkeypatch.setattr(module, "demo_passages", lambda say=None: (passages[:600], passages[600:]))
    monkeypatch.setattr(demo, "demo_model", lambda say=None: tiny())
    monkeypatch.setattr(command, "SEQ_LEN", 64)
    monkeypatch.chdir(tmp_path)


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--tier", "merged", "--preset", "fast", "--samples", "4", "--seq-len", "32"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    row = next(line for line in lines if line.startswith("perplexity@demo,seq64"))
    assert row.endswith("x") and row.count("+-") == 2 and "with 5 degrees of freedom" in shown.out
    assert lines[-2:] == ["  vllm serve ./smollm2-135m-w4a4", "  affinequant eval ./smollm2-135m-w4a4"]
    assert "The capital of France is" in shown.out and "note: SmolLM2-135M-Instruct, dequantised" in shown.out
    page = Path("smollm2-135m-w4a4/report.html")
    assert f"report: {page}" in lines and "perplexity@demo,seq64" in page.with_suffix(".md").read_text()
    # Typed again it goes straight to the scores.
    page.unlink()
    assert main([*argv, "--json", "--no-report"]) == 0 and not page.exists()
    again = capsys.readouterr()
    value = json.loads(again.out)
    assert "finished already" in again.err and "per block" not in again.err
    assert value["scores"]["metrics"]["perplexity@demo,seq64"]["n"] == 6
    assert value["greedy"][0].keys() == {"prompt", "full", "quantized"}


def test_the_default_tier_is_served_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()  # a folder of that name is not what is meant
    argv = ["demo", "--preset", "fast", "--samples", "4", "--seq-len", "32", "--json"]
    assert main(argv) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["report"]["model"], value["report"]["tier"]) == ("demo", "online")
    assert [command.split()[:2] for command in value["next"]] == [["vllm", "serve"], ["affinequant", "eval"]]


def test_options_and_the_folder_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--preset", "fast", "--samples", "4", "--seq-len", "32", "--dry-run"]
    assert main([*argv, "--w4a16"]) == 0
    assert "smollm2-135m-w4a16" in capsys.readouterr().out
    assert main([*argv, "-o", "elsewhere"]) == 0
    assert "elsewhere" in capsys.readouterr().out
    assert not Path("elsewhere").exists()
