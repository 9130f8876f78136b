"""Phi-3: Llama with q, k and v in one linear and gate and up in another."""

from dataclasses import replace

from affinequant.models.layer import LinearSpec
from affinequant.models.llama import ATTENTION, LLAMA, MLP

_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj:q",
    "self_attn.k_proj": "self_attn.qkv_proj:k",
    "self_attn.v_proj": "self_attn.qkv_proj:v",
    "mlp.gate_proj": "mlp.gate_up_proj:gate",
    "mlp.up_proj": "mlp.gate_up_proj:up",
}
"""Llama's linear -> the part of Phi-3's that does its work."""

PHI3 = replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    layers={
        "attention": ATTENTION.with_names(
            _FUSED,
            (
                LinearSpec(
                    name="self_attn.qkv_proj", rows={"q": "query", "k": "value", "v": "value"}, columns="hidden"
                ),
                LinearSpec(name="self_attn.o_proj", rows="hidden", columns="query"),
            ),
        ),
        "mlp": MLP.with_names(
            _FUSED,
            (
                LinearSpec(name="mlp.gate_up_proj", rows={"gate": "mlp", "up": "mlp"}, columns="hidden"),
                LinearSpec(name="mlp.down_proj", rows="hidden", columns="mlp"),
            ),
        ),
    },
)
