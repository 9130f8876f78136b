"""A linear on 4-bit floats, in 16 or 32 bits: the values are those of the floats, the products are not."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from affinequant.numbers import grid_of, in_units
from affinequant.recipe.scheme import NumberFormat
from affinequant.transforms.online import acting, stored_name
from affinequant.transforms.site_input import SiteInput


class FloatLinear(nn.Module):
    """y = Q(x P) W^T + b, with W made of 4-bit floats and x P rounded to them token by token where the scheme says so.

    A simulation: what hardware for such floats multiplies is what stands here, and sums are taken in the dtype of x. Every
    value of W and of rounded activations is exact in bfloat16.

    Args:
        weight: what the codes stand for.
        activation: the grid of a token; None leaves activations as they are.
        clip: ratio by which the range of each block of a token is narrowed.
        online: the matrices of P by their parts (`transforms.online`); empty for none.
        slices: into how many equal parts x is cut, each of them transformed by itself.
        unit: of the activations' scales, where their format has one.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None,
        *,
        activation: NumberFormat | None,
        clip: float,
        online: Mapping[str, Tensor] | None = None,
        slices: int = 1,
        unit: float | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.parts = {part: stored_name("", part).removeprefix(".") for part in online or {}}
        for part, matrix in (online or {}).items():
            self.register_buffer(self.parts[part], matrix, persistent=False)
        grid = None if activation is None else in_units(grid_of(activation), unit)
        self.input = SiteInput(grid=grid, clip=clip, slices=slices)

    def forward(self, x: Float[Tensor, "*batch d_in"], bias: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
        """The product in the dtype of x, with `bias` in place of its own where it is given."""
        matrices = {part: self.get_buffer(name) for part, name in self.parts.items()}
        site_input = replace(self.input, online=acting(matrices))
        return nn.functional.linear(site_input(x), self.weight, self._buffers["bias"] if bias is None else bias)

    def extra_repr(self) -> str:
        """Sizes and formats, for print(model)."""
        grid = self.input.grid
        kind = f"{grid.fmt.kind} activations, clip={self.input.clip:.4g}" if grid else "16-bit activations"
        return f"{self.in_features}, {self.out_features}, {kind}"
