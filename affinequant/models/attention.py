"""Between RoPE and attention: a rotation of queries and keys, and keys and values as a quantised cache gives them back.

transformers lets a model choose its attention by name and calls it after RoPE and after the cache has been read. Ours is
its `sdpa` with one more keyword, `on_attention`, which acts on queries, keys and values first; without it the two are
the same, but where a model caps its scores: `sdpa` leaves the keyword `softcap` aside in silence. What reaches ours is
rotated and rounded on every call. A row's grid depends on that row alone, so attention sees what a cache that rounds
once, when it is written, would hold; `runtime/cache.py` has that cache.

Where the latest tokens are kept as they are, which keys are rounded depends on the query. Attention then has them twice,
rounded and whole, and a mask that shows each query one of the two.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

NAME = "affinequant"
"""What transformers knows our attention as."""

Attended = tuple[Tensor, Tensor, Tensor, Tensor | None]
OnAttention = Callable[..., Attended]
"""(queries, keys, values, mask, sliding=) -> the first four: may replace what attention reads. Queries, keys and values are
[batch, heads, tokens, width]; the mask is as `sdpa` takes it, None where all is seen up to the query's own token;
`sliding` says that a query does not see further back than a window."""


def register() -> str:
    """Make our attention known to transformers, and return its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            act: OnAttention | None = kwargs.pop("on_attention", None)
            if act is not None:
                sliding = kwargs.get("sliding_window") is not None
                query, key, value, mask = act(query, key, value, mask, sliding=sliding)
            if (cap := kwargs.pop("softcap", None)) is not None:
                return _capped(module, query, key, value, mask, cap=cap, **kwargs)
            return sdpa(module, query, key, value, mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def seen_keys(mask: Tensor | None, query: Tensor, key: Tensor) -> Bool[Tensor, "*b queries keys"]:
    """Which keys each query sees. As `sdpa` has it, a single query without a mask sees them all, and of several the first
    sees the first alone, however much room there is behind them."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    queries, keys = query.shape[-2], key.shape[-2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=key.device)
    return (seen.tril() if queries > 1 else seen)[None, None]


def first_keys(seen: Bool[Tensor, "*b queries keys"], count: int) -> Bool[Tensor, "*b keys 1"]:
    """Which keys are the first of their sequences, `count` each, padding left aside, where the last query sees them all."""
    last = seen[..., -1, :]
    return (last & (last.cumsum(-1, dtype=torch.int32) <= count))[..., None]


def latest_whole(
    rounded: tuple[Float[Tensor, "*b keys width"], Float[Tensor, "*b keys width"]],
    whole: tuple[Float[Tensor, "*b last width"], Float[Tensor, "*b last width"]],
    mask: Tensor | None,
    seen: Bool[Tensor, "*b queries keys"],
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, mask) of which each query sees the `count` latest whole, up to and with its own, and the rest rounded.

    Args:
        rounded, whole: keys and values; whole ones of the last tokens, of those at least that a query sees so.
        mask, seen: as attention has it, and as `seen_keys` gives it.
    """
    there = seen.cumsum(-1, dtype=torch.int32)
    latest = seen & (there[..., -1:] - there < count)
    mask = seen if mask is None else mask
    kept = whole[0].shape[-2]
    shown = (_only(mask, ~latest), _only(mask[..., -kept:], latest[..., -kept:]))
    key, value = (torch.cat(both, -2) for both in zip(rounded, whole, strict=True))
    return key, value, torch.cat(shown, -1)


def _only(mask: Tensor, where: Tensor) -> Tensor:
    return mask & where if mask.dtype == torch.bool else mask.masked_fill(~where, torch.finfo(mask.dtype).min)


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
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None
