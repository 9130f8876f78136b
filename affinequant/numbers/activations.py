"""Activations on any grid: one per token, per slice or group of a token, or per token and head."""

from jaxtyping import Float
from torch import Tensor

from affinequant.numbers import Grid


def fake_quantize_activation(
    x: Float[Tensor, "*b n"],
    grid: Grid,
    clip: Float[Tensor, ""] | float = 1.0,
    slices: int = 1,
    *,
    through: bool = False,
) -> Float[Tensor, "*b n"]:
    """Activations rounded to each token's grid, its range narrowed to `clip` of what the token spans, in their own dtype
    (computed in fp32). Each of `slices` parts of a token has a grid of its own, or each group where the format has them.

    Differentiable in x and clip, and with `through` in the extremes of a grid's values as well, which is how a rotation
    learns to make them smaller; else these count as constants.

    Raises:
        ValueError: slices, or groups within them, that do not divide a token.
    """
    parts = _parts(x, grid, slices)
    low, high = grid.range((parts if through else parts.detach()).float())
    return grid.fake(parts.float(), low * clip, high * clip).to(x.dtype).reshape(x.shape)


def _parts(x: Float[Tensor, "*b n"], grid: Grid, slices: int) -> Tensor:
    """x with values that share a grid along the last axis."""
    width, size = x.shape[-1], grid.fmt.group_size or 1
    if width % (slices * size):
        raise ValueError(f"a token of {width} features has no {slices} slices in groups of {size}")
    count = slices * grid.fmt.groups(width // slices)
    return x if count == 1 else x.unflatten(-1, (count, -1))
