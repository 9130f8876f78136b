"""4-bit floats with one matrix for all blocks of an input, in the forms of stock engines: theirs and ours compute the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

import affinequant
from affinequant.cli import main
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.export import read_back
from affinequant.formats import find_format
from affinequant.formats.transform_config import UNIT
from affinequant.models.source import open_source
from affinequant.transforms.online import apply_online
from tests.test_float4 import logits

Tiny = Callable[..., Path]
Make = Callable[..., Path]
KINDS = ["nvfp4", "mxfp4"]
SHARED = {"attn_in": "diagonal+shared-32", "vo": "block", "mlp_in": "shared-16", "mlp_mid": "diagonal+shared-32"}


@pytest.fixture(scope="session")
def shared(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """shared(scheme): a finished folder with such matrices at run time, made once; tests must not change it."""
    folder = tmp_path_factory.mktemp("floats")
    (folder / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))

    def make(scheme: str, tier: str = "online", *, transforms: dict[str, str] = SHARED, **shape: Any) -> Path:
        out = folder / "-".join(map(str, (scheme, tier, *transforms.values(), *shape.values())))
        if not out.exists():
            fields: dict[str, Any] = {"samples": 4, "seq_len": 32, "data": folder / "text.txt", "preset": "fast"}
            fields |= {"rounding": "nearest", "weight_clip": "none"}
            fields |= {"transforms": transforms} if tier == "online" else {}
            affinequant.quantize(tiny(tied=True, **shape), scheme=scheme, tier=tier, out=out, **fields)
        return out

    return make


def linear_inputs(model: Any, act: Callable[[str, Tensor], Tensor]) -> None:
    """What each linear of the blocks reads goes through `act(name, x)`, behind whatever acts there already."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: (act(name, args[0]),))


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_computes_what_transform_config_says(kind: str, shared: Make, tmp_path: Path) -> None:
    """Its decompressed weights, its transforms and its rounding of activations, against `affinequant.load`: the same logits."""
    done = affinequant.export(shared(kind), format="transform-config", out=tmp_path / "out")
    assert done.report["verified"]["passed"] and "compressed-tensors" in done.report["verified"]["read_by"]
    assert done.report["rounded"] is None and done.report["activations"].endswith("as in the source")
    source = open_source(done.path)
    declared = source.config["quantization_config"]
    assert declared["format"] == f"{kind}-pack-quantized" and len(declared["transform_config"]["config_groups"]) == 6
    model, _ = read_back(find_format("transform-config"), done.path, "float32")
    args = preset_name_to_scheme(kind.upper(), ["Linear"]).input_activations
    assert args is not None

    def rounded(name: str, x: Tensor) -> Tensor:
        whole = source.read([f"{name}.input_global_scale"]).popitem()[1] if kind == "nvfp4" else None
        blocks = x.unflatten(-1, (-1, args.group_size or 0))
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
        return fake_quantize(x, scale, zero.float(), args, global_scale=whole)

    plain = logits(model)
    linear_inputs(model, rounded)
    expected = logits(affinequant.load(shared(kind), device="cpu", dtype="float32"))
    assert float((logits(model) - expected).abs().max()) < 1e-3 * float(expected.std())
    assert float((plain - expected).abs().max()) > 0.02 * float(expected.std())  # rounding activations is seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_x_b_as_it_lies_times_the_root_of_its_size(kind: str, shared: Make, tmp_path: Path) -> None:
    affinequant.export(shared(kind), format="transform-config", out=tmp_path / "out")
    ours, theirs = open_source(shared(kind)), open_source(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    stored = theirs.read([f"{name}.layer_1_mlp_mid_input.weight"]).popitem()[1]
    block = ours.read([f"{name}.online_blocks"]).popitem()[1][0]
    assert float((block - block.T).abs().max()) > 0.1 * float(block.abs().max())
    over = 1.0
    if kind == "nvfp4":
        units = [float(1 / source.read([f"{name}.input_global_scale"]).popitem()[1]) for source in (ours, theirs)]
        over = UNIT / units[0]
        assert units[1] == UNIT
    torch.testing.assert_close(stored / 32**0.5, block * over)
    gate, up = (theirs.read([f"model.layers.1.mlp.{one}_proj.layer_1_mlp_in_input.weight"]) for one in ("gate", "up"))
    assert torch.equal(*(one.popitem()[1] for one in (gate, up)))


def test_no_engine_reads_it_without_its_transforms(shared: Make, tmp_path: Path) -> None:
    """transformers reads no transform_config: it stops where it would compute another function."""
    from transformers import AutoModelForCausalLM

    from affinequant.serve.transformers_quantizer import stock

    affinequant.export(shared("nvfp4"), format="transform-config", out=tmp_path / "out")
    with pytest.raises(AffineQuantError):
        affinequant.load(tmp_path / "out", device="cpu")
    with stock(), pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_alone_have_no_unit_for_activations(shared: Make, tmp_path: Path) -> None:
    done = affinequant.export(shared("nvfp4a16"), format="transform-config", out=tmp_path / "out")
    source = open_source(done.path)
    assert done.report["verified"]["passed"] and not any("input_global_scale" in name for name in source.entries)
    assert "input_activations" not in source.config["quantization_config"]["config_groups"]["group_0"]
    again = affinequant.export(shared("nvfp4a16"), format="transform-config", out=tmp_path / "again")
    files = [
        sorted(file.read_bytes() for file in one.path.iterdir() if file.name != "report.json") for one in (done, again)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", KINDS)
def test_fp_quant_has_one_size_of_block_for_all(kind: str, shared: Make, tmp_path: Path) -> None:
    done = affinequant.export(shared(kind), format="fp_quant", out=tmp_path / "out")
    assert done.report["verified"]["passed"] and done.report["rounded"] == "the matrices at run time, to bfloat16"
    source = open_source(done.path)
    declared = source.config["quantization_config"]
    assert (declared["quant_method"], declared["forward_dtype"], declared["hadamard_group_size"]) == (
        "fp_quant",
        kind,
        32,
    )
    from transformers.utils.quantization_config import FPQuantConfig

    FPQuantConfig(**declared)  # it checks what it is given
    before = open_source(shared(kind))
    for site, member in {"attn_in": "self_attn.q_proj", "mlp_in": "mlp.up_proj", "vo": "self_attn.o_proj"}.items():
        name = f"model.layers.0.{member}"
        matrix = source.read([f"{name}.forward_hadamard_matrix"]).popitem()[1].float()
        blocks = before.read([f"{name}.online_blocks"]).popitem()[1] if site != "vo" else torch.eye(16)[None]
        expected = torch.block_diag(*[blocks[0]] * (32 // blocks.shape[-1]))
        assert torch.equal(matrix, expected.bfloat16().float()), site


def test_fp_quant_holds_what_is_folded_too(shared: Make, tmp_path: Path) -> None:
    done = affinequant.export(shared("nvfp4", "merged"), format="fp_quant", out=tmp_path / "out")
    declared = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert declared["hadamard_group_size"] == 16 and done.report["verified"]["divergence"] < 1e-9


KERNEL = """
import importlib, sys, torch
kind, file = sys.argv[1:]
x, matrix, whole = torch.load(file)
kernel = getattr(importlib.import_module(f"fp_quant.module.triton.{kind}"), f"{kind}_forward_kernel").fn
got, more = torch.empty_like(x), {"n_elements": x.numel(), "hadamard_dim": len(matrix), "BLOCK_SIZE": x.numel()}
if kind == "nvfp4":
    kernel[(1,)](x, matrix, whole, got, **more)
else:
    kernel[(1,)](x, matrix, got, None, group_size=32, gaussian_scale=0.75, quest=False, **more)
torch.save(got, file)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_fp_quant_s_own_kernel_rounds_what_ours_rounds(kind: str, shared: Make, tmp_path: Path) -> None:
    """Its Triton kernel, interpreted: x B, and that rounded."""
    pytest.importorskip("fp_quant", reason="pip install --no-deps fp-quant==0.3.2")
    affinequant.export(shared(kind), format="fp_quant", out=tmp_path / "out")
    name, file = "model.layers.0.mlp.down_proj", tmp_path / "case.pt"
    parts = open_source(tmp_path / "out").read([f"{name}.forward_hadamard_matrix", f"{name}.act_global_scale"])
    ours: Any = affinequant.load(shared(kind), device="cpu", dtype="float32").get_submodule(name)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    torch.save((x, *(tensor.float() for tensor in parts.values())), file)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", KERNEL, kind, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    got, plain = torch.load(file), apply_online(x, {"blocks": ours.online_blocks})
    rounded = ours.input.rounded(plain)
    noise = float((rounded - plain).norm())
    assert float((got - plain).norm()) < 1.3 * noise < 0.3 * float(plain.norm())
    if kind == "nvfp4":  # rounded the same way, but for the matrix's 16 bits
        assert float((got - rounded).norm()) < 0.5 * noise


REFUSED = [
    (
        "transform-config",
        "w4a4",
        {"mlp_in": "block"},
        "acts at run time, which it has room for beside 4-bit floats alone",
    ),
    ("fp_quant", "nvfp4a16", {"mlp_in": "shared-16"}, "rounds? activations, which nvfp4a16 leaves in 16 bits"),
    ("transform-config", "nvfp4", {"vo": "kronecker"}, r"self_attn\.o_proj has another transform at run time"),
    ("fp_quant", "nvfp4", {"mlp_mid": "block"}, r"mlp\.down_proj has another transform at run time"),
]


@pytest.mark.parametrize(("form", "scheme", "transforms", "words"), REFUSED)
def test_what_no_engine_holds_is_refused_by_name(
    form: str, scheme: str, transforms: dict[str, str], words: str, shared: Make, tmp_path: Path
) -> None:
    with pytest.raises(AffineQuantError, match=words) as caught:
        affinequant.export(shared(scheme, transforms=transforms), format=form, out=tmp_path / "out")
    assert caught.value.exit_code == PREFLIGHT and not (tmp_path / "out").exists()


def test_what_this_model_has_no_room_for_is_refused_by_name(shared: Make, tmp_path: Path) -> None:
    def refused(folder: Path, form: str) -> str:
        with pytest.raises(AffineQuantError) as caught:
            affinequant.export(folder, format=form, out=tmp_path / "out")
        return str(caught.value)

    assert "nothing acts at run time" in refused(shared("nvfp4", "merged"), "transform-config")
    assert "holds 4-bit floats, and w4a4 has integers" in refused(shared("w4a4", "merged"), "fp_quant")
    biased = shared("nvfp4", family="qwen2")
    assert "_proj has a bias" in refused(biased, "transform-config")
    wide = shared("nvfp4", transforms={"attn_in": "shared-64"}, mlp=96)
    assert "down_proj has 96 inputs, which blocks of 64" in refused(wide, "fp_quant")
    assert affinequant.export(biased, format="fp_quant", out=tmp_path / "out").report["verified"]["passed"]


def test_families_that_vllm_gives_no_transforms_are_named() -> None:
    from affinequant.models import FAMILIES

    reasons = {family.name: find_format("transform-config").lacks(family) for family in FAMILIES.values()}
    assert reasons["llama"] is None and "fused" in str(reasons["phi3"]) and "experts" in str(reasons["mixtral"])
    assert "model.decoder.layers" in str(reasons["opt"]) and "in_proj_qkv" in str(reasons["qwen3_5"])


def test_what_to_type_next_is_what_an_engine_takes(
    shared: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from affinequant.cli.quantize import next_commands
    from affinequant.deliver import Result

    def after(folder: Path) -> list[str]:
        report = json.loads((folder / "report.json").read_text())
        return [line.replace(str(folder), "DIR") for line in next_commands(Result(path=folder, report=report))]

    assert after(shared("nvfp4")) == ["affinequant export DIR --format transform-config", "affinequant eval DIR"]
    assert after(shared("nvfp4", "merged")) == ["vllm serve DIR", "affinequant eval DIR"]
    assert after(shared("nvfp4", transforms={"vo": "kronecker"})) == ["affinequant eval DIR"]
    out = tmp_path / "out"
    assert main(["export", str(shared("mxfp4")), "--format", "fp_quant", "-o", str(out)]) == 0
    assert f"vllm serve {out} --dtype bfloat16 --allow-deprecated-quantization" in capsys.readouterr().out
    assert "--allow-deprecated-quantization" in (out / "README.md").read_text()
