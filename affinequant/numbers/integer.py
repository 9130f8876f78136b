"""Integer grids: ranges to scales, values to codes, and the straight-through forms that training needs."""

import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor, nn

from affinequant.recipe.scheme import NumberFormat

SMALLEST_SCALE = 1e-8
_HALF = torch.finfo(torch.float16)
CLIP_START = 4.0
"""Logit at which a learned range starts: sigmoid(4) = 0.982 of the full one (arXiv 2308.13137, AffineQuant alike)."""


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, *grad: Tensor) -> Tensor:
        return grad[0]


def grouped(weight: Float[Tensor, "rows columns"], fmt: NumberFormat) -> Float[Tensor, "rows groups width"]:
    """A weight seen as groups that share a scale (one group per row for a per-channel format)."""
    return weight.reshape(weight.shape[0], fmt.groups(weight.shape[1]), -1)


def weight_range(
    weight: Float[Tensor, "rows columns"], fmt: NumberFormat
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Smallest and largest value of each group, zero always inside."""
    parts = grouped(weight, fmt)
    return parts.amin(-1).clamp_max(0.0), parts.amax(-1).clamp_min(0.0)


def grid(
    low: Float[Tensor, "*s"], high: Float[Tensor, "*s"], fmt: NumberFormat, store: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """(scale, zero) of the grid over [low, high]; value = (code - zero) * scale.

    `store` is the dtype in which scales are kept: they are rounded to it here, so that codes fit what engines read.
    Differentiable in the range, straight through the roundings.
    """
    if fmt.symmetric:
        scale = _divide(torch.maximum(high, -low), fmt.code_max)
        zero = torch.zeros_like(scale)
    else:
        scale = _divide(high - low, 2**fmt.bits - 1)
        zero = None
    scale = scale.clamp_min(max(SMALLEST_SCALE, torch.finfo(store).smallest_normal))
    if store != torch.float32:
        scale = scale + (scale.detach().to(store).to(scale.dtype) - scale.detach())
    if zero is None:
        zero = (_round(-low / scale) + fmt.code_min).clamp(fmt.code_min, fmt.code_max)
    return scale, zero


def codes_of(
    weight: Float[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    fmt: NumberFormat,
) -> Float[Tensor, "rows columns"]:
    """The nearest codes, as floats that hold whole numbers."""
    parts = grouped(weight, fmt)
    codes = _round(parts / scale[..., None]) + zero[..., None]
    return codes.clamp(fmt.code_min, fmt.code_max).reshape(weight.shape)


def dequantize(
    codes: Tensor, scale: Float[Tensor, "rows groups"], zero: Float[Tensor, "rows groups"], fmt: NumberFormat
) -> Float[Tensor, "rows columns"]:
    """(codes - zero) * scale, in the dtype of the scale."""
    parts = grouped(codes.to(scale.dtype), fmt)
    return ((parts - zero[..., None]) * scale[..., None]).reshape(codes.shape)


class _OnGrid(torch.autograd.Function):
    """x to the nearest point of the grid (scale, zero), with straight-through gradients in closed form.

    Inside the grid the gradient passes to x, and the scale receives what rounding left over; outside, only scale and
    zero do. One fused backward: the same composed of single operations takes several times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = x * inverse
        if not any(ctx.needs_input_grad):
            return steps.round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)
        wide = steps.round().add_(zero)
        codes = wide.clamp(low, high)
        inside = codes == wide
        codes.sub_(zero)
        value = codes * scale
        ctx.save_for_backward(codes.sub_(steps.mul_(inside)), inside, scale)
        return value

    @staticmethod
    def backward(ctx, *grads: Tensor):
        left, inside, scale = ctx.saved_tensors
        grad = grads[0]
        passed = torch.where(inside, grad, grad.new_zeros(()))
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            to_scale = (grad * left).sum(-1, keepdim=True)
        if ctx.needs_input_grad[3]:
            to_zero = -scale * (grad - passed).sum(-1, keepdim=True)
        return (passed if ctx.needs_input_grad[0] else None), to_scale, None, to_zero, None, None


def fake_quantize(
    weight: Float[Tensor, "rows columns"],
    low: Float[Tensor, "rows groups"],
    high: Float[Tensor, "rows groups"],
    fmt: NumberFormat,
    store: torch.dtype = torch.float32,
) -> Float[Tensor, "rows columns"]:
    """Weights rounded to the grid over [low, high], differentiable in weights and range."""
    scale, zero = (part[..., None] for part in grid(low, high, fmt, store))
    inverse = 1.0 / scale.detach()
    value = _OnGrid.apply(grouped(weight, fmt), scale, inverse, zero, fmt.code_min, fmt.code_max)
    return value.reshape(weight.shape)  # pyright: ignore[reportAttributeAccessIssue]


def activation_grid(
    x: Float[Tensor, "*b n"], fmt: NumberFormat, clip: Float[Tensor, ""] | float = 1.0, *, through: bool = False
) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
    """(scale, its reciprocal, zero) of each token's own grid, its range narrowed to `clip` of what the token spans.

    Computed in fp32 with one reciprocal per token, step by step as the integer kernels do, so that codes agree exactly.
    Differentiable in `clip`; a token's extremes count as constants unless the gradient shall pass `through` them.
    """
    x = (x if through else x.detach()).float()
    if fmt.symmetric:
        scale = _divide(x.abs().amax(-1, keepdim=True) * clip, fmt.code_max).clamp_min(SMALLEST_SCALE)
        return scale, 1.0 / scale, torch.zeros_like(scale)
    low = x.amin(-1, keepdim=True).clamp_max(0.0) * clip
    high = x.amax(-1, keepdim=True).clamp_min(0.0) * clip
    scale = _divide(high - low, 2**fmt.bits - 1).clamp_min(SMALLEST_SCALE)
    inverse = 1.0 / scale
    return scale, inverse, (_round(-low * inverse) + fmt.code_min).clamp(fmt.code_min, fmt.code_max)


def quantize_activation(
    x: Float[Tensor, "*b n"], fmt: NumberFormat, clip: float = 1.0
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
    """(codes, scale, zero) of each token; codes are floats that hold whole numbers."""
    scale, inverse, zero = activation_grid(x, fmt, clip)
    x = x.float()
    if fmt.symmetric:
        return (x * inverse).clamp(fmt.code_min, fmt.code_max).round(), scale, zero
    return ((x * inverse).round() + zero).clamp(fmt.code_min, fmt.code_max), scale, zero


def fake_quantize_activation(
    x: Float[Tensor, "*b n"],
    fmt: NumberFormat,
    clip: Float[Tensor, ""] | float = 1.0,
    slices: int = 1,
    *,
    through: bool = False,
) -> Float[Tensor, "*b n"]:
    """Activations rounded to each token's grid, or to one for each of `slices` parts of a token, in their own dtype;
    differentiable in x and clip, and with `through` in the extremes of a grid's values as well, which is how a rotation
    learns to make them smaller."""
    parts = x if slices == 1 else x.unflatten(-1, (slices, -1))
    scale, inverse, zero = activation_grid(parts, fmt, clip, through=through)
    value = _OnGrid.apply(parts.float(), scale, inverse, zero, fmt.code_min, fmt.code_max)
    return value.to(x.dtype).reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue]


def cached_grid(x: Float[Tensor, "*b n"], fmt: NumberFormat) -> tuple[Float16[Tensor, "*b 1"], Float16[Tensor, "*b 1"]]:
    """(scale, offset) of each row of keys or values: value = u * scale + offset with u from 0 to 2^bits - 1.

    The grid starts at the row's smallest value, and its two numbers are kept in float16. Computed in fp32 step by step
    as the kernels that pack a cache do, so that codes agree exactly.
    """
    x = x.detach().float()
    offset = x.amin(-1, keepdim=True).clamp(-_HALF.max, _HALF.max).half()
    span = _divide(x.amax(-1, keepdim=True) - offset.float(), 2**fmt.bits - 1)
    return span.clamp(_HALF.smallest_normal, _HALF.max).half(), offset


def fake_quantize_cached(x: Float[Tensor, "*b n"], fmt: NumberFormat) -> Float[Tensor, "*b n"]:
    """Keys or values of heads `n` wide as a cache of `fmt` gives them back, in their own dtype.

    Differentiable in x, straight through the rounding; a row's extremes count as constants.
    """
    scale, offset = (part.float() for part in cached_grid(x, fmt))
    zero, last = torch.zeros_like(scale), 2**fmt.bits - 1
    rounded = _OnGrid.apply(x.float() - offset, scale, 1.0 / scale, zero, 0, last)
    return (rounded + offset).to(x.dtype)  # pyright: ignore[reportOperatorIssue]


class LearnedRange(nn.Module):
    """Learned weight clipping: the range of each group is sigmoid(logit) of its minimum and of its maximum."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.low_logit = nn.Parameter(torch.full((rows, groups), CLIP_START))
        self.high_logit = nn.Parameter(torch.full((rows, groups), CLIP_START))

    def forward(
        self, weight: Float[Tensor, "rows columns"], fmt: NumberFormat
    ) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """(low, high) for this weight."""
        low, high = weight_range(weight, fmt)
        return low * self.low_logit.sigmoid().to(low), high * self.high_logit.sigmoid().to(high)


def to_integers(codes: Float[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Whole-number floats as int8."""
    return codes.to(torch.int8)


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once on every device: by a plain number, CUDA would multiply with its reciprocal."""
    return x / torch.full_like(x, by, requires_grad=False)


def _round(x: Tensor) -> Tensor:
    return _Round.apply(x)  # pyright: ignore[reportReturnType]
