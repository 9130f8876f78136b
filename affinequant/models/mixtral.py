"""Mixtral: Mistral's attention, and in the place of the MLP experts of which a router gives each token two."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims, read_dims, read_size
from affinequant.models.layer import ExpertNames, Layer, LinearSpec, SiteSpec
from affinequant.models.mistral import LAYERS, MISTRAL

ROUTED = "mlp_mid"
"""What a recipe calls the site within an expert, whichever it is."""


def experts_layer(names: ExpertNames, norm: str = "post_attention_layernorm") -> Layer:
    """Experts and their router behind a norm. The router reads what the experts read and stays in 16 bits, so what goes
    into the norm goes out of the router too; every expert has a site of its own between up and down."""
    gate, up, down = (f"{names.module}.experts.*.{linear}" for linear in names.linears)
    return Layer(
        experts=names,
        linears=(
            LinearSpec(name=gate, rows="expert", columns="hidden"),
            LinearSpec(name=up, rows="expert", columns="hidden"),
            LinearSpec(name=down, rows="hidden", columns="expert"),
        ),
        sites=(
            SiteSpec(
                name="mlp_in",
                kind="norm",
                width="hidden",
                sources=((norm, "gain"),),
                sinks=((f"{names.module}.gate", "columns"), (gate, "columns"), (up, "columns")),
            ),
            SiteSpec(
                name=ROUTED,
                kind="linear",
                width="expert",
                sources=((up, "rows"),),
                sinks=((down, "columns"),),
                each_expert=True,
            ),
        ),
    )


def experts_dims(config: Mapping[str, Any], where: str) -> Dims:
    """The sizes of a decoder with experts: as many as `num_local_experts` or `num_experts` says, as wide as
    `moe_intermediate_size` or, where that is absent, `intermediate_size`.

    Raises:
        AffineQuantError: a size that is missing or impossible, or a token goes to more experts than there are (exit 3).
    """
    dims = read_dims(config, where)
    key = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    experts, asked = read_size(config, key, where), read_size(config, "num_experts_per_tok", where)
    if asked > experts:
        what = f"num_experts_per_tok = {asked} of {experts} experts"
        raise AffineQuantError(what, where, "correct config.json", exit_code=PREFLIGHT)
    return replace(
        dims, experts=experts, routed=asked, expert=read_size(config, "moe_intermediate_size", where, dims.mlp)
    )


MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    layers={
        "attention": LAYERS["attention"],
        "experts": experts_layer(ExpertNames(module="block_sparse_moe", linears=("w1", "w3", "w2"))),
    },
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    dims=experts_dims,
)
