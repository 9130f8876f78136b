"""Several presets on one model: the table, what is taken as it is, what fails, and published figures beside."""

import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals.scores import Score, exp_mean_score, mean_score

from affinequant.cli import compare, main
from affinequant.cli.comparison import Comparison, Entry, ratio
from affinequant.cli.entry import over_seeds

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
        "--seeds 0-2",
        "noise floor",
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
    assert [rows[name].count("+-") for name in ("full precision", "rtn", "quarot")] == [1, 3, 3]
    assert "merged" in rows["rtn"] and "online" in rows["quarot"] and "0.0 %" in rows["rtn"]
    assert "3 windows of 32 tokens of text.txt" in shown.out and "published" not in shown.out
    assert "preset 1/2: rtn" in shown.err and "2/2" in shown.err and "scoring quarot" in shown.err
    page = (out / "compare.md").read_text()
    assert "| preset | tier |" in page and "\n| quarot | online |" in page and "- perplexity: 3 windows" in page

    request.getfixturevalue("in_process")
    stamps = [(out / name / "report.json").stat().st_mtime_ns for name in ("rtn", "quarot")]
    assert main([*words, "--presets", "rtn,quarot", "--json", "--report"]) == 0
    assert "Perplexity of each preset" in (out / "report.html").read_text()
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
        assert one["stderr"] > 0 and one["ratio_stderr"] > 0 and one["kl"] > 0 and one["published"] is None
    assert value["text"]["windows"] == 3 and value["env"]["torch"]


@pytest.mark.usefixtures("in_process")
def test_one_that_fails_is_listed_and_the_rest_goes_on(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--presets", "quarot,rtn", "--tier", "merged", "-q"]) == 1
    shown = capfd.readouterr()
    assert "quarot failed: kronecker at vo stays online" in shown.out and "use --tier online" in shown.out
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert "failed" in rows["quarot"] and rows["rtn"].count("+-") == 3
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


# Seeds.


@pytest.mark.usefixtures("in_process")
def test_presets_over_seeds(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import affinequant

    out = tmp_path / "out"
    asked = [*words, "--presets", "smoothquant,rtn", "--seeds", "0-1"]
    assert main(asked) == 0
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("noise floor of x full precision, seeds 0, 1: a preset moves by ")
    assert "of smoothquant; 1 degree of freedom" in lines[0] and "from smoothquant that is told apart" in lines[1]
    rows = {line.split("  ")[0]: line for line in lines}
    assert "sd over seeds  verdict" in rows["preset"]
    assert "preset 2/4: smoothquant, seed 1" in shown.err and "scoring rtn with seed 1" in shown.err
    assert shown.err.count("scoring") == 5  # full precision once
    assert {path.name for path in out.glob("*-seed?")} == {
        f"{p}-seed{n}" for p in ("rtn", "smoothquant") for n in (0, 1)
    }
    page = (out / "compare.md").read_text()
    assert page.index("noise floor") < page.index("| preset |") and "each is the mean over seeds" in page

    value = json.loads((out / "compare.json").read_text())
    smooth, plain = value["presets"]
    assert [one["seed"] for one in smooth["seeds"]] == value["noise"]["seeds"] == [0, 1]
    assert smooth["ratio"] == pytest.approx(sum(one["ratio"] for one in smooth["seeds"]) / 2)
    assert smooth["spread"] == value["noise"]["ratio"]["deviation"] > 0 == plain["spread"]
    assert len({one["perplexity"] for one in plain["seeds"]}) == 1  # draws nothing
    assert plain["stderr"] == pytest.approx(plain["seeds"][0]["stderr"]) and "seeds" not in plain["seeds"][0]
    assert value["noise"]["ratio"]["reference"] == "smoothquant"
    assert all(one["kl"] > 0 for one in smooth["seeds"]) and value["noise"]["kl"]["spreads"]["rtn"]["deviation"] == 0

    stamps = [path.stat().st_mtime_ns for path in sorted(out.glob("*-seed?/report.json"))]
    load, loaded = affinequant.load, list[Path]()
    monkeypatch.setattr(affinequant, "load", lambda folder, **how: loaded.append(folder) or load(folder, **how))
    assert main([*asked, "-q"]) == 0
    assert len(loaded) == 1  # full precision, to compare with; the checkpoints' scores are kept
    assert json.loads((out / "compare.json").read_text())["presets"] == value["presets"]
    assert stamps == [path.stat().st_mtime_ns for path in sorted(out.glob("*-seed?/report.json"))]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--seeds", "2-0"], "'2-0' names no seeds"),
        (["--seeds", "0,0"], "names a seed twice"),
        (["--seeds", "0-1", "--seed", "3"], "--seed and --seeds cannot go together"),
    ],
)
def test_seeds_that_are_none(words: list[str], tmp_path: Path, capsys: Capture, more: list[str], what: str) -> None:
    assert main([*words, "--presets", "rtn", *more]) == 2
    assert what in capsys.readouterr().err and not (tmp_path / "out").exists()


def made(preset: str, seed: int, value: float | None, kl: float | None = None) -> Entry:
    known = exp_mean_score([math.log(value)] * 2, key="k", about=score(1).about) if value else None
    error = {} if value else {"what": "killed", "where": "there", "fix": "again"}
    divergence = mean_score([kl] * 2, key="k") if kl is not None else None
    path = Path(f"{preset}-seed{seed}")
    return Entry(preset=preset, tier="online", path=path, score=known, kl=divergence, seed=seed, error=error)


def seeded(values: Mapping[str, Sequence[float | None]], kl: Mapping[str, Sequence[float]] | None = None) -> Comparison:
    entries = [
        over_seeds([made(name, seed, one, kl[name][seed] if kl else None) for seed, one in enumerate(found)])
        for name, found in values.items()
    ]
    full = exp_mean_score([math.log(10)] * 2, key="k", about=score(1).about)
    seeds = range(len(next(iter(values.values()))))
    return Comparison(model="m", scheme="w4a4", entries=entries, full=full, seeds=tuple(seeds))


def cells(found: Comparison) -> dict[str, dict[str, str]]:
    columns, rows = found.table()
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def test_words_only_where_the_difference_exceeds_the_noise() -> None:
    found = seeded({"fast": [12.8, 13.0, 12.7], "default": [11.8, 11.7, 11.9], "best": [12.9, 12.5, 12.6]})
    rows = cells(found)
    assert rows["default"]["verdict"] == "better than fast by 0.1 x" and rows["default"]["sd over seeds"] == "0.01"
    assert rows["best"]["verdict"] == "not told apart from fast" and rows["fast"]["verdict"] == ""
    assert rows["default"]["x full precision"] == "1.18 +- 0" and rows["full precision"]["verdict"] == ""
    first, second = found.floor()
    assert "moves by 0.016 x" in first and "6 degrees of freedom" in first
    assert "default 0.04 x, best 0.055 x" in second and "KL" not in rows["fast"]
    assert found.to_json()["presets"][1]["verdicts"] == {"ratio": "better than fast by 0.1 x"}


def test_perplexity_and_divergence_may_disagree() -> None:
    kl = {"fast": [0.20, 0.21, 0.20], "default": [0.40, 0.41, 0.42]}
    found = seeded({"fast": [12.8, 13.0, 12.7], "default": [11.8, 11.7, 11.9]}, kl)
    row = cells(found)["default"]
    assert row["verdict"] == "better than fast by 0.1 x" and row["verdict by KL"] == "worse than fast by 0.21 nats"
    assert row["KL"] == "0.41 +- 0" and row["sd over seeds by KL"] == "0.01"
    assert "default: better than fast by perplexity, worse by KL: the two disagree" in found.notes()
    assert [line.split(",")[0] for line in found.floor()[::2]] == [
        "noise floor of x full precision",
        "noise floor of KL",
    ]
    value = found.to_json()
    assert value["noise"]["kl"]["verdicts"]["default"]["said"] == "worse" and value["presets"][0]["kl"] > 0


def test_a_seed_that_fails_is_listed_and_the_others_stand() -> None:
    found = seeded({"fast": [12.8, None, 12.7], "default": [None, None, None]})
    assert found.failed and len([note for note in found.notes() if "failed: killed" in note]) == 4
    assert "fast with seed 1 failed" in "".join(found.notes())
    rows = cells(found)
    assert rows["fast"]["x full precision"].startswith("1.275") and rows["default"]["perplexity"] == "failed"
    assert found.noise["ratio"].spreads["fast"].n == 2 and "default" not in found.noise["ratio"].spreads
    fast, default = found.to_json()["presets"]
    assert fast["error"] is None and fast["seeds"][1]["error"]["what"] == "killed" and default["error"]


def test_one_seed_shows_no_noise() -> None:
    found = seeded({"fast": [12.8], "default": [11.8]})
    assert found.floor() == ["noise floor of x full precision: one seed shows none; name more, e.g. --seeds 0-2"]
    assert cells(found)["default"]["verdict"] == "" and found.to_json()["noise"]["ratio"]["deviation"] is None
    still = seeded({"rtn": [700, 700], "smoothquant": [900, 900]})
    assert still.floor() == ["noise floor of x full precision: no preset moves from seed to seed"]
    assert cells(still)["smoothquant"]["verdict"] == "worse than rtn by 20 x"


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
