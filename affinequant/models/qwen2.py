"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, whatever the config says. Its blocks may see a sliding window."""

from dataclasses import replace

from affinequant.models.llama import LLAMA

_BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    layers={
        kind: replace(layer, linears=tuple(replace(linear, bias=linear.name in _BIASED) for linear in layer.linears))
        for kind, layer in LLAMA.layers.items()
    },
)
