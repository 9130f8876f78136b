"""Triton: a structured transform of every row, fused with its quantisation.

`kron`: each row of n1*n2 values is a matrix X [n1, n2], and y = left^T X right, that is x (left (x) right). `block`: the
row is cut into pieces of b values, each times its own matrix [b, b], or all times one (a block-wise Hadamard transform).
The matrices are rounded to x's type, as is the product X right; sums are fp32. As in quant.py, y may differ from the
reference in its last bits, and the codes of that y are exact.

Shapes: M rows, N1 x N2 a row as a matrix (P1, P2 padded to powers of two), B the size of a block (P padded), R rows.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from . import reference
from .asm import INTERPRET
from .quant import new_rows, row_codes, row_quant, row_scale, row_statistics, store_row_scales
from .reference import Rows

# A tile of a row, and its two matrices, must fit shared memory. Larger transforms run as matmuls and `row_quant`.
LARGEST_FACTOR = 128
_RESIDENT = 4  # programs per multiprocessor that walk over the rows, keeping their matrices


@triton.jit
def _dot(a, b, FP32: tl.constexpr):
    if FP32:  # also for the interpreter, whose bf16 product is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit(do_not_specialize=["M"])
def kron_kernel(
    x_ptr, left_ptr, right_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, clip,
    N1: tl.constexpr, N2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORE_Y: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    i1, i2 = tl.arange(0, P1), tl.arange(0, P2)
    mask1, mask2 = i1 < N1, i2 < N2
    left_t = tl.load(left_ptr + i1[None, :] * N1 + i1[:, None], mask=mask1[:, None] & mask1[None, :], other=0.0)
    right = tl.load(right_ptr + i2[:, None] * N2 + i2[None, :], mask=mask2[:, None] & mask2[None, :], other=0.0)
    mask = mask1[:, None] & mask2[None, :]
    at = i1[:, None] * N2 + i2[None, :]
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        rows = row + tl.arange(0, 1)
        base = (rows.to(tl.int64) * (N1 * N2))[:, None]
        x = tl.load(x_ptr + base + at, mask=mask, other=0.0)
        half = _dot(x, right, FP32).to(x.dtype)
        y = _dot(left_t, half, FP32)
        flat = tl.reshape(y, [1, P1 * P2])
        top, bottom, ceiling = row_statistics(flat)
        scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
        q = tl.reshape(row_codes(flat, inverse, zero, BITS), [P1, P2])
        tl.store(q_ptr + base + at, q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + base + at, y, mask=mask)
        total = tl.sum(tl.reshape(tl.where(mask, q, 0).to(tl.int32), [1, P1 * P2]), 1)
        store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, rows < M)


@triton.jit
def _block_product(x_ptr, matrix_ptr, rows, inside, block, K, shared_stride, B: tl.constexpr, P: tl.constexpr,
                   FP32: tl.constexpr):  # fmt: skip
    i = tl.arange(0, P)
    mask = i < B
    x = tl.load(x_ptr + rows[:, None] * K + block * B + i[None, :], mask=inside[:, None] & mask[None, :], other=0.0)
    square = i[:, None] * B + i[None, :]
    matrix = tl.load(matrix_ptr + block * shared_stride + square, mask=mask[:, None] & mask[None, :], other=0.0)
    return _dot(x, matrix, FP32)


@triton.jit(do_not_specialize=["M"])
def block_kernel(
    x_ptr, matrix_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, K, blocks, matrix_stride, clip,
    B: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORE_Y: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """R rows; the products are computed twice, which costs less than keeping them."""
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = rows < M
    top = tl.zeros([R], tl.int32)
    bottom = tl.zeros([R], tl.float32)
    ceiling = tl.zeros([R], tl.float32)
    for block in range(blocks):
        y = _block_product(x_ptr, matrix_ptr, rows, inside, block, K, matrix_stride, B, P, FP32)
        t, b, c = row_statistics(y)
        top, bottom, ceiling = tl.maximum(top, t), tl.minimum(bottom, b), tl.maximum(ceiling, c)
    scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
    total = tl.zeros([R], tl.int32)
    i = tl.arange(0, P)
    mask = inside[:, None] & (i < B)[None, :]
    for block in range(blocks):
        y = _block_product(x_ptr, matrix_ptr, rows, inside, block, K, matrix_stride, B, P, FP32)
        q = row_codes(y, inverse, zero, BITS)
        at = rows[:, None] * K + block * B + i[None, :]
        tl.store(q_ptr + at, q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + at, y, mask=mask)
        total += tl.sum(tl.where(mask, q, 0).to(tl.int32), 1)
    store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, inside)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _unfused(transformed: Tensor, y: Tensor | None, bits: int, symmetric: bool, clip: float) -> Rows:
    """For factors too large for one program: the transform by torch, then the quantiser alone."""
    if y is not None:
        y.copy_(transformed)
    return row_quant(transformed, bits=bits, symmetric=symmetric, clip=clip)


def kron_quant(
    x: Float[Tensor, "m k"],
    left: Float[Tensor, "n1 n1"],
    right: Float[Tensor, "n2 n2"],
    *,
    bits: int,
    symmetric: bool,
    clip: float,
    y: Tensor | None = None,
) -> Rows:
    """As `reference.kron_quant`. `y` (fp32 [m, k]), where given, receives what was quantised."""
    m, k = x.shape
    p1, p2 = _padded(left.shape[0]), _padded(right.shape[0])
    if max(p1, p2) > LARGEST_FACTOR:
        return _unfused(reference.kron_apply(x, left, right), y, bits, symmetric, clip)
    out = new_rows(m, k, x.device)
    programs = m if not x.is_cuda else _RESIDENT * torch.cuda.get_device_properties(x.device).multi_processor_count
    if m:
        kron_kernel[(min(m, programs),)](
            x, left.to(x.dtype), right.to(x.dtype), out.q, out.scale, out.zero, out.rowsum,
            out.q if y is None else y, m, clip, N1=left.shape[0], N2=right.shape[0], P1=p1, P2=p2,
            BITS=bits, SYMMETRIC=symmetric, STORE_Y=y is not None, FP32=INTERPRET or x.dtype == torch.float32,
            num_warps=8 if p1 * p2 >= 8192 else 4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def block_quant(
    x: Float[Tensor, "m k"],
    matrices: Float[Tensor, "blocks b b"],
    *,
    bits: int,
    symmetric: bool,
    clip: float,
    y: Tensor | None = None,
) -> Rows:
    """As `reference.block_quant`. `y` (fp32 [m, k]), where given, receives what was quantised."""
    m, k = x.shape
    size = matrices.shape[1]
    padded = _padded(size)
    if padded > LARGEST_FACTOR:
        return _unfused(reference.block_apply(x, matrices), y, bits, symmetric, clip)
    out = new_rows(m, k, x.device)
    rows = 16 if m <= 2048 else 32
    if m:
        block_kernel[(triton.cdiv(m, rows),)](
            x, matrices.to(x.dtype), out.q, out.scale, out.zero, out.rowsum, out.q if y is None else y,
            m, k, k // size, 0 if matrices.shape[0] == 1 else size * size, clip, B=size, P=padded, R=rows,
            BITS=bits, SYMMETRIC=symmetric, STORE_Y=y is not None, FP32=INTERPRET or x.dtype == torch.float32,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
