"""Bad input through the command line: exit code, three parts, what the message names, and nothing begun."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from affinequant.cli import main

Make = Callable[..., Path]
Quantize = Callable[..., tuple[int, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{i} blue birds on wire {i % 9}" for i in range(1500)))
    return path


@pytest.fixture
def quantize(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Quantize:
    """quantize(model, *flags) -> (exit code, stderr); no block may have been worked on."""

    def call(model: object, *flags: str, out: Path | None = None) -> tuple[int, str]:
        out = out or tmp_path / "out"
        words = ["quantize", str(model), "--preset", "fast", "--samples", "4", "--seq-len", "32", "-o", str(out)]
        if "--data" not in flags:
            words += ["--data", str(text)]
        code = main([*words, *flags])
        shown = capsys.readouterr()
        assert code != 0
        assert not list(out.glob(".run/stages/block*")) if out.is_dir() else True
        assert "where:" in shown.err and "fix:" in shown.err, shown.err
        assert "Traceback" not in shown.err
        return code, shown.err

    return call


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_no_such_folder(quantize: Quantize) -> None:
    code, shown = quantize("./nowhere/at/all")
    assert code == 2 and "no such folder" in shown


def test_not_a_model_folder(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, shown = quantize(tmp_path / "empty")
    assert code == 2 and "config.json" in shown


def test_a_hub_that_cannot_be_reached(quantize: Quantize) -> None:
    code, shown = quantize("nobody/no-such-model")
    assert code == 3 and "HF_HUB_OFFLINE" in shown


def test_an_unsupported_architecture_is_named_with_the_supported_ones(quantize: Quantize, tiny_copy: Make) -> None:
    code, shown = quantize(edit_config(tiny_copy(), architectures=["MambaForCausalLM"], model_type="mamba"))
    assert code == 3 and "MambaForCausalLM" in shown and "LlamaForCausalLM" in shown


def test_a_truncated_shard(quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    code, shown = quantize(folder)
    assert code == 3 and "cut short" in shown and "model.safetensors" in shown


def test_a_file_that_is_no_safetensors(quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    assert quantize(folder)[0] == 3


def test_a_missing_shard(quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy(shards=2)
    gone = sorted(folder.glob("model-*.safetensors"))[0]
    gone.unlink()
    code, shown = quantize(folder)
    assert code == 3 and gone.name in shown


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, shown = quantize(folder)
    assert code == 3 and name in shown and "1 values" in shown


def test_a_group_that_does_not_divide_names_the_nearest(quantize: Quantize, tiny: Make) -> None:
    code, shown = quantize(tiny(), "--scheme", "w4a16-g48")
    assert code == 3 and "w4a16-g64" in shown


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--scheme", "w4a44"], "w4a4"),
        (["--preset", "fats"], "fast"),
        (["--sampels", "4"], "--samples"),
        (["--rounding", "gpqt"], "gptq"),
        (["--transform", "vo=hadamrd"], "hadamard"),
        (["--transform", "v0=hadamard"], "vo"),
        (["--tier", "merge"], "merged"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_name_gets_the_nearest(flags: list[str], hint: str, quantize: Quantize, tiny: Make) -> None:
    code, shown = quantize(tiny(), *flags)
    assert code == 2 and hint in shown


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantise", "x"]) == 2
    assert "quantize" in capsys.readouterr().err


def test_a_transform_that_does_not_fold_says_why(quantize: Quantize, tiny: Make) -> None:
    code, shown = quantize(tiny(), "--transform", "qk=banded")
    assert code == 2 and "RoPE" in shown and "rope-pair" in shown


def test_too_little_text_says_how_much_there_is(quantize: Quantize, tiny: Make, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    code, shown = quantize(tiny(), "--data", str(short))
    assert code == 3 and "128" in shown and "short.txt" in shown


@pytest.mark.parametrize("data", ["missing.txt", "wikitext3", "demmo"])
def test_a_source_that_is_not_there(data: str, quantize: Quantize, tiny: Make) -> None:
    assert quantize(tiny(), "--data", data)[0] in (2, 3)


def test_a_folder_that_holds_something_else(quantize: Quantize, tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    code, shown = quantize(tiny(), out=out)
    assert code == 2 and "--overwrite" in shown
    assert (out / "thesis.txt").read_text() == "three years of work"


def test_overwrite_does_not_empty_the_model_itself(quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy()
    assert quantize(folder, "--overwrite", out=folder)[0] == 2
    assert (folder / "model.safetensors").exists()


def test_a_folder_that_cannot_be_written(quantize: Quantize, tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert quantize(tiny(), out=tmp_path / "file" / "out")[0] in (2, 3)
    assert quantize(tiny(), out=Path("/proc/affinequant-out"))[0] == 3


def test_a_disk_that_is_too_small(quantize: Quantize, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10, used=9, free=1000))
    code, shown = quantize(tiny())
    assert code == 3 and "needed" in shown and "free" in shown


def test_memory_that_is_too_small_says_what_would_fit(quantize: Quantize, tiny: Make) -> None:
    code, shown = quantize(tiny(), "--cpu-memory", "1MB")
    assert code == 3 and "GB" in shown


def test_another_recipe_in_the_same_folder_names_the_field(
    quantize: Quantize, tiny: Make, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(tiny()), "--preset", "rtn", "--seq-len", "32", "--data", str(text), "-q"]
    assert main([*words, "-o", str(tmp_path / "done")]) == 0
    before = (tmp_path / "done/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*words, "-o", str(tmp_path / "done"), "--seed", "1", "--resume"]) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert (tmp_path / "done/model.safetensors").read_bytes() == before


def test_resume_without_a_run(quantize: Quantize, tiny: Make) -> None:
    code, shown = quantize(tiny(), "--resume")
    assert code == 2 and "no run" in shown


def test_pickle_files_are_refused_with_the_conversion(quantize: Quantize, tiny_copy: Make) -> None:
    folder = tiny_copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, shown = quantize(folder)
    assert code == 3 and "pickle" in shown and "save_pretrained" in shown


def test_code_of_the_models_own_is_not_run(quantize: Quantize, tiny_copy: Make, tmp_path: Path) -> None:
    folder = edit_config(tiny_copy(), auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code, shown = quantize(folder)
    assert code == 3 and "--trust-remote-code" in shown
    assert not (tmp_path / "ran").exists()


def test_an_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "./nowhere/x", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["error"]) >= {"what", "where", "fix"}
