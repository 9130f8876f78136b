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
from tests.test_vllm_export import loaded
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


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_next"])
def source(request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: the recurrence in float32, everything else in bfloat16, and a Qwen3-Next with what guesses several tokens."""
    folder = Path(shutil.copytree(tiny(family=request.param), tmp_path_factory.mktemp("source") / "model"))
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("A_log")]:
        stored[name] = stored[name].float() + 2.0**-12
    if request.param == "qwen3_next":
        block = {"model.layers.1.self_attn.": "self_attn.", "model.layers.0.mlp.": "mlp."}
        ahead = {"mtp.fc.weight": torch.ones(64, 128).bfloat16(), "mtp.norm.weight": torch.ones(64).bfloat16()}
        for start, part in block.items():
            found = {name: tensor for name, tensor in stored.items() if name.startswith(start)}
            ahead |= {f"mtp.layers.0.{part}{name[len(start) :]}": tensor + 1 for name, tensor in found.items()}
        stored |= ahead
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
    assert made.report["verified"]["passed"]
    assert all("experts see fewer tokens" in event for event in made.report["events"])
    delta, attention = (set(block["linears"]) for block in made.report["blocks"])
    before, after = load_file(source / "model.safetensors"), load_file(made.path / "affinequant.safetensors")
    start, fused = "model.layers.0.", "model.layers.0.linear_attn.in_proj_qkvz.weight" in before
    read = ["in_proj_qkvz"] if fused else ["in_proj_qkv", "in_proj_z"]
    assert {name for name in delta if "attn" in name} == {f"linear_attn.{name}" for name in (*read, "out_proj")}
    assert {name for name in attention if "attn" in name} == {f"self_attn.{name}_proj" for name in "qkvo"}
    declared = json.loads((made.path / "config.json").read_text())["quantization_config"]
    small = {f"{start}linear_attn.in_proj_{name}" for name in (["ba"] if fused else "ba")}
    routers = {f"{start}mlp.{name}" for name in ("gate", "shared_expert_gate")}
    patterns = {"re:(.*\\.)?mtp\\..*", "re:(.*\\.)?lm_head"}
    assert set(declared["ignore"]) == {"lm_head", *small, *(routers | patterns if fused else ())}
    for name in RECURRENCE:
        kept = after[f"{start}{name}"]
        assert kept.dtype == before[f"{start}{name}"].dtype and torch.equal(kept, before[f"{start}{name}"])
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


def test_what_guesses_several_tokens_is_copied_and_closes_the_stream(
    made: Any, source: Path, fields: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """vLLM drafts with it, on the hidden states, the embedding and the head that it was trained with."""
    before, after = load_file(source / "model.safetensors"), load_file(made.path / "affinequant.safetensors")
    names = {name for name in before if name.startswith("mtp.")}
    assert names == {name for name in after if name.startswith("mtp.")} == made.report["unknown_tensors"].keys()
    assert all(torch.equal(before[name], after[name]) for name in names)
    merged = affinequant.plan(source, **fields, tier="merged")
    notes = [note for note in merged.notes if "mtp" in note]
    if not names:
        assert not notes and not merged.copied and merged.recipe.transforms["residual"] == "hadamard"
        return
    assert merged.copied == made.report["plan"]["copied"] == {"mtp": sum(before[name].nbytes for name in names)}
    assert len(notes) == 2 and "copied: mtp" in notes[0]
    assert notes[1].endswith("is left out: mtp stays as it is, and would meet a stream that is rotated")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    with pytest.raises(AffineQuantError, match="residual is refused: mtp stays as it is"):
        affinequant.plan(source, **fields | {"preset": "rtn"}, transforms={"residual": "hadamard"})
    capfd.readouterr()
    affinequant.load(made.path)
    assert "mtp" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def merged(source: Path, fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights in four bits, rounded to nearest."""
    out = tmp_path_factory.mktemp("merged") / "out"
    asked: dict[str, Any] = {**fields, "preset": "rtn", "scheme": "w4a16-g32-sym", "tier": "merged"}
    return affinequant.quantize(source, out=out, **asked)


@pytest.mark.parametrize("form", ["compressed-tensors", "dense", "gptq", "int-quantized"])
def test_every_format_takes_it(form: str, merged: Any, source: Path, tmp_path: Path) -> None:
    out = merged.path
    if form != "compressed-tensors":
        out, asked = tmp_path / "out", dict[str, Any]({"scheme": "w4a8"} if form == "int-quantized" else {})
        assert affinequant.export(merged.path, format=form, out=out, **asked).report["verified"]["passed"]
    assert merged.report["verified"]["passed"]
    model, _ = read_back(find_format(form), out, "float32")
    if form in ("compressed-tensors", "gptq"):  # the others round activations too, or weights to 16 bits
        ours = affinequant.load(merged.path, device="cpu", dtype="float32")
        torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-4)
    assert bool(logits(model).isfinite().all())
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    ahead = [name for name in before if name.startswith("mtp.")]
    assert all(torch.equal(before[name], after[name]) for name in ahead)
    if form == "gptq" and ahead:  # by which vLLM knows that its drafter is not quantised
        declared = json.loads((out / "config.json").read_text())["quantization_config"]
        assert "-:(.*\\.)?mtp\\..*" in declared["dynamic"]


def test_gguf_is_refused_by_name(merged: Any, tmp_path: Path) -> None:
    with pytest.raises(AffineQuantError, match=r"llama.cpp's form of qwen3_(5|next) is not known here"):
        affinequant.export(merged.path, format="gguf", out=tmp_path / "out")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", ["qwen3_next"], indirect=True)
def test_stock_vllm_reads_it_and_drafts_in_16_bits(source: Path, merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused linears row by row as they are written. Its code of a Qwen3.5 would ask for torchvision."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    monkeypatch.setattr(CPUWNA16LinearKernel, "process_weights_after_loading", lambda *_: None)
    stored, start = load_file(merged.path / "model.safetensors"), "model.layers.0.linear_attn."
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with loaded(merged.path, monkeypatch) as model, torch.no_grad():
        found = dict(model.named_parameters())
        for name in (
            f"{start}{one}.weight_{part}" for one in ("in_proj_qkvz", "out_proj") for part in ("packed", "scale")
        ):
            assert torch.equal(found[name], stored[name]), name
        small, name = model.get_submodule(f"{start}in_proj_ba"), f"{start}in_proj_ba.weight"
        torch.testing.assert_close(small(x)[0], x @ stored[name].T, rtol=0.02, atol=0.02)
        drafter = ("mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.experts.0.gate_proj")
        for name in ("model.layers.1.self_attn.o_proj", *drafter):
            asked = model.quant_config.get_scheme_dict(nn.Linear(1, 1), name)
            assert (asked is None) == name.startswith("mtp."), name


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
