"""Qwen3-Next: Qwen3.5-MoE's layers, with an MLP where the config has no experts, and fused what the other has apart.

Rows of `in_proj_qkvz` are, by head of keys, its query, its key, and the values and
gates of the value heads that it serves; those of `in_proj_ba` likewise the rate and the decay. So no part of either lies in
one piece. None has to: rows are rounded one by one, and what folds behind the recurrence goes into its norm.
"""

from dataclasses import replace

from affinequant.models.qwen3_5 import QWEN3_5, delta_kinds, delta_layer
from affinequant.models.qwen3_5_moe import QWEN3_5_MOE
from affinequant.models.qwen3_moe import kinds

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    layers={
        **QWEN3_5.layers,
        "delta": delta_layer({"in_proj_qkvz": "delta_qkvz"}, ("in_proj_ba",)),
        "experts": QWEN3_5_MOE.layers["experts"],
    },
    defaults={**QWEN3_5_MOE.defaults, "intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10}
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    kinds=lambda config, index: (delta_kinds(config, index), kinds(config, index)[1]),
)
