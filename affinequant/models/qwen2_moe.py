"""Qwen2-MoE: Qwen2's attention, and beside the experts one that every token goes through, behind a gate of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from affinequant.models.dims import Dims, read_size
from affinequant.models.layer import ExpertNames, Layer, LinearSpec, SiteSpec
from affinequant.models.llama import ATTENTION
from affinequant.models.mixtral import ROUTED, experts_dims, experts_layer
from affinequant.models.qwen3_moe import DENSE, QWEN3_MOE

_BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SHARED = {rest: f"mlp.shared_expert.{rest}" for rest in ("gate_proj", "up_proj", "down_proj")}


def _shared(layer: Layer) -> Layer:
    """The layer with the shared expert, which reads what the others read, as does its gate."""
    gate, up, down = _SHARED.values()
    beside = ((gate, "columns"), (up, "columns"), ("mlp.shared_expert_gate", "columns"))
    within = SiteSpec(
        name=f"{ROUTED}.shared", kind="linear", width="shared", sources=((up, "rows"),), sinks=((down, "columns"),)
    )
    linears = (
        LinearSpec(name=gate, rows="shared", columns="hidden"),
        LinearSpec(name=up, rows="shared", columns="hidden"),
        LinearSpec(name=down, rows="hidden", columns="shared"),
    )
    first, *rest = layer.sites
    return replace(
        layer, linears=(*linears, *layer.linears), sites=(replace(first, sinks=(*beside, *first.sinks)), within, *rest)
    )


def _dims(config: Mapping[str, Any], where: str) -> Dims:
    dims = experts_dims(config, where)
    return replace(dims, shared=read_size(config, "shared_expert_intermediate_size", where))


QWEN2_MOE = replace(
    QWEN3_MOE,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    layers={
        "attention": replace(
            ATTENTION,
            linears=tuple(
                replace(linear, bias="qkv_bias" if linear.name in _BIASED else False) for linear in ATTENTION.linears
            ),
        ),
        "mlp": DENSE,
        "experts": _shared(experts_layer(ExpertNames())),
    },
    defaults={**QWEN3_MOE.defaults}
    | {"num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408, "qkv_bias": True}
    | {"shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4},
    dims=_dims,
)
