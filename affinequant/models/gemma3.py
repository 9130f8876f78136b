"""Gemma 3 (text): Gemma 2 with norms on queries and keys in the place of caps; two kinds of RoPE alternate over blocks."""

from dataclasses import replace

from affinequant.models.gemma2 import GEMMA2, sandwiched
from affinequant.models.qwen3 import NORMED

GEMMA3 = replace(GEMMA2, name="gemma3", architectures=("Gemma3ForCausalLM",), layers=sandwiched(NORMED))
