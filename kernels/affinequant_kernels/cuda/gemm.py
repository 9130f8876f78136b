"""Triton: integer matrix products with the fused epilogue of `reference.linear`.

The weight is the *left* operand (C^T = W A^T): on Hopper it then goes from shared memory to registers, is unpacked
there, and feeds wgmma without a second trip through shared memory. Activations stay int8 in natural order: a tile of
weight bytes gives 64 columns from its low nibbles and the next 64 from its high ones (layout hs128), so the two halves
are two products, and nothing is interleaved. There is no int4 matrix instruction on Hopper; int8 is the fast one.

Symmetric int4 weights stay shifted left by 4 (unpacking costs one instruction per four weights and nibble); the exact
int32 sum is shifted back once. Zero points never cost a product: they are rank-one corrections in the epilogue.

Shapes: M rows (tokens), N output features, K input features; tile BN x BM, BJ bytes of a row of weights per step.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from affinequant_kernels.cuda import configs
from affinequant_kernels.cuda.asm import INTERPRET, dp4a, nibbles_affine, nibbles_times_16
from affinequant_kernels.cuda.gemm_group import group_linear
from affinequant_kernels.cuda.tiles import FINISH, group_step, load_activations, store_tile, tile_of
from affinequant_kernels.weight import Weight, kind_of


@triton.jit
def _group_values(mul_ptr, zero_ptr, rn, column, GROUPS, GROUP_SIZE, HAS_ZERO: tl.constexpr):
    """Multiplier and zero point, int32 [rows, 1], of the group that holds a column."""
    at = rn * GROUPS + tl.minimum(column // GROUP_SIZE, GROUPS - 1)
    mul = tl.load(mul_ptr + at).to(tl.int32)
    zero = tl.load(zero_ptr + at).to(tl.int32) if HAS_ZERO else tl.zeros_like(mul)
    return mul[:, None], zero[:, None]


@triton.jit
def store_result(
    acc, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, rn, rm, N, M,
    HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Corrections in int32, then float(acc) * weight scale * activation scale + bias, one rounding each."""
    mask_n, mask_m = rn < N, rm < M
    if HAS_ZW:
        zw = tl.load(zw_ptr + rn, mask=mask_n, other=0).to(tl.int32)
        acc -= zw[:, None] * tl.load(rowsum_ptr + rm, mask=mask_m, other=0)[None, :]
    if HAS_ZA:
        za = tl.load(za_ptr + rm, mask=mask_m, other=0)
        acc -= tl.load(colsum_ptr + rn, mask=mask_n, other=0)[:, None] * za[None, :]
    if RAW:
        y = acc
    else:
        y = acc.to(tl.float32) * tl.load(sw_ptr + rn, mask=mask_n, other=0.0)[:, None]
        y = y * tl.load(sa_ptr + rm, mask=mask_m, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    store_tile(y, out_ptr, rn, rm, N, M)


@triton.jit
def _product(
    a_ptr, w_ptr, mul_ptr, zw_ptr, rn, rm, N, K, stride_w, groups, group_size, first, last,
    BITS: tl.constexpr, AFFINE: tl.constexpr, HAS_ZW: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """int32 [BN, BM] over steps first..last."""
    PER_BLOCK: tl.constexpr = 64 // BJ
    rj = tl.arange(0, BJ)
    acc = tl.zeros([BN, BM], tl.int32)
    for step in range(first, last):
        # In this form the compiler sees that columns are aligned, and loads 16 bytes at a time.
        low_k = (step // PER_BLOCK) * 128 + (step % PER_BLOCK) * BJ
        a_low = load_activations(a_ptr, rm, low_k + rj, K, EVEN)
        a_high = load_activations(a_ptr, rm, low_k + 64 + rj, K, EVEN)
        if BITS == 4:
            w = tl.load(w_ptr + rn[:, None].to(tl.int64) * stride_w + (step * BJ + rj)[None, :])
            if AFFINE:
                mul_low, zero_low = _group_values(mul_ptr, zw_ptr, rn, low_k, groups, group_size, HAS_ZW)
                mul_high, zero_high = _group_values(mul_ptr, zw_ptr, rn, low_k + 64, groups, group_size, HAS_ZW)
                w_low, w_high = nibbles_affine(w, mul_low, zero_low, mul_high, zero_high, ASM)
            else:
                w_low, w_high = nibbles_times_16(w, ASM)
        else:
            at = w_ptr + rn[:, None].to(tl.int64) * stride_w + (low_k + rj)[None, :]
            if EVEN:
                w_low = tl.load(at)
                w_high = tl.load(at + 64)
            else:
                w_low = tl.load(at, mask=(low_k + rj < K)[None, :], other=0)
                w_high = tl.load(at + 64, mask=(low_k + 64 + rj < K)[None, :], other=0)
        acc = tl.dot(w_low, a_low, acc, out_dtype=tl.int32)
        acc = tl.dot(w_high, a_high, acc, out_dtype=tl.int32)
    if BITS == 4 and not AFFINE:
        acc = acc >> 4
    return acc


@triton.jit
def _one_tile(
    tile, a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, mul_ptr, colsum_ptr, bias_ptr,
    M, N, K, stride_w, groups, group_size,
    BITS: tl.constexpr, AFFINE: tl.constexpr, HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr,
    SPLIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    steps = tl.cdiv(K, 128) * (64 // BJ)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    tile_n, tile_m = tile_of(tile, N, M, BN, BM, 8)
    rn, rm = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    # Rows past the end repeat the last row: nothing is read out of bounds, and they are not stored.
    acc = _product(
        a_ptr, w_ptr, mul_ptr, zw_ptr, tl.minimum(rn, N - 1), tl.minimum(rm, M - 1), N, K, stride_w, groups, group_size,
        first, last, BITS, AFFINE, HAS_ZW, EVEN, BN, BM, BJ, ASM,
    )  # fmt: skip
    if SPLIT > 1:
        store_tile(acc, out_ptr + tl.program_id(1).to(tl.int64) * M * N, rn, rm, N, M)
    else:
        store_result(
            acc, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, rn, rm, N, M,
            HAS_ZA, HAS_ZW and not AFFINE, HAS_BIAS, RAW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, mul_ptr, colsum_ptr, bias_ptr,
    M, N, K, stride_w, groups, group_size,
    BITS: tl.constexpr, AFFINE: tl.constexpr, HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr,
    SPLIT: tl.constexpr, PERSISTENT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Kinds "channel" and "integer" of weight. One tile per program, a walk over tiles, or SPLIT programs per tile.

    With SPLIT `out` is int32 [SPLIT, M, N], the share of each program in a sum, which `finish_kernel` makes up. No memory
    is both read and written by one kernel, and none outlives the call: nothing to order, to zero, or to share between
    streams and CUDA graphs.
    """
    tiles = tl.cdiv(N, BN) * tl.cdiv(M, BM)
    if PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_tile(
                tile, a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, mul_ptr, colsum_ptr, bias_ptr,
                M, N, K, stride_w, groups, group_size,
                BITS, AFFINE, HAS_ZA, HAS_ZW, HAS_BIAS, RAW, EVEN, BN, BM, BJ, SPLIT, ASM,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, mul_ptr, colsum_ptr,
            bias_ptr, M, N, K, stride_w, groups, group_size,
            BITS, AFFINE, HAS_ZA, HAS_ZW, HAS_BIAS, RAW, EVEN, BN, BM, BJ, SPLIT, ASM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    parts_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, M, N,
    HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr, RAW: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds the SPLIT shares that `gemm_kernel` left, and finishes the product."""
    rn, rm = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    at = rm[None, :].to(tl.int64) * N + rn[:, None]
    inside = (rn < N)[:, None] & (rm < M)[None, :]
    acc = tl.zeros([BN, BM], tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + tl.full([], part, tl.int64) * M * N + at, mask=inside, other=0)
    store_result(
        acc, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, rn, rm, N, M,
        HAS_ZA, HAS_ZW, HAS_BIAS, RAW,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    a_ptr, w_ptr, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, M, N, words, blocks,
    HAS_ZA: tl.constexpr, HAS_ZW: tl.constexpr, HAS_BIAS: tl.constexpr, RAW: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row of activations times symmetric int4 weights, both read as int32 words of four bytes; BW words per step."""
    row = tl.program_id(1)
    rn, rw = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BW)
    in_n = tl.minimum(rn, N - 1)[:, None].to(tl.int64)
    acc = tl.zeros([BN, BW], tl.int32)
    for start in tl.range(0, blocks * 16, BW, num_stages=4):
        word = start + rw
        inside = word < blocks * 16
        w = tl.load(w_ptr + in_n * (blocks * 16) + word[None, :], mask=inside[None, :], other=0)
        low = word // 16 * 32 + word % 16
        a_low = tl.load(a_ptr + row * words + low, mask=inside & (low < words), other=0)
        a_high = tl.load(a_ptr + row * words + low + 16, mask=inside & (low + 16 < words), other=0)
        a_low, a_high = tl.broadcast_to(a_low[None, :], [BN, BW]), tl.broadcast_to(a_high[None, :], [BN, BW])
        acc = dp4a((w << 4) & -252645136, a_low, acc, ASM)  # 0xF0F0F0F0
        acc = dp4a(w & -252645136, a_high, acc, ASM)
    total = (tl.sum(acc, 1) >> 4)[:, None]
    store_result(
        total, out_ptr, sa_ptr, za_ptr, rowsum_ptr, sw_ptr, zw_ptr, colsum_ptr, bias_ptr, rn, row + tl.arange(0, 1),
        N, M, HAS_ZA, HAS_ZW, HAS_BIAS, RAW,
    )  # fmt: skip


def linear(
    q: Int8[Tensor, "m k"],
    scale: Float[Tensor, " m *g"],
    zero: Int32[Tensor, " m *g"] | None,
    rowsum: Int32[Tensor, " m *g"] | None,
    weight: Weight,
    bias: Float[Tensor, " n"] | None,
    out_dtype: torch.dtype,
    config: configs.Config | None = None,
) -> Tensor:
    """As `reference.linear`. `config` overrides the table of configs.py."""
    m, k = q.shape
    n = weight.qweight.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=q.device)
    if m == 0:
        return out
    kind = "group" if scale.ndim == 2 else kind_of(weight.scale, weight.mul)
    bits = 4 if weight.qweight.dtype == torch.uint8 else 8
    config = config or configs.lookup(m, n, k, kind, bits, q.device)
    if kind == "group":
        return group_linear(q, scale, zero, weight, bias, out, config)
    if kind == "channel" and weight.zero is not None and rowsum is None:
        rowsum = q.sum(1, dtype=torch.int32)
    flags = {
        "HAS_ZA": zero is not None, "HAS_ZW": weight.zero is not None, "HAS_BIAS": bias is not None,
        "RAW": out_dtype == torch.int32,
    }  # fmt: skip
    # Arguments that a kernel does not use still need a pointer.
    rest = tuple(t if t is not None else weight.colsum for t in (zero, rowsum))
    tail = (weight.colsum, bias if bias is not None else weight.scale)
    zw = weight.zero if weight.zero is not None else weight.qweight
    if config.path == "gemv" and kind == "channel" and bits == 4 and k % 4 == 0:
        gemv_kernel[(triton.cdiv(n, config.bn), m)](
            q.view(torch.int32), weight.qweight.view(torch.int32), out, scale, *rest, weight.scale, zw, *tail,
            m, n, k // 4, weight.qweight.shape[1] // 64, BN=config.bn, BW=config.bj, ASM=not INTERPRET,
            num_warps=config.warps, enable_fp_fusion=False, **flags,
        )  # fmt: skip
        return out
    _launch_gemm(q, scale, rest, weight, zw, tail, out, config, bits, flags)
    return out


def _launch_gemm(
    q: Tensor, scale: Tensor, rest: tuple[Tensor, ...], weight: Weight, zw: Tensor, tail: tuple[Tensor, ...],
    out: Tensor, config: configs.Config, bits: int, flags: dict[str, bool],
) -> None:  # fmt: skip
    m, k = q.shape
    n = out.shape[1]
    groups = weight.mul.shape[1] if weight.mul is not None else 1
    bj = group_step(k // groups, config.bj) if weight.mul is not None else config.bj
    tiles = triton.cdiv(n, config.bn) * triton.cdiv(m, config.bm)
    split = min(config.split, triton.cdiv(k, 128) * (64 // bj))
    programs = min(tiles, config.programs or tiles) if split == 1 else tiles
    affine = weight.mul is not None
    mul = weight.mul if weight.mul is not None else weight.qweight
    share, share_zw, share_flags = tail, zw, flags
    if split > 1:
        # A share of a sum knows nothing of how the sum ends, and needs no variants for it.
        share, share_zw = (weight.colsum, weight.scale), zw if affine else weight.qweight
        share_flags = {"HAS_ZA": False, "HAS_ZW": flags["HAS_ZW"] and affine, "HAS_BIAS": False, "RAW": False}
    sums = out if split == 1 else torch.empty(split, m, n, dtype=torch.int32, device=q.device)
    gemm_kernel[(programs, split)](
        q, weight.qweight.view(torch.int8), sums, scale, *rest, weight.scale, share_zw, mul, *share,
        m, n, k, weight.qweight.shape[1], groups, k // groups,
        BITS=bits, AFFINE=affine, EVEN=k % 128 == 0, BN=config.bn, BM=config.bm, BJ=bj, SPLIT=split,
        PERSISTENT=programs < tiles, ASM=not INTERPRET,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False, **share_flags,
    )  # fmt: skip
    if split > 1:
        finish_kernel[(triton.cdiv(n, FINISH[0]), triton.cdiv(m, FINISH[1]))](
            sums, out, scale, *rest, weight.scale, zw, *tail, m, n, SPLIT=split, BN=FINISH[0], BM=FINISH[1],
            num_warps=4, enable_fp_fusion=False, **(flags | {"HAS_ZW": flags["HAS_ZW"] and not affine}),
        )  # fmt: skip
