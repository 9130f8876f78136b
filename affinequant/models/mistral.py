"""Mistral: Llama whose blocks may all see a sliding window, which is the attention's own business, and that has no biases
whatever its config says."""

from dataclasses import replace

from affinequant.models.llama import LLAMA

LAYERS = {
    kind: replace(layer, linears=tuple(replace(linear, bias=False) for linear in layer.linears))
    for kind, layer in LLAMA.layers.items()
}
MISTRAL = replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    layers=LAYERS,
    defaults={"num_key_value_heads": 8},
)
