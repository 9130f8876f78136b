"""Each family beside Llama, from a folder to a folder: what stock transformers computes, and what presets leave out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.formats.reading import decompressed, in_transformers
from affinequant.models import FAMILIES

MIXTURES = [name for name, family in FAMILIES.items() if "experts" in family.layers]
OTHERS = [name for name in FAMILIES if name not in ("llama", "qwen2", *MIXTURES)]
IDS = torch.arange(2, 42)[None]


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return {"preset": "fast", "samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out"}


def of_family(tiny: Callable[..., Path], family: str) -> Path:
    return tiny(family=family, tied=family.startswith("gemma"))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("family", OTHERS)
def test_stock_transformers_computes_what_ours_does(
    family: str, tiny: Callable[..., Path], fields: dict[str, Any]
) -> None:
    """Weights in four bits; of what does not cap its scores, with the attention that transformers takes by itself."""
    made = affinequant.quantize(of_family(tiny, family), scheme="w4a16", tier="merged", **fields)
    assert made.report["verified"]["passed"] and made.report["events"] == []
    stock, _ = in_transformers(made.path, "float32")
    ours = affinequant.load(made.path, device="cpu", dtype="float32")
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_compute_what_ours_do(family: str, mixture: Callable[..., Path]) -> None:
    """transformers' own code, after the library of the form has made weights of the integers."""
    folder = mixture(family, "w4a16")
    stock, _ = decompressed(folder, "float32")
    ours = affinequant.load(folder, device="cpu", dtype="float32")
    assert not any("experts.0" in name for name, _ in stock.named_modules())
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)


def test_caps_are_computed(tiny: Callable[..., Path]) -> None:
    """Gemma 2 caps its attention's scores, which transformers' own `sdpa` leaves out without a word."""
    model: Any = affinequant.load(tiny(family="gemma2", tied=True), device="cpu", dtype="float32")
    ours = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, logits(model), rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert float((ours - logits(model)).abs().max()) > 0.01


def test_a_preset_is_for_all_families_and_says_what_it_leaves_out(
    tiny: Callable[..., Path], fields: dict[str, Any]
) -> None:
    model = of_family(tiny, "gemma3")
    made = affinequant.plan(model, tier="merged", **fields | {"preset": "default"})
    assert not {"residual", "qk"} & made.recipe.transforms.keys() and "vo" in made.recipe.transforms
    left_out = [note for note in made.notes if "is left out" in note]
    assert [note.split()[1] for note in left_out] == ["residual=hadamard", "qk=rope-pair"]
    assert "the gain of post_attention_layernorm" in left_out[0] and "self_attn.q_norm" in left_out[1]
    with pytest.raises(AffineQuantError, match=r"the gain of self_attn\.q_norm acts between the linear and RoPE"):
        affinequant.plan(model, tier="merged", transforms={"qk": "rope-pair"}, **fields)


@pytest.mark.parametrize(("family", "key"), [("qwen3", "head_dim"), ("gemma3", "tie_word_embeddings")])
def test_a_size_that_config_json_leaves_out_is_what_transformers_takes(family: str, key: str) -> None:
    import transformers

    made = getattr(transformers, FAMILIES[family].architectures[0]).config_class()
    assert FAMILIES[family].defaults[key] == getattr(made, key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"word_embed_proj_dim": 32}, "embeddings of width 32 in blocks of width 64"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported for opt"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu' is not supported for opt"),
    ],
)
def test_an_opt_that_computes_something_else_is_refused(
    change: dict[str, Any], words: str, tiny_copy: Callable[..., Path], fields: dict[str, Any]
) -> None:
    folder = tiny_copy(family="opt", tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(AffineQuantError, match=words) as caught:
        affinequant.plan(folder, **fields)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Olmo3ForCausalLM", "models/smollm3.py is the nearest"),
        ("RwkvForCausalLM", "to start from"),
        (None, "models/llama.py"),
    ],
)
def test_an_architecture_that_is_not_known_is_refused_by_name(
    name: str | None, file: str, tiny_copy: Callable[..., Path], fields: dict[str, Any]
) -> None:
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name] if name else []}))
    with pytest.raises(AffineQuantError, match=f"unsupported architecture: {name or 'none named'}") as caught:
        affinequant.plan(folder, **fields)
    assert caught.value.exit_code == 3 and file in caught.value.fix


def test_positions_that_are_missing_are_named(tiny_copy: Callable[..., Path], fields: dict[str, Any]) -> None:
    folder = tiny_copy(family="opt", tied=True)
    stored = load_file(folder / "model.safetensors")
    stored.pop("model.decoder.embed_positions.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AffineQuantError, match=r"model\.decoder\.embed_positions\.weight is missing") as caught:
        affinequant.plan(folder, **fields)
    assert caught.value.exit_code == 3
