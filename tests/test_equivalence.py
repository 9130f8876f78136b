"""Every family x site x transform: folding changes no logit. In fp64, through the original Hugging Face model.

Registries drive the matrix: a new transform or family joins by itself. Parameters are random, never the identity.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from affinequant.formats.reading import attending
from affinequant.models import FAMILIES, Family, resolve, resolve_sites
from affinequant.models.experts import split_experts
from affinequant.models.sites import SHARED, Site, in_expert, place
from affinequant.runtime.cache import quantize_cache
from affinequant.transforms import SHIFT, TRANSFORMS, build, structures_of
from affinequant.transforms.fold import Tensors, fold, rotate_block, rotate_outer
from tests.tiny import OWN, gain_centre

TOLERANCE = 1e-9
CHANGED = 1e-4
"""A transform that is not equivalent moves logits (of size one) by more than this."""

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "width-72": {"hidden_size": 72, "intermediate_size": 136},
    "width-40": {"hidden_size": 40, "intermediate_size": 104},
    "width-60": {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 84},
    "wide-heads": {"head_dim": 24, "attention_bias": True},
    "narrow-heads": {"head_dim": 6, "num_key_value_heads": 1},
    "scaled-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
SHAPES_OF = {"llama": tuple(SHAPES), "mixtral": ("tied", "gqa"), "qwen2_moe": ("gqa",), "qwen3_moe": ("gqa",)}
SHAPES_OF |= {"qwen3_5": ("gqa", "wide-heads"), "qwen3_next": ("gqa",), "qwen3_5_moe": ("gqa",)}
"""The shapes of a family; relatives of Llama need those alone in which they may differ."""
FAMILY_SHAPES = [
    (family, shape) for family in FAMILIES for shape in SHAPES_OF.get(family, ("gqa", "tied", "wide-heads"))
]


class Tiny(NamedTuple):
    """A model with random weights and what the library says about it."""

    model: Any
    family: Family
    sites: dict[str, Site]
    blocks: tuple[tuple[Family, dict[str, Site]], ...]
    state: Tensors
    logits: Tensor


class KeepDouble(TorchFunctionMode):
    """Hugging Face norms compute in float32 whatever they are given; here casts of fp64 down are left out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.to and args[0].dtype == torch.float64 and torch.float32 in args[1:]:
            return args[0]
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def logits_of(model: Any, state: Tensors, tokens: int = 24) -> Tensor:
    """Logits of the model's own code with these weights."""
    ids = torch.randint(2, 96, (2, tokens), generator=torch.Generator().manual_seed(3))
    with KeepDouble(), torch.no_grad():
        return functional_call(model, state, (ids,), {"use_cache": False}, tie_weights=False).logits


@functools.cache
def tiny(family_name: str, shape: str) -> Tiny:
    """The family's first architecture with two layers in this shape; gains and biases far from their usual values."""
    import transformers

    family = FAMILIES[family_name]
    architecture = getattr(transformers, family.architectures[0])
    base = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112}
    config = architecture.config_class(
        **base
        | {"num_hidden_layers": 2, "vocab_size": 96, "architectures": [architecture.__name__], "pad_token_id": 1}
        | OWN.get(family_name, {})
        | ({"ffn_dim": 112} if family_name == "opt" else {})
        | SHAPES[shape]
    )
    model = attending(split_experts(architecture(config).double().eval().requires_grad_(False), family))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre, spread = (
            (gain_centre(name, family_name), 0.3) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.13)
        )
        parameter.copy_(centre + spread * noise)
    model.tie_weights()
    known, dims = resolve(config.to_dict(), where=shape)
    assert known.name == family_name
    state = dict(model.named_parameters())
    sites, *inside = (
        {site.name: site for site in resolve_sites(one, dims)} for one in (known, *known.each_block(dims))
    )
    blocks = tuple(zip(known.each_block(dims), inside, strict=True))
    return Tiny(model, known, sites, blocks, state, logits_of(model, state))


def randomised(name: str, site: Site, seed: int) -> Any:
    """A transform with random parameters, in fp64."""
    transform: Any = build(name, site, seed=seed, alpha=1.0).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.5 * noise)
    return transform


@torch.no_grad()
def each_block(
    case: Tiny, act: Callable[[Tensors, int], Tensors], outer: Callable[[Tensors], Tensors] = dict
) -> Tensors:
    """The model's weights with `act` applied to every block and `outer` to the rest."""
    blocks = [f"{case.family.blocks}.{index}." for index in range(len(case.blocks))]
    result = outer({name: tensor for name, tensor in case.state.items() if not name.startswith(tuple(blocks))})
    for index, prefix in enumerate(blocks):
        part = {name[len(prefix) :]: tensor for name, tensor in case.state.items() if name.startswith(prefix)}
        result |= {prefix + name: tensor for name, tensor in act(part, index).items()}
    return result


def rotated(case: Tiny, rotation: Any, then: Callable[[Tensors, int], Tensors] = lambda part, _: part) -> Tensors:
    """Weights with the residual stream rotated, and then `then` in every block."""
    site = case.sites["residual"]
    return each_block(
        case,
        lambda part, index: then(
            dict(rotate_block(part, case.blocks[index][0], case.blocks[index][1]["residual"], rotation)), index
        ),
        lambda part: rotate_outer(part, case.family, site, rotation),
    )


def applied(case: Tiny, site_name: str, transform: str) -> Tensors:
    """Weights with one transform at one site, other parameters in each block (one rotation for the residual stream)."""
    site = case.sites[site_name]
    if site.kind == "residual":
        return rotated(case, randomised(transform, site, 11))

    def at_site(part: Tensors, index: int) -> Tensors:
        here = case.blocks[index][1].get(site_name)  # not all blocks have the same sites
        chosen = randomised(transform, site, 11 + index)
        return fold(part, here, chosen, norm_offset=case.family.norm_offset) if here else part

    return each_block(case, at_site)


def distance(case: Tiny, state: Tensors) -> float:
    """Largest change of a logit."""
    return float((logits_of(case.model, state) - case.logits).abs().max())


def moved(case: Tiny, state: Tensors) -> float:
    """Largest change of a weight: a fold that does nothing proves nothing."""
    return max(float((state[name] - tensor).abs().max()) for name, tensor in case.state.items())


def at(how: str) -> list[tuple[str, str, str]]:
    """(family, site, transform) whose placement is, or with "not folded" is not, to be folded."""
    found = []
    for family in FAMILIES:
        for name, site in tiny(family, "gqa").sites.items():
            if in_expert(name) and not name.endswith(".1"):
                continue  # one of them stands for all
            for transform in (one for one in TRANSFORMS if one not in SHARED[1:]):  # one width stands for all
                folded = place(site, structures_of(transform, where="test")[0]).how == "folded"
                if folded == (how == "folded"):
                    found.append((family, name, transform))
    return found


def folding(sites: dict[str, Site], name: str) -> list[str]:
    """Every transform that folds at a site."""
    return [t for t in TRANSFORMS if place(sites[name], structures_of(t, where="test")[0]).how == "folded"]


@pytest.mark.parametrize(
    ("family", "site", "transform", "shape"),
    [(*case, shape) for case in at("folded") for family, shape in FAMILY_SHAPES if family == case[0]],
)
def test_folding_changes_no_logit(family: str, site: str, transform: str, shape: str) -> None:
    case = tiny(family, shape)
    state = applied(case, site, transform)
    assert moved(case, state) > 0.05
    assert distance(case, state) < TOLERANCE


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
def test_everything_at_once_changes_no_logit(family: str, shape: str) -> None:
    """The residual stream rotated, and every transform that folds at each site, one after the other."""
    case = tiny(family, shape)

    def all_sites(part: Tensors, index: int) -> Tensors:
        sites = case.blocks[index][1]
        for position, (name, site) in enumerate(sites.items()):
            for transform in folding(sites, name) if site.kind != "residual" else []:
                chosen = randomised(transform, site, 100 * index + position)
                part = fold(part, site, chosen, norm_offset=case.family.norm_offset)
        return part

    rotations = folding(case.sites, "residual")
    state = (
        rotated(case, randomised(rotations[0], case.sites["residual"], 5), all_sites)
        if rotations
        else each_block(case, all_sites)
    )
    assert moved(case, state) > 0.05
    assert distance(case, state) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "shape"), [*((family, "gqa") for family in ("llama", "gemma3", "phi3", "opt")), ("llama", "width-60")]
)
def test_transforms_in_a_row_change_no_logit(family: str, shape: str) -> None:
    case = tiny(family, shape)
    for name, site in case.sites.items():
        for first in folding(case.sites, name) if site.kind != "residual" else []:
            for second in folding(case.sites, name):
                assert distance(case, applied(case, name, f"{first}+{second}")) < TOLERANCE, (name, first, second)


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
def test_what_acts_after_rope_changes_no_logit(family: str, shape: str) -> None:
    """One rotation of all query heads and key heads in each block; of the queries alone, it would change them."""
    case = tiny(family, shape)
    site = next((site for site in case.sites.values() if site.kind == "rope"), None)
    if site is None:
        pytest.skip("positions are not rotary there")
    online = [t for t in TRANSFORMS if place(site, structures_of(t, where="test")[0]).how == "online"]
    assert online == ["hadamard"]
    width, copies = site.head_width, site.sources[0].copies
    having = [(index, block.attention) for index, (block, _) in enumerate(case.blocks) if block.attention]
    modules = [f"{case.family.blocks}.{index}.{attention}" for index, attention in having]
    for name in (*online, "+".join(online * 2)):
        made = {module: randomised(name, site, 11 + index).online() for index, module in enumerate(modules)}
        assert all(matrix.shape == (1, width, width) for parts in made.values() for matrix in parts.values())
        model, seen = copy.deepcopy(case.model), []
        quantize_cache(model, None, lambda module, _, made=made: made[module])
        heads = model.get_submodule(modules[0]).cached_heads
        heads.register_forward_hook(lambda _, before, after, seen=seen: seen.append((*before, *after)))
        assert float((logits_of(model, case.state) - case.logits).abs().max()) < TOLERANCE
        query, key, value, mask, turned_query, turned_key, same, same_mask = seen[0]
        assert query.shape[1] == copies * key.shape[1] and same is value and same_mask is mask
        assert min(float((a - b).abs().max()) for a, b in ((query, turned_query), (key, turned_key))) > 0.05
        heads.forward = lambda query, *rest, heads=heads, sliding: (heads.rotated(query), *rest)
        assert float((logits_of(model, case.state) - case.logits).abs().max()) > CHANGED


def test_every_transform_folds_somewhere() -> None:
    """A transform that is registered and folds nowhere would escape the matrix above, unless it only acts online."""
    only_online = {"kronecker", "dense", *SHARED}
    assert {transform for _, _, transform in at("folded")} == set(TRANSFORMS) - only_online
    assert all(folding(tiny(family, "gqa").sites, site) for family, site, _ in at("folded"))


@pytest.mark.parametrize(("family", "site", "transform"), at("not folded"))
def test_what_is_not_folded_would_change_logits(family: str, site: str, transform: str) -> None:
    """The other half of the placement table is right to say no, and this file's measure can fail."""
    case = tiny(family, "gqa")
    if case.sites[site].kind in ("heads", "scores"):
        pytest.skip("any matrix per head is exact between v and o; those that are refused there are merely useless")
    if case.sites[site].kind == "gated" and transform == "kronecker":
        pytest.skip("as wide as what the linear behind reads, it could not even be applied to what gives the values")
    if case.sites[site].kind == "residual" and case.family.layer_norm:
        pytest.skip("the bias of its norms could not even be fused")
    if case.sites[site].kind == "rope" and structures_of(transform, where="test")[0] in ("kronecker", "dense"):
        pytest.skip("queries and keys differ in width, so it could not even be applied to both")
    if case.sites[site].kind == "rope" and case.sites[site].sources[0].side == "gain":
        pytest.skip("all heads share one gain there, so it could not even be applied")
    if transform == SHIFT and case.sites[site].kind == "rope":
        pytest.skip("what no linear reads leaves nothing for a bias to take up")
    ends = (*case.sites[site].sources, *case.sites[site].sinks)
    if transform == SHIFT and not all(edge.bias for edge in ends):
        with pytest.raises(KeyError, match=r"\.bias"):
            applied(case, site, transform)
        return
    assert distance(case, applied(case, site, transform)) > CHANGED


def test_a_shift_of_values_passes_wherever_v_and_o_have_biases() -> None:
    """Also where no norm has one."""
    case = tiny("llama", "biases")
    how = {name: place(site, "translation").how for name, site in case.sites.items()}
    assert {name for name, placed in how.items() if placed == "folded"} == {"vo"}
    state = applied(case, "vo", SHIFT)
    assert moved(case, state) > 0.05
    assert distance(case, state) < TOLERANCE


@pytest.mark.parametrize("transform", ["banded", "diagonal"])
def test_the_published_query_key_matrix_is_not_equivalent(transform: str) -> None:
    """AffineQuant's matrix (and OmniQuant's diagonal) on q and k acts before RoPE, which does not commute with it:
    right between equal positions, wrong at every distance."""
    case = tiny("llama", "mha")
    state = applied(case, "qk", transform)
    alone = logits_of(case.model, state, tokens=1) - logits_of(case.model, case.state, tokens=1)
    assert float(alone.abs().max()) < TOLERANCE
    assert distance(case, state) > CHANGED


def test_a_dense_matrix_does_not_fold_into_a_norm() -> None:
    case = tiny("llama", "mha")

    class Dense:
        matrix = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 8 + torch.eye(
            64
        )

        def on_activations(self, x: Tensor, copies: int = 1) -> Tensor:
            return x @ self.matrix

        def on_weights(self, w: Tensor, copies: int = 1) -> Tensor:
            return torch.linalg.solve(self.matrix, w.mT).mT

    dense: Any = Dense()
    w, x = torch.randn(2, 5, 64, dtype=torch.float64)
    torch.testing.assert_close(dense.on_activations(x) @ dense.on_weights(w).mT, x @ w.mT)
    state = each_block(case, lambda part, _: fold(part, case.sites["attn_in"], dense))
    assert distance(case, state) > CHANGED


def test_a_rotation_needs_the_gains_fused_first() -> None:
    case = tiny("llama", "gqa")
    rotation, site = randomised("hadamard", case.sites["residual"], 5), case.sites["residual"]
    bare = each_block(
        case, lambda part, _: fold(part, site, rotation), lambda part: fold(part, site, rotation, scope="model")
    )
    assert distance(case, bare) > CHANGED


def test_a_rotation_unties_the_head() -> None:
    case = tiny("llama", "tied")
    assert "lm_head.weight" not in case.state
    state = applied(case, "residual", "hadamard")
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
