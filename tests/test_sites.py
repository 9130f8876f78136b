"""Sites with their sizes, and the algebra of costs."""

import dataclasses

import pytest
import torch
import transformers

from affinequant.models import FAMILIES, LLAMA, Dims, resolve, resolve_sites
from affinequant.models.experts import split_experts
from affinequant.models.sites import (
    STRUCTURES,
    Edge,
    Placement,
    Site,
    block_width,
    kronecker_factors,
    place,
    rotation_factors,
)
from tests.tiny import OWN

GQA = Dims(layers=2, hidden=64, mlp=128, heads=4, kv_heads=2, head_dim=24, vocab=320, tied=False)


def site(kind: str, width: int, heads: int = 1) -> Site:
    edge = (Edge(module="m", side="columns"),)
    return Site(name="s", kind=kind, width=width, heads=heads, sources=edge, sinks=edge)  # pyright: ignore[reportArgumentType]


def test_sizes_of_a_grouped_llama() -> None:
    sites = {s.name: s for s in resolve_sites(LLAMA, GQA)}
    assert {name: (s.width, s.heads, s.head_width) for name, s in sites.items()} == {
        "residual": (64, 1, 64),
        "attn_in": (64, 1, 64),
        "qk": (48, 2, 24),
        "vo": (48, 2, 24),
        "mlp_in": (64, 1, 64),
        "mlp_mid": (128, 1, 128),
    }
    assert sites["qk"].sources[0].copies == 2 and sites["qk"].sinks[0].copies == 1
    assert sites["vo"].sources[0].copies == 1 and sites["vo"].sinks[0].copies == 2
    scopes = {edge.module: edge.scope for edge in (*sites["residual"].sources, *sites["residual"].sinks)}
    assert scopes.pop("model.embed_tokens") == "model" and scopes.pop("lm_head") == "model"
    assert set(scopes.values()) == {"block"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_edge_names_a_module_that_the_family_has(family) -> None:
    """In the code that transformers has for it."""
    architecture = getattr(transformers, family.architectures[0])
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 96, "pad_token_id": 1}
    with torch.device("meta"):
        model = architecture(architecture.config_class(**{**sizes, **OWN.get(family.name, {})}))
    known, dims = resolve({**model.config.to_dict(), "architectures": [*family.architectures]}, where="")
    split_experts(model, known)
    for index, of_block in enumerate(known.each_block(dims)):
        block = model.get_submodule(f"{family.blocks}.{index}")
        linears = {linear.name: linear for linear in of_block.linears}
        prefix = f"{family.blocks}.{index}."
        plain = {name.removeprefix(prefix) for name in known.left_alone(dims) if name.startswith(prefix)}
        for spec in of_block.sites:
            for name, side in (*spec.sources, *spec.sinks):
                module, _, part = name.partition(":")
                if module in (family.embedding, family.head):
                    assert model.get_submodule(module) is not None
                    continue
                assert block.get_submodule(module) is not None
                assert (module in linears) == (side in ("rows", "columns") and module not in plain)
                assert not part or part in linears[module].rows
            assert set(spec.grouped) <= {module for module, _ in (*spec.sources, *spec.sinks)}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_linear_reads_exactly_one_quantised_input(family) -> None:
    members = [name for _, group in family.input_groups() for name in group]
    assert sorted(members) == sorted(linear.name for linear in family.linears)


def test_inputs_come_in_the_order_of_the_forward_pass() -> None:
    assert [name for name, _ in LLAMA.input_groups()] == ["attn_in", "vo", "mlp_in", "mlp_mid"]


def test_costs_follow_the_factors() -> None:
    assert place(site("norm", 60), "dense").flops == 2 * 60 * 60
    assert place(site("norm", 60), "kronecker").flops == 2 * 60 * (6 + 10)
    assert place(site("norm", 60), "block").flops == 2 * 60 * 60  # the divisor nearest to 64
    assert place(site("norm", 61), "kronecker").flops == 2 * 61 * (1 + 61)  # a prime has no better factors


SIZES = {
    61: ((1, 61), 61, (61, 1)),
    72: ((8, 9), 72, (9, 8)),
    96: ((8, 12), 48, (12, 8)),
    576: ((24, 24), 64, (18, 32)),
    1536: ((32, 48), 64, (48, 32)),
    4096: ((64, 64), 64, (64, 64)),
    4864: ((64, 76), 64, (76, 64)),
    11008: ((86, 128), 64, (86, 128)),
    14336: ((112, 128), 64, (112, 128)),
    18944: ((128, 148), 64, (148, 128)),
}
"""width: (factors of a Kronecker product, width of a block, factors of a rotation)."""


@pytest.mark.parametrize("width", SIZES)
def test_sizes_of_factors_and_blocks(width: int) -> None:
    kronecker, block, rotation = SIZES[width]
    assert kronecker_factors(site("linear", width)) == kronecker
    assert block_width(site("linear", width)) == block
    assert rotation_factors(width) == rotation
    assert place(site("linear", width), "kronecker").flops == 2 * width * sum(kronecker)
    assert place(site("linear", width), "hadamard").flops == 2 * width * sum(rotation)
    assert place(site("norm", width), "orthogonal").flops == 2 * width * block


def test_between_heads_and_within_them() -> None:
    vo = {s.name: s for s in resolve_sites(LLAMA, GQA)}["vo"]
    assert kronecker_factors(vo) == (4, 24)  # query heads, since o_proj reads those
    assert block_width(vo) == 24


def test_placements_are_values() -> None:
    first = place(site("norm", 64), "diagonal")
    assert first == place(site("norm", 64), "diagonal")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.flops = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert Placement(how="folded", reason="r").flops == 0


def test_nothing_non_orthogonal_enters_the_residual_stream() -> None:
    allowed = {s for s in STRUCTURES if place(site("residual", 64), s).how != "refused"}
    assert allowed == {"hadamard", "orthogonal"}
