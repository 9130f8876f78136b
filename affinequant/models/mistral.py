"""Mistral: Llama whose blocks may all see a sliding window, which is the attention's own business."""

from dataclasses import replace

from affinequant.models.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", architectures=("MistralForCausalLM",), defaults={"num_key_value_heads": 8})
