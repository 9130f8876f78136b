"""A family that nobody has, with everything that a family can say and Llama does not: q, k and v in one linear, gate and up
in another, norms between a layer and the residual stream, every second block without attention, a size under another name.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from affinequant.models import LLAMA
from affinequant.models.dims import read_dims
from affinequant.models.layer import Layer, LinearSpec, SiteSpec


class MadeUpConfig(LlamaConfig):
    """Llama's, with the width between up and down called `n_ff`."""

    model_type = "made-up"
    n_ff: int = 112


class Mixer(nn.Module):
    """Attention with one linear in front."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, index, True
        self.width = config.head_dim
        self.sizes = [count * self.width for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.qkv = nn.Linear(config.hidden_size, sum(self.sizes))
        self.out = nn.Linear(self.sizes[0], config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any, **more: Any
    ) -> Tensor:
        """x: [batch, tokens, hidden]."""
        parts = self.qkv(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in parts)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        more = {key: value for key, value in more.items() if key == "on_attention"}
        y, _ = attend(
            self, *apply_rotary_pos_emb(q, k, *position_embeddings), v, attention_mask, scaling=self.width**-0.5, **more
        )
        return self.out(y.flatten(-2))


class Block(nn.Module):
    """An even one has attention, an odd one none."""

    mix_norm_in: nn.Module
    mix_norm_out: nn.Module
    norm_in: nn.Module
    norm_out: nn.Module

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        norms = ("norm_in", "norm_out") if index % 2 else ("mix_norm_in", "mix_norm_out", "norm_in", "norm_out")
        for name in norms:
            setattr(self, name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))
        if not index % 2:
            self.mixer = Mixer(config, index)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.n_ff)
        self.down = nn.Linear(config.n_ff, config.hidden_size, bias=False)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        """x: [batch, tokens, hidden]."""
        if hasattr(self, "mixer"):
            x = x + self.mix_norm_out(self.mixer(self.mix_norm_in(x), **more))
        gate, up = self.gate_up(self.norm_in(x)).chunk(2, -1)
        return x + self.norm_out(self.down(nn.functional.silu(gate) * up))


class MadeUpModel(LlamaModel):
    """Llama's around other blocks."""

    config_class = MadeUpConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))


class MadeUpForCausalLM(LlamaForCausalLM):
    """With a head."""

    config_class = MadeUpConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MadeUpModel(config)


AutoConfig.register("made-up", MadeUpConfig, exist_ok=True)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)

_ATTENTION = Layer(
    attention="mixer",
    post_norm="mix_norm_out",
    linears=(
        LinearSpec(name="mixer.qkv", rows={"q": "query", "k": "value", "v": "value"}, columns="hidden", bias=True),
        LinearSpec(name="mixer.out", rows="hidden", columns="query"),
    ),
    sites=(
        SiteSpec(
            name="attn_in",
            kind="norm",
            width="hidden",
            sources=(("mix_norm_in", "gain"),),
            sinks=(("mixer.qkv", "columns"),),
        ),
        SiteSpec(
            name="qk",
            kind="rope",
            width="value",
            sources=(("mixer.qkv:q", "rows"),),
            sinks=(("mixer.qkv:k", "rows"),),
            grouped=("mixer.qkv:q",),
        ),
        SiteSpec(
            name="vo",
            kind="heads",
            width="value",
            sources=(("mixer.qkv:v", "rows"),),
            sinks=(("mixer.out", "columns"),),
            grouped=("mixer.out",),
        ),
    ),
)
_MLP = Layer(
    post_norm="norm_out",
    linears=(
        LinearSpec(name="gate_up", rows={"gate": "mlp", "up": "mlp"}, columns="hidden", bias=True),
        LinearSpec(name="down", rows="hidden", columns="mlp"),
    ),
    sites=(
        SiteSpec(
            name="mlp_in", kind="norm", width="hidden", sources=(("norm_in", "gain"),), sinks=(("gate_up", "columns"),)
        ),
        SiteSpec(
            name="mlp_mid",
            kind="linear",
            width="mlp",
            sources=(("gate_up:up", "rows"),),
            sinks=(("down", "columns"),),
        ),
    ),
)
MADE_UP = replace(
    LLAMA,
    name="made-up",
    architectures=("MadeUpForCausalLM",),
    layers={"attention": _ATTENTION, "mlp": _MLP},
    dims=lambda config, where: read_dims({**config, "intermediate_size": config["n_ff"]}, where),
    kinds=lambda config, index: ("mlp",) if index % 2 else ("attention", "mlp"),
)
