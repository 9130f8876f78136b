"""Qwen3.5 (text): most blocks have a gated-delta layer in the place of attention, and attention has a gate on its output.

A gate multiplies what heads give feature by feature, so no matrix passes from values to the linear behind: only diagonals
do. Behind the recurrence a norm stands too, one weight for all heads, which is where a diagonal that they share goes. The
recurrence itself (`conv1d`, `A_log`, `dt_bias`, and the two small linears that make its decay and its rate) is left alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims, read_dims, read_size
from affinequant.models.layer import Layer, LinearSpec, SiteSpec
from affinequant.models.llama import LLAMA
from affinequant.models.qwen3 import NORMED
from affinequant.models.qwen3_moe import DENSE

_KINDS = {"linear_attention": "delta", "full_attention": "attention"}
_GATED = {"self_attn.q_proj": "gated_query"}

ATTENTION = replace(
    NORMED, linears=tuple(replace(one, rows=_GATED.get(one.name, one.rows)) for one in NORMED.linears)
).with_site("vo", kind="gated")
"""Rows of q_proj are, head by head, the query and the gate of what the head gives."""


def delta_layer(projections: Mapping[str, Any], plain: tuple[str, ...]) -> Layer:
    """A gated-delta layer.

    Args:
        projections: the linears that it reads its input with, and the widths of their rows.
        plain: those that make decay and rate of the recurrence.
    """
    named = {f"linear_attn.{name}": rows for name, rows in projections.items()}
    readers = (*named, *(f"linear_attn.{name}" for name in plain))
    return Layer(
        linears=(
            *(LinearSpec(name=name, rows=rows, columns="hidden") for name, rows in named.items()),
            LinearSpec(name="linear_attn.out_proj", rows="hidden", columns="delta"),
        ),
        sites=(
            SiteSpec(
                name="attn_in.delta",
                kind="norm",
                width="hidden",
                sources=(("input_layernorm", "gain"),),
                sinks=tuple((reader, "columns") for reader in readers),
            ),
            SiteSpec(
                name="vo.delta",
                kind="gated",
                width="delta_head",
                sources=(("linear_attn.norm", "factor"),),
                sinks=(("linear_attn.out_proj", "columns"),),
                grouped=("linear_attn.out_proj",),
            ),
        ),
    )


def delta_dims(
    config: Mapping[str, Any], where: str, sizes: Callable[[Mapping[str, Any], str], Dims] = read_dims
) -> Dims:
    """The sizes of a decoder with gated-delta layers, beside those that `sizes` reads.

    Raises:
        AffineQuantError: a size that is missing or impossible, or `layer_types` that say no kind of some block (exit 3).
    """
    dims, types = sizes(config, where), config.get("layer_types")
    if types is not None and (len(types) != dims.layers or not {*types} <= {*_KINDS}):
        fix = f"give one of {', '.join(_KINDS)} for each of {dims.layers} blocks"
        raise AffineQuantError(f"layer_types = {types!r}"[:200], where, fix, exit_code=PREFLIGHT)
    if types is None:
        read_size(config, "full_attention_interval", where)
    keys = ("linear_num_value_heads", "linear_value_head_dim", "linear_num_key_heads", "linear_key_head_dim")
    names = ("delta_heads", "delta_head", "delta_key_heads", "delta_key_head")
    return replace(dims, **{name: read_size(config, key, where) for name, key in zip(names, keys, strict=True)})


def delta_kinds(config: Mapping[str, Any], index: int) -> str:
    """What mixes the tokens in block `index`: `layer_types` says it, or attention comes once in `full_attention_interval`."""
    types = config.get("layer_types")
    if types is not None:
        return _KINDS[types[index]]
    return "delta" if (index + 1) % config["full_attention_interval"] else "attention"


QWEN3_5 = replace(
    LLAMA,
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM",),
    norm_offset=1.0,
    layers={
        "delta": delta_layer({"in_proj_qkv": "delta_qkv", "in_proj_z": "delta"}, ("in_proj_b", "in_proj_a")),
        "attention": ATTENTION,
        "mlp": DENSE,
    },
    settings={"hidden_act": ("silu",)},
    defaults={"head_dim": 256, "num_key_value_heads": 4, "full_attention_interval": 4}
    | {"linear_num_value_heads": 32, "linear_value_head_dim": 128}
    | {"linear_num_key_heads": 16, "linear_key_head_dim": 128},
    dims=delta_dims,
    kinds=lambda config, index: (delta_kinds(config, index), "mlp"),
)
