"""Weights of a linear on any grid: one per output row, or per group of its inputs where the format has groups."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from affinequant.numbers import Grid

CLIP_START = 4.0
"""Logit at which a learned range starts: sigmoid(4) = 0.982 of the full one (arXiv 2308.13137, AffineQuant alike)."""


def grouped(weight: Float[Tensor, "rows columns"], grid: Grid) -> Float[Tensor, "rows groups width"]:
    """A weight seen as groups that share a scale (one group per row for a per-channel format)."""
    return weight.reshape(weight.shape[0], grid.fmt.groups(weight.shape[1]), -1)


def weight_range(
    weight: Float[Tensor, "rows columns"], grid: Grid
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """(low, high) of each group, unclipped."""
    low, high = grid.range(grouped(weight, grid))
    return low.squeeze(-1), high.squeeze(-1)


def codes_of(
    weight: Float[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    grid: Grid,
) -> Float[Tensor, "rows columns"]:
    """The nearest codes, as floats that hold whole numbers."""
    return grid.nearest(grouped(weight, grid), scale[..., None], zero[..., None]).reshape(weight.shape)


def dequantize(
    codes: Tensor, scale: Float[Tensor, "rows groups"], zero: Float[Tensor, "rows groups"], grid: Grid
) -> Float[Tensor, "rows columns"]:
    """What codes stand for, in the dtype of the scale."""
    parts = grouped(codes.to(scale.dtype), grid)
    return grid.value(parts, scale[..., None], zero[..., None]).reshape(codes.shape)


def fake_quantize(
    weight: Float[Tensor, "rows columns"],
    low: Float[Tensor, "rows groups"],
    high: Float[Tensor, "rows groups"],
    grid: Grid,
    store: torch.dtype = torch.float32,
) -> Float[Tensor, "rows columns"]:
    """Weights rounded to the grid over [low, high], differentiable in weights and range."""
    return grid.fake(grouped(weight, grid), low[..., None], high[..., None], store).reshape(weight.shape)


class LearnedRange(nn.Module):
    """Learned weight clipping: the range of each group is sigmoid(logit) of its minimum and of its maximum."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.low_logit = nn.Parameter(torch.full((rows, groups), CLIP_START))
        self.high_logit = nn.Parameter(torch.full((rows, groups), CLIP_START))

    def forward(
        self, weight: Float[Tensor, "rows columns"], grid: Grid
    ) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """(low, high) for this weight."""
        low, high = weight_range(weight, grid)
        return low * self.low_logit.sigmoid().to(low), high * self.high_logit.sigmoid().to(high)


def to_integers(codes: Float[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Whole-number floats as int8."""
    return codes.to(torch.int8)
