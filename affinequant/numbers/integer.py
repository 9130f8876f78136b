"""Integer grids: ranges to scales, values to codes, and the straight-through forms that training needs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.numbers import Grid
from affinequant.recipe.scheme import NumberFormat

SMALLEST_SCALE = 1e-8


def integers(fmt: NumberFormat) -> Grid:
    """The grid of integers of this format: a cached head's starts anywhere, all others have zero among their points."""
    return Cached(fmt) if fmt.granularity == "head" else Integer(fmt)


@dataclass(frozen=True, slots=True)
class Integer:
    """Signed integers: value = (code - zero) * scale, with a code for zero.

    A token's are computed with one reciprocal a row, step by step as the integer kernels do, so that codes agree
    exactly; those of weights, made once, by division.
    """

    WIDER: ClassVar[tuple[float, ...]] = ()
    fmt: NumberFormat

    def range(self, x: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
        """Smallest and largest value, zero always inside."""
        if self.fmt.symmetric and self.fmt.dynamic:
            reach = x.abs().amax(-1, keepdim=True)
            return -reach, reach
        return x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)

    def params(
        self, low: Float[Tensor, "*s"], high: Float[Tensor, "*s"], store: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """(scale, zero). Scales are rounded to `store` here, so that codes fit what engines read."""
        if self.fmt.symmetric:
            scale = _divide(torch.maximum(high, -low), self.fmt.code_max)
        else:
            scale = _divide(high - low, 2**self.fmt.bits - 1)
        scale = scale.clamp_min(max(SMALLEST_SCALE, torch.finfo(store).smallest_normal))
        if store != torch.float32:
            scale = self.kept(scale, store)
        if self.fmt.symmetric:
            return scale, torch.zeros_like(scale)
        zero = _round(self._steps(-low, scale)) + self.fmt.code_min
        return scale, zero.clamp(self.fmt.code_min, self.fmt.code_max)

    def nearest(self, x: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """round(x / scale) + zero, as far as there are codes."""
        return self._steps(x, scale, out).round_().add_(zero).clamp_(self.fmt.code_min, self.fmt.code_max)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """(code - zero) * scale."""
        left = torch.sub(codes, zero, out=out)
        return left * scale if scale.requires_grad else left.mul_(scale)

    def fake(
        self,
        x: Float[Tensor, "*b n"],
        low: Float[Tensor, "*b 1"],
        high: Float[Tensor, "*b 1"],
        store: torch.dtype = torch.float32,
    ) -> Float[Tensor, "*b n"]:
        """By one reciprocal a row, for weights too: where that falls on the other side of a tie, a code is one off."""
        scale, zero = self.params(low, high, store)
        return on_grid(x, scale, zero, self.fmt.code_min, self.fmt.code_max)

    def kept(self, scale: Tensor, store: torch.dtype = torch.float32) -> Tensor:
        """The scale in `store`."""
        return scale + (scale.detach().to(store).to(scale.dtype) - scale.detach())

    def _steps(self, x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(x, 1.0 / scale, out=out) if self.fmt.dynamic else torch.div(x, scale, out=out)


@dataclass(frozen=True, slots=True)
class Cached:
    """Unsigned integers from a row's smallest value on: value = code * scale + zero, both kept in float16.

    So a cache keeps the keys or values of one token and head. Computed in fp32 step by step as the kernels that pack a
    cache do, so that codes agree exactly.
    """

    WIDER: ClassVar[tuple[float, ...]] = ()
    fmt: NumberFormat

    @property
    def last(self) -> int:
        """Largest code."""
        return 2**self.fmt.bits - 1

    def range(self, x: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
        """Smallest and largest value."""
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)

    def params(
        self, low: Float[Tensor, "*s"], high: Float[Tensor, "*s"], store: torch.dtype = torch.float16
    ) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """(scale, zero), here in the dtype `store` itself."""
        limits = torch.finfo(store)
        zero = low.clamp(-limits.max, limits.max).to(store)
        span = _divide(high - zero.float(), self.last)
        return span.clamp(limits.smallest_normal, limits.max).to(store), zero

    def nearest(self, x: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """round((x - zero) / scale), as far as there are codes."""
        return torch.sub(x, zero.float(), out=out).mul_(1.0 / scale.float()).clamp_(0, self.last).round_()

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """code * scale + zero."""
        return torch.mul(codes, scale.float(), out=out).add_(zero.float())

    def fake(
        self,
        x: Float[Tensor, "*b n"],
        low: Float[Tensor, "*b 1"],
        high: Float[Tensor, "*b 1"],
        store: torch.dtype = torch.float16,
    ) -> Float[Tensor, "*b n"]:
        """As the cache gives x back."""
        scale, zero = (part.float() for part in self.params(low, high, store))
        return on_grid(x - zero, scale, torch.zeros_like(scale), 0, self.last) + zero

    def kept(self, scale: Tensor, store: torch.dtype = torch.float16) -> Tensor:
        """The scale in `store`."""
        return scale.to(store).to(scale.dtype)


def on_grid(
    x: Float[Tensor, "*b n"], scale: Float[Tensor, "*b 1"], zero: Float[Tensor, "*b 1"], low: int, high: int
) -> Float[Tensor, "*b n"]:
    """x to the nearest (code - zero) * scale with a whole code from `low` to `high`, with straight-through gradients."""
    return _OnGrid.apply(x, scale, 1.0 / scale.detach(), zero, low, high)  # pyright: ignore[reportReturnType]


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


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, *grad: Tensor) -> Tensor:
        return grad[0]


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once on every device: by a plain number, CUDA would multiply with its reciprocal."""
    return x / torch.full_like(x, by, requires_grad=False)


def _round(x: Tensor) -> Tensor:
    return _Round.apply(x)  # pyright: ignore[reportReturnType]
