"""A finished folder in every format: read back, compared with what it means, or refused with the reason."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant import progress
from affinequant.cli import main
from affinequant.errors import PREFLIGHT, QUALITY, USAGE, AffineQuantError
from affinequant.export import read_back
from affinequant.formats import FORMATS, find_format
from affinequant.formats import dense as dense_format
from affinequant.formats.reading import in_transformers
from affinequant.run.run import Run
from affinequant.transforms.online import stored_name
from tests.tiny import LINEARS, dense_model, rounded

Tiny = Callable[..., Path]
Make = Callable[..., Path]
SHAPE = {"hidden": 128, "mlp": 256}
SCHEMES = ["w4a4", "w4a16-sym", "w4a8-g32"]
"""Asymmetric, symmetric, grouped."""
EXACT = ["compressed-tensors", "affinequant", "gptq", "gguf"]
IDS = torch.randint(2, 320, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(scheme): the folder of that scheme, as a finished run leaves it; tests must not change it."""
    folders: dict[tuple[Any, ...], Path] = {}

    def folder(scheme: str, **shape: Any) -> Path:
        key = scheme, *sorted(shape.items())
        if key not in folders:
            folders[key] = fresh(tiny(**SHAPE | shape), scheme, tmp_path_factory.mktemp("made") / scheme)
        return folders[key]

    return folder


def fresh(source: Path, scheme: str, out: Path, *, clip: float = 0.9) -> Path:
    """A folder as a run writes it, with its recipe and report."""
    find_format("auto").write(rounded(source, scheme, clip=1 if scheme == "w8a8" else clip), out)
    (out / "recipe.toml").write_text('model = "tiny"\n')
    (out / "report.json").write_text(json.dumps({"model": "tiny", "blocks": []}))
    return out


def export(source: Path, form: str, out: Path, scheme: str | None = None) -> dict[str, Any]:
    """The report of an export."""
    return dict(affinequant.export(source, format=form, scheme=scheme, out=out).report)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the linears in stock transformers, decompressed."""
    model, _ = in_transformers(folder, "float32")
    model(IDS)
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("proj.weight")}


# What is written.


@pytest.mark.parametrize("form", ["dense", "affinequant"])
def test_every_long_step_says_how_far_it_is(
    form: str, made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    affinequant.export(made("w4a4"), format=form, out=tmp_path / "out", say=said.append)
    read = {
        "dense": ("reading the source: 1/3", "loading weights: 1/21"),
        "affinequant": ("reading the weights: 1/14",),
    }
    for step in ("writing: 1/3", *read[form], "comparing: 1/26", "comparing: 25/26"):
        assert any(line.startswith(f"{step}, ~") for line in said), (step, said)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8"])
@pytest.mark.parametrize("form", EXACT)
def test_the_same_integers_give_the_same_logits(form: str, scheme: str, made: Make, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(made(scheme), form, out, None if form in ("gptq", "gguf") else f"{scheme[:2]}a16")
    model, _ = read_back(find_format(form), out, "float32")
    expected = logits(dense_model(rounded(tiny(**SHAPE), scheme)))
    difference = float((logits(model) - expected).abs().max())
    # Q4_1 keeps what asymmetric weights add to a block in float16; everything else is exact.
    assert difference < (2e-2 if form == "gguf" and "sym" not in scheme and scheme != "w8a8" else 1e-5)
    assert report["verified"]["passed"] and report["verified"]["divergence"] < 1e-5
    assert report["scheme"].startswith(f"{scheme[:2]}a16") and report["activations"].startswith("16 bits")


@pytest.mark.parametrize("form", ["dense", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_rounded_again_is_said_and_bounded(
    form: str, scheme: str, made: Make, tiny: Tiny, tmp_path: Path
) -> None:
    report = export(made(scheme), form, tmp_path / "out")
    assert report["rounded"] and report["events"] == [f"rounded once more: {report['rounded']}"]
    found = weights(tmp_path / "out") if form == "dense" else unpacked(tmp_path / "out")
    step = {"dense": 2**-8, "nvfp4": 2**-2 + 2**-4, "mxfp4": 0.5}[form]  # half a step at the top, scales rounded too
    for name, value in dense_model(rounded(tiny(**SHAPE), scheme)).state_dict().items():
        if name in found:
            group = value.unflatten(1, (-1, 16 if form == "nvfp4" else 32))
            bound = value.abs() if form == "dense" else group.abs().amax(-1, keepdim=True).expand_as(group).flatten(1)
            error = (found[name] - value).abs()
            assert bool((error <= step * bound + 1e-6).all()), name
            assert float(error.pow(2).mean()) < 0.02 * float(value.pow(2).mean())
    assert len(found) == 2 * len(LINEARS)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_our_loader_hands_4_bit_floats_to_transformers(form: str, made: Make, tmp_path: Path) -> None:
    export(made("w4a4"), form, tmp_path / "out")
    expected = read_back(find_format(form), tmp_path / "out", "bfloat16")[0]
    assert torch.equal(logits(affinequant.load(tmp_path / "out", dtype="bfloat16")), logits(expected))


def unpacked(folder: Path) -> dict[str, Tensor]:
    """The weights as compressed-tensors unpacks them, one linear at a time."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**declared).config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry(declared["format"])
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.")}
        found[f"{name}.weight"] = compressor.decompress(parts, scheme)["weight"].float()
    return found


def test_the_members_of_a_fused_layer_share_their_global_scale(made: Make, tmp_path: Path) -> None:
    export(made("w4a4"), "nvfp4", tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    for layer in range(2):
        for members in (LINEARS[:3], LINEARS[4:6]):
            scales = {float(stored[f"model.layers.{layer}.{name}.weight_global_scale"]) for name in members}
            assert len(scales) == 1


@pytest.mark.parametrize(
    ("source", "form", "asked", "named"),
    [
        ("w4a4", "int-quantized", "w8a8", "w8a8"),
        ("w4a4", "compressed-tensors", "w8a8", "w8a8"),
        ("w4a16-sym", "int-quantized", "w4a8", "w4a8-sym"),
        ("w4a8-g32-sym", "int-quantized", "w4a8", "w4a8-g32-sym"),
    ],
)
def test_engines_quantise_the_activations_and_have_the_same_weights(
    source: str, form: str, asked: str, named: str, made: Make, tiny: Tiny, tmp_path: Path
) -> None:
    report = export(made(source), form, tmp_path / "out", asked)
    assert report["scheme"] == named and "over its full range" in report["activations"]
    assert report["verified"]["quantised_activations"] and 0 < report["verified"]["divergence"] < 0.01
    stored = load_file(tmp_path / "out/model.safetensors")
    contents = rounded(tiny(**SHAPE), source)
    expected = dense_model(contents).state_dict()
    for name in contents.linears:
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"].float()
        assert codes.dtype == torch.int8 and int(codes.abs().max()) <= (15 if asked == "w8a8" else 8)
        value = codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        assert torch.equal(value, expected[f"{name}.weight"]), name
    group = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert (group["input_activations"]["num_bits"], group["input_activations"]["strategy"]) == (8, "token")


def test_the_source_scheme_keeps_its_clips(made: Make, tmp_path: Path) -> None:
    report = export(made("w4a4"), "affinequant", tmp_path / "out")
    assert report["activations"] == "4 bits per token, as in the source"
    assert report["verified"]["reference"].startswith("the source as affinequant.load")
    assert report["verified"]["largest_logit_difference"] == 0
    ours = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["affinequant"]
    assert all(clip == pytest.approx(0.9) for clip in ours["input_clip"].values())
    again = export(tmp_path / "out", "compressed-tensors", tmp_path / "again", "w4a16")  # an export is a source too
    assert again["verified"]["largest_logit_difference"] == 0


def test_ranges_that_engines_ignore_are_said_to_be_lost(made: Make, tmp_path: Path) -> None:
    report = export(made("w4a8-g32-sym"), "int-quantized", tmp_path / "out")
    assert report["activations"].endswith("the narrowed ranges of the source do not carry over")


def test_humming_declares_four_bits_of_what_it_rounds(made: Make, tmp_path: Path) -> None:
    report = export(made("w4a4-sym"), "humming", tmp_path / "out")
    assert report["activations"].endswith("over its full range; the narrowed ranges of the source do not carry over")
    assert "activations in 16 bits" in report["verified"]["read_by"] and report["verified"]["divergence"] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    group, ours = config["config_groups"]["group_0"], config["affinequant"]
    assert config["format"] == "pack-quantized" and set(ours["input_clip"].values()) == {1.0}
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assert {name: group["input_activations"][name] for name in wanted} == wanted
    stored, source = load_file(tmp_path / "out/model.safetensors"), load_file(made("w4a4-sym") / "model.safetensors")
    assert all(torch.equal(tensor, source[name]) for name, tensor in stored.items())
    with pytest.raises(AffineQuantError, match="--scheme w4a4-sym"):
        export(made("w4a4"), "humming", tmp_path / "other")


def test_few_bits_are_held_by_compressed_tensors_and_refused_elsewhere(made: Make, tmp_path: Path) -> None:
    report = export(made("w2a16-g32"), "compressed-tensors", tmp_path / "out")
    assert report["verified"]["largest_logit_difference"] < 1e-4
    for form in ("gptq", "gguf"):
        with pytest.raises(AffineQuantError, match="2-bit weights"):
            export(made("w2a16-g32"), form, tmp_path / form)


def test_three_bits_are_exported_where_the_library_reads_them(made: Make, tmp_path: Path) -> None:
    from affinequant.formats.packing import library_packs

    if library_packs(3):
        report = export(made("w3a16-g32"), "compressed-tensors", tmp_path / "out")
        assert report["verified"]["largest_logit_difference"] < 1e-4
    else:
        with pytest.raises(AffineQuantError, match="packs 3-bit weights another way"):
            export(made("w3a16-g32"), "compressed-tensors", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "size"), [("w4a4-sym", 0), ("w4a4-g32-ag32-sym", 32)])
def test_vllm_takes_humming_s_folder_for_int4_activations(name: str, size: int, made: Make, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    export(made(name), "humming", tmp_path / "out")
    read = CompressedTensorsConfig.from_config(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    parts = read.target_scheme_map["Linear"]
    scheme = read._get_scheme_from_parts(parts["weights"], parts["input_activations"], format=read.quant_format)
    assert type(scheme).__name__ == "CompressedTensorsWNA4Int"
    assert scheme._build_input_quant_config()["group_size"] == size


def with_transform(folder: Path) -> Path:
    """The folder in our own form, one of its transforms acting at run time."""
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "affinequant",
        "ignore": ["lm_head"],
        "affinequant": config["quantization_config"]["affinequant"],
    }
    matrix = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0].contiguous()
    for layer in range(2):
        stored[stored_name(f"model.layers.{layer}.mlp.down_proj", "blocks")] = matrix[None].clone()
    (folder / "model.safetensors").unlink()
    save_file(stored, folder / "affinequant.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_online_transform_stays_in_our_form_and_nowhere_else(tiny: Tiny, tmp_path: Path) -> None:
    source = with_transform(fresh(tiny(**SHAPE), "w4a4", tmp_path / "source"))
    report = export(source, "affinequant", tmp_path / "out", "w4a16")
    assert report["verified"]["divergence"] < 1e-6  # x P W^T against one matrix for both, in float32
    plain = export(fresh(tiny(**SHAPE), "w4a4", tmp_path / "plain"), "affinequant", tmp_path / "other", "w4a16")
    assert plain["verified"]["sample"] != report["verified"]["sample"]
    for form in FORMATS:
        if form != "affinequant":
            with pytest.raises(AffineQuantError, match="acts at run time") as raised:
                export(source, form, tmp_path / form, "w8a8" if form == "int-quantized" else None)
            assert raised.value.exit_code == PREFLIGHT and not (tmp_path / form).exists()


# Layouts, by readers of their own.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_by_its_definition(scheme: str, made: Make, tiny: Tiny, tmp_path: Path) -> None:
    export(made(scheme), "gptq", tmp_path / "out")
    stored = {name: tensor.numpy() for name, tensor in load_numpy(tmp_path / "out/model.safetensors").items()}
    expected = dense_model(rounded(tiny(**SHAPE), scheme)).state_dict()
    name = "model.layers.1.mlp.gate_proj"
    qweight, qzeros = (stored[f"{name}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    scales, group = stored[f"{name}.scales"].astype(np.float32), stored[f"{name}.g_idx"]
    columns, rows = qweight.shape[0] * 8, qweight.shape[1]
    value = np.zeros((rows, columns), np.float32)
    for k in range(columns):
        code = (qweight[k // 8] >> np.uint32(4 * (k % 8))) & np.uint32(15)
        for n in range(0, rows, 8):
            word = int(qzeros[group[k], n // 8])
            for place in range(8):
                zero = ((word >> (4 * place)) & 15) + 1
                value[n + place, k] = (int(code[n + place]) - zero) * scales[group[k], n + place]
    assert np.array_equal(value, expected[f"{name}.weight"].numpy())
    declared = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (declared["bits"], declared["group_size"]) == (4, 32 if "g32" in scheme else -1)
    assert (declared["quant_method"], declared["sym"], declared["desc_act"]) == ("gptq", "sym" in scheme, False)


def load_numpy(path: Path) -> dict[str, Tensor]:
    """The tensors that numpy has a type for."""
    return {name: tensor for name, tensor in load_file(path).items() if tensor.dtype != torch.bfloat16}


@pytest.mark.parametrize(("scheme", "kind"), [("w4a4", "Q4_1"), ("w4a4-sym", "Q4_0"), ("w8a8", "Q8_0")])
def test_gguf_by_its_own_package(scheme: str, kind: str, made: Make, tiny: Tiny, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    export(made(scheme, tied=True), "gguf", tmp_path / "out")
    reader = GGUFReader(tmp_path / "out/model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = dense_model(rounded(tiny(tied=True, **SHAPE), scheme)).state_dict()
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind and "output.weight" not in tensors  # the head stays tied
    value = torch.from_numpy(dequantize(down.data, down.tensor_type))
    wanted = expected["model.layers.1.mlp.down_proj.weight"]
    assert float((value - wanted).abs().max()) <= (0 if kind != "Q4_1" else 2**-11 * float(wanted.abs().max()))
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320
    assert reader.fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    assert "message" in reader.fields["tokenizer.chat_template"].contents()


# Refusals, with exit codes through the command line.


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["export", *argv])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheme", "argv", "code", "words"),
    [
        ("w4a4", ["--format", "int-quantized", "--scheme", "w4a8"], PREFLIGHT, "--scheme w8a8 holds the same"),
        ("w4a4", ["--format", "int-quantized"], PREFLIGHT, "add --scheme w8a8"),
        ("w4a16-g32", ["--format", "compressed-tensors", "--scheme", "w8a8"], USAGE, "in groups"),
        ("w4a16", ["--format", "compressed-tensors", "--scheme", "w4a4"], USAGE, "w4a16 was not made"),
        ("w8a8", ["--format", "compressed-tensors", "--scheme", "w4a16"], USAGE, "round them anew"),
        ("w4a16-g32", ["--format", "compressed-tensors", "--scheme", "w4a16-g64"], USAGE, "use w4a16-g32"),
        ("w4a16", ["--format", "gguf", "--scheme", "w8a8"], USAGE, "holds nothing"),
        ("w8a16", ["--format", "gguf"], PREFLIGHT, "no 8-bit type with zero points"),
        ("w4a16", ["--format", "ggu"], USAGE, "did you mean 'gguf'"),
        ("w4a16", [], USAGE, "--format is missing"),
    ],
)
def test_what_cannot_be_held_is_refused(
    scheme: str, argv: list[str], code: int, words: str, made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, said = refused([str(made(scheme)), *argv, "-o", str(tmp_path / "out")], capsys)
    assert got == code and words in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "form", "words"),
    [
        ({"mlp": 136}, "gguf", "blocks of 32"),
        ({"mlp": 136}, "gptq", "multiples of 32"),
        ({"mlp": 136}, "nvfp4", "groups of 16"),
        ({"mlp": 144}, "mxfp4", "groups of 32"),
    ],
)
def test_sizes_and_biases_are_refused(shape: dict[str, Any], form: str, words: str, made: Make, tmp_path: Path) -> None:
    with pytest.raises(AffineQuantError, match=words) as raised:
        export(made("w4a16", **shape), form, tmp_path / "out")
    assert raised.value.exit_code == PREFLIGHT and not (tmp_path / "out").exists()


def test_biases_are_held_where_the_layout_has_them(made: Make, tmp_path: Path) -> None:
    for form in ("gptq", "gguf", "nvfp4", "compressed-tensors"):
        assert export(made("w4a16", bias=True), form, tmp_path / form)["verified"]["passed"]


@pytest.mark.parametrize("form", ["gptq", "gguf"])
def test_a_scale_that_float16_does_not_hold_leaves_no_folder(form: str, tiny: Tiny, tmp_path: Path) -> None:
    source = fresh(tiny(**SHAPE), "w4a16", tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight_scale"][0] = 1e-12
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AffineQuantError, match="do not fit float16"):
        export(source, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gptq", "gguf"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym"])
def test_rows_of_zeros_have_scales_that_float16_does_not_hold(
    form: str, scheme: str, tiny_copy: Tiny, tmp_path: Path
) -> None:
    source = tiny_copy(**SHAPE)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3:7] = 0
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    made = fresh(source, scheme, tmp_path / "made")
    written = load_file(made / "model.safetensors")
    written["model.layers.1.mlp.up_proj.weight_scale"][3:7] = torch.finfo(torch.bfloat16).smallest_normal
    save_file(written, made / "model.safetensors", metadata={"format": "pt"})  # as our own rounding leaves them
    report = export(made, form, tmp_path / "out")
    assert report["verified"]["passed"]
    model, _ = read_back(find_format(form), tmp_path / "out", "float32")
    assert not bool(model.model.layers[1].mlp.up_proj.weight[3:7].any())


def test_a_zero_point_that_gptq_engines_read_in_two_ways(tiny: Tiny, tmp_path: Path) -> None:
    from affinequant.formats.gptq import pack, unpack

    codes = torch.randint(-8, 8, (32, 32), dtype=torch.int8)
    scale, zero = torch.full((32, 1), 0.5), torch.full((32, 1), -7, dtype=torch.int8)
    value = unpack(*pack(codes, scale, zero, bits=4, where="x"), bits=4)
    assert torch.equal(value, (codes.float() + 7) * 0.5)
    with pytest.raises(AffineQuantError, match="zero point 0"):
        pack(codes, scale, zero - 1, bits=4, where="x")


def test_scales_that_are_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    source = fresh(tiny(**SHAPE), "w4a16", tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_scale"][3] = math.inf
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AffineQuantError, match="not finite"):
        export(source, "compressed-tensors", tmp_path / "out")


# Sources and output folders.


def test_sources_that_are_none(made: Make, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--format", "dense", "-o", str(tmp_path / "out")]
    assert refused([str(tmp_path / "none"), *out], capsys)[0] == USAGE
    code, said = refused([str(tiny(**SHAPE)), *out], capsys)
    assert code == PREFLIGHT and "holds no integers" in said
    export(made("w4a16"), "gptq", tmp_path / "gptq")
    code, said = refused([str(tmp_path / "gptq"), *out], capsys)
    assert code == PREFLIGHT and "keeps no integers of ours (gptq)" in said
    running = fresh(tiny(**SHAPE), "w4a16", tmp_path / "running")
    Run.open(running / ".run", {"model": "tiny"})
    (running / "report.json").unlink()
    code, said = refused([str(running), *out], capsys)
    assert code == PREFLIGHT and "not finished" in said and "affinequant inspect" in said
    (running / "report.failed.json").write_text("{}")
    code, said = refused([str(running), *out], capsys)
    assert code == PREFLIGHT and "FAILED its verification" in said
    assert not (tmp_path / "out").exists()


def test_another_version_is_not_read(tiny: Tiny, tmp_path: Path) -> None:
    source = fresh(tiny(**SHAPE), "w4a16", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["affinequant"]["version"] = 99
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(AffineQuantError, match="version 99"):
        export(source, "dense", tmp_path / "out")


def test_output_folders(made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub/mine.txt").write_text("x")
    argv = [str(made("w4a16")), "--format", "dense", "-o", str(out)]
    code, said = refused(argv, capsys)
    assert code == USAGE and "not empty" in said and (out / "sub/mine.txt").exists()
    (out / "sub/mine.txt").unlink()
    (out / "sub").rmdir()
    Run.open(out / ".run", {"model": "tiny"})
    code, said = refused(argv, capsys)
    assert code == USAGE and "holds a run" in said
    assert main(["export", *argv[:-2], "-o", str(made("w4a16")), "--overwrite"]) == USAGE  # would empty the source
    assert main(["export", *argv, "--overwrite", "-q"]) == 0
    assert not (out / ".run").exists()


def test_the_folder_is_whole_and_listed(made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(made("w4a4")), "--format", "gguf", "-o", str(out), "--json", "-q"]) == 0
    answer = json.loads(capsys.readouterr().out)
    report = json.loads((out / "report.json").read_text())
    assert answer["report"] == report and answer["next"] == [f"llama-cli -m {out}/model.gguf"]
    assert report["files"] == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "recipe.toml"} < set(report["files"])
    assert report["exported_from"] == str(made("w4a4")) and report["model"] == "tiny"
    assert "splits a test text as tokenizer.json does" in report["verified"]["read_by"]
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "exported" in shown and "gguf, w4a16" in shown


def test_a_wrong_result_is_kept_and_exits_with_4(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dense_format.dense_stage

    def negated(*args: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rest, values = wrong(*args)
        return rest, {name: -value for name, value in values.items()}

    monkeypatch.setattr(dense_format, "dense_stage", negated)
    out = tmp_path / "out"
    code, said = refused([str(made("w4a16")), "--format", "dense", "-o", str(out)], capsys)
    assert code == QUALITY and "diverges" in said and "report.failed.json" in said and "rounds once more" in said
    assert (out / "config.json").exists() and not (out / "report.json").exists()
    assert json.loads((out / "report.failed.json").read_text())["verified"]["passed"] is False


def test_quantize_names_the_way_to_a_format_that_only_export_writes(tiny: Tiny) -> None:
    with pytest.raises(AffineQuantError, match="affinequant export DIR --format gguf"):
        affinequant.plan(str(tiny(**SHAPE)), format="gguf")
