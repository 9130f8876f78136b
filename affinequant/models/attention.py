"""Between RoPE and attention: a rotation of queries and keys, and keys and values as a quantised cache gives them back.

transformers lets a model choose its attention by name and calls it after RoPE and after the cache has been read. Ours is
its `sdpa` with one more keyword, `on_attention`, which acts on queries, keys and values first; without it the two are
the same, but where a model caps its scores: `sdpa` leaves the keyword `softcap` aside in silence. What reaches ours is
rotated and rounded on every call. A row's grid depends on that row alone, so attention sees what a cache that rounds
once, when it is written, would hold; `runtime/cache.py` has that cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "affinequant"
"""What transformers knows our attention as."""

OnAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(queries, keys, values) -> the same, each [batch, heads, tokens, width]: may replace what attention reads."""


def register() -> str:
    """Make our attention known to transformers, and return its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            act: OnAttention | None = kwargs.pop("on_attention", None)
            if act is not None:
                query, key, value = act(query, key, value)
            if (cap := kwargs.pop("softcap", None)) is not None:
                return _capped(module, query, key, value, *args, cap=cap, **kwargs)
            return sdpa(module, query, key, value, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def _capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    cap: float,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention whose scores are cap tanh(score / cap): [batch, tokens, heads, width]. `mask` is as `sdpa` takes it."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = cap * torch.tanh(query @ key.mT * (scaling / cap))
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None
