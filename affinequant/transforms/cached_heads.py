"""What acts between RoPE and attention: a rotation of queries and keys, and rounding as a quantised cache does it."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.recipe.scheme import NumberFormat
from affinequant.transforms.online import apply_online


class CachedHeads(nn.Module):
    """An `OnAttention`: q R and k R for one orthogonal R [width, width] that all heads share, so that q k^T stays what it
    was; then k and v rounded to the cache's grid.

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes that come in."""
        query, key = self.rotated(query), self.rotated(key)
        if self.grid is not None:
            key, value = (fake_quantize_activation(part, self.grid) for part in (key, value))
        return query, key, value

    def queries(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for keys and values that come out of a packed cache: they have been through it."""
        return self.rotated(query), key, value

    def rotated(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        """x R."""
        rotation = {part: getattr(self, name) for part, name in self.names.items()}
        return apply_online(x, rotation) if rotation else x
