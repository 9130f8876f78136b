"""Model folders: what is read, and every kind of damage that is refused from headers alone."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from affinequant import progress
from affinequant.errors import AffineQuantError
from affinequant.models import resolve
from affinequant.models.source import Source, check_tensors, locate, open_source, read_through, settle
from affinequant.models.source_files import revision

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
    read_through(source)
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


def test_content_tells_sources_apart_however_it_lies_in_files(tiny: Tiny, tiny_copy: Tiny) -> None:
    one, copy = read_through(open_source(tiny())), open_source(tiny_copy())
    assert one == read_through(copy) == read_through(open_source(tiny(shards=3))) and json.dumps(one)
    stat = (file := copy.folder / "model.safetensors").stat()
    rewritten(copy.folder, lambda state: state[UP].view(-1)[-1:].neg_())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same names, shapes, size and time
    assert file.stat().st_size == stat.st_size
    changed = read_through(copy)
    assert changed["weights"] != one["weights"] and changed["config"] == one["config"]
    table = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(table | {"rms_norm_eps": 1e-3}))
    assert read_through(open_source(copy.folder))["config"] != one["config"]


def test_reading_that_takes_long_says_how_far_it_is(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    read_through(open_source(tiny()), said.append)
    assert len(said) > 3 and all(line.startswith("reading the weights: 0.0 GB/0.0 GB, ~") for line in said)


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
    error = refusal(lambda: read_through(open_source(folder)))
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


# Which files are the model.


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


def turned(folder: Path) -> dict[str, torch.Tensor]:
    """Other weights under the same names."""
    files = [load_file(file) for file in sorted(folder.glob("model*.safetensors"))]
    return {name: -tensor for state in files for name, tensor in state.items()}


def test_a_stray_file_of_the_same_tensors_is_refused_by_name(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    save(turned(folder), folder / "zzz_ema.safetensors")
    error = refusal(lambda: check(folder))
    assert "two sets of weights" in error.what and "zzz_ema.safetensors" in error.what and "move" in error.fix


def test_one_file_beside_an_index_is_refused_by_name(tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=2)
    save(turned(folder), folder / "model.safetensors")
    error = refusal(lambda: check(folder))
    assert "model.safetensors, and model.safetensors.index.json" in error.what
    table = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    check(folder)  # an index that names the one file says nothing else than the file does


def test_other_files_and_indices_are_left_out_and_said(tiny_copy: Tiny) -> None:
    """`consolidated` is the same model under its authors' own names; its index sorts before ours."""
    folder = tiny_copy(shards=2)
    before = open_source(folder)
    save({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save({"exp_avg": torch.ones(2)}, folder / "optimizer.safetensors")
    index = {"weight_map": {"layers.0.attention.wq.weight": "consolidated.safetensors"}}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(folder)
    assert source.entries == before.entries and not before.notes
    assert ["consolidated" in source.notes[0], "optimizer" in source.notes[1]] == [True, True]


def test_a_file_under_another_name_is_not_taken_for_the_model(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    error = refusal(lambda: check(folder))
    assert "weights.safetensors" in error.what and "model.safetensors" in error.fix
    table = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "weights.safetensors"}
    (folder / "config.json").write_text(json.dumps(table))
    check(folder)  # the config names it


@pytest.mark.parametrize("later", [True, False])
def test_the_index_gives_each_tensor_its_file(tiny_copy: Tiny, later: bool) -> None:
    folder = tiny_copy(shards=2)
    source = open_source(folder)
    expected = source.read(source.entries)
    one, two = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    file, other = (one, two) if later else (two, one)
    name, state = next(iter(load_file(file))), load_file(other)
    save(state | {name: -expected[name]}, other)  # a stale copy
    source = open_source(folder)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in source.read(source.entries).items())
    assert name in source.notes[0] and other.name in source.notes[0]


def test_a_tensor_that_the_index_promises_and_its_shard_lacks(tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][UP] = next(file for file in index["weight_map"].values() if file != index["weight_map"][UP])
    path.write_text(json.dumps(index))
    assert f"tensor {UP} is missing" in refusal(lambda: open_source(folder)).what


def moved(folder: Path, place: str) -> Path:
    """The first shard under another name, in the index too."""
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of-00002.safetensors", place))
    (folder / "model-00001-of-00002.safetensors").rename(folder / place)
    return folder


def test_shards_in_a_folder_below(tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=2)
    (folder / "parts").mkdir()
    check(moved(folder, "parts/one.safetensors"))
    read_through(open_source(folder))


@pytest.mark.parametrize("kind", ["dots", "absolute", "link"])
def test_nothing_outside_the_folder_is_read(tiny_copy: Tiny, tmp_path: Path, kind: str) -> None:
    folder, place = tiny_copy(shards=2), tmp_path / "elsewhere.safetensors"
    moved(folder, "../elsewhere.safetensors" if kind == "dots" else str(place) if kind == "absolute" else "one")
    if kind == "link":
        (folder / "one").rename(place)
        (folder / "one").symlink_to(place)
    assert place.exists() and "outside" in refusal(lambda: open_source(folder)).what


def test_a_hubs_cache_links_to_its_blobs(tiny_copy: Tiny, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    folder = Path(tiny_copy(shards=2).rename(cache / "here"))
    (cache / "snapshots").mkdir()
    folder = folder.rename(cache / "snapshots" / "0a1b2c")
    for file in list(folder.iterdir()):
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    check(folder)
    assert revision(folder) == "0a1b2c" and revision(cache) is None
    (cache / "secret").write_text("x")
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").symlink_to("../../secret")
    assert "outside" in refusal(lambda: open_source(folder)).what


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_says_that_it_is_one(tiny_copy: Tiny, tmp_path: Path, alone: bool) -> None:
    folder = tmp_path / "adapter" if alone else tiny_copy()
    save({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    error = refusal(lambda: open_source(folder))
    assert "LoRA adapter" in error.what and "x/y" in error.fix and "merge" in error.fix
    assert ("beside the weights" in error.what) != alone


def test_adapters_inside_the_weights(tiny_copy: Tiny) -> None:
    name = UP.replace("weight", "lora_A.default.weight")
    error = refusal(lambda: check(rewritten(tiny_copy(), lambda state: state.update({name: torch.ones(2, 64)}))))
    assert name in error.what and "merge" in error.fix


@pytest.mark.parametrize(("flag", "name"), [("attention_bias", "self_attn.o_proj"), ("mlp_bias", "mlp.down_proj")])
def test_biases_that_the_config_promises_are_there(tiny_copy: Tiny, flag: str, name: str) -> None:
    tensor = f"model.layers.1.{name}.bias"
    folder = rewritten(tiny_copy(bias=True), lambda state: state.pop(tensor))
    assert f"tensor {tensor} is missing" in refusal(lambda: check(folder)).what


def settled(folder: Path) -> tuple[Source, bool]:
    source = open_source(folder)
    source, dims = settle(source, *resolve(source.config, where=""))
    return source, dims.tied


def test_ties_are_those_of_the_weights(tiny_copy: Tiny) -> None:
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    folder = tiny_copy(tied=True)
    assert settled(folder)[1]
    rewritten(folder, lambda state: state.update({head: state[table].clone()}))
    source, tied = settled(folder)
    assert tied and not source.notes, "a copy of the embedding is a tie"
    rewritten(folder, lambda state: state[head].view(-1)[-1:].add_(1))
    source, tied = settled(folder)
    assert not tied and head in source.notes[0]
    rewritten(folder, lambda state: state.pop(table))  # as transformers does, the head stands for both
    source, tied = settled(folder)
    assert tied and head not in source.entries
    assert torch.equal(source.read([table])[table], load_file(folder / "model.safetensors")[head])
    check_tensors(source, *resolve(source.config, where=""))
