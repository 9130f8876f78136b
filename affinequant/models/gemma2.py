"""Gemma 2: gains are 1 + w, a norm stands before and behind each layer, and embeddings are tied and scaled.

The norms behind the layers keep rotations of the residual stream out. Caps on scores are the attention's business, caps on
logits the head's. Windows alternate over blocks.
"""

from dataclasses import replace

from affinequant.models.layer import Layer
from affinequant.models.llama import ATTENTION, LLAMA, MLP


def sandwiched(attention: Layer) -> dict[str, Layer]:
    """Attention and the MLP, each between two norms."""
    mlp = MLP.with_site("mlp_in", sources=(("pre_feedforward_layernorm", "gain"),))
    return {
        "attention": replace(attention, post_norm="post_attention_layernorm"),
        "mlp": replace(mlp, post_norm="post_feedforward_layernorm"),
    }


GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    norm_offset=1.0,
    bos=True,
    layers=sandwiched(ATTENTION),
    settings={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    defaults={"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True},
)
