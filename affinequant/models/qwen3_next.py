"""Qwen3-Next and Qwen3.5-MoE: Qwen3.5's two ways to mix tokens, and Qwen2-MoE's experts with one that every token goes through.

Qwen3-Next fuses what Qwen3.5 has apart. Rows of `in_proj_qkvz` are, by head of keys, its query, its key, and the values and
gates of the value heads that it serves; those of `in_proj_ba` likewise the rate and the decay. So no part of either lies in
one piece. None has to: rows are rounded one by one, and what folds behind the recurrence goes into its norm.
"""

from dataclasses import replace
from functools import partial

from affinequant.models.qwen2_moe import QWEN2_MOE
from affinequant.models.qwen3_5 import QWEN3_5, delta_dims, delta_kinds, delta_layer
from affinequant.models.qwen3_moe import kinds

_SIZES = partial(delta_dims, sizes=QWEN2_MOE.dims)
_WIDTHS = {"num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}

QWEN3_NEXT = replace(
    QWEN3_5,
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    layers={
        **QWEN3_5.layers,
        "delta": delta_layer({"in_proj_qkvz": "delta_qkvz"}, ("in_proj_ba",)),
        "experts": QWEN2_MOE.layers["experts"],
    },
    defaults={**QWEN3_5.defaults, **_WIDTHS, "intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | {"num_experts": 512, "num_experts_per_tok": 10},
    dims=_SIZES,
    kinds=lambda config, index: (delta_kinds(config, index), kinds(config, index)[1]),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM",),
    layers={kind: layer for kind, layer in QWEN3_5.layers.items() if kind != "mlp"}
    | {"experts": QWEN2_MOE.layers["experts"]},
    # No block is without experts: what `intermediate_size` says is the width of nothing, and few configs say it.
    defaults={**QWEN3_5.defaults, **_WIDTHS, "intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8},
    dims=_SIZES,
    kinds=lambda config, index: (delta_kinds(config, index), "experts"),
)
