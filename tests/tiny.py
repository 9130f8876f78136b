"""Tiny Llamas and relatives and a tokenizer, built in code; and their weights rounded to nearest, for tests of what comes
after."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from affinequant.formats import Contents
from affinequant.models import FAMILIES, resolve
from affinequant.models.experts import split_experts
from affinequant.numbers import grid_of
from affinequant.numbers.float4 import unit_of
from affinequant.numbers.weights import codes_of, weight_range
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import acting

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
VOCAB = 320
TIERS = [
    (name, tier)
    for name, preset in PRESETS.items()
    for tier in (
        [preset.settings["tier"]] if "tier" in preset.settings else ["merged", "online"][: 1 + bool(preset.online)]
    )
]
"""Every preset in each tier that it has."""
SLIDING = {"family": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
"""A Qwen2 whose first block sees all that came before, and the others twelve tokens."""


_WINDOWED = {"sliding_window": 12, "head_dim": 16, "query_pre_attn_scalar": 16}
_MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 24,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "qwen3": {"head_dim": 16},
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen3_5": {"head_dim": 16, **_DELTA},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_MIXED, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_MIXED, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_next": {"head_dim": 16, **_DELTA, **_MIXED, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    "qwen3_5_moe": {"head_dim": 16, **_DELTA, **_MIXED, "shared_expert_intermediate_size": 64},
}
"""By family, what a tiny model of it needs in its config: sizes whose defaults are large, and what it alone has."""


def tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    shards: int = 1,
    seed: int = 0,
    bias: bool = False,
    mlp: int = 128,
    family: str = "llama",
    architecture: Any = None,
    **settings: Any,
) -> Path:
    """Write a Llama (or another family) of random weights with its tokenizer; norm gains are far from one, so that folding
    shows. `bias`: for those whose config decides that; `settings`: more of the config."""
    import transformers

    architecture = architecture or getattr(transformers, FAMILIES[family].architectures[0])
    if family == "llama":
        settings |= {"attention_bias": bias, "mlp_bias": bias}
    if family == "opt":
        settings = {"ffn_dim": mlp} | settings
    settings = {"max_position_embeddings": 512, "pad_token_id": 1} | OWN.get(family, {}) | settings
    config = architecture.config_class(
        architectures=[architecture.__name__],
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    generator = torch.Generator().manual_seed(seed)
    model = architecture(config).bfloat16()
    with torch.no_grad():
        for name, parameter in split_experts(model, FAMILIES[family]).named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5
            value = (
                gain_centre(name, family) + 0.3 * noise
                if "norm" in name
                else noise * (0.5 if "embed" in name else scale)
            )
            parameter.copy_(value)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    _save(state, Path(folder), shards)
    return Path(folder)


def gain_centre(name: str, family: str) -> float:
    """The weight of a norm that leaves what it gives as it is."""
    return 1.0 if "linear_attn.norm" in name else 1.0 - FAMILIES[family].norm_offset


def rounded(folder: Path, scheme: str, *, clip: float = 1.0) -> Contents:
    """The folder's weights rounded to nearest, as a finished run would hand them to a format."""
    parsed = Scheme.parse(scheme)
    config = json.loads((folder / "config.json").read_text())
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    layers, (family, _) = config["num_hidden_layers"], resolve(config, where=str(folder))
    linears = tuple(f"model.layers.{layer}.{linear.name}" for layer in range(layers) for linear in family.linears)

    def stages() -> Iterator[dict[str, Tensor]]:
        yield {name: tensor for name, tensor in state.items() if ".layers." not in name}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            stage = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            for name in linears:
                if name.startswith(prefix):
                    stage |= _round(name, stage.pop(f"{name}.weight"), parsed, clip)
            yield stage

    return Contents(
        config=config,
        source=folder,
        scheme=parsed,
        dtype="bfloat16",
        tied=config["tie_word_embeddings"],
        linears=linears,
        stages=stages,
        extra={"tier": "merged", "placements": {}},
    )


def dense_model(contents: Contents) -> Any:
    """The reference for what a checkpoint computes without activation quantisation: float32, exact products."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(contents.source)
    config.tie_word_embeddings = contents.tied
    # The attention that transformers takes by itself leaves a cap on scores out.
    attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    state: dict[str, Tensor] = {}
    for stage in contents.stages():
        for name, tensor in stage.items():
            module, _, part = name.rpartition(".")
            if part == "codes":
                scale, zero = stage[f"{module}.scale"], stage.get(f"{module}.zero")
                zero = torch.zeros_like(scale) if zero is None else zero.float()
                width = tensor.shape[1] // scale.shape[1]
                shifted = tensor.float() - zero.repeat_interleave(width, 1)
                state[f"{module}.weight"] = shifted * scale.repeat_interleave(width, 1)
            elif part not in ("scale", "zero", "input_clip"):
                state[name] = tensor.float()
    if contents.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def _round(name: str, weight: Tensor, scheme: Scheme, clip: float) -> dict[str, Tensor]:
    if scheme.weight.kind != "int":
        return _round_to_floats(name, weight.float(), scheme)
    grid = scheme.weight
    value = weight.float().unflatten(1, (grid.groups(weight.shape[1]), -1))
    if grid.symmetric:
        scale = value.abs().amax(-1, keepdim=True) / grid.code_max
        low = torch.zeros_like(scale)
    else:
        low = value.amin(-1, keepdim=True).clamp(max=0)
        scale = (value.amax(-1, keepdim=True).clamp(min=0) - low) / (2**grid.bits - 1)
    scale = scale.to(torch.bfloat16).float()
    zero = (
        torch.zeros_like(scale)
        if grid.symmetric
        else ((-low / scale).round() + grid.code_min).clamp(grid.code_min, grid.code_max)
    )
    codes = ((value / scale).round() + zero).clamp(grid.code_min, grid.code_max)
    tensors = {f"{name}.codes": codes.flatten(1).to(torch.int8), f"{name}.scale": scale[..., 0]}
    if not grid.symmetric:
        tensors[f"{name}.zero"] = zero[..., 0].to(torch.int8)
    if scheme.activation:
        tensors[f"{name}.input_clip"] = torch.tensor(clip)
    return tensors


def _round_to_floats(name: str, weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    grid = grid_of(scheme.weight)
    scale, zero = grid.params(*weight_range(weight, grid))
    tensors = {f"{name}.codes": codes_of(weight, scale, zero, grid).to(torch.int8), f"{name}.scale": scale}
    units = {f"{name}.weight_unit": unit_of(scale), f"{name}.input_unit": torch.tensor(0.25)}
    clips = {f"{name}.input_clip": torch.tensor(1.0)} if scheme.activation else {}
    return tensors | clips | (units if scheme.weight.has_unit else {})


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["Ġt", "he", "in", "er", "on", "Ġa", "re", "at", "en", "or"]
    words = ["<s>", "</s>", *alphabet, *pairs]
    merges = [(pair[0], pair[1]) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _save(state: dict[str, Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    table = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        chosen = names[part::shards]  # a block's tensors lie in several shards
        save_file({name: state[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized_input(job: BlockJob, clips: Mapping[str, float], online: Mapping[str, Tensors]):
    """The `on_input` that transforms activations and rounds them with these clip ratios; a site that has no ratio yet is
    not rounded."""
    return lambda site, x: job.site_input(site, acting(online.get(site)), clips.get(site))(x)
