"""Gated-delta layers beside attention: what is quantised and what is not, from a folder to a folder, and with a cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.export import read_back
from affinequant.formats import find_format
from affinequant.models import FAMILIES, resolve, resolve_sites
from affinequant.models.experts import split_experts
from affinequant.models.sites import STRUCTURES, place
from tests.tiny import OWN

HYBRIDS = [name for name, family in FAMILIES.items() if "delta" in family.layers]
IDS = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
RECURRENCE = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.conv1d.weight")


def on_meta(family: str, **settings: Any) -> tuple[Any, Any, Any]:
    """(transformers' own model without weights, what `resolve` says of it)."""
    architecture = getattr(transformers, FAMILIES[family].architectures[0])
    config = architecture.config_class(**SIZES | {"vocab_size": 96, "pad_token_id": 1} | OWN.get(family, {}) | settings)
    with torch.device("meta"):
        model = architecture(config)
    return model, *resolve({**config.to_dict(), "architectures": [architecture.__name__]}, where="here")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_quantised_or_left_alone_by_name(family: str) -> None:
    """Of transformers' own module tree: nothing is quantised by mistake, and nothing missed in silence."""
    model, known, dims = on_meta(family)
    split_experts(model, known)
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    listed = {
        f"{known.blocks}.{index}.{linear.name}"
        for index, block in enumerate(known.each_block(dims))
        for linear in block.linears
    }
    alone = set(known.left_alone(dims))
    assert not listed & alone and listed <= found <= listed | alone
    assert all(model.get_submodule(name) is not None for name in alone)
    for index, block in enumerate(known.each_block(dims)):
        for linear in block.linears:
            module = model.get_submodule(f"{known.blocks}.{index}.{linear.name}")
            assert linear.shape(dims) == (module.out_features, module.in_features)


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_a_gate_stands_behind_is_refused_by_name(family: str) -> None:
    _, known, dims = on_meta(family)
    sites = {site.name: site for site in resolve_sites(known, dims)}
    assert {"attn_in", "attn_in.delta", "vo", "vo.delta"} <= set(sites)
    for site in (sites["vo"], sites["vo.delta"]):
        how = {structure: place(site, structure).how for structure in STRUCTURES}
        assert {one for one, placed in how.items() if placed != "refused"} == {"diagonal", "kronecker"}
        assert (how["diagonal"], how["kronecker"]) == ("folded", "online")
        assert "a gate multiplies each feature" in place(site, "per-head").reason
    # One weight for all heads: a diagonal of one head's width, each head of out_proj alike.
    assert sites["vo.delta"].width == dims.delta_head and sites["vo.delta"].sinks[0].copies == dims.delta_heads
    assert {edge.module for edge in sites["attn_in.delta"].sinks if edge.plain} == {
        name for name, _ in on_meta(family)[0].model.layers[0].named_modules() if name.endswith(("_b", "_a", "_ba"))
    }


def test_blocks_are_what_layer_types_or_the_interval_says() -> None:
    _, _, dims = on_meta("qwen3_5", num_hidden_layers=4, layer_types=None)
    mixers = ["delta"] * 3 + ["attention"]
    assert [kinds[0] for kinds in dims.kinds] == mixers
    config = {"architectures": ["Qwen3_5ForCausalLM"], "intermediate_size": 64, "vocab_size": 96, **SIZES}
    assert [kinds[0] for kinds in resolve(config | {"num_hidden_layers": 4}, where="")[1].kinds] == mixers
    for types in (["linear_attention"], ["linear_attention", "sliding_attention"]):
        with pytest.raises(AffineQuantError, match="layer_types = ") as caught:
            resolve(config | {"layer_types": types}, where="")
        assert caught.value.exit_code == 3 and "for each of 2 blocks" in caught.value.fix


@pytest.mark.parametrize("family", HYBRIDS)
def test_sizes_that_config_json_leaves_out_are_what_transformers_takes(family: str) -> None:
    made = getattr(transformers, FAMILIES[family].architectures[0]).config_class()
    defaults = FAMILIES[family].defaults.items()
    assert all(getattr(made, key) == value for key, value in defaults if hasattr(made, key))


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return {"preset": "fast", "samples": 4, "seq_len": 32, "data": text}


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: the recurrence in float32, everything else in bfloat16."""
    folder = Path(shutil.copytree(tiny(family="qwen3_5"), tmp_path_factory.mktemp("source") / "model"))
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("A_log")]:
        stored[name] = stored[name].float() + 2.0**-12
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(source: Path, fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """At four bits throughout, the KV cache of attention too."""
    out = tmp_path_factory.mktemp("made") / "out"
    return affinequant.quantize(source, scheme="w4a4kv4", tier="online", out=out, **fields)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits.float()


def test_projections_are_quantised_and_the_recurrence_is_left_alone(made: Any, source: Path) -> None:
    assert made.report["verified"]["passed"] and made.report["events"] == []
    delta, attention = (set(block["linears"]) for block in made.report["blocks"])
    assert delta - attention == {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
    assert attention - delta == {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    declared = json.loads((made.path / "config.json").read_text())["quantization_config"]
    small = {f"model.layers.0.linear_attn.in_proj_{name}" for name in "ba"}
    assert set(declared["ignore"]) == {"lm_head", *small}
    before, after = load_file(source / "model.safetensors"), load_file(made.path / "affinequant.safetensors")
    for name in RECURRENCE:
        kept = after[f"model.layers.0.{name}"]
        assert kept.dtype == before[f"model.layers.0.{name}"].dtype and torch.equal(
            kept, before[f"model.layers.0.{name}"]
        )
    # What reads the norm took up what was folded into it, and is still in 16 bits.
    assert all(f"{name}.weight" in after and not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
               for name in small)  # fmt: skip


def test_decoding_with_a_cache_gives_what_the_whole_text_gives(made: Any) -> None:
    """The state of the recurrence as it is, keys and values of attention packed."""
    model: Any = affinequant.load(made.path, device="cpu", dtype="float32")
    with torch.no_grad():
        result = model(IDS[:, :20], use_cache=True)
        cache, parts = result.past_key_values, [result.logits]
        for token in range(20, IDS.shape[1]):
            parts.append(model(IDS[:, token : token + 1], past_key_values=cache, use_cache=True).logits)
    # A value at the middle between two steps may round to either, as in any cache: of each token most, not all, agree.
    difference = (torch.cat(parts, 1) - logits(model)).abs().amax(-1)
    assert float((difference < 1e-3).float().mean()) > 0.8
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer", "PackedLayer"]


def test_stock_transformers_loads_our_own_format(made: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert torch.equal(logits(model), logits(affinequant.load(made.path, device="cpu", dtype="float32")))


@pytest.mark.parametrize("form", ["compressed-tensors", "dense", "gptq", "int-quantized"])
def test_every_format_takes_it(form: str, source: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    scheme = "w8a8" if form == "int-quantized" else "w4a16-g32"
    first = affinequant.quantize(
        source, scheme=scheme, tier="merged", out=tmp_path / "first", **fields | {"preset": "rtn"}
    )
    out = first.path
    if form != "compressed-tensors":
        out = tmp_path / "out"
        report = affinequant.export(first.path, format=form, out=out).report
        assert report["verified"]["passed"]
    assert first.report["verified"]["passed"]
    model, _ = read_back(find_format(form), out, "float32")
    assert bool(logits(model).isfinite().all())


def test_gguf_is_refused_by_name(source: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    first = affinequant.quantize(
        source, scheme="w4a16-sym", tier="merged", out=tmp_path / "first", **fields | {"preset": "rtn"}
    )
    with pytest.raises(AffineQuantError, match="qwen3_5"):
        affinequant.export(first.path, format="gguf", out=tmp_path / "out")


def test_an_interrupted_run_ends_in_the_same_bytes(
    made: Any, source: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    class Stop(affinequant.progress.Silent):
        """Stops behind the first block, the one of the gated-delta layer."""

        def block(self, index: int, report: Any) -> None:
            raise KeyboardInterrupt

    asked = {"scheme": "w4a4kv4", "tier": "online", "out": tmp_path / "out", **fields}
    with pytest.raises(KeyboardInterrupt):
        affinequant.quantize(source, progress=Stop(), **asked)
    again = affinequant.quantize(source, resume=True, **asked)
    names = ("affinequant.safetensors", "config.json")
    assert all((again.path / name).read_bytes() == (made.path / name).read_bytes() for name in names)


def test_ranks_share_whole_heads_of_the_recurrence(source: Path, fields: dict[str, Any]) -> None:
    """Two heads of keys cannot be cut in four, though the heads of queries and of values can."""
    assert affinequant.plan(source, tp=2, **fields).sites["vo.delta"].slices == 2
    with pytest.raises(AffineQuantError, match="in gated-delta layers 4 and 2") as caught:
        affinequant.plan(source, tp=4, **fields)
    assert caught.value.fix == "use one of 1, 2"
