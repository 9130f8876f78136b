"""Llama and those that share its layout (Llama 1 to 3, SmolLM2, TinyLlama, Vicuna, ...)."""

from affinequant.models.family import Family
from affinequant.models.layer import Layer, LinearSpec, SiteSpec

ATTENTION = Layer(
    attention="self_attn",
    linears=(
        LinearSpec(name="self_attn.q_proj", rows="query", columns="hidden", bias="attention_bias"),
        LinearSpec(name="self_attn.k_proj", rows="value", columns="hidden", bias="attention_bias"),
        LinearSpec(name="self_attn.v_proj", rows="value", columns="hidden", bias="attention_bias"),
        LinearSpec(name="self_attn.o_proj", rows="hidden", columns="query", bias="attention_bias"),
    ),
    sites=(
        SiteSpec(
            name="attn_in",
            kind="norm",
            width="hidden",
            sources=(("input_layernorm", "gain"),),
            sinks=(
                ("self_attn.q_proj", "columns"),
                ("self_attn.k_proj", "columns"),
                ("self_attn.v_proj", "columns"),
            ),
        ),
        SiteSpec(
            name="qk",
            kind="rope",
            width="value",
            sources=(("self_attn.q_proj", "rows"),),
            sinks=(("self_attn.k_proj", "rows"),),
            grouped=("self_attn.q_proj",),
        ),
        SiteSpec(
            name="vo",
            kind="heads",
            width="value",
            sources=(("self_attn.v_proj", "rows"),),
            sinks=(("self_attn.o_proj", "columns"),),
            grouped=("self_attn.o_proj",),
        ),
    ),
)
MLP = Layer(
    linears=(
        LinearSpec(name="mlp.gate_proj", rows="mlp", columns="hidden", bias="mlp_bias"),
        LinearSpec(name="mlp.up_proj", rows="mlp", columns="hidden", bias="mlp_bias"),
        LinearSpec(name="mlp.down_proj", rows="hidden", columns="mlp", bias="mlp_bias"),
    ),
    sites=(
        SiteSpec(
            name="mlp_in",
            kind="norm",
            width="hidden",
            sources=(("post_attention_layernorm", "gain"),),
            sinks=(("mlp.gate_proj", "columns"), ("mlp.up_proj", "columns")),
        ),
        SiteSpec(
            name="mlp_mid",
            kind="linear",
            width="mlp",
            sources=(("mlp.up_proj", "rows"),),
            sinks=(("mlp.down_proj", "columns"),),
        ),
    ),
)
LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    blocks="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    norm_offset=0.0,
    rope="half",
    layers={"attention": ATTENTION, "mlp": MLP},
    settings={"hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu"), "partial_rotary_factor": (1.0,)},
)
