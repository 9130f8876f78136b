"""What a number format can hold, and the nearest of it to a value.

A format's arithmetic is one class, its `Grid`: whoever rounds asks it and knows no bits. `weights.py` and
`activations.py` say which values share a grid, whatever grid it is.
"""

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from affinequant.recipe.scheme import NumberFormat

if TYPE_CHECKING:  # names alone are asked for without torch
    import torch
    from torch import Tensor


class Grid(Protocol):
    """The values that `fmt` has for a row: points that a scale and a zero place, each named by a whole number, its code.

    `fmt` says how many bits a code takes, and what a row is: an output channel, a group of inputs, a token, a token's
    head. `low`, `high`, `scale` and `zero` belong to rows and broadcast against what lies in them.
    """

    WIDER: ClassVar[tuple[float, ...]]
    """By how much more than what a row holds its grid may span and err less; a search tries these."""

    @property
    def fmt(self) -> NumberFormat:
        """Bits, symmetry (whether zero is 0 for every row, and kept nowhere) and the axis of the scales."""
        ...

    def range(self, x: "Tensor") -> "tuple[Tensor, Tensor]":
        """(low, high) [*rows, 1] that the grids of the rows x [*rows, n] span when nothing narrows them."""
        ...

    def params(self, low: "Tensor", high: "Tensor", store: "torch.dtype" = ...) -> "tuple[Tensor, Tensor]":
        """(scale, zero) of the grids over [low, high], rounded to `store`, the dtype in which scales are kept.
        Differentiable in the range, straight through the roundings."""
        ...

    def nearest(self, x: "Tensor", scale: "Tensor", zero: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        """The codes nearest to x, as floats that hold whole numbers; without gradients."""
        ...

    def value(self, codes: "Tensor", scale: "Tensor", zero: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        """What codes stand for: a new tensor, or `out`. Differentiable in the scale."""
        ...

    def fake(self, x: "Tensor", low: "Tensor", high: "Tensor", store: "torch.dtype" = ...) -> "Tensor":
        """Each x [*rows, n] as the nearest value over [low, high], with straight-through gradients to x and the range."""
        ...

    def kept(self, scale: "Tensor", store: "torch.dtype" = ...) -> "Tensor":
        """The nearest scale that can be stored; the gradient passes straight through."""
        ...


GRIDS: dict[str, str] = {
    "int": "affinequant.numbers.integer:integers",
    "nvfp4": "affinequant.numbers.float4:NVFP4",
    "mxfp4": "affinequant.numbers.float4:MXFP4",
}
"""`NumberFormat.kind` -> what makes its Grid of a NumberFormat."""


def grid_of(fmt: NumberFormat) -> Grid:
    """The arithmetic of a number format."""
    module, _, attribute = GRIDS[fmt.kind].partition(":")
    return getattr(importlib.import_module(module), attribute)(fmt)


def in_units(grid: Grid, unit: float | None) -> Grid:
    """The grid with scales that are counted in `unit`, where its format has one (`NumberFormat.has_unit`)."""
    return replace(grid, unit=unit) if grid.fmt.has_unit else grid  # pyright: ignore[reportArgumentType, reportCallIssue]


def unit_for(grid: Grid, reach: "Tensor") -> float | None:
    """The unit of a tensor whose blocks reach so far; None where the format has none."""
    if not grid.fmt.has_unit:
        return None
    from affinequant.numbers.float4 import LARGEST, unit_of

    return float(unit_of(reach / LARGEST))
