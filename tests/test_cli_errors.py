"""Bad input: each with its exit code, three parts that help, and nothing begun."""

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from affinequant.cli import main
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import resolve
from affinequant.runtime.load import load

Refuse = Callable[..., str]
Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 100)
    return path


@pytest.fixture
def refuse(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """refuse(code, words, *argv): quantising ends so, says those words, and leaves the output as it was."""

    def check(code: int, words: list[str], *argv: Any, out: Path = tmp_path / "out", data: Any = text) -> str:
        before = contents(out)
        options = ["--data", data, "--samples", 4, "--seq-len", 32, "--preset", "fast", "-o", out]
        assert main([str(word) for word in ["quantize", *argv, *options]]) == code
        captured = capsys.readouterr()
        error = captured.err[captured.err.index("affinequant: ") :]
        what, where, fix = error.rstrip().split("\n")
        assert where.startswith("  where: ") and fix.startswith("  fix:   ")
        assert all(part.split(": ", 1)[1].strip() for part in (what, where, fix))
        for word in words:
            assert word in error, error
        assert "Traceback" not in captured.err and captured.out == ""
        assert contents(out) == before
        return error

    return check


def contents(out: Path) -> Any:
    return sorted(out.rglob("*")) if out.is_dir() and "proc" not in out.parts else out.exists()


# The model.


def test_no_such_folder(refuse: Refuse, tmp_path: Path) -> None:
    refuse(2, ["no such folder", "missing", "hub id"], tmp_path / "missing")
    refuse(2, ["no such folder"], "missing")


def test_a_file_in_place_of_a_folder(refuse: Refuse, text: Path) -> None:
    refuse(2, ["is a file", "config.json"], text)


def test_a_hub_id_without_a_hub(refuse: Refuse) -> None:
    refuse(3, ["nobody/nothing-here", "HF_HUB_OFFLINE", "local folder"], "nobody/nothing-here")


def test_not_a_model_folder(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(2, ["not a model folder", "config.json"], tmp_path / "empty")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_broken_config(refuse: Refuse, tiny_copy: Tiny, content: str) -> None:
    folder = tiny_copy()
    (folder / "config.json").write_bytes(content.encode("latin1"))
    refuse(2, ["config.json"], folder)


def test_unsupported_architecture_is_named_with_the_supported_ones(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = change_config(tiny_copy(), architectures=["MambaForCausalLM"])
    refuse(3, ["MambaForCausalLM", "LlamaForCausalLM", "affinequant list models"], folder)


def test_already_quantised(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = change_config(tiny_copy(), quantization_config={"quant_method": "gptq"})
    refuse(3, ["quantised already", "gptq"], folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pointers_of_git_lfs(refuse: Refuse, tiny_copy: Tiny, file: str) -> None:
    folder = tiny_copy()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(3, [file, "Git LFS pointer", "git lfs pull"], folder)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "no-such-kind", "rope_theta": 1e4}}),
        ("config.json", {"initializer_range": "wide"}),
        ("generation_config.json", {"max_new_tokens": "many"}),
    ],
)
def test_what_transformers_makes_nothing_of(refuse: Refuse, tiny_copy: Tiny, file: str, values: dict[str, Any]) -> None:
    folder = tiny_copy()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    refuse(3, ["transformers cannot use", file, "correct that"], folder)


@pytest.mark.parametrize(
    ("built", "words"), [(False, ["built without CUDA", "--device cpu"]), (True, ["no CUDA device", "--device cpu"])]
)
def test_a_device_that_is_not_there(
    refuse: Refuse, tiny: Tiny, built: bool, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refuse(3, words, tiny(), "--device", "cuda")
    with pytest.raises(AffineQuantError) as caught:
        load(tiny(), device="cuda")
    assert caught.value.exit_code == 3


# Its weights.


def test_truncated_shard(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for left in (len(whole) - 1, 100, 4, 0):
        shard.write_bytes(whole[:left])
        refuse(3, [shard.name, "cut short", "download"], folder)


@pytest.mark.parametrize("header", [b"no JSON", b"[]", b'{"a": 5}'])
def test_a_shard_that_is_something_else(refuse: Refuse, tiny_copy: Tiny, header: bytes) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(3, ["not a safetensors file", "download"], folder)


def test_missing_shard(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = tiny_copy(shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    refuse(3, ["model-00001-of-00002.safetensors", "missing", "download"], folder)


def test_missing_weights(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").unlink()
    refuse(3, ["no weights", "safetensors"], folder)


def test_missing_and_misshapen_tensors(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda state: state.pop(name))
    refuse(3, [name, "missing"], folder)
    change_weights(folder, lambda state: state.update({name: torch.zeros(8, 8, dtype=torch.bfloat16)}))
    refuse(3, [name, "[8, 8]", "[128, 64]"], folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refuse: Refuse, tiny_copy: Tiny, value: float) -> None:
    folder = tiny_copy()
    name = "model.layers.1.self_attn.o_proj.weight"
    change_weights(folder, lambda state: state[name][3].fill_(value))
    refuse(3, [name, "64 values", "NaN or infinite"], folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickle_only(refuse: Refuse, tiny_copy: Tiny, tmp_path: Path, file: str) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").unlink()
    # A pickle that makes a file when it is read.
    (folder / file).write_bytes(f"cposix\nsystem\n(S'touch {tmp_path / 'sprung'}'\ntR.".encode())
    refuse(3, [file, "pickle", "save_pretrained"], folder)
    assert not (tmp_path / "sprung").exists()


def test_code_of_the_model_is_not_run(refuse: Refuse, tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = change_config(tiny_copy(), auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "c.C"})
    for file in ("modeling_own.py", "c.py"):
        (folder / file).write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    refuse(3, ["code of its own", "--trust-remote-code"], folder)
    assert not (tmp_path / "sprung").exists()


# What is asked for.


def test_group_that_does_not_divide_names_the_nearest(refuse: Refuse, tiny: Tiny) -> None:
    folder = tiny(hidden=96, mlp=192)
    refuse(3, ["groups of 64", "96", "'w4a16-g48'"], folder, "--w4a16-g64")
    refuse(3, ["groups of 1000", "'w4a16-g96'"], folder, "--scheme", "w4a16-g1000")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheme", "w4a5"], ["unknown scheme 'w4a5'", "did you mean 'w4a"]),
        (["--scheme", "w4a4kv3"], ["KV cache in 3 bits", "kv4"]),
        (
            ["--w4a4kv4", "--tier", "merged", "--transform", "qk=hadamard"],
            ["hadamard at qk stays online", "--tier online"],
        ),
        (["--format", "dens"], ["unknown format 'dens'", "did you mean 'dense'"]),
        (["--tier", "merge"], ["unknown tier 'merge'", "did you mean 'merged'"]),
        (["--rounding", "gptg"], ["unknown rounding", "did you mean 'gptq'"]),
        (["--transform", "vo=hadamrd"], ["unknown transform 'hadamrd'", "did you mean 'hadamard'"]),
        (["--transform", "mlp_up=diagonal"], ["unknown site 'mlp_up'", "did you mean 'mlp_"]),
        (["--rounding", "gptag"], ["unknown rounding", "did you mean 'gptaq'"]),
        (["--transform", "vo=atuo"], ["unknown transform 'atuo'", "did you mean 'auto'"]),
        (["--transform", "atuo"], ["cannot read 'atuo'", "or auto for every site"]),
        (["--cost-budget", "120"], ["cost_budget = 120.0", "use 0.0 to 100.0"]),
        (["--transform", "vo"], ["cannot read 'vo'", "SITE=NAME"]),
        (["--transform", "vo=none", "--transform", "vo=hadamard"], ["two transforms for the site vo"]),
        (["--transform", "qk=banded"], ["banded at qk is refused", "RoPE", "rope-pair"]),
        (
            ["--tier", "merged", "--transform", "mlp_mid=hadamard"],
            ["hadamard at mlp_mid stays online", "--tier online"],
        ),
        (["--w4a4", "--w4a8"], ["--w4a8 cannot go together with --w4a4"]),
        (["--smaples", "3"], ["unknown option --smaples", "did you mean --samples"]),
        (["--w4a5"], ["unknown option --w4a5", "did you mean --w4a"]),
        (["--overwrit"], ["unknown option --overwrit", "did you mean --overwrite"]),
        (["--epochs", "many"], ["'many' is not a whole number", "--epochs"]),
        (["--lr", "fast"], ["'fast' is not a number", "--lr"]),
        (["--lr", "nan"], ["lr = nan", "--lr"]),
        (["--epochs", "-1"], ["epochs = -1", "0 or more"]),
        (["--cpu-memory", "plenty"], ["'plenty' is not a size", "22GB"]),
        (["--trust-remote-code=no"], ["--trust-remote-code takes no value, and got 'no'"]),
        (["--seed"], ["a value is missing", "--seed"]),
        (["another"], ["unexpected argument 'another'"]),
        (["--w8a8", "--activation-clip", "search"], ["w8a8", "clipping"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_values_that_are_not_known(refuse: Refuse, tiny: Tiny, options: list[str], words: list[str]) -> None:
    refuse(2, words, tiny(), *options)


def test_unknown_preset(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny()), "--preset", "papre", "-o", str(tmp_path / "out")]) == 2
    assert "unknown preset 'papre'" in (error := capsys.readouterr().err) and "did you mean 'paper'" in error


def test_recipe_files(refuse: Refuse, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    refuse(2, ["cannot read", "recipe.toml", "--config"], tiny(), "--config", recipe)
    recipe.write_text("epochs = = 3")
    refuse(2, ["not TOML", "line 1"], tiny(), "--config", recipe)
    recipe.write_text("epoch = 3")
    refuse(2, ["unknown recipe field 'epoch'", "did you mean 'epochs'", "recipe.toml"], tiny(), "--config", recipe)
    recipe.write_text("epochs = 'three'")
    refuse(2, ["epochs = 'three'", "int"], tiny(), "--config", recipe)


# The data.


def test_too_little_text_says_how_much_there_is_and_is_needed(refuse: Refuse, tiny: Tiny, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("XYZ " * 12 + "XY")  # no merges of the tokenizer: a token a character
    refuse(3, ["short.txt has 50 tokens", "128 are needed", "--samples 1 or --seq-len 12"], tiny(), data=short)


def test_text_that_is_not_there_or_not_text(refuse: Refuse, tiny: Tiny, tmp_path: Path) -> None:
    refuse(2, ["no such file", "did you mean", "text.txt"], tiny(), data=tmp_path / "txet.txt")
    refuse(2, ["unknown text source 'wikitext'", "did you mean 'wikitext2'"], tiny(), data="wikitext")
    (tmp_path / "lines.jsonl").write_text('{"txt": "a"}\n')
    refuse(2, ["'text'", "line 1"], tiny(), data=tmp_path / "lines.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    refuse(2, ["not UTF-8", "iconv"], tiny(), data=tmp_path / "latin.txt")
    refuse(3, ["wikitext", "switched off", "--data demo"], tiny(), data="wikitext2")


# The output.


def test_output_folder_not_empty(refuse: Refuse, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refuse(2, ["full is not empty", "--overwrite"], tiny(), out=out)
    refuse(2, ["no run to resume", "--resume"], tiny(), "--resume", out=out)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_output_that_overwriting_would_ruin(refuse: Refuse, tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    refuse(2, ["--overwrite would empty", "the model"], folder, "--overwrite", out=folder)
    refuse(2, ["--overwrite would empty", "the model"], folder, "--overwrite", out=folder.parent)


def test_a_refusal_leaves_what_was_to_be_overwritten(refuse: Refuse, tiny: Tiny, tmp_path: Path) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    short.write_text("too little")
    refuse(2, ["no run made", "precious.txt"], tiny(), "--overwrite", data=short, out=out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    there = {"config.json": "{}", "report.json": '{"schema": 1, "files": {"config.json": 2}}'}
    for name, content in there.items():
        (out / name).write_text(content)
    refuse(3, ["too little calibration text"], tiny(), "--overwrite", data=short, out=out)
    assert {path.name: path.read_text() for path in out.iterdir()} == there


def test_output_that_cannot_be_written(refuse: Refuse, tiny: Tiny, text: Path) -> None:
    refuse(2, ["is a file", "-o"], tiny(), out=text)
    refuse(3, ["cannot be written", "-o"], tiny(), out=text / "below")  # root may write everywhere but here
    if Path("/proc/self").exists():
        refuse(3, ["/proc", "-o"], tiny(), out=Path("/proc/affinequant-out"))


def test_disk_too_small(refuse: Refuse, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(total=2**30, used=2**30, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(3, ["disk is too small", "needed", "free", "-o"], tiny())


def test_memory_too_small_says_what_would_fit(refuse: Refuse, tiny: Tiny) -> None:
    refuse(3, ["needs 0.", "0.1 GB are allowed", "--cpu-memory", "allow 0."], tiny(), "--cpu-memory", "100MB")


def test_run_of_another_recipe_names_the_field(refuse: Refuse, tiny: Tiny, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "begun"
    (out / ".run" / "stages").mkdir(parents=True)
    settings = {"data": str(text), "samples": 4, "seq_len": 32, "preset": "fast", "seed": 7}
    there = resolve({"model": str(tiny()), "out": str(out)} | settings)
    (out / ".run" / "fingerprint.json").write_text(json.dumps(there.fingerprint()))
    refuse(2, ["another recipe", "seed: 7 there, 0 now", "--overwrite"], tiny(), "--resume", out=out)
    refuse(2, ["another recipe", "scheme: 'w4a4' there, 'w4a8' now"], tiny(), "--w4a8", "--seed", "7", out=out)


# The other commands.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantise", "demo"], ["unknown command 'quantise'", "did you mean 'quantize'"]),
        (["--json-lines"], ["unknown command '--json-lines'", "the command comes first"]),
        (["eval"], ["CKPT is missing"]),
        (["eval", "CKPT", "--limit", "3"], ["--limit is about tasks", "--tasks"]),
        (["eval", "CKPT", "--tasks", "piqa", "--windows", "3"], ["--windows is about text", "--text"]),
        (["eval", "CKPT", "--tasks", ","], ["no task is named"]),
        (["eval", "CKPT", "--bos", "maybe"], ["unknown BOS policy 'maybe'"]),
        (["eval", "CKPT", "--suite", "quik"], ["unknown suite 'quik'", "did you mean 'quick'"]),
        (["eval", "CKPT", "--suite", "paper-task"], ["unknown suite 'paper-task'", "did you mean 'paper-tasks'"]),
        (["eval", "CKPT", "--suite", "paper-tasks", "--windows", "3"], ["the suite paper-tasks has none", "--windows"]),
        (["eval", "CKPT", "--chat-template"], ["--chat-template is about tasks", "--tasks"]),
        (["eval", "CKPT", "--log-samples", "there"], ["--log-samples is about tasks", "--tasks"]),
        (["eval", "CKPT", "--backend", "vlm"], ["unknown backend 'vlm'", "did you mean 'vllm'"]),
        (["eval", "CKPT", "--backend", "http://h", "--dtype", "float32"], ["--dtype is the server's own choice"]),
        (["eval", "CKPT", "--device", "gpu"], ["unknown device 'gpu'", "--device"]),
        (["eval", "CKPT", "--dtype", "float23"], ["unknown dtype 'float23'", "did you mean 'float32'"]),
        (["eval", "nowhere"], ["no such folder: nowhere"]),
        (["list", "shemes"], ["unknown topic 'shemes'", "did you mean 'schemes'"]),
        (["plan"], ["no model was named"]),
        (["demo", "--model", "x"], ["unknown option --model"]),
        (["inspect", "nowhere"], ["no such folder: nowhere"]),
        (["inspect", "CKPT"], ["not quantised", "affinequant quantize"]),
        (["bench", "--shapes", "4096"], ["expected NxK", "--shapes", "affinequant bench --help"]),
        (["bench", "--rows", "1,0"], ["expected positive numbers, got 0", "--rows"]),
        (["bench", "--rounds", "few"], ["'few' is not a whole number", "--rounds"]),
        (["bench", "--device", "gpu"], ["unknown device 'gpu'", "--device"]),
        (["bench", "--out", __file__], ["expected a folder", "--out"]),
        (["bench", "--round", "3"], ["unknown option --round", "did you mean --rounds"]),
        (["env", "extra"], ["unexpected argument 'extra'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and " " not in value[0] else "",
)
def test_other_commands(argv: list[str], words: list[str], tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny()) if word == "CKPT" else word for word in argv]) == 2
    captured = capsys.readouterr()
    assert "  where: " in captured.err and "  fix:   " in captured.err and captured.out == ""
    for word in words:
        assert word in captured.err, captured.err


def test_inspect_refuses_what_others_made(tiny_copy: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = change_config(tiny_copy(), quantization_config={"quant_method": "awq"})
    assert main(["inspect", str(folder)]) == 3
    assert "something else (quant_method 'awq')" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no config.json and holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "not a checkpoint of this package"),
        (["--engines", "vlm"], "did you mean 'vllm'"),
        (["--against", "fp16"], "did you mean 'bf16'"),
        (["--batches", "1,x"], "'1,x' is not a list of numbers"),
        (["--new", "1"], "use 2 or more"),
        (["--dtype", "float16"], "unknown dtype"),
    ],
)
def test_what_cannot_be_timed(words: list[str], said: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny()), *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def change_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
