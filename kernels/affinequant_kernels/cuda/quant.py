"""Triton: row quantisers, alone or fused with what comes before them. Equal to reference.py.

The reference says how to quantise a row y. Fused kernels compute y themselves, with the reference's roundings but their
own order of summation, so y may differ in the last bit; given its y, a kernel's codes are exact.

Shapes: M rows, K columns, R rows of a tile.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels.checks import fail
from affinequant_kernels.reference import Rows, in_groups

# Columns held in registers; longer rows are read once more (out of the cache).
BLOCK_COLUMNS = 8192
NORM_COLUMNS = 32768  # a normalised row is always held whole
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the rounded integer in the low bits
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def row_statistics(y):
    """Per row: the largest |y| as int32 bits (NaN counts as more than infinity), the least and the greatest value."""
    magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, 1), tl.min(y, 1), tl.max(y, 1)


@triton.jit
def row_scale(top, bottom, ceiling, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale, its reciprocal and zero point (fp32 each), as `reference.row_quant`."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    largest = top.to(tl.float32, bitcast=True)
    if SYMMETRIC:
        scale = tl.maximum(tl.div_rn(largest * clip, tl.full(top.shape, HALF - 1.0, tl.float32)), 1e-8)
    else:
        bottom = tl.minimum(bottom, 0.0) * clip
        ceiling = tl.maximum(ceiling, 0.0) * clip
        scale = tl.maximum(tl.div_rn(ceiling - bottom, tl.full(top.shape, 2.0 * HALF - 1.0, tl.float32)), 1e-8)
    scale = tl.where(top >= _INFINITY, largest, scale)
    inverse = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = (-bottom * inverse + _MAGIC) - _MAGIC - HALF
        zero = tl.minimum(tl.maximum(zero, -1.0 * HALF), HALF - 1.0)
        zero = tl.where(top >= _INFINITY, 0.0, zero)
    return scale, inverse, zero


@triton.jit
def row_codes(y, inverse, zero, BITS: tl.constexpr):
    """int8 codes. Clamping before rounding gives the same, and keeps the magic sum from becoming a fused multiply-add."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    low = -1.0 * HALF - zero
    high = HALF - 1.0 - zero
    scaled = tl.minimum(tl.maximum(y * inverse[:, None], low[:, None]), high[:, None])
    # The low byte of the sum's bits is the integer: no conversion instruction is needed.
    bits = (scaled + _MAGIC).to(tl.int32, bitcast=True) + zero.to(tl.int32)[:, None]
    return bits.to(tl.int8)


@triton.jit
def store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, inside):
    tl.store(scale_ptr + rows, scale, mask=inside)
    tl.store(zero_ptr + rows, zero.to(tl.int32), mask=inside)
    tl.store(sum_ptr + rows, total, mask=inside)


@triton.jit
def _tile(x_ptr, rows, columns, mask, stride, K, SILU_MUL: tl.constexpr):
    """A tile of y in fp32, with the roundings that separate ops in x's type would make."""
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    y = x.to(tl.float32)
    if SILU_MUL:
        up = tl.load(x_ptr + rows[:, None] * stride + K + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(x.dtype).to(tl.float32)
        y = (y * up).to(x.dtype).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, K, stride, clip,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, SILU_MUL: tl.constexpr, STORE_Y: tl.constexpr,
    SINGLE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`row_quant`, or `silu_mul_quant` of rows [gate | up]. SINGLE: a row fits one tile."""
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = rows < M
    columns = tl.arange(0, BK)
    top = tl.zeros([R], tl.int32)
    bottom = tl.zeros([R], tl.float32)
    ceiling = tl.zeros([R], tl.float32)
    y = tl.zeros([R, BK], tl.float32)
    for start in range(0, K, BK):
        mask = inside[:, None] & (start + columns < K)[None, :]
        y = _tile(x_ptr, rows, start + columns, mask, stride, K, SILU_MUL)
        t, b, c = row_statistics(y)
        top, bottom, ceiling = tl.maximum(top, t), tl.minimum(bottom, b), tl.maximum(ceiling, c)
    scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
    total = tl.zeros([R], tl.int32)
    for start in range(0, K, BK):
        mask = inside[:, None] & (start + columns < K)[None, :]
        if not SINGLE:
            y = _tile(x_ptr, rows, start + columns, mask, stride, K, SILU_MUL)
        q = row_codes(y, inverse, zero, BITS)
        total += tl.sum(tl.where(mask, q, 0).to(tl.int32), 1)
        tl.store(q_ptr + rows[:, None] * K + start + columns[None, :], q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + rows[:, None] * K + start + columns[None, :], y, mask=mask)
    store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, inside)


@triton.jit(do_not_specialize=["M"])
def rmsnorm_kernel(
    x_ptr, residual_ptr, gain_ptr, hidden_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, K, eps, clip,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STORE_Y: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row: hidden = x + residual; y = gain * (hidden * rsqrt(mean(hidden^2) + eps)); quantise y."""
    rows = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    inside = rows < M
    columns = tl.arange(0, BK)
    mask = inside[:, None] & (columns < K)[None, :]
    at = rows[:, None] * K + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    kind = x.dtype
    h = x.to(tl.float32)
    if HAS_RESIDUAL:
        h = (h + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(kind)
        tl.store(hidden_ptr + at, h, mask=mask)
        h = h.to(tl.float32)
    mean = tl.sum(h * h, 1) / K
    y = (h * (1.0 / tl.sqrt_rn(mean + eps))[:, None]).to(kind).to(tl.float32)
    gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    y = (y * gain[None, :]).to(kind).to(tl.float32)
    top, bottom, ceiling = row_statistics(y)
    scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
    q = row_codes(y, inverse, zero, BITS)
    tl.store(q_ptr + at, q, mask=mask)
    if STORE_Y:
        tl.store(y_ptr + at, y, mask=mask)
    total = tl.sum(tl.where(mask, q, 0).to(tl.int32), 1)
    store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, inside)


def new_rows(m: int, k: int, device: torch.device) -> Rows:
    """Uninitialised outputs of a quantiser."""
    integers = torch.empty(2, m, dtype=torch.int32, device=device)
    scale = torch.empty(m, dtype=torch.float32, device=device)
    return Rows(torch.empty(m, k, dtype=torch.int8, device=device), scale, integers[0], integers[1])


def _launch_rows(x: Tensor, k: int, bits: int, symmetric: bool, clip: float, silu_mul: bool, y: Tensor | None) -> Rows:
    m = x.shape[0]
    out = new_rows(m, k, x.device)
    block = min(triton.next_power_of_2(k), BLOCK_COLUMNS)
    rows = max(1, min(16, 2048 // block))
    if m:
        rows_kernel[(triton.cdiv(m, rows),)](
            x, out.q, out.scale, out.zero, out.rowsum, out.q if y is None else y, m, k, x.stride(0), clip,
            BITS=bits, SYMMETRIC=symmetric, SILU_MUL=silu_mul, STORE_Y=y is not None,
            SINGLE=k <= block, R=rows, BK=block, num_warps=8 if block >= 4096 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def row_quant(x: Float[Tensor, "m k"], *, bits: int, symmetric: bool, clip: float, group: int = 0) -> Rows:
    """As `reference.row_quant`."""
    if group:
        return in_groups(_launch_rows(x.view(-1, group), group, bits, symmetric, clip, False, None), *x.shape)
    return _launch_rows(x, x.shape[1], bits, symmetric, clip, False, None)


def silu_mul_quant(
    gate_up: Float[Tensor, "m two_k"], *, bits: int, symmetric: bool, clip: float, y: Tensor | None = None
) -> Rows:
    """As `reference.silu_mul_quant`. `y` (fp32 [m, k]), where given, receives what was quantised."""
    return _launch_rows(gate_up, gate_up.shape[1] // 2, bits, symmetric, clip, True, y)


def rmsnorm_quant(
    x: Float[Tensor, "m k"],
    residual: Float[Tensor, "m k"] | None,
    gain: Float[Tensor, " k"],
    eps: float,
    *,
    bits: int,
    symmetric: bool,
    clip: float,
    y: Tensor | None = None,
) -> tuple[Rows, Float[Tensor, "m k"]]:
    """As `reference.rmsnorm_quant`: the quantised rows and x + residual."""
    m, k = x.shape
    if k > NORM_COLUMNS:
        raise fail("x", f"at most {NORM_COLUMNS} columns", k)
    out = new_rows(m, k, x.device)
    # An op must not return its own input: without a residual the hidden state is a copy.
    hidden = x.clone() if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(k)
    if m:
        rmsnorm_kernel[(m,)](
            x, x if residual is None else residual, gain, hidden,
            out.q, out.scale, out.zero, out.rowsum, out.q if y is None else y, m, k, eps, clip,
            BITS=bits, SYMMETRIC=symmetric, HAS_RESIDUAL=residual is not None, STORE_Y=y is not None, BK=block,
            num_warps=16 if block > 8192 else 8 if block >= 4096 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, hidden
