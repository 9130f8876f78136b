"""Checkpoints of version 1 as they lie on people's disks: written here byte by byte, by none of the package's code.

If one of these tests fails, the change that made it fail cuts users off from what they have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from affinequant import load

HIDDEN, MLP, VOCAB, HEADS, KV = 32, 64, 48, 2, 1
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
LINEARS = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in SHAPES.items()}
CLIP = 0.875
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7]])

SHARED = """
 "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": false,
 "hidden_size": 32, "intermediate_size": 64, "vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
 "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-06, "hidden_act": "silu",
 "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": 0, "eos_token_id": 1,
"""
OURS = """
 "affinequant": {"tier": "TIER", "placements": {}, "transforms": {}, "version": 1, "scheme": "w4a8",
  "weight": {"bits": 4, "symmetric": false, "granularity": "channel", "group_size": null, "dynamic": false},
  "activation": {"bits": 8, "symmetric": false, "granularity": "token", "group_size": null, "dynamic": true},
  "input_clip": CLIPS}
"""
MERGED = """
 "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
  "quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"],
   "weights": {"num_bits": 4, "type": "int", "symmetric": false, "strategy": "channel", "group_size": null,
    "dynamic": false}, "input_activations": null, "output_activations": null}},
"""
ONLINE = """
 "quantization_config": {"quant_method": "affinequant", "ignore": ["lm_head"],
"""


def nibbles(codes: Tensor) -> Tensor:
    """Eight 4-bit codes to an int32 along the last dimension, the first lowest, each stored as code + 8."""
    parts = (codes.long() + 8).unflatten(-1, (-1, 8))
    words = sum(parts[..., place] << (4 * place) for place in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def stored(method: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(the file's tensors, per linear what it multiplies by: `weight` in fp32, `left` and `right`)."""
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN).bfloat16(),
        "model.norm.weight": (1 + 0.2 * normal(HIDDEN)).bfloat16(),
        "lm_head.weight": (normal(VOCAB, HIDDEN) / 6).bfloat16(),
    }
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (1 + 0.2 * normal(HIDDEN)).bfloat16()
    meant: dict[str, dict[str, Tensor]] = {}
    for name, (rows, columns) in LINEARS.items():
        codes = torch.randint(-8, 8, (rows, columns), generator=random)
        zero = torch.randint(-2, 3, (rows, 1), generator=random)
        scale = ((0.5 + torch.rand(rows, 1, generator=random)) / 4 / columns**0.5).bfloat16()
        tensors[f"{name}.weight_packed"] = nibbles(codes)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.weight_zero_point"] = nibbles(zero.T).T.contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
        meant[name] = {"weight": (codes - zero) * scale.float()}
        if method == "affinequant" and name.endswith("down_proj"):
            meant[name] |= {"left": normal(4, 4) / 2, "right": normal(16, 16) / 4}
            tensors |= {f"{name}.online_{part}": meant[name][part] for part in ("left", "right")}
    return tensors, meant


def write(folder: Path, method: str) -> dict[str, dict[str, Tensor]]:
    """The folder; returns what its linears mean."""
    tensors, meant = stored(method)
    clips = json.dumps(dict.fromkeys(LINEARS, CLIP))
    tier, head, stem = ("online", ONLINE, "affinequant") if method == "affinequant" else ("merged", MERGED, "model")
    ours = OURS.replace("TIER", tier).replace("CLIPS", clips)
    (folder / "config.json").write_text("{" + SHARED + head + ours + "}}")
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    return meant


def on_the_grid(x: Tensor) -> Tensor:
    """8-bit asymmetric per token, range narrowed by CLIP; what the integers stand for."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0) * CLIP, x.amax(-1, keepdim=True).clamp(min=0) * CLIP
    scale = (high - low) / 255
    zero = (-low / scale).round() - 128
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def expected(tensors: dict[str, Tensor], meant: dict[str, dict[str, Tensor]]) -> Tensor:
    """Logits in float64 of the network that the folder describes."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    model: Any = LlamaForCausalLM(config).double().eval()
    state = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
    state |= {f"{name}.weight": parts["weight"] for name, parts in meant.items()}
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})

    def before(parts: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0]
            if "left" in parts:
                x = x @ torch.kron(parts["left"].double(), parts["right"].double())
            return (on_the_grid(x),)

        return hook

    for name, parts in meant.items():
        model.get_submodule(name).register_forward_pre_hook(before(parts))
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", ["compressed-tensors", "affinequant"])
def test_version_one_loads_and_computes_what_it_says(tmp_path: Path, method: str) -> None:
    meant = write(tmp_path, method)
    want = expected(stored(method)[0], meant)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours: Any = load(tmp_path)
    for model in (ours, theirs):
        with torch.no_grad():
            got = model(IDS).logits.double()
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    unclipped = json.loads((tmp_path / "config.json").read_text())
    unclipped["quantization_config"]["affinequant"]["input_clip"] = dict.fromkeys(LINEARS, 1.0)
    (tmp_path / "config.json").write_text(json.dumps(unclipped))
    other: Any = load(tmp_path)
    with torch.no_grad():
        assert float((other(IDS).logits - want).abs().max() / want.abs().max()) > 1e-2
