"""Triton: products with weights alone quantised, of every kind: `w4a16_linear`, with activations in their own float type.

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

from affinequant_kernels.cuda import configs
from affinequant_kernels.cuda.asm import INTERPRET
from affinequant_kernels.cuda.tiles import FINISH, group_step, load_activations, store_tile, tile_of
from affinequant_kernels.weight import Weight, kind_of


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
