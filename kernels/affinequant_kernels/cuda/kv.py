"""Triton: a key-value cache in 4 bits. Equal to `reference.kv_pack` and `reference.kv_unpack`.

Shapes: ROWS = tokens * heads, D values of a head, H = D / 2 bytes.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

_MAGIC = tl.constexpr(8388608.0)  # 2^23: adding it to a number in 0..15 leaves its rounding in the low byte
_LARGEST = tl.constexpr(65504.0)
_LEAST = tl.constexpr(2.0**-14)


@triton.jit
def _steps(value, zero, inverse):
    scaled = (value - zero[:, None]) * inverse[:, None]
    scaled = tl.minimum(tl.maximum(scaled, 0.0), 15.0)
    return (scaled + _MAGIC).to(tl.int32, bitcast=True) & 15


@triton.jit(do_not_specialize=["ROWS"])
def pack_kernel(k_ptr, out_ptr, scale_ptr, zero_ptr, ROWS, H: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    j = tl.arange(0, P)
    mask = (rows < ROWS)[:, None] & (j < H)[None, :]
    at = rows[:, None] * (2 * H) + j[None, :]
    low = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(k_ptr + at + H, mask=mask, other=0.0).to(tl.float32)
    infinity = float("inf")
    least = tl.min(tl.where(mask, tl.minimum(low, high), infinity), 1)
    greatest = tl.max(tl.where(mask, tl.maximum(low, high), -infinity), 1)
    zero16 = tl.minimum(tl.maximum(least, -_LARGEST), _LARGEST).to(tl.float16)
    zero = zero16.to(tl.float32)
    step = tl.div_rn(greatest - zero, tl.full([R], 15.0, tl.float32))
    scale16 = tl.minimum(tl.maximum(step, _LEAST), _LARGEST).to(tl.float16)
    inverse = tl.div_rn(tl.full([R], 1.0, tl.float32), scale16.to(tl.float32))
    byte = _steps(low, zero, inverse) | (_steps(high, zero, inverse) << 4)
    tl.store(out_ptr + rows[:, None] * H + j[None, :], byte.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + rows, scale16, mask=rows < ROWS)
    tl.store(zero_ptr + rows, zero16, mask=rows < ROWS)


@triton.jit(do_not_specialize=["ROWS"])
def unpack_kernel(in_ptr, scale_ptr, zero_ptr, out_ptr, ROWS, H: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    j = tl.arange(0, P)
    mask = (rows < ROWS)[:, None] & (j < H)[None, :]
    byte = tl.load(in_ptr + rows[:, None] * H + j[None, :], mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + rows, mask=rows < ROWS, other=0.0).to(tl.float32)[:, None]
    zero = tl.load(zero_ptr + rows, mask=rows < ROWS, other=0.0).to(tl.float32)[:, None]
    at = rows[:, None] * (2 * H) + j[None, :]
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, ((byte & 15).to(tl.float32) * scale + zero).to(kind), mask=mask)
    tl.store(out_ptr + at + H, ((byte >> 4).to(tl.float32) * scale + zero).to(kind), mask=mask)


def _launch(kernel, rows: int, half: int, *tensors: Tensor) -> None:
    padded = triton.next_power_of_2(half)
    tile = max(1, min(64, 4096 // padded))
    if rows:
        # Fusing u * scale + zero into one rounding would differ from the reference.
        kernel[(triton.cdiv(rows, tile),)](
            *tensors, rows, H=half, P=padded, R=tile, num_warps=4, enable_fp_fusion=False
        )


def kv_pack(
    k: Float[Tensor, "t h d"],
) -> tuple[UInt8[Tensor, "t h half"], Float16[Tensor, "t h"], Float16[Tensor, "t h"]]:
    """As `reference.kv_pack`."""
    t, h, d = k.shape
    packed = torch.empty(t, h, d // 2, dtype=torch.uint8, device=k.device)
    scale = torch.empty(t, h, dtype=torch.float16, device=k.device)
    zero = torch.empty_like(scale)
    _launch(pack_kernel, t * h, d // 2, k, packed, scale, zero)
    return packed, scale, zero


def kv_unpack(
    packed: UInt8[Tensor, "t h half"],
    scale: Float16[Tensor, "t h"],
    zero: Float16[Tensor, "t h"],
    out_dtype: torch.dtype,
) -> Float[Tensor, "t h d"]:
    """As `reference.kv_unpack`."""
    t, h, half = packed.shape
    out = torch.empty(t, h, 2 * half, dtype=out_dtype, device=packed.device)
    _launch(unpack_kernel, t * h, half, packed, scale, zero, out)
    return out
