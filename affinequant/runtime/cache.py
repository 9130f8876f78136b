"""The KV cache of a loaded model: keys and values as packed integers, rotated and rounded once, when they are written.

A cache that transformers makes for `generate()` has its layers replaced before anything is in them. In other kinds of
cache (static ones, those of a sliding window) keys and values stay in the model's dtype and are rounded whenever they
are read: the same numbers, and no memory saved. Where a scheme keeps tokens as they are, a packed layer has them beside the
bytes. This room imports transformers, so it is asked for only where a model is loaded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from affinequant_kernels import kv_pack, kv_unpack
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from affinequant.errors import AffineQuantError
from affinequant.models import resolve
from affinequant.models.attention import NAME, Attended, first_keys, latest_whole, register, seen_keys
from affinequant.models.source import unquantized
from affinequant.numbers import grid_of
from affinequant.recipe.scheme import GOING_BACK, NumberFormat
from affinequant.transforms.cached_heads import CachedHeads

Pair = tuple[Tensor, Tensor]
"""Keys and values, [batch, heads, tokens, width] each."""
_GRID_BYTES = 4
"""Scale and offset of a row, two bytes each, behind its codes."""


def quantize_cache(
    model: Any, kv: NumberFormat | None, rotation_of: Callable[[str, int], Mapping[str, Tensor]]
) -> None:
    """Let every attention of a transformers model see keys and values as a cache of `kv` holds them, whoever calls it.

    Args:
        kv: the cache's numbers; None leaves them as they are.
        rotation_of: (name of an attention module, width of a head) -> its rotation of queries and keys, if any.
    """
    family, dims = resolve(unquantized(model.config.to_dict()), where="config.json")
    for index, block in enumerate(family.each_block(dims)):
        if not block.attention:
            continue
        name = f"{family.blocks}.{index}.{block.attention}"
        module = model.get_submodule(name)
        module.cached_heads = CachedHeads(kv, rotation_of(name, dims.head_dim))
        module.register_forward_pre_hook(_pass_on, with_kwargs=True)
    model.set_attn_implementation(register())


def pack(x: Float[Tensor, "*b n"], kv: NumberFormat) -> UInt8[Tensor, "*b packed"]:
    """Rows as bytes: codes (two in a byte at 4 bits), then the row's scale and offset."""
    if kv.bits == 4:
        codes, scale, offset = kv_pack(x.reshape(-1, 1, x.shape[-1]).contiguous())
    else:
        grid, numbers = grid_of(kv), x.detach().float()
        scale, offset = grid.params(*grid.range(numbers))
        codes = grid.nearest(numbers, scale, offset).to(torch.uint8)
    pairs = torch.stack([scale.reshape(-1), offset.reshape(-1)], -1).view(torch.uint8)
    return torch.cat([codes.reshape(len(pairs), -1), pairs], -1).reshape(*x.shape[:-1], -1)


def unpack(packed: UInt8[Tensor, "*b packed"], kv: NumberFormat, dtype: torch.dtype) -> Float[Tensor, "*b n"]:
    """What `pack` was given, rounded."""
    rows = packed.reshape(-1, packed.shape[-1])
    codes, pairs = rows[:, :-_GRID_BYTES].contiguous(), rows[:, -_GRID_BYTES:].contiguous().view(torch.float16)
    scale, offset = pairs[:, :1].contiguous(), pairs[:, 1:].contiguous()
    if kv.bits == 4:
        values = kv_unpack(codes[:, None], scale, offset, dtype)
    else:
        values = grid_of(kv).value(codes.float(), scale, offset).to(dtype)
    return values.reshape(*packed.shape[:-1], -1)


class PackedLayer(DynamicLayer):
    """One layer of a growing cache. `keys` and `values` are bytes [batch, heads, tokens, packed], so that whatever
    selects, repeats or drops batches and tokens works on them as it does on numbers."""

    def __init__(self, heads: CachedHeads, kv: NumberFormat) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for bytes; `dtype` stays that of the numbers."""
        super().lazy_initialization(key_states, value_states)
        self.keys = self.values = torch.empty(0, dtype=torch.uint8, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write these, and return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys, pack(self.heads.rotated(key_states), self.kv)], -2)
        self.values = torch.cat([self.values, pack(value_states, self.kv)], -2)
        return unpack(self.keys, self.kv, self.dtype), unpack(self.values, self.kv, self.dtype)

    def on_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, sliding: bool
    ) -> Attended:
        """An `OnAttention`, for what `update` has returned: keys and values have been through all that there is."""
        return self.heads.rotated(query), key, value, mask


class KeepingLayer(PackedLayer):
    """A packed layer that also has its first tokens as they are, and the latest. They stand among the bytes as well, so
    that a token which is no longer among the latest is there already.

    Which tokens are the first is known from the mask alone, since a batch may be padded: attention brings it.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keys and values are [batch, heads, tokens, width] each; of the first tokens there is room for all."""
        super().lazy_initialization(key_states, value_states)
        whole = key_states, value_states
        self.first = _both(lambda x: x.new_zeros(*x.shape[:2], self.kv.kept_first, x.shape[-1]), whole)
        self.latest = _both(lambda x: x[..., :0, :], whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write these, and return all there are, rounded."""
        rounded = super().update(key_states, value_states, *args, **kwargs)
        fresh = self.heads.rotated(key_states), value_states
        self.latest = _both(lambda *parts: torch.cat(parts, -2), self.latest, fresh)
        return rounded

    def on_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, sliding: bool
    ) -> Attended:
        """What a query sees whole is put in its place, and what none will need is let go."""
        seen, whole = seen_keys(mask, query, key), self.latest
        rounded = (key, value) if sliding else self._with_first(key, value, seen)
        self.latest = _both(lambda x: x[..., -(self.kv.kept_latest + GOING_BACK) :, :], whole)
        return self.heads.rotated(query), *latest_whole(rounded, whole, mask, seen, self.kv.kept_latest)

    def _with_first(self, key: Tensor, value: Tensor, seen: Tensor) -> Pair:
        """Keys and values with the first tokens of each sequence as they are; notes those that have come."""
        count = self.kv.kept_first
        first = first_keys(seen, count)
        place = seen[..., -1, :].cumsum(-1)[..., None]  # [batch, 1, tokens, 1], from 1 on
        found = (first & (place == torch.arange(1, count + 1, device=place.device))).mT  # [batch, 1, first, tokens]
        found = found[..., -self.latest[0].shape[-2] :]
        come, at = found.any(-1, keepdim=True), found.byte().argmax(-1, keepdim=True)
        new = _both(lambda x: torch.take_along_dim(x, at, -2), self.latest)
        self.first = _both(lambda x, old: torch.where(come, x, old), new, self.first)
        row = (place - 1).clamp(0, count - 1)
        return _both(lambda x, own: torch.where(first, torch.take_along_dim(own, row, -2), x), (key, value), self.first)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back.

        Raises:
            AffineQuantError: more than there are whole ones for: some of those before them would be among the latest.
        """
        there = self.get_seq_length()
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, there - tokens_to_remove)
        kept = self.latest[0].shape[-2] - gone
        if gone and kept < min(there - gone, self.kv.kept_latest - 1):
            raise AffineQuantError(
                f"a KV cache that keeps its latest {self.kv.kept_latest} tokens cannot take back {gone}",
                "past_key_values",
                f"take back {GOING_BACK} at most, or begin a new cache",
            )
        super().crop(tokens_to_remove)
        self.latest = _both(lambda x: x[..., :kept, :], self.latest)

    def offload(self) -> None:
        """All to the CPU."""
        super().offload()
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """All back to where it was."""
        super().prefetch()
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows of a batch in another order."""
        super().reorder_cache(beam_idx)
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of a batch so many times."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of a batch."""
        super().batch_select_indices(indices)
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.first, self.latest = _both(change, self.first), _both(change, self.latest)


def _both(change: Callable[..., Tensor], *pairs: Pair) -> Pair:
    """Keys and values, each made of those of the pairs."""
    keys, values = (change(*parts) for parts in zip(*pairs, strict=True))
    return keys, values


def _pass_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    chosen = module.config._attn_implementation
    if chosen != NAME:  # any other would leave the keyword aside, and the cache in 16 bits
        raise AffineQuantError(
            f"the attention {chosen!r} cannot quantise the KV cache",
            "model.config",
            f"call model.set_attn_implementation({NAME!r})",
        )
    heads: CachedHeads = module.cached_heads
    packed = _packed(kwargs.get("past_key_values"), module.layer_idx, heads)
    return args, kwargs | {"on_attention": packed.on_attention if packed else heads}


def _packed(cache: Any, index: int, heads: CachedHeads) -> PackedLayer | None:
    """Layer `index` of a cache if it packs what it holds; a growing one that is still empty is made to."""
    if heads.kv is None or getattr(cache, "layers", None) is None:
        return None
    while len(cache.layers) <= index and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is DynamicLayer and not layer.is_initialized:
        kind = KeepingLayer if heads.kv.kept_latest else PackedLayer
        layer = cache.layers[index] = kind(heads, heads.kv)
    return layer if isinstance(layer, PackedLayer) else None
