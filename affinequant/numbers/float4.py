"""Grids of 4-bit floats (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) in blocks, as hardware computes them.

MXFP4 (OCP Microscaling) has blocks of 32 whose scales are powers of two. NVFP4 has blocks of 16 whose scales are 8-bit
floats (E4M3), counted in a unit of the whole tensor's. Engines hold any float as that unit; here it is a power of two, so
that scales and what codes stand for are exact in 16 bits. All else is rounded as compressed-tensors and vLLM round it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.recipe.scheme import NumberFormat

LARGEST = 6.0
"""What a block's largest value becomes, in its scale."""
SCALE_MOST = 448.0
"""Largest scale of NVFP4, in units."""
SCALE_EMPTY = 0.125
"""The scale of a block that is too small for any, in units: its values are 0. So compressed-tensors keeps it."""
SCALE_START = 128.0
"""The tensor's largest scale lies from here to twice that, in units: it may grow by another 75 %."""
SMALLEST = 2.0**-120
QUARTER = 1 << 21
"""Of a power of two, in the bits of a float's fraction."""


class _Floats(ABC):
    """What both have in common: value = code / 2 * scale, with a code from -12 to 12 and no zero point."""

    __slots__ = ()
    WIDER: ClassVar[tuple[float, ...]] = ()

    def range(self, x: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
        """The largest magnitude on both sides."""
        reach = x.abs().amax(-1, keepdim=True)
        return -reach, reach

    @abstractmethod
    def scale_of(self, reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The scale of a block whose largest magnitude this is; the gradient passes straight through its rounding."""

    def params(
        self, low: Float[Tensor, "*s"], high: Float[Tensor, "*s"], store: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """(scale, 0)."""
        reach = torch.maximum(high, -low)
        return self.scale_of(reach), torch.zeros_like(reach)

    def nearest(self, x: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """Twice the 4-bit float that is nearest to x / scale; of two that are as near, the even one."""
        return _to_floats(torch.div(x, scale, out=out)).mul_(2)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """code / 2 * scale."""
        return torch.mul(codes, scale * 0.5, out=out)

    def fake(
        self,
        x: Float[Tensor, "*b n"],
        low: Float[Tensor, "*b 1"],
        high: Float[Tensor, "*b 1"],
        store: torch.dtype = torch.float32,
    ) -> Float[Tensor, "*b n"]:
        """As the codes give x back."""
        return _on_floats(x, self.params(low, high, store)[0])


@dataclass(frozen=True, slots=True)
class MXFP4(_Floats):
    """Scales are powers of two, from 2^-120 on.

    A block's is that of its largest value less two: floor(log2(reach)) - 2, where a reach from 1.75 times a power of two
    on counts as the next one, since it would round to 8 in a scale that ends at 6. OCP's own rule has plain floors.
    """

    fmt: NumberFormat

    def scale_of(self, reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The power of two."""
        scale = (_power_below(reach.detach(), QUARTER) / 4).clamp_min(SMALLEST)
        return _through(reach / LARGEST, scale)

    def kept(self, scale: Tensor, store: torch.dtype = torch.float32) -> Tensor:
        """The power of two that is nearest by ratio."""
        return _through(scale, _power_below(scale.detach() * 2**0.5).clamp_min(SMALLEST))


@dataclass(frozen=True, slots=True)
class NVFP4(_Floats):
    """Scales are 8-bit floats in units of `unit`; None for that of each tensor by itself (`unit_of`).

    Between 4 and 6 lies nothing: a block may lose less where its largest value becomes 4 (Four Over Six, arXiv 2512.02010),
    or anything between the two.
    """

    WIDER: ClassVar[tuple[float, ...]] = (1.1, 1.2, 1.3, 1.4, 1.5)
    fmt: NumberFormat
    unit: float | None = None

    def scale_of(self, reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """reach / 6, rounded."""
        return self.kept(_divide(reach))

    def kept(self, scale: Tensor, store: torch.dtype = torch.float32) -> Tensor:
        """The nearest 8-bit float."""
        return _through(scale, self._rounded(scale.detach()))

    def _rounded(self, scale: Tensor) -> Tensor:
        unit = unit_of(scale) if self.unit is None else self.unit
        counted = (scale / unit).clamp_max(SCALE_MOST).to(torch.float8_e4m3fn).to(scale.dtype)
        return torch.where(counted > 0, counted, SCALE_EMPTY) * unit


def unit_of(scale: Tensor) -> Float[Tensor, ""]:
    """The unit, a power of two, of a tensor with these scales."""
    return (_power_below(scale.max()) / SCALE_START).clamp_min(SMALLEST)


def _on_floats(x: Float[Tensor, "*b n"], scale: Float[Tensor, "*b 1"]) -> Float[Tensor, "*b n"]:
    return _OnFloats.apply(x, scale)  # pyright: ignore[reportReturnType]


class _OnFloats(torch.autograd.Function):
    """x to the nearest 4-bit float times scale. The gradient passes to x as far as the floats reach, the scale receives
    what rounding left over."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        steps = x / scale
        if not any(ctx.needs_input_grad):
            return _to_floats(steps).mul_(scale)
        inside = steps.abs() <= LARGEST
        floats = _to_floats(steps.clone())
        value = floats * scale
        ctx.save_for_backward(floats.sub_(steps.mul_(inside)), inside)
        return value

    @staticmethod
    def backward(ctx, *grads: Tensor):
        left, inside = ctx.saved_tensors
        grad = grads[0]
        to_scale = (grad * left).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return (grad * inside if ctx.needs_input_grad[0] else None), to_scale


def _to_floats(x: Tensor) -> Tensor:
    """Each x as the nearest E2M1, in place: steps are 0.5 below 2, 1 below 4, and 2 up to 6."""
    x.clamp_(-LARGEST, LARGEST)
    step = _power_below(x.abs().clamp_min_(1.0)).mul_(0.5)
    return x.div_(step).round_().mul_(step)


def _power_below(x: Tensor, more: int = 0) -> Tensor:
    """The largest power of two that is no more than x >= 0, by its bits, with `more` added to the fraction before; 0 below
    the normal floats."""
    bits = x.to(torch.float32).view(torch.int32)
    return (bits + more).bitwise_and_(0x7F800000).view(torch.float32).to(x.dtype)


def _divide(reach: Tensor) -> Tensor:
    """reach / 6, rounded once on every device: by a plain number, CUDA would multiply with its reciprocal."""
    return reach / torch.full_like(reach, LARGEST, requires_grad=False)


class _Through(torch.autograd.Function):
    """`rounded` to the bit, with the gradient passing straight through to `value`."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, *grad: Tensor):
        return grad[0], None


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    return _Through.apply(value, rounded)  # pyright: ignore[reportReturnType]
