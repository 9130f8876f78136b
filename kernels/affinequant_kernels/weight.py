"""A quantised weight as plain tensors, what every linear op takes.

    value = (code - zero) * mul * scale          codes signed: [-8, 7] at 4 bits, [-128, 127] at 8

| kind      | scale     | zero             | mul          | accumulator                                              |
|-----------|-----------|------------------|--------------|----------------------------------------------------------|
| "channel" | [n]       | None or [n]      | None         | one int32 over all of k                                  |
| "integer" | [n]       | None or [n, g]   | uint8 [n, g] | one int32 over all of k: (code - zero) * mul fits int8   |
| "group"   | [n, g]    | None or [n, g]   | None         | int32 within a group, fp32 across groups                 |

What it is multiplied by is quantised in whole rows, or in groups of columns, each with its own scale and zero point: the
weight says which by its `colsum`. Beside groups of rows a weight has one scale and zero per channel, or groups as large.

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
    # int32 [n]: sum over k of (code - zero) * mul; kind "group": float32 [n], of (code - zero) * scale.
    # For rows in groups int32 [n, g]: sums over the columns of each, of code - zero.
    colsum: Tensor

    def to(self, device: torch.device | str) -> Weight:
        """The same weight on another device."""
        return Weight(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


def kind_of(scale: Tensor, mul: Tensor | None) -> Kind:
    """Which of the three kinds of weight these tensors describe."""
    if scale.ndim == 2:
        return "group"
    return "channel" if mul is None else "integer"


def row_group(weight: Weight, k: int) -> int:
    """Columns that share a scale and a zero point in the rows which this weight of k columns multiplies; 0: all of them."""
    return k // weight.colsum.shape[1] if weight.colsum.ndim == 2 else 0


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
    codes: Int8[Tensor, "n k"], scale: Tensor, zero: Tensor | None, mul: Tensor | None, act_group: int = 0
) -> Float[Tensor, " n"] | Int[Tensor, " n *g"]:
    """What an activation zero point is multiplied by: `Weight.colsum`. Groups of a weight are added in order, in fp32;
    those of rows stay apart."""
    value = integer_weight(codes, zero, mul)
    if act_group:
        return value.unflatten(1, (-1, act_group)).sum(2, dtype=torch.int32)
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
    act_group: int = 0,
) -> Weight:
    """Pack signed codes and their scales. Everything is checked here, once, so that the ops need not look at values.

    A scale or zero of shape [n, 1] counts as per channel. A zero per group beside a scale per channel makes kind
    "integer". `act_group`: the columns of a row that share a scale where rows are quantised in groups; 0 for whole rows.
    Raises ValueError for codes out of range, groups that do not divide k or are not those of the rows, scales that are
    not finite, or (code - zero) * mul that does not fit int8.
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
    _check_act_group(codes.shape[1], scale, mul, act_group)
    scale = scale.float().contiguous()
    qweight = layout.pack_hs128(codes) if bits == 4 else codes
    return Weight(qweight, scale, zero, mul, column_sum(codes, scale, zero, mul, act_group))


def _check_act_group(k: int, scale: Tensor, mul: Tensor | None, size: int) -> None:
    if size and (size < 0 or k % size):
        raise fail("act_group", f"a size that divides {k} columns", size)
    if size and mul is not None:
        raise fail("mul", "none beside rows in groups", list(mul.shape))
    if size and scale.ndim == 2 and k // scale.shape[1] != size:
        raise fail("act_group", f"the {k // scale.shape[1]} columns of the weight's own groups", size)


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

    Any range will do at per-channel kinds (it is repacked); with groups, of the weight or of the rows, start and stop must
    lie on group boundaries.
    """
    if not 0 <= start < stop <= k:
        raise fail("start, stop", f"a range within {k} columns", (start, stop))
    codes = unpack(weight.qweight, k)[:, start:stop].contiguous()
    groups = next((t.shape[1] for t in (weight.mul, weight.scale) if t is not None and t.ndim == 2), None)
    parts, act_group = [weight.scale, weight.zero, weight.mul], row_group(weight, k)
    size = act_group if groups is None else k // groups
    if size and (start % size or stop % size):
        raise fail("start, stop", f"multiples of the group size {size}", (start, stop))
    if groups is not None:
        cut = slice(start // size, stop // size)
        parts = [t if t is None or t.ndim == 1 else t[:, cut].contiguous() for t in parts]
    scale, zero, mul = parts
    assert scale is not None
    bits = 4 if weight.qweight.dtype == torch.uint8 else 8
    qweight = layout.pack_hs128(codes) if bits == 4 else codes
    return Weight(qweight, scale, zero, mul, column_sum(codes, scale, zero, mul, act_group))
