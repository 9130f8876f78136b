"""Each format written, and read back by transformers, by compressed-tensors and by our own loader."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.export import read_back
from affinequant.formats import FORMATS, Contents, find_format
from affinequant.formats.compressed_tensors import declares_activations, unpack_linear
from affinequant.models.sites import Placement
from affinequant.models.source import open_source
from affinequant.recipe.scheme import Scheme
from affinequant.runtime.load import load
from affinequant.serve.transformers_quantizer import stock
from tests.tiny import SLIDING, VOCAB, dense_model, rounded

Tiny = Callable[..., Path]
WEIGHT_ONLY = ["w4a16", "w4a16-sym", "w4a16-g32", "w4a16-g32-sym", "w8a16", "w8a16-sym"]
WITH_ACTIVATIONS = ["w4a4", "w4a4-sym", "w4a4-g32", "w4a8", "w8a8-asym", "w8a8-g32"]
FOLDED = {"attn_in": Placement(how="folded", reason="")}
ONLINE = {"mlp_mid": Placement(how="online", reason="")}
IDS = torch.randint(2, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def in_transformers(folder: Path) -> Any:
    """As transformers loads it without this package."""
    from transformers import AutoModelForCausalLM

    with stock():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_key(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["affinequant"]


def digest(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + WITH_ACTIVATIONS)
def test_transformers_computes_the_dense_model(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    contents = rounded(tiny(), scheme, clip=0.9)
    find_format("auto").write(contents, tmp_path)
    assert torch.equal(logits(in_transformers(tmp_path)), logits(dense_model(contents)))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_our_loader_computes_the_dense_model(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    contents = rounded(tiny(), scheme)
    find_format("auto").write(contents, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(dense_model(contents)))


@pytest.mark.parametrize(
    "shape",
    [{"tied": True}, {"bias": True}, {"kv_heads": 4}, {"kv_heads": 1}, {"layers": 3, "shards": 3}, SLIDING],
    ids=["tied", "biases", "mha", "mqa", "shards", "qwen2"],
)
def test_every_shape_of_source(tiny: Tiny, tmp_path: Path, shape: dict[str, Any]) -> None:
    contents = rounded(tiny(**shape), "w4a16")
    find_format("auto").write(contents, tmp_path)
    expected = logits(dense_model(contents))
    assert torch.equal(logits(in_transformers(tmp_path)), expected)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_w8a8_is_declared_in_full(tiny: Tiny, tmp_path: Path) -> None:
    contents = rounded(tiny(), "w8a8")
    find_format("auto").write(contents, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (config["format"], group["input_activations"]["strategy"]) == ("int-quantized", "token")
    engine, reference, ours = in_transformers(tmp_path), dense_model(contents), load(tmp_path)
    # The engine divides a token's maximum by 127.5, we and vLLM by 127: as near as 8 bits are to full precision.
    weight_only = logits(reference)
    noise = (logits(ours) - weight_only).pow(2).mean()
    assert 0 < noise < 0.002 * weight_only.pow(2).mean()
    assert (logits(engine) - logits(ours)).pow(2).mean() < 2 * noise
    for name in contents.linears:  # decompressed by now
        assert torch.equal(engine.get_submodule(name).weight, reference.get_submodule(name).weight), name


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16-g32", "w8a16-sym"])
def test_compressed_tensors_reads_the_packing(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    contents = rounded(tiny(), scheme)
    find_format("auto").write(contents, tmp_path)
    declared = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    del declared["affinequant"]
    group = QuantizationConfig(**declared).config_groups["group_0"]
    reference, stored = dense_model(contents), load_file(tmp_path / "model.safetensors")
    for name in contents.linears:
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        weight = PackedQuantizationCompressor.decompress(parts, group)["weight"]
        assert torch.equal(weight, reference.get_submodule(name).weight), name


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-g32", "w4a8-g32"])
def test_integers_are_read_contiguous_whatever_view_the_library_returns(
    tiny: Tiny, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compressed_tensors.compressors as library

    unpack = library.unpack_from_int32

    def transposed(*args: Any, **options: Any) -> Tensor:  # as release 0.20 answers for zero points
        return unpack(*args, **options).t().contiguous().t()

    contents = rounded(tiny(), scheme)
    find_format("auto").write(contents, tmp_path)
    expected = logits(load(tmp_path))
    monkeypatch.setattr(library, "unpack_from_int32", transposed)
    source = open_source(tmp_path)
    for tensor in unpack_linear(source, contents.linears[0], contents.scheme.weight):
        assert tensor is not None and tensor.is_contiguous()
    assert torch.equal(logits(load(tmp_path)), expected)


def test_dense_weights_are_the_dequantised_ones(tiny: Tiny, tmp_path: Path) -> None:
    contents = rounded(tiny(), "w4a4")
    find_format("dense").write(contents, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stored, reference = load_file(tmp_path / "model.safetensors"), dense_model(contents).state_dict()
    assert stored.keys() == reference.keys()
    for name, value in reference.items():
        assert torch.equal(stored[name], value.bfloat16()), name
    assert torch.equal(logits(load(tmp_path)), logits(in_transformers(tmp_path)))


def test_our_key_says_what_runs(tiny: Tiny, tmp_path: Path) -> None:
    contents = replace(rounded(tiny(), "w4a4", clip=0.9), extra={"tier": "merged", "version": -1})
    find_format("auto").write(contents, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    declared, ours = config["quantization_config"], our_key(tmp_path)
    assert declared["config_groups"]["group_0"]["input_activations"] is None
    assert (declared["format"], declared["ignore"]) == ("pack-quantized", ["lm_head"])
    assert (ours["version"], ours["scheme"], ours["tier"]) == (1, "w4a4", "merged")
    assert (ours["activation"]["bits"], ours["activation"]["symmetric"]) == (4, False)
    assert set(ours["input_clip"]) == set(contents.linears)
    assert torch.tensor(ours["input_clip"][contents.linears[0]]) == torch.tensor(0.9)
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)


def test_weight_only_has_no_activation_part(tiny: Tiny, tmp_path: Path) -> None:
    find_format("auto").write(rounded(tiny(), "w4a16"), tmp_path)
    assert (our_key(tmp_path)["activation"], our_key(tmp_path)["input_clip"]) == (None, {})


def test_a_tied_head_stays_tied(tiny: Tiny, tmp_path: Path) -> None:
    find_format("auto").write(rounded(tiny(tied=True), "w4a4"), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for model in (load(tmp_path), in_transformers(tmp_path)):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_untied_by_a_rotation_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    contents = rounded(tiny(tied=True), "w4a16")

    def stages() -> Iterator[dict[str, Tensor]]:
        outer, *blocks = contents.stages()
        yield outer | {"lm_head.weight": -outer["model.embed_tokens.weight"]}
        yield from blocks

    find_format("auto").write(replace(contents, tied=False, stages=stages), tmp_path)
    expected = -logits(dense_model(contents))
    assert torch.equal(logits(in_transformers(tmp_path)), expected)
    assert torch.equal(logits(load(tmp_path)), expected)


SCHEME_OF = {"int-quantized": "w8a8", "humming": "w4a4-sym", "transform-config": "nvfp4", "fp_quant": "mxfp4"}
"""Where a format does not take W4A4."""
SHARDED = [form for form in FORMATS if form != "gguf"]


def stem(form: str) -> str:
    """How the files of weights are called."""
    return "affinequant" if form in ("affinequant", "transform-config") else "model"


def rounded_for(form: str, source: Path) -> Contents:
    """Contents that the format takes."""
    return rounded(source, SCHEME_OF.get(form, "w4a4"))


@pytest.mark.parametrize("form", FORMATS)
def test_the_folder_is_complete(tiny_copy: Tiny, tmp_path: Path, form: str) -> None:
    source, out = tiny_copy(shards=2), tmp_path / "out"
    (source / "README.md").write_text("about the model")
    (source / "LICENSE").write_text("its licence")
    (source / "assets").mkdir()
    (source / "assets/voice.json").write_text("{}")
    for name in ("pytorch_model.bin", "old.pt", "consolidated.00.pth", "model.gguf", ".hidden", "recipe.toml"):
        (source / name).write_text("not copied")
    files = find_format(form).write(rounded_for(form, source), out)
    weights = "model.gguf" if form == "gguf" else f"{stem(form)}.safetensors"
    assert sorted(str(file.relative_to(out)) for file in files) == sorted(
        [
            *("LICENSE", "SOURCE_README.md", "assets/voice.json", "chat_template.jinja", "config.json"),
            *("generation_config.json", weights, "tokenizer.json", "tokenizer_config.json"),
            *(["README.md"] if form in ("transform-config", "fp_quant") else []),
        ]
    )
    assert files[-1] == out / "config.json"
    assert sorted(files) == sorted(path for path in out.rglob("*") if path.is_file())
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "SOURCE_README.md").read_text() == "about the model"


def test_an_output_inside_the_source_is_not_copied_into_itself(tiny_copy: Tiny) -> None:
    source = tiny_copy()
    out = source / "w4a4"
    find_format("auto").write(rounded(source, "w4a4"), out)
    files = find_format("auto").write(rounded(source, "w4a4"), out)
    assert not [file for file in files if "w4a4" in str(file.relative_to(out))]


@pytest.mark.parametrize("form", SHARDED)
def test_several_shards_with_an_index(tiny: Tiny, tmp_path: Path, form: str) -> None:
    limit = 45_000
    contents = rounded_for(form, tiny(tied=True, layers=4))
    files = find_format(form).write(contents, tmp_path / "many", shard_bytes=limit)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert [file.name for file in shards] == [
        f"{stem(form)}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / f"many/{stem(form)}.safetensors.index.json").read_text())
    held = {name: file.name for file in shards for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in shards]
    assert len(shards) > 2 and max(sizes) <= limit
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(sizes)
    find_format(form).write(contents, tmp_path / "one")
    many, one = (read_back(find_format(form), tmp_path / name, "float32")[0] for name in ("many", "one"))
    assert torch.equal(logits(many), logits(one))
    if form in ("compressed-tensors", "dense", "int-quantized"):
        assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_contents_give_the_same_bytes(tiny: Tiny, tmp_path: Path, form: str) -> None:
    contents = rounded_for(form, tiny())
    once, twice = (find_format(form).write(contents, tmp_path / name, shard_bytes=45_000) for name in ("once", "twice"))
    assert digest(once) == digest(twice)


@pytest.mark.parametrize("form", FORMATS)
def test_a_rewrite_leaves_no_old_shards(tiny: Tiny, tmp_path: Path, form: str) -> None:
    find_format(form).write(rounded_for(form, tiny(seed=1)), tmp_path, shard_bytes=45_000)
    contents = rounded_for(form, tiny())
    files = find_format(form).write(contents, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    if form == "compressed-tensors":
        assert torch.equal(logits(in_transformers(tmp_path)), logits(dense_model(contents)))


@pytest.mark.parametrize("form", FORMATS)
def test_every_file_is_as_readable_as_the_umask_says(tiny: Tiny, tmp_path: Path, form: str) -> None:
    before = os.umask(0o027)
    try:
        files = find_format(form).write(rounded_for(form, tiny()), tmp_path)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_write_is_seen(tiny: Tiny, tmp_path: Path, form: str) -> None:
    contents = rounded_for(form, tiny())
    find_format(form).write(contents, tmp_path)

    def stages() -> Iterator[dict[str, Tensor]]:
        yield next(contents.stages())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_format(form).write(replace(contents, stages=stages), tmp_path)
    with pytest.raises(AffineQuantError, match=r"config\.json"):
        load(tmp_path)
    find_format(form).write(contents, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_clipped_w8a8_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    form = find_format("auto")
    assert "full range" in str(form.supports(Scheme.parse("w8a8"), FOLDED, clipped=True))
    with pytest.raises(AffineQuantError, match="activation-clip none"):
        form.write(rounded(tiny(), "w8a8", clip=0.95), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + WITH_ACTIVATIONS)
def test_clipped_ranges_are_held_by_our_key(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    assert not declares_activations(parsed)
    assert find_format("auto").supports(parsed, FOLDED, clipped=True) is None


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "affinequant"])
def test_online_transforms_are_refused_with_the_site(form: str) -> None:
    reason = find_format(form).supports(Scheme.parse("w4a4"), FOLDED | ONLINE)
    assert reason is not None and "mlp_mid" in reason and "attn_in" not in reason


def test_numbers_without_a_kernel_are_refused() -> None:
    assert "no integer kernel" in str(find_format("auto").supports(Scheme.parse("w8a8-g32-asym"), {}))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_what_it_is(form: str) -> None:
    assert re.fullmatch(r"\w.{20,90}", find_format(form).ABOUT)


def test_an_unknown_format_gets_the_nearest_name() -> None:
    with pytest.raises(AffineQuantError, match="did you mean 'compressed-tensors'"):
        find_format("compressed-tensor")
