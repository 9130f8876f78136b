"""Caps of scores and logits, cap tanh(x / cap), as Gemma 2 has them, where the code that computes them is not the model's own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def caps_scores(config: Any) -> bool:
    """Whether a model caps its attention scores: then no attention of transformers but `eager`, and ours, computes it."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def capped_logits(logits: Float[Tensor, "*batch vocab"], config: Any) -> Float[Tensor, "*batch vocab"]:
    """What a model makes of its head's output where its config has a cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
