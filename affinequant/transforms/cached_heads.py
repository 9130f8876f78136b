"""What acts between RoPE and attention: a rotation of queries and keys, and rounding as a quantised cache does it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.attention import Attended, first_keys, latest_whole, seen_keys
from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.recipe.scheme import NumberFormat
from affinequant.transforms.online import apply_online


class CachedHeads(nn.Module):
    """An `OnAttention`: q R and k R for one orthogonal R [width, width] that all heads share, so that q k^T stays what it
    was; then k and v rounded to the cache's grid, but for the tokens that it keeps.

    The first token, on which attention rests, carries massive activations, and what lies nearest matters most. Behind a
    sliding window the first tokens are out of sight before long: there the latest alone are kept.

    Args:
        kv: the cache's numbers; None rounds nothing.
        rotation: R as `transforms/online.py` names it; nothing for the identity.
    """

    def __init__(self, kv: NumberFormat | None, rotation: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kv, self.grid = kv, grid_of(kv) if kv else None
        self.names = {part: part.replace(".", "_") for part in rotation}
        for part, tensor in rotation.items():
            self.register_buffer(self.names[part], tensor, persistent=False)

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens width"],
        key: Float[Tensor, "batch kv_heads cached width"],
        value: Float[Tensor, "batch kv_heads cached width"],
        mask: Tensor | None = None,
        *,
        sliding: bool = False,
    ) -> Attended:
        """In the dtypes that come in."""
        query, key = self.rotated(query), self.rotated(key)
        if self.grid is None or self.kv is None:
            return query, key, value, mask
        rounded = fake_quantize_activation(key, self.grid), fake_quantize_activation(value, self.grid)
        if not self.kv.kept_latest:
            return query, *rounded, mask
        seen = seen_keys(mask, query, key)
        if not sliding:
            first = first_keys(seen, self.kv.kept_first)
            rounded = torch.where(first, key, rounded[0]), torch.where(first, value, rounded[1])
        return query, *latest_whole(rounded, (key, value), mask, seen, self.kv.kept_latest)

    def rotated(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        """x R."""
        rotation = {part: getattr(self, name) for part, name in self.names.items()}
        return apply_online(x, rotation) if rotation else x
