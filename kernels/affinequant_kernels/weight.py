"""A quantised weight as plain tensors, what every linear op takes.

    value = (code - zero) * mul * scale          codes signed: [-8, 7] at 4 bits, [-128, 127] at 8

| kind      | scale     | zero             | mul          | accumulator                                              |
|-----------|-----------|------------------|--------------|----------------------------------------------------------|
| "channel" | [n]       | None or [n]      | None         | one int32 over all of k                                  |
| "integer" | [n]       | None or [n, g]   | uint8 [n, g] | one int32 over all of k: (code - zero) * mul fits int8   |
| "group"   | [n, g]    | None or [n, g]   | None         | int32 within a group, fp32 across groups                 |

Shapes: n rows (output features), k columns (input features), g groups of k/g consecutive columns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Int8, Int16, UInt8
from torch import Tensor

from affinequant_kernels import layout
from affinequant_kernels.checks import FLOATS, check_finite, check_tensor, fail

Kind = Literal["channel", "integer", "group"]


class Weight(NamedTuple):
    """A quantised weight, as plain tensors: for a state dict, torch.compile and other devices nothing special."""

    qweight: Tensor  # uint8 [n, ceil(k/128)*64] in layout hs128 (4 bits), or int8 [n, k] (8 bits)
    scale: Tensor  # float32 [n] or [n, g]
    zero: Tensor | None  # int8 [n] or [n, g]
    mul: Tensor | None  # uint8 [n, g]
    colsum: Tensor  # int32 [n]: sum over k of (code - zero) * mul; kind "group": float32 [n], of (code - zero) * scale

    def to(self, device: torch.device | str) -> Weight:
        """The same weight on another device."""
        return Weight(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


def kind_of(scale: Tensor, mul: Tensor | None) -> Kind:
    """Which of the three kinds of weight these tensors describe."""
    if scale.ndim == 2:
        return "group"
    return "channel" if mul is None else "integer"


def unpack(qweight: Tensor, k: int) -> Int8[Tensor, "n k"]:
    """Signed codes of a weight of either width."""
    return layout.unpack_hs128(qweight, k) if qweight.dtype == torch.uint8 else qweight


def integer_weight(codes: Int8[Tensor, "n k"], zero: Tensor | None, mul: Tensor | None) -> Int16[Tensor, "n k"]:
    """(code - zero) * mul, spread over the columns."""
    n, k = codes.shape
    value = codes.to(torch.int16)
    if zero is not None:
        value = (value.view(n, zero[0].numel(), -1) - zero.view(n, -1, 1)).view(n, k)
    if mul is not None:
        value = (value.view(n, mul.shape[1], -1) * mul.unsqueeze(-1)).view(n, k)
    return value


def column_sum(
    codes: Int8[Tensor, "n k"], scale: Tensor, zero: Tensor | None, mul: Tensor | None
) -> Float[Tensor, " n"] | Int[Tensor, " n"]:
    """What an activation zero point is multiplied by: `Weight.colsum`. Groups are added in order, in fp32."""
    value = integer_weight(codes, zero, mul)
    if kind_of(scale, mul) != "group":
        return value.sum(1, dtype=torch.int32)
    sums = value.unflatten(1, (scale.shape[1], -1)).sum(2, dtype=torch.int32).float() * scale
    total = sums[:, 0].clone()
    for group in range(1, scale.shape[1]):
        total += sums[:, group]
    return total


def prepare_weight(
    codes: Int8[Tensor, "n k"],
    scale: Float[Tensor, " n"] | Float[Tensor, "n g"],
    zero: Int8[Tensor, " n"] | Int8[Tensor, "n g"] | None = None,
    *,
    bits: int = 4,
    mul: UInt8[Tensor, "n g"] | None = None,
) -> Weight:
    """Pack signed codes and their scales. Everything is checked here, once, so that the ops need not look at values.

    A scale or zero of shape [n, 1] counts as per channel. A zero per group beside a scale per channel makes kind
    "integer". Raises ValueError for codes out of range, groups that do not divide k, scales that are not finite, or
    (code - zero) * mul that does not fit int8.
    """
    if bits not in (4, 8):
        raise fail("bits", "4 or 8", bits)
    check_tensor("codes", codes, (None, None), (torch.int8,))
    n = codes.shape[0]
    scale = scale.squeeze(1) if scale.ndim == 2 and scale.shape[1] == 1 else scale
    zero = zero.squeeze(1) if zero is not None and zero.ndim == 2 and zero.shape[1] == 1 else zero
    if mul is None and zero is not None and zero.ndim == 2 and scale.ndim == 1:
        mul = torch.ones_like(zero, dtype=torch.uint8)
    elif zero is not None and zero.ndim == 1 and (mul is not None or scale.ndim == 2):
        groups = mul.shape[1] if mul is not None else scale.shape[1]
        zero = zero.unsqueeze(1).expand(n, groups).contiguous()
    _check_parts(codes, scale, zero, mul, bits)
    scale = scale.float().contiguous()
    qweight = layout.pack_hs128(codes) if bits == 4 else codes
    return Weight(qweight, scale, zero, mul, column_sum(codes, scale, zero, mul))


def _check_parts(codes: Tensor, scale: Tensor, zero: Tensor | None, mul: Tensor | None, bits: int) -> None:
    n, k = codes.shape
    if k == 0:
        raise fail("codes", "at least one column", list(codes.shape))
    check_tensor("scale", scale, (n,) if scale.ndim == 1 else (n, None), FLOATS, codes.device)
    check_finite("scale", scale)
    if mul is not None:
        if scale.ndim != 1:
            raise fail("mul", "none beside a scale per group", list(mul.shape))
        if bits != 4:
            raise fail("mul", "none beside 8-bit codes", list(mul.shape))
        check_tensor("mul", mul, (n, None), (torch.uint8,), codes.device)
    groups = mul.shape[1] if mul is not None else (scale.shape[1] if scale.ndim == 2 else None)
    if groups is not None and (groups == 0 or k % groups):
        raise fail("mul" if mul is not None else "scale", f"a number of groups that divides {k} columns", groups)
    if zero is not None:
        check_tensor("zero", zero, (n,) if groups is None else (n, groups), (torch.int8,), codes.device)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if int(zero.min()) < low or int(zero.max()) > high:
            raise fail("zero", f"values in [{low}, {high}]", f"[{int(zero.min())}, {int(zero.max())}]")
    if mul is not None or (groups is not None and zero is not None):
        value = integer_weight(codes, zero, mul)
        if int(value.min()) < -128 or int(value.max()) > 127:
            raise fail("(codes - zero) * mul", "values in [-128, 127]", f"[{int(value.min())}, {int(value.max())}]")


def slice_rows(weight: Weight, start: int, stop: int) -> Weight:
    """The shard of a column-parallel layer: output features start..stop."""
    n = weight.qweight.shape[0]
    if not 0 <= start < stop <= n:
        raise fail("start, stop", f"a range within {n} rows", (start, stop))
    return Weight(*(None if t is None else t[start:stop].contiguous() for t in weight))  # type: ignore[arg-type]


def slice_columns(weight: Weight, k: int, start: int, stop: int) -> Weight:
    """The shard of a row-parallel layer: input features start..stop of k. Adding the shards' outputs gives the whole.

    Any range will do at per-channel kinds (it is repacked); with groups, start and stop must lie on group boundaries.
    """
    if not 0 <= start < stop <= k:
        raise fail("start, stop", f"a range within {k} columns", (start, stop))
    codes = unpack(weight.qweight, k)[:, start:stop].contiguous()
    groups = next((t.shape[1] for t in (weight.mul, weight.scale) if t is not None and t.ndim == 2), None)
    parts = [weight.scale, weight.zero, weight.mul]
    if groups is not None:
        size = k // groups
        if start % size or stop % size:
            raise fail("start, stop", f"multiples of the group size {size}", (start, stop))
        cut = slice(start // size, stop // size)
        parts = [t if t is None or t.ndim == 1 else t[:, cut].contiguous() for t in parts]
    scale, zero, mul = parts
    assert scale is not None
    bits = 4 if weight.qweight.dtype == torch.uint8 else 8
    qweight = layout.pack_hs128(codes) if bits == 4 else codes
    return Weight(qweight, scale, zero, mul, column_sum(codes, scale, zero, mul))
