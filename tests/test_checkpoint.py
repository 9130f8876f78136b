"""Model folders: what is read, and every kind of damage that is refused from headers alone."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from affinequant.checkpoint import check_finite, check_tensors, locate, open_source
from affinequant.errors import AffineQuantError
from affinequant.models import resolve

Tiny = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


def check(folder: Path) -> None:
    """What a plan does with a folder."""
    source = open_source(folder)
    check_tensors(source, *resolve(source.config, where="config.json"))


def refusal(act: Callable[[], Any], code: int = 3) -> AffineQuantError:
    with pytest.raises(AffineQuantError) as caught:
        act()
    assert caught.value.exit_code == code and caught.value.where and caught.value.fix
    return caught.value


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder with its tensors changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("shape", [{}, {"shards": 3}, {"tied": True}, {"bias": True}, {"kv_heads": 1}], ids=str)
def test_whole_folders_pass(tiny: Tiny, shape: dict[str, Any]) -> None:
    folder = tiny(**shape)
    source = open_source(folder)
    check(folder)
    check_finite(source)
    names = source.names_under("model.layers.1")
    assert UP in names and all(name.startswith("model.layers.1.") for name in names)
    read = source.read([UP, "model.norm.weight"])
    assert read[UP].shape == (128, 64) and read[UP].dtype == torch.bfloat16
    assert source.entries[UP].size == 128 * 64 * 2
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert torch.equal(read[UP], files[source.entries[UP].file][UP])


def test_the_same_weights_in_shards_or_not_are_read_alike(tiny: Tiny) -> None:
    one, three = open_source(tiny()), open_source(tiny(shards=3))
    assert set(one.entries) == set(three.entries)
    assert len({entry.file for entry in three.entries.values()}) == 3
    for name, tensor in one.read(one.entries).items():
        assert torch.equal(tensor, three.read([name])[name])


def test_block_names_do_not_run_into_each_other(tiny: Tiny) -> None:
    assert not any(
        name.startswith("model.layers.10") for name in open_source(tiny(layers=11)).names_under("model.layers.1")
    )


def test_a_stamp_tells_sources_apart(tiny: Tiny, tiny_copy: Tiny) -> None:
    stamp = open_source(tiny()).stamp()
    assert stamp == open_source(tiny()).stamp() == open_source(tiny_copy()).stamp()
    assert stamp != open_source(tiny(tied=True)).stamp() and json.dumps(stamp)


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: locate("./absent/model"), 2).what
    assert "no such folder" in refusal(lambda: locate("absent"), 2).what
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(lambda: locate(str(tmp_path / "file")), 2).what
    assert "no config.json" in refusal(lambda: open_source(tmp_path), 2).what


def test_a_hub_that_is_switched_off_is_said() -> None:
    error = refusal(lambda: locate("some-org/no-such-model"))
    assert "could not be downloaded (HF_HUB_OFFLINE is set)" in error.what and "local folder" in error.fix


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"[]", b"3"])
def test_a_config_that_is_no_table(tiny_copy: Tiny, text: bytes) -> None:
    folder = tiny_copy()
    (folder / "config.json").write_bytes(text)
    assert "config.json is not" in refusal(lambda: open_source(folder), 2).what


@pytest.mark.parametrize("left", [0, 5, 100, -1, -4096])
def test_a_file_that_is_cut_short(tiny_copy: Tiny, left: int) -> None:
    file = tiny_copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    error = refusal(lambda: open_source(file.parent))
    assert "model.safetensors is cut short" in error.what and "download" in error.fix


def test_a_file_with_something_after_it(tiny_copy: Tiny) -> None:
    file = tiny_copy() / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "model.safetensors" in refusal(lambda: open_source(file.parent)).what


HEADERS = [
    b"",
    b"{",
    b"[]",
    b"5",
    b'{"a": 5}',
    b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}',
    b"\xff\xff",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_no_table(tiny_copy: Tiny, header: bytes) -> None:
    file = tiny_copy() / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a safetensors file" in refusal(lambda: open_source(file.parent)).what


def test_a_header_longer_than_any_file(tiny_copy: Tiny) -> None:
    file = tiny_copy() / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "cut short" in refusal(lambda: open_source(file.parent)).what


@pytest.mark.parametrize("index", [b"[]", b"{}", b"\xff\xfe", b'{"weight_map": []}', b'{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none(tiny_copy: Tiny, index: bytes) -> None:
    folder = tiny_copy(shards=3)
    (folder / "model.safetensors.index.json").write_bytes(index)
    refusal(lambda: open_source(folder))


def test_a_shard_that_is_missing_is_named(tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "shard model-00002-of-00003.safetensors is missing" in refusal(lambda: check(folder)).what


@pytest.mark.parametrize("kind", ["missing", "shape", "transposed", "integers"])
def test_tensors_that_are_not_what_the_config_says(tiny_copy: Tiny, kind: str) -> None:
    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "missing": lambda state: state.pop(UP),
        "shape": lambda state: state.update({UP: torch.zeros(128, 32)}),
        "transposed": lambda state: state.update({UP: state[UP].T.contiguous()}),
        "integers": lambda state: state.update({UP: torch.zeros(128, 64, dtype=torch.int32)}),
    }
    error = refusal(lambda: check(rewritten(tiny_copy(), changes[kind])))
    assert UP in error.what
    assert {"missing": "missing", "shape": "[128, 32]", "transposed": "[64, 128]", "integers": "I32"}[
        kind
    ] in error.what


def test_an_untied_head_must_be_there_and_a_tied_one_need_not(tiny: Tiny, tiny_copy: Tiny) -> None:
    check(tiny(tied=True))
    assert (
        "lm_head.weight is missing"
        in refusal(lambda: check(rewritten(tiny_copy(), lambda s: s.pop("lm_head.weight")))).what
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(tiny_copy: Tiny, value: float) -> None:
    folder = rewritten(tiny_copy(), lambda state: state[UP].view(-1)[:3].fill_(value))
    check(folder)  # headers cannot show it
    error = refusal(lambda: check_finite(open_source(folder)))
    assert f"tensor {UP} has 3 values" in error.what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickles_are_never_read(tiny_copy: Tiny, name: str) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    error = refusal(lambda: open_source(folder))
    assert name in error.what and "pickle" in error.what and "save_pretrained" in error.fix


def test_a_folder_without_weights(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(lambda: open_source(folder)).what
    assert open_source(folder, weights=False).entries == {}
