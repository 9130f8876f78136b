"""Scores are kept under what decides them: told again at once, measured again where anything differs, never wrong."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals import Metric, Score, Suite, checkpoint, evaluate, mean_score, perplexity
from affinequant_evals import kept as module
from affinequant_evals.checkpoint import eval_checkpoint
from affinequant_evals.kept import content_of, context_of, kept_cards, open_scores
from affinequant_evals.part import Part

import affinequant
from affinequant.cli import main
from affinequant.run.run import Run

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with enough words for a few windows."""
    path = tmp_path_factory.mktemp("text") / "heron.txt"
    path.write_text(" ".join(random.Random(0).choices(["heron", "reed", "the", "an", "over", "bridge"], k=500)))
    return str(path)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were loaded, in order."""
    load, seen = affinequant.load, []

    def watched(folder: Path, **options: Any) -> Any:
        seen.append(Path(folder).name)
        return load(folder, **options)

    monkeypatch.setattr(affinequant, "load", watched)
    return seen


def scored(folder: Path, text: str, **options: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"seq_len": 32, "windows": 3, "keep": True, "baseline": "none"}
    return eval_checkpoint(folder, text=text, **chosen | options).to_json()


def bare(value: dict[str, Any]) -> dict[str, Any]:
    """A scorecard without what says that it was kept."""
    for entry in value["metrics"].values():
        entry.pop("kept")
    return value


def test_the_same_again_is_told_without_loading(tiny: Tiny, text: str, loads: list[str]) -> None:
    other = tiny(seed=1)
    first = scored(tiny(), text, baseline=other)
    assert len(loads) == 2 and all(entry["kept"] is None for entry in first["metrics"].values())
    second = scored(tiny(), text, baseline=other)
    assert len(loads) == 2
    assert all(re.fullmatch(r"\d{4}-.*\+00:00", entry["kept"]) for entry in second["metrics"].values())
    assert bare(first) == bare(second)
    third = scored(tiny(), text, baseline=other, again=True)
    assert len(loads) == 4 and third["metrics"].keys() == first["metrics"].keys()
    assert all(entry["kept"] is None for entry in third["metrics"].values())


def test_a_baseline_is_scored_once_for_all(tiny: Tiny, text: str, loads: list[str]) -> None:
    for seed in (1, 2):
        scored(tiny(seed=seed), text, baseline=tiny(), kl=False)
    assert loads == [tiny(seed=1).name, tiny().name, tiny(seed=2).name]


@pytest.mark.parametrize("fits", [True, False])
def test_a_divergence_is_kept_beside_what_it_is_from(
    tiny: Tiny, text: str, loads: list[str], monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: fits)
    name, found = "kl@heron.txt,seq32", []
    for seed in (1, 2, 1, 2):
        found.append(scored(tiny(), text, baseline=tiny(seed=seed)))
    values = [card["metrics"][name]["value"] for card in found]
    assert len(loads) == 4 and values[:2] == values[2:] and 0 < values[0] != values[1] > 0
    assert [card["metrics"][name]["kept"] is None for card in found] == [True, True, False, False]
    # A baseline whose own scores are kept is read again where another checkpoint is compared with it, and only there.
    other = scored(tiny(seed=3), text, baseline=tiny(seed=1))
    assert len(loads) == 6 and other["metrics"][name]["value"] not in (None, *values)
    scored(tiny(seed=3), text, baseline=tiny(seed=1))
    assert len(loads) == 6


@pytest.mark.parametrize("other", [{"windows": 2}, {"seq_len": 16}, {"bos": "yes"}, {"dtype": "bfloat16"}])
def test_another_way_is_measured(tiny: Tiny, text: str, loads: list[str], other: dict[str, Any]) -> None:
    for options in ({}, other, {}, other):
        scored(tiny(), text, **options)
    assert len(loads) == 2


def test_other_text_under_the_same_name_is_measured(tiny: Tiny, text: str, loads: list[str], tmp_path: Path) -> None:
    other = tmp_path / Path(text).name
    other.write_text(" ".join(reversed(Path(text).read_text().split())))
    values = [scored(tiny(), one)["metrics"]["perplexity@heron.txt,seq32"]["value"] for one in (text, str(other), text)]
    assert len(loads) == 2 and values[0] == values[2] != values[1]


def test_other_versions_and_settings_are_measured(
    tiny: Tiny, text: str, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(tiny(), text)
    monkeypatch.setenv("AFFQ_NATIVE", "0")
    scored(tiny(), text)
    version = module.package_version
    monkeypatch.setattr(module, "package_version", lambda name: "9.9" if name == "torch" else version(name))
    scored(tiny(), text)
    monkeypatch.setattr(module, "_code", lambda: "changed")
    scored(tiny(), text)
    assert len(loads) == 4


def change(path: Path) -> None:
    """Other bytes of the same length, and the old times: what a careful `cp -p` or `rsync` over it leaves."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_changed_weights_are_seen_whatever_the_times_say(tiny_copy: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_copy()
    monkeypatch.setattr(module, "SETTLED", -1.0)  # the tests cannot wait until the file is old
    first = content_of(folder)
    read = module.read_through
    monkeypatch.setattr(module, "read_through", lambda *given, **options: pytest.fail("was read again"))
    assert content_of(folder) == first
    monkeypatch.setattr(module, "read_through", read)
    time.sleep(0.01)
    change(folder / "model.safetensors")
    other = content_of(folder)
    assert other["weights"] != first["weights"] and other["tokenizer"] == first["tokenizer"]


def test_a_fresh_file_is_read_again(tiny_copy: Tiny, scores: Path) -> None:
    content_of(tiny_copy())
    assert not (scores / "content").exists()


def test_content_is_that_of_weights_settings_and_tokenizer(tiny: Tiny, tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    first = content_of(folder)
    assert first == content_of(tiny())
    (folder / "report.json").write_text("{}")
    (folder / "README.md").write_text("words")
    assert content_of(folder) == first
    for name, part in (("generation_config.json", "settings"), ("chat_template.jinja", "tokenizer")):
        (folder / name).write_text('{"other": 1}')
        before, first = first, content_of(folder)
        assert {key for key in first if first[key] != before[key]} == {part}


def test_a_model_of_nan_is_scored_all_the_same(tiny_copy: Tiny) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert content_of(folder)["weights"]


def test_cards_of_a_checkpoint(tiny_copy: Tiny, text: str) -> None:
    folder = tiny_copy()
    scored(folder, text, windows=2)
    newest = scored(folder, text, windows=3)
    scored(folder, text, windows=2)  # told again
    cards = kept_cards(folder)
    assert len(cards) == 2 and cards[0] == json.loads(json.dumps(newest))
    change(folder / "model.safetensors")
    assert kept_cards(folder) == []


def test_metrics_that_do_not_say_what_decides_them_are_not_kept(tiny: Tiny) -> None:
    calls: list[str] = []

    def metric(name: str, **fields: Any) -> Metric[Any]:
        def measure(subject: Any) -> Score:
            calls.append(name)
            return mean_score([1.0, 2.0])

        return Metric(name=name, better="lower", function=measure, **fields)

    suite = Suite(name="", metrics=(metric("nameless"), metric("named", fingerprint={"rows": 3})))
    for _ in range(2):
        with open_scores(context_of(tiny(), tiny(), device="cpu", dtype="auto")) as run:
            evaluate("subject", suite, run=run, nameless=False)
    assert calls == ["nameless", "named", "nameless"]


def test_what_cannot_be_read_is_measured(tiny: Tiny, text: str, loads: list[str], scores: Path) -> None:
    first = scored(tiny(), text)
    (report,) = scores.glob("subjects/*/stages/score.*/report.json")
    report.write_text('{"rows": [{"na')
    second = scored(tiny(), text)
    assert len(loads) == 2 and first["metrics"] == second["metrics"]
    scored(tiny(), text)
    assert len(loads) == 2


def test_where_nothing_can_be_kept_it_is_said_once(
    tiny: Tiny, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AFFINEQUANT_SCORES", str(tmp_path / "file"))
    said: list[str] = []
    value = scored(tiny(), text, say=said.append, baseline=tiny(seed=1))
    assert value["metrics"]["perplexity@heron.txt,seq32"]["value"] > 0
    assert sum("not kept" in line for line in said) == 1


def test_a_full_disk_costs_no_score(tiny: Tiny, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "commit", full)
    said: list[str] = []
    value = scored(tiny(), text, say=said.append)
    assert value["metrics"]["perplexity@heron.txt,seq32"]["value"] > 0
    assert sum("could not be kept" in line for line in said) == 1


def test_two_at_once_wait_for_one_another(tiny: Tiny) -> None:
    context = context_of(tiny(), tiny(), device="cpu", dtype="auto")
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with open_scores(context, said.append) as run:
            order.append("second")
            assert run and run.committed("score.x")

    thread = threading.Thread(target=second)
    with open_scores(context) as run:
        thread.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
        assert run
        run.commit("score.x", report={"rows": []})
    thread.join()
    assert order == ["first", "second"] and "another process" in said[0]


def test_a_long_metric_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def measure(subject: str, part: Part) -> Score:
        values = list(part.there().get("values", []))
        while len(values) < 4:
            done.append(len(values))
            values.append(float(len(values)))
            part.note({"values": values})
            if len(done) == 2:
                raise KeyboardInterrupt
        return mean_score(values)

    metric = Metric(name="long", better="lower", function=measure, resumes=True, fingerprint={"of": 4})
    suite = Suite(name="", metrics=(metric,))
    with pytest.raises(KeyboardInterrupt):
        evaluate("subject", suite, run=Run.open(tmp_path, {}))
    card = evaluate("subject", suite, run=Run.open(tmp_path, {}))
    assert done == [0, 1, 2, 3] and (card.score("long") or pytest.fail("no score")).value == 1.5
    assert metric("subject").value == 1.5  # alone it keeps nothing


@pytest.mark.parametrize("kl", [True, False])
def test_a_text_goes_on_at_the_window_where_it_was(
    kl: bool, tiny: Tiny, text: str, scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"baseline": tiny(seed=1), "kl": kl, "windows": 4}
    whole = scored(tiny(), text, **options, again=True)["metrics"]
    weigh, seen = perplexity.weigh, []

    def counted(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return weigh(*given)

    monkeypatch.setattr(perplexity, "weigh", counted)
    with pytest.raises(KeyboardInterrupt):
        scored(tiny(), text, **options, again=True)
    assert len([*scores.glob("subjects/*/stages/*.part")]) == 1
    resumed = bare(scored(tiny(), text, **options))["metrics"]
    assert len(seen) == 3 + 2  # of four windows two were kept, and the baseline's were not asked for anew
    for name, entry in whole.items():
        entry.pop("kept")
        assert resumed[name] == entry


SLOW = """
import signal, sys, time
from affinequant.cli import main
from affinequant_evals import perplexity
read, calls = perplexity.read, []
def slow(*given):
    calls.append(given)
    if len(calls) == 2:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        print("the baseline", flush=True)
        time.sleep(60)
    return read(*given)
perplexity.read = slow
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_is_130_and_the_printed_command_goes_on(
    tiny: Tiny, text: str, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", str(tiny(seed=1)), "--text", text, "--seq-len", "32", "--windows", "3"]
    argv += ["--baseline", str(tiny()), "--no-kl", "-q"]
    command = [sys.executable, "-c", SLOW, *argv, "--again"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "the baseline\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "every finished score is saved" in said
    assert f"to go on: affinequant {' '.join(argv)}\n" in said  # --again would throw away what was saved
    assert main(argv) == 0
    assert loads == [tiny().name]  # the checkpoint's scores were there
    assert "scores of the checkpoint were measured" in capsys.readouterr().out
