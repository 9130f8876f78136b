"""Triton: products with one fp32 scale per group, of a weight (GPTQ, AWQ and most published int4 checkpoints), of rows or
of both.

Equal to `reference.linear` for kind "group" and for rows in groups: an exact int32 within each group, then fp32 across
groups in ascending order, rounded after each scale and after the sum.

Shapes: M rows (tokens), N output features, K input features; tile BN x BM; blocks of 128 columns.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affinequant_kernels.checks import fail
from affinequant_kernels.cuda import configs
from affinequant_kernels.cuda.asm import INTERPRET, nibbles_affine, nibbles_times_16
from affinequant_kernels.cuda.tiles import load_activations, store_tile, tile_of
from affinequant_kernels.weight import Weight


@triton.jit
def _zero_of(zw_ptr, rn, group, groups):
    return tl.load(zw_ptr + rn * groups + tl.minimum(group, groups - 1)).to(tl.int32)[:, None]


@triton.jit
def _halves(
    w_ptr, zw_ptr, rn, block, low_group, high_group, groups, stride_w, K, J0: tl.constexpr, J: tl.constexpr,
    BITS: tl.constexpr, HAS_ZW: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """int8 weights of columns J0..J0+J and 64+J0..64+J0+J of a block; times 16 where they have 4 bits and no zero."""
    rj = J0 + tl.arange(0, J)
    base = w_ptr + rn[:, None].to(tl.int64) * stride_w
    if BITS == 4:
        w = tl.load(base + (block * 64 + rj)[None, :])
        if HAS_ZW:
            low_zero = _zero_of(zw_ptr, rn, low_group, groups)
            high_zero = _zero_of(zw_ptr, rn, high_group, groups)
            one = tl.full(low_zero.shape, 1, tl.int32)
            low, high = nibbles_affine(w, one, low_zero, one, high_zero, ASM)
        else:
            low, high = nibbles_times_16(w, ASM)
    else:
        k = block * 128 + rj
        if EVEN:
            low = tl.load(base + k[None, :])
            high = tl.load(base + (k + 64)[None, :])
        else:
            low = tl.load(base + k[None, :], mask=(k < K)[None, :], other=0)
            high = tl.load(base + (k + 64)[None, :], mask=(k + 64 < K)[None, :], other=0)
        if HAS_ZW:
            low = (low.to(tl.int32) - _zero_of(zw_ptr, rn, low_group, groups)).to(tl.int8)
            high = (high.to(tl.int32) - _zero_of(zw_ptr, rn, high_group, groups)).to(tl.int8)
    return low, high


@triton.jit
def _add(acc, w, a_ptr, k, K, scales, rn, rm, group, groups, SHIFT: tl.constexpr, HAS_ZA: tl.constexpr,
         OF_W: tl.constexpr, OF_A: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """acc + float(w a) * scale of the group."""
    part = tl.dot(w, load_activations(a_ptr, rm, k, K, EVEN), out_dtype=tl.int32)
    return _scaled(acc, part, scales, rn, rm, group, groups, SHIFT, HAS_ZA, OF_W, OF_A)


@triton.jit
def _scaled(acc, part, scales, rn, rm, group, groups, SHIFT: tl.constexpr, HAS_ZA: tl.constexpr, OF_W: tl.constexpr,
            OF_A: tl.constexpr):  # fmt: skip
    """`scales`: pointers to those of the weight and the rows, to the rows' zero points and the sums they are multiplied by.
    A group past the last, of columns past K, adds nothing."""
    sw_ptr, sa_ptr, za_ptr, colsum_ptr = scales
    last = tl.minimum(group, groups - 1)
    part = part >> SHIFT
    if OF_A and HAS_ZA:
        za = tl.load(za_ptr + rm * groups + last) * (group < groups).to(tl.int32)
        part -= tl.load(colsum_ptr + rn * groups + last)[:, None] * za[None, :]
    y = part.to(tl.float32)
    if OF_W:
        y = y * tl.load(sw_ptr + rn * groups + last)[:, None]
    if OF_A:
        y = y * tl.load(sa_ptr + rm * groups + last)[None, :]
    return acc + y


@triton.jit(do_not_specialize=["M"])
def group_kernel(
    a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, M, N, K, stride_w, groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr,
    OF_W: tl.constexpr, OF_A: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """OF_W, OF_A: whether the weight's scales are those of groups, and the rows'."""
    SHIFT: tl.constexpr = 4 if BITS == 4 and not HAS_ZW else 0
    J: tl.constexpr = 64 if GROUP_SIZE % 64 == 0 else 32
    tile_n, tile_m = tile_of(tl.program_id(0), N, M, BN, BM, 8)
    rn, rm = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    in_n, in_m = tl.minimum(rn, N - 1), tl.minimum(rm, M - 1)
    rj = tl.arange(0, J)
    acc = tl.zeros([BN, BM], tl.float32)
    scales = (sw_ptr, sa_ptr, za_ptr, colsum_ptr)
    if OF_W:
        zeros = groups
    else:
        zeros = 1
    if GROUP_SIZE % 128 == 0:
        for group in range(groups):
            part = tl.zeros([BN, BM], tl.int32)
            for inner in tl.static_range(GROUP_SIZE // 128):
                block = group * (GROUP_SIZE // 128) + inner
                low, high = _halves(w_ptr, zw_ptr, in_n, block, group, group, zeros, stride_w, K, 0, 64,
                                    BITS, HAS_ZW, EVEN, ASM)  # fmt: skip
                k = block * 128 + rj
                part = tl.dot(low, load_activations(a_ptr, in_m, k, K, EVEN), part, out_dtype=tl.int32)
                part = tl.dot(high, load_activations(a_ptr, in_m, k + 64, K, EVEN), part, out_dtype=tl.int32)
            acc = _scaled(acc, part, scales, in_n, in_m, group, groups, SHIFT, HAS_ZA, OF_W, OF_A)
    elif GROUP_SIZE == 64:
        for block in range(tl.cdiv(K, 128)):
            low, high = _halves(w_ptr, zw_ptr, in_n, block, block * 2, block * 2 + 1, zeros, stride_w, K, 0, 64,
                                BITS, HAS_ZW, EVEN, ASM)  # fmt: skip
            k = block * 128 + rj
            acc = _add(acc, low, a_ptr, k, K, scales, in_n, in_m, block * 2, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN)
            acc = _add(
                acc, high, a_ptr, k + 64, K, scales, in_n, in_m, block * 2 + 1, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN
            )
    else:
        # Four groups of 32 in a block, added in ascending order of their columns.
        for block in range(tl.cdiv(K, 128)):
            g = block * 4
            w0, w2 = _halves(w_ptr, zw_ptr, in_n, block, g, g + 2, zeros, stride_w, K, 0, 32, BITS, HAS_ZW, EVEN, ASM)
            w1, w3 = _halves(w_ptr, zw_ptr, in_n, block, g + 1, g + 3, zeros, stride_w, K, 32, 32, BITS, HAS_ZW,
                             EVEN, ASM)  # fmt: skip
            k = block * 128 + rj
            acc = _add(acc, w0, a_ptr, k, K, scales, in_n, in_m, g, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN)
            acc = _add(acc, w1, a_ptr, k + 32, K, scales, in_n, in_m, g + 1, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN)
            acc = _add(acc, w2, a_ptr, k + 64, K, scales, in_n, in_m, g + 2, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN)
            acc = _add(acc, w3, a_ptr, k + 96, K, scales, in_n, in_m, g + 3, groups, SHIFT, HAS_ZA, OF_W, OF_A, EVEN)
    mask_n, mask_m = rn < N, rm < M
    if HAS_ZA and not OF_A:
        za = tl.load(za_ptr + rm, mask=mask_m, other=0).to(tl.float32)
        acc -= za[None, :] * tl.load(colsum_ptr + rn, mask=mask_n, other=0.0)[:, None]
    y = acc
    if not OF_A:
        y = acc * tl.load(sa_ptr + rm, mask=mask_m, other=0.0)[None, :]
    elif not OF_W:
        y = acc * tl.load(sw_ptr + rn, mask=mask_n, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    store_tile(y, out_ptr, rn, rm, N, M)


def group_linear(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    config: configs.Config,
) -> Tensor:
    """Kind "group" of `gemm.linear`, or rows in groups, into `out`."""
    m, k = q.shape
    n, of_weight, of_rows = weight.qweight.shape[0], weight.scale.ndim == 2, scale.ndim == 2
    groups = (weight.scale if of_weight else scale).shape[1]
    size = k // groups
    if size not in (32, 64, 128, 256, 512):
        raise fail("group size", "32, 64, 128, 256 or 512 on this device", size)
    if not of_weight and weight.zero is not None and weight.qweight.dtype == torch.int8:
        raise fail("w_zero", "none beside 8-bit codes and rows in groups on this device", list(weight.zero.shape))
    bm = min(config.bm, 64)  # the fp32 sums take as many registers again
    group_kernel[(triton.cdiv(n, config.bn) * triton.cdiv(m, bm),)](
        q, weight.qweight.view(torch.int8), out, scale, zero if zero is not None else weight.colsum, weight.scale,
        weight.zero if weight.zero is not None else weight.qweight, weight.colsum,
        bias if bias is not None else weight.scale, m, n, k, weight.qweight.shape[1], groups,
        BITS=4 if weight.qweight.dtype == torch.uint8 else 8, GROUP_SIZE=size, HAS_ZA=zero is not None,
        HAS_ZW=weight.zero is not None, HAS_BIAS=bias is not None, OF_W=of_weight, OF_A=of_rows, EVEN=k % 128 == 0,
        BN=config.bn, BM=bm, ASM=not INTERPRET, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
