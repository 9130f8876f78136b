"""The whole table site x structure, with its costs, against a golden text."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from affinequant.models import FAMILIES, LLAMA, Dims, Family, resolve_sites
from affinequant.models.sites import SHARED, STRUCTURES, Site, Structure, place

LLAMA_2_7B = Dims(layers=32, hidden=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, tied=False)
LLAMA_3_8B = Dims(layers=32, hidden=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False)

# Online: floating-point operations per token of one block, multiply and add counted apart.
GOLDEN = """
site     diagonal rope-pair per-head kronecker        block          dense           hadamard         orthogonal     translation
residual refused  refused   refused  refused          refused        refused         folded           folded         refused
attn_in  folded   refused   refused  online 1,048,576 online 524288  online 33554432 online 1,048,576 online 524288  refused
qk       refused  folded    refused  refused          refused        refused         online 2,097,152 refused        refused
vo       folded   refused   folded   online 1,310,720 folded         refused         folded           folded         refused
mlp_in   folded   refused   refused  online 1,048,576 online 524288  online 33554432 online 1,048,576 online 524288  refused
mlp_mid  folded   refused   refused  online 4,711,424 online 1409024 refused         online 4,711,424 online 1409024 refused
"""

ONE_FOR_ALL_BLOCKS = """
site      shared-16       shared-32       shared-64        shared-128
residual  refused         refused         refused          refused
attn_in   online 131,072  online 262,144  online 524,288   online 1,048,576
qk        refused         refused         refused          refused
vo        refused         refused         refused          refused
mlp_in    online 131,072  online 262,144  online 524,288   online 1,048,576
mlp_mid   online 352,256  online 704,512  online 1,409,024 online 2,818,048
"""


def sites_of(dims: Dims, family: Family = LLAMA) -> dict[str, Site]:
    return {site.name: site for site in resolve_sites(family, dims)}


def cells(text: str) -> list[list[str]]:
    """Rows of the table; thousands separators and spacing are for the reader."""
    joined = text.replace("online ", "online:").replace(",", "")
    return [line.split() for line in joined.strip().splitlines()]


@pytest.mark.parametrize(
    ("structures", "golden"),
    [([one for one in STRUCTURES if one not in SHARED], GOLDEN), (SHARED, ONE_FOR_ALL_BLOCKS)],
    ids=["golden", "shared"],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_table_for_llama_2_7b_and_others_of_its_sizes(
    family: str, structures: Sequence[Structure], golden: str
) -> None:
    rows = [["site", *structures]]
    for name, site in sites_of(LLAMA_2_7B, FAMILIES[family]).items():
        placements = [place(site, structure) for structure in structures]
        rows.append([name, *(f"online:{p.flops}" if p.how == "online" else p.how for p in placements)])
    assert rows == cells(golden)


def test_blocks_that_do_not_divide_are_refused() -> None:
    site = sites_of(replace(LLAMA_2_7B, hidden=4128))["attn_in"]
    assert [place(site, structure).how for structure in SHARED] == ["online", "online", "refused", "refused"]
    assert "blocks of 64 do not divide 4128" in place(site, "shared-64").reason


def test_grouped_queries_are_counted_where_they_are_the_ones_transformed() -> None:
    """With 8 KV heads for 32 query heads: q (4096 wide) and k (1024) after RoPE; o's input is 4096 wide."""
    sites = sites_of(LLAMA_3_8B)
    assert place(sites["qk"], "hadamard").flops == 2 * (4096 + 1024) * 128
    assert place(sites["vo"], "kronecker").flops == 2 * 4096 * (32 + 128)


def test_only_what_is_online_costs_anything_and_every_answer_has_a_reason() -> None:
    for site in sites_of(LLAMA_2_7B).values():
        for structure in STRUCTURES:
            placement = place(site, structure)
            assert (placement.flops > 0) == (placement.how == "online")
            assert placement.reason


def test_every_site_has_something_that_folds() -> None:
    for site in sites_of(LLAMA_2_7B).values():
        assert any(place(site, structure).how == "folded" for structure in STRUCTURES), site.name
