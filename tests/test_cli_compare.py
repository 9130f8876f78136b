"""Several presets on one model: the table, what is taken as it is, what fails, and published figures beside."""

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals.scores import Score, exp_mean_score

from affinequant.cli import compare, main
from affinequant.cli.comparison import Comparison, Entry, ratio

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets are quantised in this process, which has imported what each child would have to import anew."""

    def run(words: Sequence[str]) -> tuple[int, Mapping[str, Any]]:
        shown = io.StringIO()
        with redirect_stdout(shown):
            code = main(list(words[3:]))
        return code, json.loads(shown.getvalue())

    monkeypatch.setattr(compare, "_run_child", run)


@pytest.fixture
def words(tiny: Tiny, tmp_path: Path) -> list[str]:
    """All of the command line but the presets."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} red kites over barn {number % 7}." for number in range(1200)))
    flags = ["--data", str(text), "--samples", "4", "--seq-len", "32"]
    flags += ["--text", str(text), "--windows", "3", "--window-len", "32", "-o", str(tmp_path / "out")]
    return ["compare", str(tiny()), *flags]


def test_help_teaches(capsys: Capture) -> None:
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "--presets A,B,C",
        "--window-len",
        "--bos",
        "--tier",
        "--samples",
        "examples:",
        "compare.md",
        "flatquant",
    ):
        assert word in shown
    assert "--preset NAME" not in shown and shown.count("--out DIR") == 1


@pytest.mark.parametrize(
    ("presets", "what", "fix"),
    [
        ("rtn,flatqant", "unknown preset 'flatqant'", "did you mean 'flatquant'"),
        ("papre", "unknown preset 'papre'", "did you mean 'paper'"),
        (" ,", "no preset is named", "--presets rtn,fast,default"),
        ("paper,rtn,affinequant-paper", "preset 'paper' is named twice", "once"),
    ],
)
def test_presets_that_are_none(
    words: list[str], tmp_path: Path, capsys: Capture, presets: str, what: str, fix: str
) -> None:
    assert main([*words, "--presets", presets]) == 2
    error = capsys.readouterr().err
    assert what in error and fix in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "what"),
    [
        ([], 2, "no preset is named"),
        (["--presets", "rtn", "--samples", "0"], 2, "samples = 0"),
        (["--presets", "rtn", "--text", "nowhere.txt"], 2, "nowhere.txt"),
        (["--presets", "rtn", "--text", "c4"], 2, "add --bos first"),
        (["--presets", "rtn", "--windows", "99999"], 3, "too little text"),
        (["--presets", "rtn", "--preset", "rtn"], 2, "did you mean --presets"),
    ],
)
def test_refused_before_any_work(
    words: list[str], tmp_path: Path, capsys: Capture, more: list[str], code: int, what: str
) -> None:
    assert main([*words, *more]) == code
    assert what in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").write_text("a file")
    assert main([*words, "--presets", "rtn"]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_two_presets_and_what_is_finished_is_kept(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    assert main([*words, "--presets", "rtn,quarot"]) == 0
    shown = capfd.readouterr()
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert "degrees of freedom, of pairs of windows in the ratio" in shown.out
    assert rows["full precision"].count("+-") == 1 and rows["rtn"].count("+-") == rows["quarot"].count("+-") == 2
    assert "merged" in rows["rtn"] and "online" in rows["quarot"] and "0.0 %" in rows["rtn"]
    assert "3 windows of 32 tokens of text.txt" in shown.out and "published" not in shown.out
    assert "preset 1/2: rtn" in shown.err and "2/2" in shown.err and "scoring quarot" in shown.err
    page = (out / "compare.md").read_text()
    assert "| preset | tier |" in page and "\n| quarot | online |" in page and "- perplexity: 3 windows" in page

    request.getfixturevalue("in_process")
    stamps = [(out / name / "report.json").stat().st_mtime_ns for name in ("rtn", "quarot")]
    assert main([*words, "--presets", "rtn,quarot", "--json"]) == 0
    again = capfd.readouterr()
    assert again.err.count("is finished already") == 2
    assert stamps == [(out / name / "report.json").stat().st_mtime_ns for name in ("rtn", "quarot")]
    value = json.loads(again.out)
    assert value == json.loads((out / "compare.json").read_text()) and value["schema"] == 1
    plain, rotated = value["presets"]
    assert plain["online_flops_per_token"] == 0 < rotated["online_flops_per_token"]
    assert plain["ratio"] == pytest.approx(plain["perplexity"] / value["full_precision"]["perplexity"])
    for one in (plain, rotated):
        assert one["minutes"] > 0 and one["peak_bytes"] > 2**20 and one["bytes"] > 0 and one["error"] is None
        assert one["stderr"] > 0 and one["ratio_stderr"] > 0 and one["published"] is None
    assert value["text"]["windows"] == 3 and value["env"]["torch"]


@pytest.mark.usefixtures("in_process")
def test_one_that_fails_is_listed_and_the_rest_goes_on(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--presets", "quarot,rtn", "--tier", "merged", "-q"]) == 1
    shown = capfd.readouterr()
    assert "quarot failed: kronecker at vo stays online" in shown.out and "use --tier online" in shown.out
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert "failed" in rows["quarot"] and rows["rtn"].count("+-") == 2
    assert shown.err.startswith("affinequant: kronecker at vo stays online") and shown.err.count("affinequant:") == 1
    value = json.loads((tmp_path / "out/compare.json").read_text())
    assert value["presets"][0]["error"].keys() == {"what", "where", "fix"} and value["presets"][0]["perplexity"] is None
    assert value["presets"][1]["perplexity"] > 1


@pytest.mark.parametrize(
    ("script", "code", "what"),
    [
        ("kill -9 $$", 1, "killed by SIGKILL"),
        ("exit 7", 1, "exit code 7"),
        ("exit 130", 130, "to go on: affinequant compare"),
    ],
)
def test_a_process_that_dies(
    words: list[str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    code: int,
    what: str,
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main([*words, "--presets", "rtn,fast", "-q"]) == code
    shown = capsys.readouterr()
    assert what in shown.out + shown.err
    assert (tmp_path / "out/compare.json").exists() is (code == 1)


@pytest.mark.usefixtures("in_process")
def test_a_model_that_cannot_be_scored_leaves_the_others_scores(
    words: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import affinequant

    load = affinequant.load

    def breaks(folder: Path, **options: Any) -> Any:
        if Path(folder).name == "rtn":
            raise MemoryError("no room")
        return load(folder, **options)

    monkeypatch.setattr(affinequant, "load", breaks)
    assert main([*words, "--presets", "rtn,smoothquant", "-q"]) == 1
    assert "rtn failed: MemoryError: no room" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "out/compare.json").read_text())["presets"]
    assert first["bytes"] and first["perplexity"] is None and second["perplexity"] > 1


# Published figures.


def score(value: float, **about: Any) -> Score:
    how = {"text": "wikitext2", "windows": 163, "seq_len": 2048, "bos": "start of the text"}
    return Score(value=value, stderr=0.1, n=163, about=how | about)


def compared(preset: str, measured: Score | None, **fields: Any) -> dict[str, Any] | None:
    entry = Entry(preset=preset, tier="online", path=Path("out"), score=measured)
    values: dict[str, Any] = {"model": "meta-llama/Llama-2-7b-hf", "scheme": "w4a4", "all_windows": True} | fields
    found = Comparison(entries=[entry], full=score(5.47), **values)
    columns, rows = found.table()
    assert all(len(row) == len(columns) for row in rows)
    assert ("published" in columns) is bool(found.published(entry))
    assert found.to_json()["presets"][0]["published"] == found.published(entry)
    return found.published(entry)


def test_published_figures_pass_or_fail() -> None:
    good, bad = compared("flatquant", score(5.85)), compared("flatquant", score(6.1))
    assert good and bad and (good["passed"], bad["passed"]) == (True, False)
    assert (
        good["target"] == 5.79
        and good["text"] == "wikitext2"
        and good["limit"] == pytest.approx(5.9058)
        and good["source"]
        and good["protocol"]
    )
    older = compared("paper", score(15.0, text="c4", bos="start of each document"))
    assert older and older["target"] == 15.76 and older["passed"]
    assert compared("flatquant", score(5.8), model="some/Mistral-7B") is None
    assert compared("fast", score(5.8)) is None


@pytest.mark.parametrize(
    ("measured", "fields", "reason"),
    [
        (None, {}, "no perplexity"),
        (score(5.8, text="demo"), {}, "the figures are for wikitext2 and c4-new"),
        (score(8.0, text="c4"), {}, "the figures are for wikitext2 and c4-new"),
        (score(5.8), {"scheme": "w4a8"}, "the figures are for w4a4"),
        (score(5.8), {"all_windows": False}, "all windows of 2048"),
        (score(5.8, seq_len=1024), {}, "all windows of 2048"),
        (score(5.8, bos="each window"), {}, "--bos first"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_figures_of_another_protocol_are_shown_but_not_held_against(
    measured: Score | None, fields: dict[str, Any], reason: str
) -> None:
    found = compared("flatquant", measured, **fields)
    assert found and found["passed"] is None and reason in found["reason"]
    assert found["figures"] == {"wikitext2": 5.79, "c4-new": 7.79}


def test_the_ratio_has_the_error_of_pairs() -> None:
    full = exp_mean_score([2.0, 3.0, 4.0], key="k")
    same = exp_mean_score([2.1, 3.1, 4.1], key="k")
    value, error = ratio(same, full)
    assert value == pytest.approx(1.10517, abs=1e-5) and error == pytest.approx(0, abs=1e-12)
    _, error = ratio(exp_mean_score([2.1, 3.1, 4.4], key="k"), full)
    assert error == pytest.approx(1.2214 * 0.1, rel=1e-3)
    assert ratio(exp_mean_score([2.0, 3.0, 4.0], key="other"), full)[1] is None
