"""Qwen3-MoE: Qwen3's attention, and experts in every block that the config does not make dense."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from affinequant.models.layer import ExpertNames, LinearSpec
from affinequant.models.llama import MLP
from affinequant.models.mixtral import experts_dims, experts_layer
from affinequant.models.qwen3 import NORMED, QWEN3

DENSE = replace(
    MLP, linears=tuple(LinearSpec(name=one.name, rows=one.rows, columns=one.columns) for one in MLP.linears)
)
"""The MLP of a block without experts: never with biases."""


def kinds(config: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """Experts stand in one block of `decoder_sparse_step`, and in none of `mlp_only_layers`."""
    dense = index in config["mlp_only_layers"] or (index + 1) % config["decoder_sparse_step"]
    return "attention", "mlp" if dense else "experts"


QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    layers={"attention": NORMED, "mlp": DENSE, "experts": experts_layer(ExpertNames())},
    defaults={
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    dims=experts_dims,
    kinds=kinds,
)
