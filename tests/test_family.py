"""What a family can say beyond Llama: fused linears, norms behind a layer, blocks that differ, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.formats import left_alone
from affinequant.models import FAMILIES, LLAMA, Dims, resolve, resolve_sites
from affinequant.models.family import Family
from affinequant.models.norms import check_norms
from affinequant.models.sites import STRUCTURES, place
from affinequant.models.source import open_source
from affinequant.recipe.recipe import CHOICE_SITES, EVERY
from affinequant.recipe.recipe import resolve as resolve_recipe
from affinequant.transforms.fold import fold
from affinequant.transforms.placements import choosing
from tests.made_up import MADE_UP, MadeUpConfig, MadeUpForCausalLM
from tests.test_equivalence import TOLERANCE, folding, logits_of, randomised
from tests.tiny import rounded, tiny_llama

DIMS = Dims(layers=2, hidden=16, mlp=12, heads=4, kv_heads=2, head_dim=4, vocab=10, tied=True)


def block_sites(family: Family, dims: Dims, index: int) -> dict[str, Any]:
    return {site.name: site for site in resolve_sites(family.at(dims, index), dims)}


@torch.no_grad()
@pytest.mark.parametrize("site", ["attn_in", "qk", "vo", "mlp_in", "mlp_mid"])
def test_sites_on_parts_of_fused_linears_change_no_logit(site: str) -> None:
    """In fp64, every transform that folds there one after the other, in each block that has the site."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    config = MadeUpConfig(**sizes, vocab_size=96, architectures=["MadeUpForCausalLM"])
    model = MadeUpForCausalLM(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_((1.0 if "norm" in name else 0.0) + (0.3 if parameter.ndim == 1 else 0.13) * noise)
    dims = MADE_UP.dims(config.to_dict(), "")
    dims = replace(dims, kinds=tuple(MADE_UP.kinds({}, index) for index in range(3)))  # pyright: ignore[reportOptionalCall]
    before: dict[str, Tensor] = dict(model.named_parameters())
    after, moved = dict(before), 0.0
    for index in range(3):
        sites, prefix = block_sites(MADE_UP, dims, index), f"model.layers.{index}."
        if site not in sites:
            continue
        part = {name[len(prefix) :]: tensor for name, tensor in before.items() if name.startswith(prefix)}
        for number, transform in enumerate(folding(sites, site)):
            part = fold(part, sites[site], randomised(transform, sites[site], 11 * index + number))
        after |= {prefix + name: tensor for name, tensor in part.items()}
        moved = max(float((part[name] - before[prefix + name]).abs().max()) for name in part)
    assert moved > 0.05
    assert float((logits_of(model, after) - logits_of(model, before)).abs().max()) < TOLERANCE


def test_nothing_passes_a_norm_behind_a_layer() -> None:
    """The gain acts on what is added to the stream: a rotation would have to pass it, and can not."""
    residual = block_sites(MADE_UP, DIMS, 0)["residual"]
    assert [edge.module for edge in residual.sources if edge.side == "gain"] == ["mix_norm_out", "norm_out"]
    assert all(place(residual, structure).how == "refused" for structure in STRUCTURES)
    assert "mix_norm_out" in place(residual, "hadamard").reason
    assert MADE_UP.writers() == ("mixer.out", "down")
    assert MADE_UP.norms() == ("mix_norm_in", "norm_in", "mix_norm_out", "norm_out")


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a made-up model, whose family is known while the test runs."""
    monkeypatch.setitem(FAMILIES, "made-up", MADE_UP)
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))
    sizes: dict[str, Any] = {"layers": 2, "n_ff": 112, "mlp": 8}
    return tiny_llama(tmp_path / "model", family="made-up", architecture=MadeUpForCausalLM, **sizes)


AUTO = dict.fromkeys((EVERY, *CHOICE_SITES), "auto")
RUNS: dict[str, dict[str, Any]] = {
    "merged": {"tier": "merged", "epochs": 2, "finish": "kl"},
    "online": {"tier": "online", "preset": "fast", "scheme": "w4a4kv4", "rounding": "auto"},
    "auto": {"tier": "online", "preset": "fast", "transforms": AUTO, "cost_budget": 60.0},
}


@pytest.mark.parametrize("run", RUNS)
def test_blocks_of_different_kinds_from_end_to_end(run: str, made_up: Path, tmp_path: Path) -> None:
    fields = {"samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out", **RUNS[run]}
    fields["transforms"] = {"residual": "none"} | fields.get("transforms", {})
    made = affinequant.quantize(made_up, **fields)
    checked = made.report["verified"]
    assert checked["passed"] and checked["hidden"] < 1e-3 and made.report["events"] == []
    mlp = {"gate_up", "down"}
    linears = [set(block["linears"]) for block in made.report["blocks"]]
    assert linears == [{"mixer.qkv", "mixer.out"} | mlp, mlp]
    assert made.report["plan"]["dims"]["mlp"] == 112
    if run == "auto":
        chosen = [set(block["transforms"]) for block in made.report["blocks"]]
        assert chosen == [{"attn_in", "vo", "mlp_in", "mlp_mid"}, {"mlp_in", "mlp_mid"}]
    model: Any = affinequant.load(made.path, device="cpu", dtype="float32")
    with torch.no_grad():
        assert bool(model(torch.arange(2, 30)[None], use_cache=False).logits.isfinite().all())


def test_a_rotation_is_refused_by_name_before_anything_runs(made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(AffineQuantError, match="the gain of mix_norm_out acts on what a layer adds") as caught:
        affinequant.plan(made_up, data=tmp_path / "text.txt", seq_len=32, transforms={"residual": "hadamard"})
    assert "residual=none" in caught.value.fix


def test_attention_needs_no_site_between_queries_and_keys(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose positions are not rotary has no `qk`, and its cache is packed all the same."""
    attention = LLAMA.layers["attention"]
    sites = tuple(spec for spec in attention.sites if spec.kind != "rope")
    family = replace(LLAMA, layers={**LLAMA.layers, "attention": replace(attention, sites=sites)})
    monkeypatch.setitem(FAMILIES, "llama", family)
    assert family.attention == "self_attn" and "qk" not in {spec.name for spec in family.sites}
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    fields = {"samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out", "preset": "fast"}
    made = affinequant.quantize(tiny(), tier="online", scheme="w4a16kv4", transforms={"qk": "none"}, **fields)
    assert made.report["verified"]["passed"]


def test_what_reads_a_norm_and_is_no_linear_of_the_family_is_left_alone(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = rounded(tiny(), "w4a4")
    sinks = (("mlp.gate", "columns"), ("mlp.gate_proj", "columns"), ("mlp.up_proj", "columns"))
    gated = replace(LLAMA, layers={**LLAMA.layers, "mlp": LLAMA.layers["mlp"].with_site("mlp_in", sinks=sinks)})
    assert left_alone(contents) == ["lm_head"]
    monkeypatch.setitem(FAMILIES, "llama", replace(gated, head="output"))
    assert left_alone(contents) == ["output", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def test_auto_is_for_the_sites_that_the_family_has() -> None:
    def chosen(family: Family, **asked: str) -> dict[str, str]:
        every = resolve_recipe({"model": "m", "preset": "fast", "transforms": "auto"}).transforms
        recipe = resolve_recipe({"model": "m", "preset": "fast", "transforms": {**every, **asked}})
        return dict(choosing(recipe, family).transforms)

    other = replace(
        LLAMA.layers["attention"],
        sites=tuple(
            replace(spec, name="delta_in") if spec.name == "attn_in" else spec
            for spec in LLAMA.layers["attention"].sites
        ),
    )
    family = replace(LLAMA, layers={**LLAMA.layers, "attention": other})
    assert set(chosen(LLAMA)) == {"attn_in", "vo", "mlp_in", "mlp_mid"}
    assert set(chosen(family)) == {"delta_in", "vo", "mlp_in", "mlp_mid"} == {name for name, _ in family.input_groups()}
    assert chosen(family, delta_in="hadamard")["delta_in"] == "hadamard"
    assert "delta_in" not in chosen(family, delta_in="none") and "vo" not in chosen(LLAMA, vo="none")


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (nn.LayerNorm(64), "input_layernorm has a bias"),
        (nn.LayerNorm(64, bias=False), "input_layernorm is no RMS norm"),
        (nn.RMSNorm(64), None),
    ],
    ids=["bias", "mean", "rms"],
)
def test_norms_are_asked_what_they_compute(tiny: Callable[..., Path], norm: nn.Module, words: str | None) -> None:
    model: Any = affinequant.load(tiny(), device="cpu", dtype="float32")
    family, dims = resolve(open_source(tiny()).config, where="")
    model.model.layers[1].input_layernorm = norm.requires_grad_(False)
    if words is None:
        check_norms(model, family, dims, "here")
        with pytest.raises(AffineQuantError, match="is no RMS norm"):
            check_norms(model, replace(family, norm_offset=1.0), dims, "here")
        return
    with pytest.raises(AffineQuantError, match=f"model.layers.1.{words}") as caught:
        check_norms(model, family, dims, "here")
    assert caught.value.exit_code == 3 and "family llama" in caught.value.fix


def test_qwen2_has_biases_whatever_its_config_says(tiny_copy: Callable[..., Path]) -> None:
    """transformers would make up one that is missing."""
    folder = tiny_copy(family="qwen2", attention_bias=False)
    stored = load_file(folder / "model.safetensors")
    assert not any(name.endswith(("o_proj.bias", "up_proj.bias")) for name in stored)
    stored.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AffineQuantError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing") as caught:
        affinequant.plan(folder, data="demo", seq_len=32)
    assert caught.value.exit_code == 3
