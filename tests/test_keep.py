"""Linears that stay in 16 bits because a pattern says so: which they are, what reaches the files, and who reads them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.models.linears import bound
from affinequant.plan import plan
from affinequant.recipe.recipe import Recipe

Tiny = Callable[..., Path]
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return path


def quantized(model: Path, text: Path, out: Path, **fields: Any) -> Path:
    small = {"samples": 4, "seq_len": 16, "data": text, "out": out}
    return affinequant.quantize(model, **small, **fields).path


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refused(model: Path, *keep: str, **fields: Any) -> AffineQuantError:
    with pytest.raises(AffineQuantError) as caught:
        plan(model, keep=keep, data="demo", seq_len=64, **fields)
    return caught.value


def test_a_pattern_names_linears_as_users_see_them(tiny: Tiny) -> None:
    made = plan(tiny(), keep=["*.down_proj", "model.layers.0.*", "lm_head"], data="demo", seq_len=64)
    kept = {name for name, scheme in made.schemes.items() if scheme is None}
    assert kept == {name for name in made.schemes if ".layers.0." in name} | {"model.layers.1.mlp.down_proj"}
    assert made.to_json()["linears"] == dict.fromkeys(kept, "16 bits") and 4 < made.bits_per_weight < 16
    assert [len(block.linears) for block in made.family.each_block(made.dims)] == [0, 6]


def test_one_that_matches_nothing_is_told_the_nearest(tiny: Tiny) -> None:
    problem = refused(tiny(), "down_proj")
    assert "'down_proj'" in problem.what and problem.where == "--keep" and "'*.mlp.down_proj'" in problem.fix
    assert "model.layers.1.*" in refused(tiny(), "model.layer.1.*").fix


def test_what_engines_fuse_stays_together(tiny: Tiny) -> None:
    problem = refused(tiny(), "*.q_proj")
    assert "--keep '*.self_attn.k_proj' --keep '*.self_attn.v_proj'" in problem.fix
    assert problem.fix.endswith("--keep 'model.layers.1.mlp.gate_proj'") is False
    assert refused(tiny(), "model.layers.1.mlp.gate_proj").fix.endswith("'model.layers.1.mlp.up_proj'")
    assert "experts.0.gate_proj" in refused(tiny(family="qwen2_moe"), "*.experts.*.down_proj").what
    whole = plan(
        tiny(family="qwen2_moe"), keep=["*.shared_expert.*", "*.[qkv]_proj"], data="demo", seq_len=64, preset="rtn"
    )
    assert {name for name, scheme in whole.schemes.items() if scheme is None and ".experts." in name} == set()
    assert "nothing is left" in refused(tiny(), "*").what


def test_each_linear_is_bound_by_block(tiny: Tiny) -> None:
    made = plan(tiny(), data="demo", seq_len=64)
    found = bound(made.family, made.dims)
    assert set(found) == set(made.schemes) and len({one.fused for one in found.values()}) == 2 * 4


def test_a_recipe_holds_patterns_and_files_and_flags_add_up(tmp_path: Path) -> None:
    recipe = affinequant.Recipe(model="demo", keep=("*.down_proj", 'a"b'))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.from_toml(tmp_path / "recipe.toml").keep == recipe.keep
    assert Recipe.from_toml(tmp_path / "recipe.toml", keep=["*.o_proj"]).keep == (*recipe.keep, "*.o_proj")
    assert recipe.fingerprint()["keep"] and "keep" not in affinequant.Recipe(model="demo").fingerprint()
    assert "keep =" not in affinequant.Recipe(model="demo").to_toml()
    with pytest.raises(AffineQuantError, match="list of names or patterns"):
        affinequant.Recipe(model="demo", keep="*.down_proj")  # pyright: ignore[reportArgumentType]


def test_what_is_kept_has_the_source_s_bits_and_stock_transformers_reads_it(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    asked: Mapping[str, Any] = {"preset": "rtn", "scheme": "w4a16", "keep": ["*.down_proj", "*.[qkv]_proj"]}
    out = quantized(tiny(), text, tmp_path / "out", **asked)
    there, source = tensors(out), tensors(tiny())
    kept = [name for name in source if any(part in name for part in ("down_proj", "q_proj", "k_proj", "v_proj"))]
    assert len(kept) == 8 and all(torch.equal(there[name], source[name].bfloat16()) for name in kept)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", *(name.removesuffix(".weight") for name in kept)}
    assert config["affinequant"]["version"] == 1  # older readers leave alone what is ignored
    ours, stock = affinequant.load(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)
    again = quantized(tiny(), text, tmp_path / "again", **asked)
    assert {name: value.tolist() for name, value in tensors(again).items()} == {
        name: value.tolist() for name, value in there.items()
    }
    assert "8 in 16 bits" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "qwen3_5"])
def test_online_transforms_do_not_reach_it(family: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    keep = {
        "llama": ["*.down_proj", "*.[qkv]_proj", "model.layers.1.*"],
        "qwen2_moe": ["*.shared_expert.*", "*.[qkv]_proj", "model.layers.0.mlp.*"],
        "qwen3_5": ["*.linear_attn.in_proj*", "*.down_proj"],
    }[family]
    out = quantized(tiny(family=family), text, tmp_path / "out", preset="fast", tier="online", epochs=1, keep=keep)
    report = json.loads((out / "report.json").read_text())  # verified: each block as the run had it
    kept = {name for name, called in report["plan"]["linears"].items() if called == "16 bits"}
    there = tensors(out)
    assert kept and all(f"{name}.weight" in there and f"{name}.weight_scale" not in there for name in kept)
    online = {name.rpartition(".")[0] for name in there if ".online" in name}
    assert online and not online & kept
    assert torch.isfinite(logits(affinequant.load(out))).all()


@pytest.mark.parametrize("form", ["dense", "gguf", "nvfp4", "int-quantized"])
def test_exports_hold_it(form: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    asked: Mapping[str, Any] = {"preset": "rtn", "scheme": "w8a8" if form == "int-quantized" else "w4a16"}
    out = quantized(tiny(), text, tmp_path / "out", keep=["*.[qkv]_proj", "*.down_proj"], **asked)
    done = affinequant.export(out, format=form, out=tmp_path / form)
    assert done.report["verified"]["passed"]


def test_gptq_has_no_place_for_it(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = quantized(tiny(), text, tmp_path / "out", preset="rtn", scheme="w4a16", keep=["*.down_proj"])
    with pytest.raises(AffineQuantError, match=r"down_proj stays in 16 bits"):
        affinequant.export(out, format="gptq", out=tmp_path / "gptq")


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_vllm_leaves_it_alone(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    from affinequant.serve.vllm_plugin import AffineQuantConfig

    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    out = quantized(tiny(), text, tmp_path / "out", preset="rtn", keep=["*.[qkv]_proj", "model.layers.0.*"])
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    assert should_ignore_layer("model.layers.1.self_attn.qkv_proj", declared["ignore"], fused)
    assert not should_ignore_layer("model.layers.1.mlp.gate_up_proj", declared["ignore"], fused)
    assert AffineQuantConfig(declared).ignore == declared["ignore"]
