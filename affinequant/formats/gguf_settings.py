"""What stands before the tensors of a GGUF file: sizes, RoPE and the tokenizer, with the model's defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.formats import Contents
from affinequant.formats.gguf_tokenizer import Vocabulary, read_vocabulary
from affinequant.models import Dims

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network as llama.cpp has it."""

    title: str
    called: str
    """In the file."""
    ropes: tuple[str, ...]
    """Kinds of RoPE that it computes as transformers does, whatever the length of the text."""
    neighbours: bool = False
    """Whether it rotates neighbouring features where transformers rotates halves."""
    any_heads: bool = False
    """Whether all heads together may be wider or narrower than the residual stream."""
    sums_to_one: bool | None = None
    """Whether it makes the weights of a token's experts add up to one; None where it leaves that to the model, or has no
    experts."""

    def refuses_experts(self, config: Any, dims: Dims) -> str | None:
        """None, or what it does otherwise with the experts of a described config."""
        if any("mlp" in kinds for kinds in dims.kinds):
            return "has experts in every block"
        normed = getattr(config, "norm_topk_prob", True)
        if self.sums_to_one is not None and normed != self.sums_to_one:
            return f"{'makes' if self.sums_to_one else 'does not make'} the weights of a token's experts add up to one"
        return None


_LLAMA = Architecture(
    title="Llama", called="llama", ropes=("default", "linear", "llama3"), neighbours=True, any_heads=True
)
_QWEN2 = Architecture(title="Qwen2", called="qwen2", ropes=("default", "linear"))
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mixtral": replace(_LLAMA, sums_to_one=True),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, title="Qwen2-MoE", called="qwen2moe", sums_to_one=False),
    "qwen3_moe": replace(_QWEN2, title="Qwen3-MoE", called="qwen3moe", any_heads=True, sums_to_one=True),
}
"""By family: those without a line cannot be exported."""
UNKNOWN: Mapping[str, str] = {"opt": "llama.cpp has no OPT"}
"""Why there is no line, where it is known."""


def described(config: Mapping[str, Any]) -> Any:
    """A config.json as transformers completes it, keys that it leaves out at their defaults."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config.get("model_type", "llama")].from_dict(dict(config))


def rope_kind(config: Any) -> str:
    """The kind of RoPE of a described config."""
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def rope_factors(config: Any) -> np.ndarray | None:
    """By how much each frequency of RoPE is divided, float32 [head_dim / 2], where it is not the same for all: the tensor
    `rope_freqs.weight`."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_kind(config) != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled))
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).numpy()


def write_settings(writer: Any, contents: Contents, dims: Dims) -> None:
    """Sizes and constants of the network, by llama.cpp's keys."""
    from gguf import LlamaFileType, RopeScalingType

    config, fmt = described(contents.config), contents.scheme.weight
    kind = "MOSTLY_Q8_0" if fmt.bits == 8 else "MOSTLY_Q4_0" if fmt.symmetric else "MOSTLY_Q4_1"
    writer.add_name(str(contents.config.get("_name_or_path") or contents.source.name))
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(2)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(dims.hidden)
    writer.add_block_count(dims.layers)
    writer.add_feed_forward_length(dims.mlp)
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if rope_kind(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(dims.vocab)
    if dims.experts:
        writer.add_expert_count(dims.experts)
        writer.add_expert_used_count(int(config.num_experts_per_tok))
        writer.add_expert_feed_forward_length(dims.expert)
    if dims.shared:
        writer.add_expert_shared_feed_forward_length(dims.shared)


def write_tokenizer(writer: Any, contents: Contents, dims: Dims) -> None:
    """Tokens, special tokens and the chat template.

    Raises:
        AffineQuantError: a tokenizer that the file cannot hold.
    """
    from gguf import SpecialVocab

    source = contents.source
    vocabulary = read_vocabulary(source, dims.vocab)
    if not isinstance(vocabulary, Vocabulary):
        raise AffineQuantError(vocabulary, str(source), "export another format", exit_code=PREFLIGHT)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    pieces = bool(vocabulary.scores)
    if pieces:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = SpecialVocab(source, load_merges=not pieces, n_vocab=dims.vocab)
    template = source / "chat_template.jinja"
    if template.is_file():
        special.chat_template = template.read_text(encoding="utf-8")
    special.add_special_token |= _ends(source, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _ends(source: Path, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether the tokenizer puts the first and the last token around a text: what llama.cpp assumes where it is not told
    depends on the kind of tokenizer."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source, local_files_only=True)("a")["input_ids"]
    return {
        "bos": bool(ids) and ids[0] == special.get("bos"),
        "eos": len(ids) > 1 and ids[-1] == special.get("eos"),
    }
