"""Published figures: every row is well formed, and ours stand beside them with a verdict only where the same was measured."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import affinequant_evals.published
import pytest
from affinequant_evals.harness import Row, Scorecard
from affinequant_evals.published import TASKS, published, published_of
from affinequant_evals.reproduction import Made, Reproduced, made_of, of_preset, reproduction, summary
from affinequant_evals.scores import Score

from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import resolve

SIX = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai")
PERPLEXITIES = {"wikitext2", "c4-old", "c4-new", "c4-mixed", "mean-of-three-texts"}
PERCENT = {TASKS, "mmlu", "c-eval", "aime-2024"}

# The data.


def test_every_row_is_well_formed() -> None:
    rows = published()
    assert len(rows) > 600
    for row in rows:
        assert row.measured in PERPLEXITIES | PERCENT and row.unit == ("%" if row.measured in PERCENT else "")
        assert math.isnan(row.value) or (1 < row.value < 100 if row.unit else 2 < row.value < 1e6)
        assert len(row.source) > 4 and len(row.protocol) > 4 and row.model == row.model.lower()
        assert 0 < row.tolerance < 0.1 and row.queries in (4, 6, 16)
        assert row.preset in PRESETS or not row.preset
        assert row.lm_eval in ("", "0.3", "0.4") and bool(row.lm_eval) <= bool(row.tasks) <= (row.measured == TASKS)
        assert row.full != bool(row.scheme) and row.full <= (row.preset == "")
        assert json.loads(json.dumps(row.to_json(), allow_nan=False))["source"] == row.source
    assert len({(row.table, row.method, row.model, row.measured) for row in rows}) == len(rows)


def test_tables_say_only_what_is_known() -> None:
    text = Path(affinequant_evals.published.__file__).with_suffix(".toml").read_text()
    known = {"about", "source", "protocol", "scheme", "queries", "tolerance", "models", "tasks", "lm_eval", "weak"}
    for name, table in tomllib.loads(text).items():
        assert {"about", "source", "protocol", "scheme", "models", "rows"} <= set(table), name
        assert set(table) <= known | {"presets", "methods", "rows"}, name
        methods = {method for rows in table["rows"].values() for method in rows}
        assert set(table.get("presets", {})) | set(table.get("methods", {})) <= methods, name
        assert all(set(own) <= known - {"about", "models"} for own in table.get("methods", {}).values()), name


@pytest.mark.parametrize(
    ("table", "measured", "values"),
    [
        ("omniquant-w4a4", "wikitext2", {"full precision": 5.47, "AffineQuant": 12.69, "DuQuant+LWC": 6.08}),
        ("omniquant-w4a4", "c4-old", {"full precision": 6.97, "AffineQuant": 15.76, "OmniQuant": 18.02}),
        ("flatquant-w4a4kv4", "wikitext2", {"full precision": 5.47, "FlatQuant, nearest": 5.79, "QuaRot, GPTQ": 6.10}),
        ("flatquant-w4a4kv4", "c4-new", {"full precision": 7.26, "FlatQuant, nearest": 7.79, "SpinQuant, GPTQ": 8.28}),
        ("flatquant-w4a4kv4", "tasks", {"full precision": 69.79, "FlatQuant, nearest": 67.96}),
        ("sliderquant-plus-w4a4", "wikitext2", {"SliderQuant+": 5.71}),
        ("sliderquant-w4a4", "c4-old", {"SliderQuant": 11.10}),
        ("omniquant-w4a16-g128", "wikitext2", {"RTN": 5.72, "OmniQuant": 5.58}),
    ],
)
def test_some_figures_of_llama_2_7b(table: str, measured: str, values: Mapping[str, float]) -> None:
    rows = [row for row in published_of("meta-llama/Llama-2-7b-hf") if (row.table, row.measured) == (table, measured)]
    assert {row.method: row.value for row in rows}.items() >= values.items()


def test_full_precision_of_a_model_is_nearly_the_same_in_all_tables() -> None:
    kinds: dict[tuple[str, str], list[float]] = {}
    for row in published():
        if row.full and row.measured in ("wikitext2", "c4-old", "c4-new"):
            kinds.setdefault((row.model, row.measured), []).append(row.value)
    for key, values in kinds.items():
        assert max(values) <= 1.01 * min(values), key


def test_a_quantised_model_is_no_better_than_full_precision() -> None:
    full = {(row.table, row.model, row.measured): row.value for row in published() if row.full}
    better = set()
    for row in published():
        limit = full.get((row.table, row.model, row.measured))
        if limit is None or row.full or math.isnan(row.value):
            continue
        if row.value > limit if row.unit else row.value < limit:
            better.add((row.method, row.model, row.measured))
    # Perplexity of instruct models is no measure of them, which is why their tables are published and odd.
    assert {model for _, model, _ in better} == {"qwen2.5-7b-instruct"}, better


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("./Llama-2-13b/", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
    ],
)
def test_models_by_name(name: str, model: str) -> None:
    assert {row.model for row in published_of(name)} == {model}


def test_other_models_have_none() -> None:
    for name in ("Llama-2-7b-chat-hf", "Llama-2-7b-hf-w4a4", "demo", "Meta-Llama-3-8B-Instruct"):
        assert not published_of(name)


@pytest.mark.parametrize("preset", ["smoothquant", "omniquant", "paper", "quarot", "spinquant", "flatquant"])
def test_published_methods_have_figures_of_one_table(preset: str) -> None:
    for model in ("meta-llama/Llama-2-7b-hf", "Llama-2-13b"):
        rows = of_preset(model, preset, "w4a4")
        assert {row.measured for row in rows} in ({"wikitext2", "c4-old"}, {"wikitext2", "c4-new"})
        assert len({row.table for row in rows}) == 1 and all(row.value > 4.88 for row in rows)
    assert not of_preset("demo", preset, "w4a4") and not of_preset("Llama-2-7b-hf", "default", "w4a4")


def test_the_table_of_the_same_widths_is_taken() -> None:
    assert [row.value for row in of_preset("llama-2-7b", "rtn", "w4a16-g128")] == [5.72]
    assert [row.value for row in of_preset("llama-2-7b", "rtn", "w4a16")] == [6.11]
    assert [row.measured for row in of_preset("llama-2-70b", "omniquant", "w4a4")] == []  # published as NaN


# Ours beside them.


def text(name: str, value: float, **about: Any) -> Row:
    how = {"text": name, "windows": 166, "seq_len": 2048, "bos": "start of the text"}
    score = Score(value=value, stderr=0.1, n=166, about=how | about)
    return Row(name=f"perplexity@{name},seq2048", better="lower", score=score)


def tasks(mean: float, names: tuple[str, ...] = SIX, **about: Any) -> tuple[Row, ...]:
    score = Score(value=mean, stderr=None, n=100, about={"limit": None, "num_fewshot": 0} | about)
    rows = [Row(name=f"{task},acc", better="higher", score=score) for task in names]
    whole = Score(value=mean, stderr=None, n=6, about={"tasks": dict.fromkeys(names, "acc")})
    return (*rows, Row(name="mean@flatquant", better="higher", score=whole))


def card(*rows: Row, baseline: Scorecard | None = None) -> Scorecard:
    return Scorecard(subject="out", rows=rows, env={}, seconds=1.0, baseline=baseline)


MADE = Made(model="meta-llama/Llama-2-7b-hf", scheme="w4a4", preset="flatquant", data="wikitext2:train")
FULL = card(text("wikitext2", 5.475), text("c4-new", 7.262), *tasks(0.6985))


def found(mine: Scorecard, made: Made = MADE, *, whole: bool = True) -> dict[tuple[str, str, str], Reproduced]:
    rows = reproduction(mine, made, whole=whole)
    assert all(json.loads(json.dumps(row.to_json(), allow_nan=False))["verdict"] == row.verdict for row in rows)
    assert all(bool(row.reason) == (row.verdict in ("not run", "not comparable")) for row in rows)
    return {(row.row.table, row.row.method, row.row.measured): row for row in rows}


def test_ours_beside_published_figures() -> None:
    mine = card(text("wikitext2", 5.85), text("c4-new", 8.2), *tasks(0.675), baseline=FULL)
    rows = found(mine)
    assert len(rows) == len(published_of("llama-2-7b"))
    own = {text: rows["flatquant-w4a4kv4", "FlatQuant, nearest", text] for text in ("wikitext2", "c4-new", "tasks")}
    assert {text: row.verdict for text, row in own.items()} == {"wikitext2": "pass", "c4-new": "FAIL", "tasks": "pass"}
    assert own["wikitext2"].ours == 5.85 and own["tasks"].ours == pytest.approx(67.5)
    assert own["wikitext2"].differs == (
        "KV cache: 4 bits there, 16 here",
        "symmetric grids there, asymmetric here",
    )
    full = {key: row for key, row in rows.items() if row.row.full}
    assert {row.verdict for (table, _, text), row in full.items() if text in ("wikitext2", "c4-new")} == {"pass"}
    assert full["flatquant-w4a4kv4", "full precision", "tasks"].verdict == "pass"
    assert full["omniquant-w4a4", "full precision", "c4-old"].verdict == "not run"
    assert full["omniquant-w4a4", "full precision", "c4-old"].reason == "c4-old was not scored"
    other = rows["flatquant-w4a4kv4", "FlatQuant, GPTQ", "wikitext2"]
    assert (other.verdict, other.ours) == ("not comparable", 5.85) and "another method" in other.reason
    assert rows["sliderquant-plus-w4a4", "SliderQuant+", "c4-mixed"].reason == "c4-mixed has no metric here"
    assert rows["omniquant-w4a16", "RTN", "wikitext2"].verdict == "not comparable"
    assert summary(list(rows.values())).startswith("8 pass, 1 FAIL, ")


def test_full_precision_may_miss_on_neither_side() -> None:
    for value, verdict in ((5.475, "pass"), (5.43, "pass"), (5.40, "FAIL"), (5.54, "FAIL")):
        mine = card(text("wikitext2", 5.85), baseline=card(text("wikitext2", value)))
        assert found(mine)["flatquant-w4a4kv4", "full precision", "wikitext2"].verdict == verdict
    # A model that is not quantised is full precision itself.
    alone = found(card(text("wikitext2", 5.475)), Made(model="Llama-2-7b"))
    assert alone["flatquant-w4a4kv4", "full precision", "wikitext2"].verdict == "pass"
    assert alone["flatquant-w4a4kv4", "FlatQuant, nearest", "wikitext2"].reason == "full precision alone was scored"
    without = found(card(text("wikitext2", 5.85)))
    assert without["flatquant-w4a4kv4", "full precision", "wikitext2"].reason == "there is no baseline"


KEY = ("flatquant-w4a4kv4", "FlatQuant, nearest", "wikitext2")


@pytest.mark.parametrize(
    ("row", "made", "whole", "reason"),
    [
        (text("wikitext2", 5.8, seq_len=1024), MADE, True, "all windows of 2048"),
        (text("wikitext2", 5.8, stride=512), MADE, True, "all windows of 2048"),
        (text("wikitext2", 5.8), MADE, False, "all windows of 2048"),
        (text("wikitext2", 5.8, bos="each window"), MADE, True, "--bos first"),
        (text("wikitext2", 5.8), replace(MADE, scheme="w4a8"), True, "the figures are for w4a4kv4-sym"),
        (text("wikitext2", 5.8), replace(MADE, scheme="w4a4-g128"), True, "the figures are for w4a4kv4-sym"),
        (text("wikitext2", 5.8), replace(MADE, preset="default"), True, "made by default, which is another method"),
        (text("wikitext2", 5.8), replace(MADE, changed=("epochs 1",)), True, "made by flatquant with epochs 1"),
        (text("demo", 5.8), MADE, True, "wikitext2 was not scored"),
    ],
)
def test_another_protocol_gets_no_verdict(row: Row, made: Made, whole: bool, reason: str) -> None:
    one = found(card(row), made, whole=whole)[KEY]
    assert one.verdict in ("not run", "not comparable") and reason in one.reason


def test_means_of_tasks_need_the_same_tasks_questions_and_harness() -> None:
    key = ("flatquant-w4a4kv4", "FlatQuant, nearest", "tasks")
    assert found(card(*tasks(0.66)))[key].verdict == "FAIL"
    assert found(card(*tasks(0.70, limit=100)))[key].reason == "the figures are for all documents"
    assert found(card(*tasks(0.70, num_fewshot=5)))[key].reason == "the figures are without solved examples"
    five = found(card(*tasks(0.70, SIX[:5])))
    assert five[key].verdict == "not run" and "lambada_openai" in five[key].reason
    assert five["sliderquant-plus-w4a4", "SliderQuant+", "tasks"].reason == "made by flatquant, which is another method"
    unsaid = found(card(*tasks(0.69, SIX[:5]), baseline=card(*tasks(0.69, SIX[:5]))))
    assert "not said" in unsaid["sliderquant-plus-w4a4", "full precision", "tasks"].reason
    older = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
    mine = Made(model="huggyllama/llama-7b", scheme="w4a4", preset="paper")
    one = found(card(*tasks(0.54, older)), mine)["omniquant-w4a4", "AffineQuant", "tasks"]
    assert (one.verdict, one.ours) == ("not comparable", 54.0) and one.reason == "scored by lm-eval 0.3 there"


def test_weak_sources_and_nan_are_shown_alone() -> None:
    mine = Made(model="meta-llama/Meta-Llama-3-8B", scheme="w4a4", preset="paper")
    one = found(card(text("wikitext2", 100.0)), mine)["duquant-llama-3-w4a4", "AffineQuant", "wikitext2"]
    assert (one.verdict, one.reason) == ("not comparable", "a weak source: DuQuant's rerun")
    mine = Made(model="Llama-2-70b-hf", scheme="w4a4", preset="omniquant")
    one = found(card(text("wikitext2", 9.0)), mine)["omniquant-w4a4", "OmniQuant", "wikitext2"]
    assert (one.verdict, one.reason) == ("not comparable", "it was published as NaN") and one.to_json()["value"] is None


def test_a_model_of_which_nothing_is_published() -> None:
    assert reproduction(FULL, Made(model="demo", scheme="w4a4", preset="default"), whole=True) == []
    assert reproduction(FULL, None, whole=True) == []


# How a checkpoint was made.


def written(folder: Path, **fields: Any) -> Path:
    recipe = resolve({"model": "meta-llama/Llama-2-7b-hf", "preset": "flatquant", **fields})
    known = {"model": recipe.model, "scheme": recipe.scheme, "preset": recipe.preset, "tier": recipe.tier}
    (folder / "report.json").write_text(json.dumps(known | {"calibration": {"source": "wikitext2:train"}}))
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder


def test_a_folder_says_how_it_was_made(tmp_path: Path) -> None:
    assert made_of(written(tmp_path), "out") == MADE
    changed = made_of(written(tmp_path, epochs=1, samples=64, transforms={"vo": "hadamard"}, seed=3), "out")
    assert changed and set(changed.changed) == {"epochs 1", "samples 64", "transforms"}
    (tmp_path / "recipe.toml").unlink()
    assert made_of(tmp_path, "out") is None


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert made_of(tmp_path, "meta-llama/Llama-2-7b-hf") == Made(model="meta-llama/Llama-2-7b-hf")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert made_of(tmp_path, "Llama-2-7b") is None and made_of(tmp_path / "nowhere", "Llama-2-7b") is None


# On the screen.


def test_the_table_after_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from affinequant.cli.output import Screen
    from affinequant.cli.published import as_published, beside_published

    assert as_published("paper") and not as_published("quick") and not as_published(None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    mine = replace(card(text("wikitext2", 5.85), baseline=FULL), subject=str(written(tmp_path)))
    value = beside_published(mine, whole=True, screen=Screen()).to_json()
    rows = {(one["table"], one["method"], one["measured"]): one for one in value["published"]}
    assert rows[KEY]["verdict"] == "pass" and rows[KEY]["ours"] == 5.85 and rows[KEY]["value"] == 5.79
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "FlatQuant, nearest" in line and "wikitext2" in line)
    assert line.split()[-3:] == ["5.79", "5.85", "pass"]
    assert "flatquant-w4a4kv4, nonetheless: KV cache: 4 bits there, 16 here; symmetric grids there" in shown
    assert "published: 7 pass, " in shown and "not comparable: made by flatquant, which is another method" in shown
    assert "\nomniquant-w4a4: README of Hsu1023/DuQuant @62c5844" in shown

    unknown = replace(mine, subject=str(written(tmp_path, model="some/Mistral-7B")))
    assert beside_published(unknown, whole=True, screen=Screen()).to_json()["published"] == []
    assert capsys.readouterr().out.strip() == ("no figures are published of some/Mistral-7B, as far as is known here")


def test_lists_of_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    from affinequant.cli import main

    assert main(["list", "published", "--model", "meta-llama/Meta-Llama-3-8B", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["list"]["published"]
    assert {"BDQ", "ReSpinQuant", "SliderQuant+"} < {row["method"] for row in rows}
    assert {row["published"] for row in rows if row["method"] == "BDQ"} == {"6.84", "71.46 %"}
    assert all(row["note"].startswith("weak: ") for row in rows if row["method"] == "BDQ")
    assert main(["list", "published", "--model", "Llama-2-8b"]) == 2
    assert main(["list", "data", "--model", "llama-2-7b"]) == 2
    assert "list published --model NAME" in capsys.readouterr().err


def test_eval_puts_them_into_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant.cli import evaluate, main

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    rows = (text("wikitext2", 5.85, tokens_scored=339_802), text("c4-new", 7.8, tokens_scored=524_032))
    mine = replace(card(*rows, baseline=FULL), subject=str(written(tmp_path)))
    monkeypatch.setattr(evaluate, "score", lambda *given: mine)
    assert main(["eval", str(tmp_path), "--suite", "flatquant", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    found = {(one["table"], one["method"], one["measured"]): one["verdict"] for one in value["published"]}
    assert found[KEY] == "pass" and found["atom-w4a4", "Atom", "wikitext2"] == "not comparable"
    assert main(["eval", str(tmp_path), "--suite", "flatquant", "--windows", "9", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    verdicts = {one["verdict"] for one in value["published"] if one["measured"] != TASKS}
    assert verdicts == {"not comparable", "not run"}
    assert main(["eval", str(tmp_path), "--text", "wikitext2", "--json"]) == 0
    assert "published" not in json.loads(capsys.readouterr().out)
