"""Triton: products with one fp32 scale per group of a weight (GPTQ, AWQ and most published int4 checkpoints).

Equal to `reference.linear` for kind "group": an exact int32 within each group, then fp32 across groups in ascending
order, two roundings each. Also `w4a16_linear`, for every kind of weight, with activations in their own float type.

Shapes: M rows (tokens), N output features, K input features; tile BN x BM; blocks of 128 columns.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels.checks import fail
from affinequant_kernels.cuda import configs
from affinequant_kernels.cuda.asm import INTERPRET, nibbles_affine, nibbles_times_16
from affinequant_kernels.cuda.tiles import FINISH, group_step, load_activations, store_tile, tile_of
from affinequant_kernels.weight import Weight, kind_of


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
def _add(acc, w, a_ptr, rm, k, K, sw_ptr, rn, group, groups, SHIFT: tl.constexpr, EVEN: tl.constexpr):
    """acc + float(w a) * scale of the group."""
    part = tl.dot(w, load_activations(a_ptr, rm, k, K, EVEN), out_dtype=tl.int32)
    return _scaled(acc, part, sw_ptr, rn, group, groups, SHIFT)


@triton.jit
def _scaled(acc, part, sw_ptr, rn, group, groups, SHIFT: tl.constexpr):
    scale = tl.load(sw_ptr + rn * groups + tl.minimum(group, groups - 1))
    return acc + (part >> SHIFT).to(tl.float32) * scale[:, None]


@triton.jit(do_not_specialize=["M"])
def group_kernel(
    a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, M, N, K, stride_w, groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = 4 if BITS == 4 and not HAS_ZW else 0
    J: tl.constexpr = 64 if GROUP_SIZE % 64 == 0 else 32
    tile_n, tile_m = tile_of(tl.program_id(0), N, M, BN, BM, 8)
    rn, rm = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    in_n, in_m = tl.minimum(rn, N - 1), tl.minimum(rm, M - 1)
    rj = tl.arange(0, J)
    acc = tl.zeros([BN, BM], tl.float32)
    if GROUP_SIZE % 128 == 0:
        for group in range(groups):
            part = tl.zeros([BN, BM], tl.int32)
            for inner in tl.static_range(GROUP_SIZE // 128):
                block = group * (GROUP_SIZE // 128) + inner
                low, high = _halves(w_ptr, zw_ptr, in_n, block, group, group, groups, stride_w, K, 0, 64,
                                    BITS, HAS_ZW, EVEN, ASM)  # fmt: skip
                k = block * 128 + rj
                part = tl.dot(low, load_activations(a_ptr, in_m, k, K, EVEN), part, out_dtype=tl.int32)
                part = tl.dot(high, load_activations(a_ptr, in_m, k + 64, K, EVEN), part, out_dtype=tl.int32)
            acc = _scaled(acc, part, sw_ptr, in_n, group, groups, SHIFT)
    elif GROUP_SIZE == 64:
        for block in range(tl.cdiv(K, 128)):
            low, high = _halves(w_ptr, zw_ptr, in_n, block, block * 2, block * 2 + 1, groups, stride_w, K, 0, 64,
                                BITS, HAS_ZW, EVEN, ASM)  # fmt: skip
            k = block * 128 + rj
            acc = _add(acc, low, a_ptr, in_m, k, K, sw_ptr, in_n, block * 2, groups, SHIFT, EVEN)
            acc = _add(acc, high, a_ptr, in_m, k + 64, K, sw_ptr, in_n, block * 2 + 1, groups, SHIFT, EVEN)
    else:
        # Four groups of 32 in a block, added in ascending order of their columns.
        for block in range(tl.cdiv(K, 128)):
            g = block * 4
            w0, w2 = _halves(w_ptr, zw_ptr, in_n, block, g, g + 2, groups, stride_w, K, 0, 32, BITS, HAS_ZW, EVEN, ASM)
            w1, w3 = _halves(w_ptr, zw_ptr, in_n, block, g + 1, g + 3, groups, stride_w, K, 32, 32, BITS, HAS_ZW,
                             EVEN, ASM)  # fmt: skip
            k = block * 128 + rj
            acc = _add(acc, w0, a_ptr, in_m, k, K, sw_ptr, in_n, g, groups, SHIFT, EVEN)
            acc = _add(acc, w1, a_ptr, in_m, k + 32, K, sw_ptr, in_n, g + 1, groups, SHIFT, EVEN)
            acc = _add(acc, w2, a_ptr, in_m, k + 64, K, sw_ptr, in_n, g + 2, groups, SHIFT, EVEN)
            acc = _add(acc, w3, a_ptr, in_m, k + 96, K, sw_ptr, in_n, g + 3, groups, SHIFT, EVEN)
    mask_n, mask_m = rn < N, rm < M
    if HAS_ZA:
        za = tl.load(za_ptr + rm, mask=mask_m, other=0).to(tl.float32)
        acc -= za[None, :] * tl.load(colsum_ptr + rn, mask=mask_n, other=0.0)[:, None]
    y = acc * tl.load(sa_ptr + rm, mask=mask_m, other=0.0)[None, :]
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
    """Kind "group" of `gemm.linear`, into `out`."""
    m, k = q.shape
    n, groups = weight.scale.shape
    size = k // groups
    if size not in (32, 64, 128, 256, 512):
        raise fail("group size", "32, 64, 128, 256 or 512 on this device", size)
    bm = min(config.bm, 64)  # the fp32 sums take as many registers again
    group_kernel[(triton.cdiv(n, config.bn) * triton.cdiv(m, bm),)](
        q, weight.qweight.view(torch.int8), out, scale, zero if zero is not None else weight.colsum, weight.scale,
        weight.zero if weight.zero is not None else weight.qweight, weight.colsum,
        bias if bias is not None else weight.scale, m, n, k, weight.qweight.shape[1], groups,
        BITS=4 if weight.qweight.dtype == torch.uint8 else 8, GROUP_SIZE=size, HAS_ZA=zero is not None,
        HAS_ZW=weight.zero is not None, HAS_BIAS=bias is not None, EVEN=k % 128 == 0, BN=config.bn, BM=bm,
        ASM=not INTERPRET, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _columns(w_ptr, rn, block, stride_w, K, HALF: tl.constexpr, J0: tl.constexpr, J: tl.constexpr,
             BITS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Codes, int8 [rows, J], of columns J0 .. J0+J of one half of a block."""
    rj = J0 + tl.arange(0, J)
    base = w_ptr + rn[:, None].to(tl.int64) * stride_w
    if BITS == 4:
        w = tl.load(base + (block * 64 + rj)[None, :])
        if HALF == 0:
            w = w << 4
        return w >> 4
    k = block * 128 + HALF * 64 + rj
    if EVEN:
        return tl.load(base + k[None, :])
    return tl.load(base + k[None, :], mask=(k < K)[None, :], other=0)


@triton.jit
def _half(x_ptr, w, rm, k, K, group, groups, rn, sw_ptr, zw_ptr, mul_ptr, acc,
          GROUPED: tl.constexpr, AFFINE: tl.constexpr, HAS_ZW: tl.constexpr, EVEN: tl.constexpr, FP32: tl.constexpr):  # fmt: skip
    """acc + W X^T over the columns k of one group; w holds codes."""
    at = rn * groups + tl.minimum(group, groups - 1)
    value = w.to(tl.int32)
    if HAS_ZW:
        value = value - tl.load(zw_ptr + at).to(tl.int32)[:, None]
    if AFFINE:
        value = value * tl.load(mul_ptr + at).to(tl.int32)[:, None]
    x = load_activations(x_ptr, rm, k, K, EVEN)
    # These integers are at most 8 bits wide, which every float type holds exactly.
    if FP32:
        part = tl.dot(value.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    else:
        part = tl.dot(value.to(x.dtype), x)
    if GROUPED:
        part = part * tl.load(sw_ptr + at)[:, None]
    return acc + part


@triton.jit(do_not_specialize=["M"])
def a16_kernel(
    x_ptr, w_ptr, out_ptr, sw_ptr, zw_ptr, mul_ptr, bias_ptr, M, N, K, stride_w, groups, group_size,
    BITS: tl.constexpr, GROUPED: tl.constexpr, AFFINE: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, J: tl.constexpr, SPLIT: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """y = X W^T with integer weights in X's type, scaled in fp32. With SPLIT, fp32 [SPLIT, M, N] for `a16_finish_kernel`."""
    tile_n, tile_m = tile_of(tl.program_id(0), N, M, BN, BM, 8)
    rn, rm = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    in_n, in_m = tl.minimum(rn, N - 1), tl.minimum(rm, M - 1)
    acc = tl.zeros([BN, BM], tl.float32)
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, SPLIT)
    first = tl.program_id(1) * share
    for block in range(first, tl.minimum(first + share, blocks)):
        for half in tl.static_range(2):
            for piece in tl.static_range(64 // J):
                k = block * 128 + half * 64 + piece * J
                w = _columns(w_ptr, in_n, block, stride_w, K, half, piece * J, J, BITS, EVEN)
                acc = _half(x_ptr, w, in_m, k + tl.arange(0, J), K, k // group_size, groups, in_n, sw_ptr, zw_ptr,
                            mul_ptr, acc, GROUPED, AFFINE, HAS_ZW, EVEN, FP32)  # fmt: skip
    if SPLIT > 1:
        store_tile(acc, out_ptr + tl.program_id(1).to(tl.int64) * M * N, rn, rm, N, M)
    else:
        _store_a16(acc, out_ptr, sw_ptr, bias_ptr, rn, rm, N, M, GROUPED, HAS_BIAS)


@triton.jit
def _store_a16(acc, out_ptr, sw_ptr, bias_ptr, rn, rm, N, M, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    if not GROUPED:
        acc = acc * tl.load(sw_ptr + rn, mask=rn < N, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    store_tile(acc, out_ptr, rn, rm, N, M)


@triton.jit(do_not_specialize=["M"])
def a16_finish_kernel(
    parts_ptr, out_ptr, sw_ptr, bias_ptr, M, N,
    GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds the SPLIT shares that `a16_kernel` left, always in the same order, and finishes the product."""
    rn, rm = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    at = rm[None, :].to(tl.int64) * N + rn[:, None]
    inside = (rn < N)[:, None] & (rm < M)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + tl.full([], part, tl.int64) * M * N + at, mask=inside, other=0.0)
    _store_a16(acc, out_ptr, sw_ptr, bias_ptr, rn, rm, N, M, GROUPED, HAS_BIAS)


def w4a16_linear(
    x: Float[Tensor, "m k"],
    weight: Weight,
    bias: Float[Tensor, " n"] | None,
    out_dtype: torch.dtype,
    split: int | None = None,
) -> Tensor:
    """As `reference.w4a16_linear`, with fp32 sums. `split` programs per tile, along k; None: as many as the GPU asks for."""
    m, k = x.shape
    n = weight.qweight.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    kind = kind_of(weight.scale, weight.mul)
    groups = 1 if kind == "channel" else (weight.mul if weight.mul is not None else weight.scale).shape[1]
    if m == 0:
        return out
    bm, wanted = configs.a16_tile(m, n, k, x.device)
    split = min(split or wanted, triton.cdiv(k, 128))
    # A share of a sum has neither scale per channel nor bias, and needs no variants for them.
    has_bias, sums = bias is not None, out
    if split > 1:
        has_bias, sums = False, torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    end = (weight.scale, bias if bias is not None else weight.scale)
    a16_kernel[(triton.cdiv(n, 64) * triton.cdiv(m, bm), split)](
        x, weight.qweight.view(torch.int8), sums, weight.scale,
        weight.zero if weight.zero is not None else weight.qweight,
        weight.mul if weight.mul is not None else weight.qweight, end[has_bias],
        m, n, k, weight.qweight.shape[1], groups, k // groups,
        BITS=4 if weight.qweight.dtype == torch.uint8 else 8, GROUPED=kind == "group",
        AFFINE=weight.mul is not None, HAS_ZW=weight.zero is not None, HAS_BIAS=has_bias,
        EVEN=k % 128 == 0, BN=64, BM=bm, J=64 if kind == "channel" else group_step(k // groups, 64), SPLIT=split,
        FP32=INTERPRET or x.dtype == torch.float32, num_warps=4, num_stages=3,
    )  # fmt: skip
    if split > 1:
        a16_finish_kernel[(triton.cdiv(n, FINISH[0]), triton.cdiv(m, FINISH[1]))](
            sums, out, *end, m, n, GROUPED=kind == "group", HAS_BIAS=bias is not None,
            SPLIT=split, BN=FINISH[0], BM=FINISH[1], num_warps=4,
        )  # fmt: skip
    return out
