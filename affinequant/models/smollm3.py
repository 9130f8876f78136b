"""SmolLM3: Llama some of whose blocks have no RoPE, which is the attention's own business."""

from dataclasses import replace

from affinequant.models.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
)
