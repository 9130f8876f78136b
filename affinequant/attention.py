"""Between RoPE and attention: a rotation of queries and keys, and keys and values as a quantised cache gives them back.

transformers lets a model choose its attention by name and calls it after RoPE and after the cache has been read. Ours is
its `sdpa` with one more keyword, `on_attention`, which acts on queries, keys and values first; without it the two are
the same. What reaches it is rotated and rounded on every call. A row's grid depends on that row alone, so attention sees
what a cache that rounds once, when it is written, would hold; `cache.py` has that cache.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from affinequant.quantizer import fake_quantize_cached
from affinequant.scheme import NumberFormat
from affinequant.transforms.online import apply_online

NAME = "affinequant"
"""What transformers knows our attention as."""

OnAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(queries, keys, values) -> the same, each [batch, heads, tokens, width]: may replace what attention reads."""


class CachedHeads(nn.Module):
    """An `OnAttention`: q R and k R for one orthogonal R [width, width] that all heads share, so that q k^T stays what it
    was; then k and v rounded to the cache's grid.

    Args:
        kv: the cache's numbers; None rounds nothing.
        rotation: R as `transforms/online.py` names it; nothing for the identity.
    """

    def __init__(self, kv: NumberFormat | None, rotation: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kv = kv
        self.names = {part: part.replace(".", "_") for part in rotation}
        for part, tensor in rotation.items():
            self.register_buffer(self.names[part], tensor, persistent=False)

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens width"],
        key: Float[Tensor, "batch kv_heads cached width"],
        value: Float[Tensor, "batch kv_heads cached width"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes that come in."""
        query, key = self.rotated(query), self.rotated(key)
        if self.kv is not None:
            key, value = fake_quantize_cached(key, self.kv), fake_quantize_cached(value, self.kv)
        return query, key, value

    def queries(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for keys and values that come out of a packed cache: they have been through it."""
        return self.rotated(query), key, value

    def rotated(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        """x R."""
        rotation = {part: getattr(self, name) for part, name in self.names.items()}
        return apply_online(x, rotation) if rotation else x


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
            return sdpa(module, query, key, value, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME
