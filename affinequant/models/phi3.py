"""Phi-3: Llama with q, k and v in one linear and gate and up in another."""

from dataclasses import replace

from affinequant.models.family import End, Layer, LinearSpec
from affinequant.models.llama import ATTENTION, LLAMA, MLP
from affinequant.models.sites import Side

_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj:q",
    "self_attn.k_proj": "self_attn.qkv_proj:k",
    "self_attn.v_proj": "self_attn.qkv_proj:v",
    "mlp.gate_proj": "mlp.gate_up_proj:gate",
    "mlp.up_proj": "mlp.gate_up_proj:up",
}
"""Llama's linear -> the part of Phi-3's that does its work."""


def _fused(layer: Layer, linear: LinearSpec, last: LinearSpec) -> Layer:
    def end(name: str, side: Side) -> End:
        fused = _FUSED.get(name, name)
        return (fused.partition(":")[0] if side == "columns" else fused, side)

    def ends(given: tuple[End, ...]) -> tuple[End, ...]:
        return tuple(dict.fromkeys(end(*one) for one in given))

    sites = tuple(
        replace(
            spec,
            sources=ends(spec.sources),
            sinks=ends(spec.sinks),
            grouped=tuple(_FUSED.get(name, name) for name in spec.grouped),
        )
        for spec in layer.sites
    )
    return replace(layer, linears=(linear, last), sites=sites)


PHI3 = replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    layers={
        "attention": _fused(
            ATTENTION,
            LinearSpec(name="self_attn.qkv_proj", rows={"q": "query", "k": "value", "v": "value"}, columns="hidden"),
            LinearSpec(name="self_attn.o_proj", rows="hidden", columns="query"),
        ),
        "mlp": _fused(
            MLP,
            LinearSpec(name="mlp.gate_up_proj", rows={"gate": "mlp", "up": "mlp"}, columns="hidden"),
            LinearSpec(name="mlp.down_proj", rows="hidden", columns="mlp"),
        ),
    },
)
