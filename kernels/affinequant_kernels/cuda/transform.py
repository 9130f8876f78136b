"""Triton: a structured transform of every row, fused with its quantisation.

`kron`: each row of n1*n2 values is a matrix X [n1, n2], and y = left^T X right, that is x (left (x) right). `block`: the
row is cut into pieces of b values, each times its own matrix [b, b], or all times one (a block-wise Hadamard transform).
The matrices are rounded to x's type, as is the product X right; sums are fp32. As in quant.py, y may differ from the
reference in its last bits, and the codes of that y are exact.

One program keeps both matrices of `kron` and a row in shared memory, where these fit. Where they do not, X right is a
matmul by torch and the rest goes by tiles, which any matrices fit. Groups of a row are quantised there where they lie side
by side in its tile, which then has no padding between them; else torch transforms, and the quantiser has its own kernel.

Shapes: M rows, N1 x N2 a row as a matrix (P1, P2 padded to powers of two, or T1 x T2 a tile of it), B the size of a block
(P padded), R rows; sums go over S terms at a time.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.cuda.asm import INTERPRET
from affinequant_kernels.cuda.quant import new_rows, row_codes, row_quant, row_scale, row_statistics, store_row_scales
from affinequant_kernels.reference import Rows, in_groups

LARGEST_FACTOR = 128  # of `kron_kernel`: more would not fit a thread's registers
LARGEST_BLOCK = 256  # larger ones run as matmuls and `row_quant`
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
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORE_Y: tl.constexpr, FP32: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = (
        GROUP if GROUP else P1 * P2
    )  # of what shares a scale, and how many there are, with padding and without
    PARTS: tl.constexpr = P1 * P2 // SIZE
    GROUPS: tl.constexpr = N1 * N2 // GROUP if GROUP else 1
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
        flat = tl.reshape(y, [PARTS, SIZE])
        top, bottom, ceiling = row_statistics(flat)
        scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
        q = tl.reshape(row_codes(flat, inverse, zero, BITS), [P1, P2])
        tl.store(q_ptr + base + at, q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + base + at, y, mask=mask)
        total = tl.sum(tl.reshape(tl.where(mask, q, 0).to(tl.int32), [PARTS, SIZE]), 1)
        part = tl.arange(0, PARTS)
        store_row_scales(scale_ptr, zero_ptr, sum_ptr, row * GROUPS + part, scale, zero, total, part < GROUPS)


@triton.jit
def _left_product(half_ptr, left_ptr, base, tile, N1: tl.constexpr, N2: tl.constexpr, T1: tl.constexpr,
                  T2: tl.constexpr, S: tl.constexpr, FP32: tl.constexpr):  # fmt: skip
    """A tile of left^T half, as one row; where it lies in the row, and what of it there is."""
    DOWN: tl.constexpr = (N1 + T1 - 1) // T1
    i1, i2 = tile % DOWN * T1 + tl.arange(0, T1), tile // DOWN * T2 + tl.arange(0, T2)
    mask1, mask2 = i1 < N1, i2 < N2
    y = tl.zeros([T1, T2], tl.float32)
    for start in range(0, N1, S):
        i = start + tl.arange(0, S)
        inside = i < N1
        left_t = tl.load(left_ptr + i[None, :] * N1 + i1[:, None], mask=mask1[:, None] & inside[None, :], other=0.0)
        at = base + i[:, None] * N2 + i2[None, :]
        half = tl.load(half_ptr + at, mask=inside[:, None] & mask2[None, :], other=0.0)
        y += _dot(left_t, half, FP32)
    at = tl.reshape(i1[:, None] * N2 + i2[None, :], [1, T1 * T2])
    return tl.reshape(y, [1, T1 * T2]), at, tl.reshape(mask1[:, None] & mask2[None, :], [1, T1 * T2])


@triton.jit(do_not_specialize=["M"])
def left_kernel(
    half_ptr, left_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, clip,
    N1: tl.constexpr, N2: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, S: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORE_Y: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """One row, whose X right is there. The products are computed twice, as in `block_kernel`."""
    TILES: tl.constexpr = ((N1 + T1 - 1) // T1) * ((N2 + T2 - 1) // T2)
    rows = tl.program_id(0) + tl.arange(0, 1)
    start = tl.program_id(0).to(tl.int64) * (N1 * N2)
    top = tl.zeros([1], tl.int32)
    bottom = tl.zeros([1], tl.float32)
    ceiling = tl.zeros([1], tl.float32)
    for tile in range(TILES):
        y, at, mask = _left_product(half_ptr, left_ptr, start, tile, N1, N2, T1, T2, S, FP32)
        t, b, c = row_statistics(y)
        top, bottom, ceiling = tl.maximum(top, t), tl.minimum(bottom, b), tl.maximum(ceiling, c)
    scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
    total = tl.zeros([1], tl.int32)
    for tile in range(TILES):
        y, at, mask = _left_product(half_ptr, left_ptr, start, tile, N1, N2, T1, T2, S, FP32)
        q = row_codes(y, inverse, zero, BITS)
        tl.store(q_ptr + start + at, q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + start + at, y, mask=mask)
        total += tl.sum(tl.where(mask, q, 0).to(tl.int32), 1)
    store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, rows < M)


@triton.jit
def _block_product(x_ptr, matrix_ptr, rows, inside, block, K, shared_stride, R: tl.constexpr, B: tl.constexpr,
                   P: tl.constexpr, S: tl.constexpr, FP32: tl.constexpr):  # fmt: skip
    i = tl.arange(0, P)
    mask = i < B
    y = tl.zeros([R, P], tl.float32)
    for start in range(0, B, S):
        j = start + tl.arange(0, S)
        here = j < B
        x = tl.load(x_ptr + rows[:, None] * K + block * B + j[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        square = j[:, None] * B + i[None, :]
        matrix = tl.load(matrix_ptr + block * shared_stride + square, mask=here[:, None] & mask[None, :], other=0.0)
        y += _dot(x, matrix, FP32)
    return y


@triton.jit(do_not_specialize=["M"])
def block_kernel(
    x_ptr, matrix_ptr, q_ptr, scale_ptr, zero_ptr, sum_ptr, y_ptr, M, K, blocks, matrix_stride, clip,
    B: tl.constexpr, P: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORE_Y: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """R rows; the products are computed twice, which costs less than keeping them."""
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = rows < M
    top = tl.zeros([R], tl.int32)
    bottom = tl.zeros([R], tl.float32)
    ceiling = tl.zeros([R], tl.float32)
    for block in range(blocks):
        y = _block_product(x_ptr, matrix_ptr, rows, inside, block, K, matrix_stride, R, B, P, S, FP32)
        t, b, c = row_statistics(y)
        top, bottom, ceiling = tl.maximum(top, t), tl.minimum(bottom, b), tl.maximum(ceiling, c)
    scale, inverse, zero = row_scale(top, bottom, ceiling, clip, BITS, SYMMETRIC)
    total = tl.zeros([R], tl.int32)
    i = tl.arange(0, P)
    mask = inside[:, None] & (i < B)[None, :]
    for block in range(blocks):
        y = _block_product(x_ptr, matrix_ptr, rows, inside, block, K, matrix_stride, R, B, P, S, FP32)
        q = row_codes(y, inverse, zero, BITS)
        at = rows[:, None] * K + block * B + i[None, :]
        tl.store(q_ptr + at, q, mask=mask)
        if STORE_Y:
            tl.store(y_ptr + at, y, mask=mask)
        total += tl.sum(tl.where(mask, q, 0).to(tl.int32), 1)
    store_row_scales(scale_ptr, zero_ptr, sum_ptr, rows, scale, zero, total, inside)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def kron_fits(n1: int, n2: int, dtype: torch.dtype, shared: int) -> bool:
    """Whether `kron_kernel` takes factors of these sizes on a device with `shared` bytes of shared memory a program.

    Both matrices and the row lie in it at once (aot.py finds these sizes in the machine code). fp32 never does: its
    products are not those of tensor cores, and spill registers.
    """
    p1, p2 = _padded(n1), _padded(n2)
    return (
        dtype != torch.float32
        and max(p1, p2) <= LARGEST_FACTOR
        and (p1 * p1 + p2 * p2 + p1 * p2) * dtype.itemsize <= shared
    )


def tile_sizes(fp32: bool) -> dict[str, int]:
    """T1, T2 and S of `left_kernel`."""
    return {"T1": 32, "T2": 64, "S": 16} if fp32 else {"T1": 64, "T2": 64, "S": 64}


def block_terms(padded: int, fp32: bool) -> int:
    """S of `block_kernel`: a matrix of up to 128 lies in shared memory whole, if it is not of fp32."""
    return 16 if fp32 else padded if padded <= LARGEST_FACTOR else 64


def _device(x: Tensor) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if not x.is_cuda:  # the interpreter, which has no limits: as the smallest of GPUs
        return 1 << 30, 99 << 10
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _unfused(transformed: Tensor, y: Tensor | None, bits: int, symmetric: bool, clip: float, group: int) -> Rows:
    """For blocks too large for one program, and groups that do not lie in one: the transform by torch, then the quantiser
    alone."""
    if y is not None:
        y.copy_(transformed)
    return row_quant(transformed, bits=bits, symmetric=symmetric, clip=clip, group=group)


def groups_fit(n1: int, n2: int, group: int) -> bool:
    """Whether groups are pieces of the tile that `kron_kernel` has of a row."""
    return n2 == _padded(n2) and group == triton.next_power_of_2(group) <= _padded(n1) * n2


def kron_quant(
    x: Float[Tensor, "m k"],
    left: Float[Tensor, "n1 n1"],
    right: Float[Tensor, "n2 n2"],
    *,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int = 0,
    y: Tensor | None = None,
) -> Rows:
    """As `reference.kron_quant`. `y` (fp32 [m, k]), where given, receives what was quantised."""
    m, k = x.shape
    n1, n2 = left.shape[0], right.shape[0]
    processors, shared = _device(x)
    fits = kron_fits(n1, n2, x.dtype, shared)
    if group and not (fits and groups_fit(n1, n2, group)):
        return _unfused(reference.kron_apply(x, left, right), y, bits, symmetric, clip, group)
    out = new_rows(m * (k // group if group else 1), group or k, x.device)
    if not m:
        return in_groups(out, m, k) if group else out
    left, right = left.to(x.dtype), right.to(x.dtype)
    tail = (out.q, out.scale, out.zero, out.rowsum, out.q if y is None else y, m, clip)
    flags = {"BITS": bits, "SYMMETRIC": symmetric, "STORE_Y": y is not None}
    flags["FP32"] = INTERPRET or x.dtype == torch.float32
    if fits:
        p1, p2 = _padded(n1), _padded(n2)
        kron_kernel[(min(m, _RESIDENT * processors),)](
            x, left, right, *tail, N1=n1, N2=n2, P1=p1, P2=p2, GROUP=group,
            num_warps=8 if p1 * p2 >= 8192 else 4, num_stages=1, enable_fp_fusion=False, **flags,
        )  # fmt: skip
    else:
        half = x.view(m * n1, n2) @ right
        left_kernel[(m,)](
            half, left, *tail, N1=n1, N2=n2, **tile_sizes(x.dtype == torch.float32),
            num_warps=4, num_stages=2, enable_fp_fusion=False, **flags,
        )  # fmt: skip
    return in_groups(out, m, k) if group else out


def block_quant(
    x: Float[Tensor, "m k"],
    matrices: Float[Tensor, "blocks b b"],
    *,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int = 0,
    y: Tensor | None = None,
) -> Rows:
    """As `reference.block_quant`. `y` (fp32 [m, k]), where given, receives what was quantised."""
    m, k = x.shape
    size = matrices.shape[1]
    padded = _padded(size)
    if group or padded > LARGEST_BLOCK:
        return _unfused(reference.block_apply(x, matrices), y, bits, symmetric, clip, group)
    out = new_rows(m, k, x.device)
    rows = 16 if m <= 2048 else 32
    if m:
        block_kernel[(triton.cdiv(m, rows),)](
            x, matrices.to(x.dtype), out.q, out.scale, out.zero, out.rowsum, out.q if y is None else y,
            m, k, k // size, 0 if matrices.shape[0] == 1 else size * size, clip, B=size, P=padded, R=rows,
            S=block_terms(padded, x.dtype == torch.float32),
            BITS=bits, SYMMETRIC=symmetric, STORE_Y=y is not None, FP32=INTERPRET or x.dtype == torch.float32,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
