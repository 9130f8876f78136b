"""Qwen3.5-MoE: Qwen3.5's two ways to mix tokens, and Qwen2-MoE's experts, with one that all tokens pass, in every block."""

from dataclasses import replace
from functools import partial

from affinequant.models.qwen2_moe import QWEN2_MOE
from affinequant.models.qwen3_5 import QWEN3_5, delta_dims, delta_kinds

QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM",),
    layers={kind: layer for kind, layer in QWEN3_5.layers.items() if kind != "mlp"}
    | {"experts": QWEN2_MOE.layers["experts"]},
    # No block is without experts: what `intermediate_size` says is the width of nothing, and few configs say it.
    defaults={**QWEN3_5.defaults, "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8}
    | {"intermediate_size": 512, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    dims=partial(delta_dims, sizes=QWEN2_MOE.dims),
    kinds=lambda config, index: (delta_kinds(config, index), "experts"),
)
