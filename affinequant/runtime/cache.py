"""The KV cache of a loaded model: keys and values as packed integers, rotated and rounded once, when they are written.

A cache that transformers makes for `generate()` has its layers replaced before anything is in them. In other kinds of
cache (static ones, those of a sliding window) keys and values stay in the model's dtype and are rounded whenever they
are read: the same numbers, and no memory saved. This room imports transformers, so it is asked for only where a model is
loaded.
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
from affinequant.models.attention import NAME, register
from affinequant.models.source import unquantized
from affinequant.numbers import grid_of
from affinequant.recipe.scheme import NumberFormat
from affinequant.transforms.cached_heads import CachedHeads

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


def _pass_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    chosen = module.config._attn_implementation
    if chosen != NAME:  # any other would leave the keyword aside, and the cache in 16 bits
        raise AffineQuantError(
            f"the attention {chosen!r} cannot quantise the KV cache",
            "model.config",
            f"call model.set_attn_implementation({NAME!r})",
        )
    heads: CachedHeads = module.cached_heads
    packed = _is_packed(kwargs.get("past_key_values"), module.layer_idx, heads)
    return args, kwargs | {"on_attention": heads.queries if packed else heads}


def _is_packed(cache: Any, index: int, heads: CachedHeads) -> bool:
    """Whether layer `index` of a cache packs what it holds; a growing one that is still empty is made to."""
    if heads.kv is None or getattr(cache, "layers", None) is None:
        return False
    while len(cache.layers) <= index and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[index] = PackedLayer(heads, heads.kv)
    return isinstance(layer, PackedLayer)
