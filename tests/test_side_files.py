"""What goes along from a source: regular files of the model, nothing from outside, no training state."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from affinequant.errors import AffineQuantError
from affinequant.formats.side_files import copy_source, find_side_files
from affinequant.plan import plan

Tiny = Callable[..., Path]
MODEL = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def copied(folder: Path, out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in copy_source(folder, out)}


def test_training_state_and_data_stay_behind_and_are_said(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    names = (
        *("optimizer.pt", "rng_state_0.pth", "trainer_state.json", "events.out.tfevents.1.host", "training_args.bin"),
        *("model.onnx", "model.onnx_data", "model.onnx.data", "train-00000-of-00002.parquet", "train.jsonl"),
        *("checkpoint-500/tokenizer.json", "step_900/model.safetensors", "step_900/tokenizer.json", "runs/a/log.txt"),
        *("global_step12/zero_pp_rank_0.json", "pytorch_model_fsdp_0/__0_0.distcp"),
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    with (folder / "corpus.txt").open("wb") as large:
        large.truncate(65 * 2**20)
    (folder / "LICENSE").write_text("free")
    found = find_side_files(folder, skip=tmp_path / "out")
    assert copied(folder, tmp_path / "out") == MODEL | {"LICENSE"} == set(found.targets)
    said = " ".join(found.left_out)
    for name in (
        "optimizer.pt",
        "model.onnx_data",
        "checkpoint-500/",
        "step_900/",
        "runs/",
        "corpus.txt",
        "train.jsonl",
    ):
        assert name in said, name
    assert found.note() and "optimizer.pt" in " ".join(
        plan(str(folder), data="demo", seq_len=32, out=str(tmp_path / "o")).notes
    )


def test_what_is_copied_counts_in_the_plan(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    before = plan(str(folder), data="demo", seq_len=32, out=str(tmp_path / "o")).disk_bytes
    (folder / "tokenizer.model").write_bytes(bytes(10**6))
    assert plan(str(folder), data="demo", seq_len=32, out=str(tmp_path / "o")).disk_bytes == before + 10**6


def test_no_link_is_followed_out_of_the_folder(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder, secret = tiny_copy(), tmp_path / "secrets"
    secret.mkdir()
    (secret / "key.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(secret / "key.txt")
    (folder / "more").symlink_to(secret)
    (folder / "NOTICE").write_text("here")
    (folder / "notice.txt").symlink_to("NOTICE")
    found = find_side_files(folder, skip=tmp_path / "out")
    assert copied(folder, tmp_path / "out") == MODEL | {"NOTICE", "notice.txt"}
    assert "notes.txt (is a link out of the folder" in " ".join(found.left_out) and "more/" in found.left_out
    (folder / "tokenizer.json").rename(secret / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(secret / "tokenizer.json")
    with pytest.raises(AffineQuantError, match=r"tokenizer.json is a link out of the folder") as caught:
        plan(str(folder), data="demo", seq_len=32, out=str(tmp_path / "o"))
    assert caught.value.exit_code == 3


def test_what_cannot_be_copied_is_known_before_any_work(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    (folder / "USE_POLICY.md").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe.txt")
    found = find_side_files(folder, skip=tmp_path / "out")
    assert copied(folder, tmp_path / "out") == MODEL
    assert "USE_POLICY.md (cannot be read" in found.note()[0] and "pipe.txt (is no regular file" in found.note()[0]
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(AffineQuantError, match=r"generation_config.json is no regular file") as caught:
        plan(str(folder), data="demo", seq_len=32, out=str(tmp_path / "o"))
    assert caught.value.exit_code == 3
