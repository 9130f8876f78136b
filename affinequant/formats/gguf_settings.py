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
    ropes: tuple[str, ...] = ("default", "linear")
    """Kinds of RoPE that it computes as transformers does, whatever the length of the text."""
    activation: str = "silu"
    stock: bool = False
    """Whether transformers reads all of such a file."""
    neighbours: bool = False
    """Whether it rotates neighbouring features where transformers rotates halves."""
    any_heads: bool = False
    """Whether all heads together may be wider or narrower than the residual stream."""
    biases: bool = False
    """Whether linears may have biases."""
    windows: int = 0
    """Every so many blocks one sees all that came before, and the others a window; 0 where there are no windows."""
    any_windows: bool = False
    """Whether the file may give another number for that."""
    unroped: int = 0
    """Every so many blocks one has no RoPE; 0 where all have it."""
    capped: bool = False
    """Whether caps on scores and logits are there: always, or never."""
    widened: int = 0
    """With so many blocks it divides scores by the root of the width of the residual stream over heads, else by that of a
    head's."""
    sums_to_one: bool | None = None
    """Whether it makes the weights of a token's experts add up to one; None where it leaves that to the model, or has no
    experts."""

    def refuses(self, config: Any, dims: Dims) -> str | None:
        """None, or what it does otherwise than a model of this described config."""
        for rope in ropes_of(config).values():
            if (kind := rope.get("rope_type", "default")) not in self.ropes:
                return f"has no RoPE of type {kind!r}: it computes {', '.join(self.ropes)} as transformers does"
        if (activation := getattr(config, "hidden_activation", None) or config.hidden_act) != self.activation:
            return f"computes {self.activation}, this model {activation}"
        if windowed(config) and not self.windows:
            return "has no sliding windows"
        if windowed(config) and self.period(config) is None:
            return f"has no sliding windows in this order: every block but each {_th(self.windows)} has one there"
        kept = list(getattr(config, "no_rope_layers", None) or [1] * dims.layers)
        if kept != [int(not self.unroped or (block + 1) % self.unroped != 0) for block in range(dims.layers)]:
            return f"leaves RoPE out of each {_th(self.unroped)} block, this model of others"
        caps = [getattr(config, f"{name}_logit_softcapping", None) for name in CAPS]
        if any((cap is not None) != self.capped for cap in caps):
            return f"has {'both caps' if self.capped else 'no caps'}, on scores and on logits"
        scale = dims.hidden // dims.heads if self.widened and dims.layers == self.widened else dims.head_dim
        if getattr(config, "query_pre_attn_scalar", scale) != scale:
            return f"divides scores by the root of {scale}, this model of {config.query_pre_attn_scalar}"
        if dims.query != dims.hidden and not self.any_heads:
            return f"has no heads of {dims.query} features together: it takes as many as the residual stream has"
        return self.refuses_experts(config, dims) if dims.experts else None

    def period(self, config: Any) -> int | None:
        """How often a block sees all that came before; None where that is in no such order, or in another than it has."""
        kinds = list(config.layer_types)
        first = kinds.index("full_attention") + 1 if "full_attention" in kinds else self.windows
        for period in dict.fromkeys((self.windows, first if self.any_windows else self.windows)):
            if kinds == [("sliding" if (block + 1) % period else "full") + "_attention" for block in range(len(kinds))]:
                return period
        return None

    def refuses_experts(self, config: Any, dims: Dims) -> str | None:
        """None, or what it does otherwise with the experts of a described config."""
        if any("mlp" in kinds for kinds in dims.kinds):
            return "has experts in every block"
        normed = getattr(config, "norm_topk_prob", True)
        if self.sums_to_one is not None and normed != self.sums_to_one:
            return f"{'makes' if self.sums_to_one else 'does not make'} the weights of a token's experts add up to one"
        return None


CAPS = ("attn", "final")
"""What is capped in a network that caps: scores and logits."""
_LLAMA = Architecture(
    title="Llama", called="llama", ropes=("default", "linear", "llama3"), neighbours=True, any_heads=True, biases=True
)
_QWEN2 = Architecture(title="Qwen2", called="qwen2", biases=True)
_GEMMA2 = Architecture(
    title="Gemma 2",
    called="gemma2",
    ropes=("default",),
    activation="gelu_pytorch_tanh",
    any_heads=True,
    windows=2,
    capped=True,
    widened=46,
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": replace(_LLAMA, stock=True),
    "mistral": replace(_LLAMA, biases=False),
    "mixtral": replace(_LLAMA, sums_to_one=True),
    "qwen2": replace(_QWEN2, stock=True),
    "qwen2_moe": replace(_QWEN2, title="Qwen2-MoE", called="qwen2moe", sums_to_one=False),
    "qwen3": Architecture(title="Qwen3", called="qwen3", any_heads=True),
    "qwen3_moe": replace(_QWEN2, title="Qwen3-MoE", called="qwen3moe", any_heads=True, sums_to_one=True),
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2,
        title="Gemma 3",
        called="gemma3",
        ropes=("default", "linear"),
        windows=6,
        any_windows=True,
        capped=False,
        widened=62,
    ),
    "phi3": Architecture(title="Phi-3", called="phi3", ropes=("default",)),
    "smollm3": Architecture(title="SmolLM3", called="smollm3", neighbours=True, unroped=4),
}
"""By family: those without a line cannot be exported."""
UNKNOWN: Mapping[str, str] = {"opt": "llama.cpp has no OPT"}
"""Why there is no line, where it is known."""


def described(config: Mapping[str, Any]) -> Any:
    """A config.json as transformers completes it, keys that it leaves out at their defaults."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config.get("model_type", "llama")].from_dict(dict(config))


def ropes_of(config: Any) -> dict[str, Mapping[str, Any]]:
    """The parameters of RoPE of a described config, by the kind of attention; of one for all, as of full attention."""
    given = config.rope_parameters or {}
    kinds = {kind: rope for kind, rope in given.items() if isinstance(rope, Mapping)}
    return kinds or {"full_attention": given}


def windowed(config: Any) -> bool:
    """Whether any block of a described config sees less than all that came before."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return window is not None and window < config.max_position_embeddings


def _th(period: int) -> str:
    return {2: "second"}.get(period, f"{period}th")


def rope_factors(config: Any) -> np.ndarray | None:
    """By how much each frequency of RoPE is divided, float32 [head_dim / 2], where it is not the same for all: the tensor
    `rope_freqs.weight`."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if ropes_of(config)["full_attention"].get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled))
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).numpy()


def write_settings(writer: Any, contents: Contents, architecture: Architecture, dims: Dims) -> None:
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
    ropes = ropes_of(config)
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(float(ropes["sliding_attention"]["rope_theta"]))
    if windowed(config):
        writer.add_sliding_window(int(config.sliding_window))
        writer.add_sliding_window_pattern(architecture.period(config))
    if architecture.capped:
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))
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
