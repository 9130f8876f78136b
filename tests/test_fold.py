"""Folding in the small: which tensors are touched, biases, gains with an offset, and what is an error."""

from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.models import LLAMA, Dims, resolve_sites
from affinequant.transforms import build
from affinequant.transforms.fold import fold, fold_all, fuse_gains, rotate_outer

DIMS = Dims(layers=1, hidden=16, mlp=24, heads=4, kv_heads=2, head_dim=4, vocab=10, tied=True)
SITES = {site.name: site for site in resolve_sites(LLAMA, DIMS)}


def block(bias: bool = False) -> dict[str, Tensor]:
    """One block's tensors, fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{s.name}.weight": s.shape(DIMS) for s in LLAMA.linears}
    shapes |= {f"{norm}.weight": (16,) for norm, _ in LLAMA.fused_norms()}
    if bias:
        shapes |= {f"{s.name}.bias": s.shape(DIMS)[:1] for s in LLAMA.linears}
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


def transform(name: str, site: str) -> Any:
    made: Any = build(name, SITES[site], seed=1, alpha=1.0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return made


TOUCHED = {
    ("attn_in", "diagonal"): {"input_layernorm.weight", *(f"self_attn.{p}_proj.weight" for p in "qkv")},
    ("qk", "rope-pair"): {f"self_attn.{p}_proj.{part}" for p in "qk" for part in ("weight", "bias")},
    ("vo", "banded"): {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"},
    ("mlp_mid", "diagonal"): {"mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight"},
}


@pytest.mark.parametrize(("site", "name"), TOUCHED)
def test_exactly_the_edges_of_a_site_change(site: str, name: str) -> None:
    before = block(bias=True)
    kept = {key: tensor.clone() for key, tensor in before.items()}
    after = fold(before, SITES[site], transform(name, site))
    assert {key for key in before if not torch.equal(before[key], after[key])} == TOUCHED[site, name]
    assert all(torch.equal(before[key], kept[key]) for key in kept), "the input was changed in place"


def test_a_gain_with_an_offset_is_folded_as_one_plus_w() -> None:
    before, made = block(), transform("diagonal", "attn_in")
    after = fold(before, SITES["attn_in"], made, norm_offset=1.0)
    effective = made.on_activations(before["input_layernorm.weight"] + 1)
    torch.testing.assert_close(after["input_layernorm.weight"] + 1, effective)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fusing_leaves_a_gain_of_one(offset: float) -> None:
    before = block()
    after = fuse_gains(before, LLAMA.fused_norms(), offset)
    gain = before["input_layernorm.weight"] + offset
    torch.testing.assert_close(after["input_layernorm.weight"] + offset, torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(after["self_attn.q_proj.weight"], before["self_attn.q_proj.weight"] * gain)
    assert torch.equal(after["self_attn.o_proj.weight"], before["self_attn.o_proj.weight"])


def test_a_norm_with_a_bias_is_not_fused() -> None:
    """Dropping it would change what the linears read, and nothing says where it goes."""
    tensors = block() | {"input_layernorm.bias": torch.ones(16, dtype=torch.float64)}
    with pytest.raises(ValueError, match="input_layernorm has a bias"):
        fuse_gains(tensors, LLAMA.fused_norms(), 0.0)


def test_a_missing_tensor_of_the_scope_is_an_error() -> None:
    tensors = block()
    del tensors["self_attn.o_proj.weight"]
    with pytest.raises(KeyError, match="o_proj"):
        fold(tensors, SITES["vo"], transform("banded", "vo"))


def test_a_tied_head_gets_a_matrix_of_its_own_and_keeps_its_product() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding, gain = torch.randn(10, 16, dtype=torch.float64, generator=generator), torch.rand(16).double() + 0.5
    rotation = transform("hadamard", "residual")
    outer = {"model.embed_tokens.weight": embedding, "model.norm.weight": gain}
    after = rotate_outer(outer, LLAMA, SITES["residual"], rotation)
    x = torch.randn(3, 16, dtype=torch.float64, generator=generator)
    expected = (x * gain) @ embedding.mT
    torch.testing.assert_close(rotation.on_activations(x) @ after["lm_head.weight"].mT, expected)
    assert set(outer) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_gradients_pass_through_every_site() -> None:
    chosen = {"attn_in": "diagonal", "qk": "rope-pair", "vo": "banded", "mlp_in": "diagonal", "mlp_mid": "diagonal"}
    modules = {site: transform(name, site) for site, name in chosen.items()}
    after = fold_all(block(), SITES, modules, norm_offset=0.0)
    sum(tensor.square().sum() for tensor in after.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for module in modules.values():
        assert all(bool(p.grad.isfinite().all()) and bool(p.grad.ne(0).any()) for p in module.parameters())
