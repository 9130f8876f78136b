"""What is taken for the same: a finished folder, a run that was interrupted and a recipe, by content and not by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import affinequant
from affinequant.deliver import Result
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Recipe, resolve
from affinequant.run.run import Run

Tiny = Callable[..., Path]


def text(path: Path, factor: int = 7) -> Path:
    path.write_text(" ".join(f"{i} green bottles hang on wall {i * factor % 13}" for i in range(1500)))
    return path


def retrain(folder: Path) -> None:
    """New weights in place: same names, shapes and sizes."""
    state = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def short(folder: Path, out: Path, data: Path, **more: Any) -> Result:
    fields = {"scheme": "w8a8", "preset": "fast", "samples": 2, "seq_len": 16, "out": str(out), "data": str(data)}
    return affinequant.quantize(str(folder), **(fields | more))


def refused(act: Callable[[], Any], field: str) -> None:
    with pytest.raises(AffineQuantError, match=re.escape(f"{field}: ")) as caught:
        act()
    assert "another recipe" in caught.value.what and caught.value.exit_code == 2 and "--overwrite" in caught.value.fix


def test_a_finished_folder_is_held_against_the_content_of_its_source(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder, data, out = tiny_copy(), text(tmp_path / "d.txt"), tmp_path / "out"
    report = short(folder, out, data).report
    assert "device" not in json.loads((out / ".run/fingerprint.json").read_text()), "another device may finish a run"
    assert short(folder, out, data).report == report, "not taken as finished"
    text(data, 11)
    refused(lambda: short(folder, out, data), "calibration")
    text(data)
    retrain(folder)
    refused(lambda: short(folder, out, data), "weights")
    written = (out / "model.safetensors").read_bytes()
    short(folder, out, data, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != written


def test_the_report_tells_the_commit_of_a_hubs_model(tiny_copy: Tiny, tmp_path: Path) -> None:
    (tmp_path / "models--org--name/snapshots").mkdir(parents=True)
    folder = tiny_copy().rename(tmp_path / "models--org--name/snapshots/0a1b2c")
    report = short(folder, tmp_path / "out", text(tmp_path / "d.txt")).report
    fingerprint = json.loads((tmp_path / "out/.run/fingerprint.json").read_text())
    assert report["source"] == {"commit": "0a1b2c", "weights": fingerprint["weights"]}


def test_what_is_copied_from_the_source_counts_too(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder, data, out = tiny_copy(), text(tmp_path / "d.txt"), tmp_path / "out"
    short(folder, out, data)
    (folder / "README.md").write_text("a document may change")
    short(folder, out, data)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    refused(lambda: short(folder, out, data), "files.chat_template.jinja")


def test_a_finished_folder_that_was_killed_late_or_lost_its_report(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, out = tiny_copy(), text(tmp_path / "d.txt"), tmp_path / "out"

    def killed(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "drop_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        short(folder, out, data)
    monkeypatch.undo()
    assert list(out.glob(".run/stages/*/*.safetensors"))
    short(folder, out, data)
    assert not list(out.glob(".run/stages/*/*.safetensors")), "kept for ever"
    (out / "report.json").unlink()
    with pytest.raises(AffineQuantError, match=r"report\.json is gone"):
        short(folder, out, data)
    assert (out / "model.safetensors").exists()
    assert short(folder, out, data, overwrite=True).report["verified"]["passed"]


def test_a_full_disk_stops_a_run_that_goes_on_later(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, real = text(tmp_path / "d.txt"), tmp_path / "out", affinequant.run.run.save_file

    def full(tensors: Any, path: Path, **more: Any) -> None:
        if "block.0001" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, **more)

    monkeypatch.setattr("affinequant.run.run.save_file", full)
    with pytest.raises(AffineQuantError, match="the disk is full") as caught:
        short(tiny(), out, data)
    assert caught.value.exit_code == 3 and "every finished block is kept" in caught.value.fix
    monkeypatch.undo()
    assert short(tiny(), out, data).report["verified"]["passed"]


def test_a_run_is_not_taken_up_with_other_weights(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, out, commit = tiny_copy(), text(tmp_path / "d.txt"), tmp_path / "out", Run.commit

    def interrupt(run: Run, name: str, **parts: Any) -> None:
        commit(run, name, **parts)
        if name == "block.0000":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        short(folder, out, data)
    monkeypatch.undo()
    kept = (folder / "model.safetensors").read_bytes()
    retrain(folder)
    refused(lambda: short(folder, out, data), "weights")
    (folder / "model.safetensors").write_bytes(kept)
    short(folder, out, data)


def test_a_recipe_names_the_same_files_from_everywhere(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here, there = tiny_copy(), tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        text(place / "d.txt")
        (place / "m").symlink_to(folder)
    monkeypatch.chdir(here)
    recipe = resolve({"model": "m", "data": "d.txt"})
    assert (recipe.model, recipe.data) == (str(here / "m"), str(here / "d.txt"))
    (here / "recipe.toml").write_text(recipe.to_toml())
    (here / "by-hand.toml").write_text('model = "m"\ndata = "./d.txt"\n')
    monkeypatch.chdir(there)
    assert Recipe.from_toml(here / "recipe.toml") == Recipe.from_toml("../here/by-hand.toml") == recipe
    assert Recipe.from_toml(here / "recipe.toml", data="d.txt").data == str(there / "d.txt")


def test_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "wikitext2", "c4"):
        (tmp_path / name).mkdir()
    assert (resolve({"model": "demo"}).model, resolve({"model": "./demo"}).model) == ("demo", str(tmp_path / "demo"))
    for name in ("demo", "wikitext2", "c4", "hf:org/set", "absent.txt"):
        assert resolve({"model": "org/name", "data": name}).data == name
    assert resolve({"model": "org/name"}).model == "org/name"


def test_a_head_of_its_own_is_used_whatever_the_config_says(tiny_copy: Tiny, tmp_path: Path) -> None:
    """As transformers does; and the result says that it is untied, so that every engine reads the head."""
    folder = tiny_copy(tied=True)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = short(folder, tmp_path / "out", text(tmp_path / "d.txt"))
    config = json.loads((done.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and any("tied" in note for note in done.report["plan"]["notes"])
    ids = torch.arange(3, 60)[None]
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected, got = source(ids).logits, affinequant.load(done.path, dtype="float32")(ids).logits
    assert float((expected - got).norm() / expected.norm()) < 0.1
