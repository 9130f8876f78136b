"""OPT: layer norms with a bias, learned positions in place of RoPE, two linears about a ReLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims, read_dims
from affinequant.models.layer import Layer, LinearSpec, SiteSpec
from affinequant.models.llama import ATTENTION, LLAMA

_NAMES = {"input_layernorm": "self_attn_layer_norm", "self_attn.o_proj": "self_attn.out_proj"}
_ATTENTION = ATTENTION.with_names(
    _NAMES,
    tuple(
        replace(linear, name=_NAMES.get(linear.name, linear.name), bias="enable_bias") for linear in ATTENTION.linears
    ),
).with_site("qk", kind="scores")
_MLP = Layer(
    linears=(
        LinearSpec(name="fc1", rows="mlp", columns="hidden", bias="enable_bias"),
        LinearSpec(name="fc2", rows="hidden", columns="mlp", bias="enable_bias"),
    ),
    sites=(
        SiteSpec(
            name="mlp_in",
            kind="norm",
            width="hidden",
            sources=(("final_layer_norm", "gain"),),
            sinks=(("fc1", "columns"),),
        ),
        # A positive diagonal passes a ReLU.
        SiteSpec(name="mlp_mid", kind="linear", width="mlp", sources=(("fc1", "rows"),), sinks=(("fc2", "columns"),)),
    ),
)


def _dims(config: Mapping[str, Any], where: str) -> Dims:
    own = {"intermediate_size": config.get("ffn_dim"), "num_key_value_heads": None, "head_dim": None}
    dims = read_dims({**config, **own}, where)
    width = config.get("word_embed_proj_dim")
    if width not in (None, dims.hidden):
        what = f"embeddings of width {width} in blocks of width {dims.hidden} are not supported for opt"
        raise AffineQuantError(what, where, "take another size of OPT: 350m alone has them", exit_code=PREFLIGHT)
    return dims


OPT = replace(
    LLAMA,
    name="opt",
    architectures=("OPTForCausalLM",),
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    norm="model.decoder.final_layer_norm",
    layer_norm=True,
    layers={"attention": _ATTENTION, "mlp": _MLP},
    settings={
        "activation_function": ("relu",),
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    defaults={"enable_bias": True, "tie_word_embeddings": True},
    dims=_dims,
)
