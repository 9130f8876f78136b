"""Qwen3: Llama with a norm on every head of queries and keys, between their linears and RoPE."""

from dataclasses import replace

from affinequant.models.llama import ATTENTION, LLAMA, MLP

NORMED = ATTENTION.with_site(
    "qk",
    sources=(("self_attn.q_norm", "gain"),),
    sinks=(("self_attn.k_norm", "gain"),),
    grouped=("self_attn.q_norm",),
)
"""Attention whose queries and keys pass a norm each."""

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    layers={"attention": NORMED, "mlp": MLP},
    defaults={"head_dim": 128},
)
