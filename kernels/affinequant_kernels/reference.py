"""Every op in plain torch, with exact integers: the specification, which the fast paths must equal bit for bit.

Rules that all implementations share:
* Quantisers compute in fp32, one rounding per operation, no fused multiply-add; rounding is to nearest, ties to even.
* A linear layer's accumulator is an exact int32. Its epilogue is fp32, in the order
  float(acc) * weight_scale * activation_scale + bias, and then one rounding to the output's type.
* An activation is (q - zero) * scale per row, a weight (code - zero) * mul * scale (see weight.py).
* Rows in groups, each with its own scale and zero point, have an exact int32 a group, and float(acc) * weight_scale *
  activation_scale is added over the groups in ascending order, in fp32. A weight's scale per channel acts on the whole sum.

Shapes: m rows (tokens), k input features, n output features, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int8, Int32, UInt8
from torch import Tensor

from affinequant_kernels.checks import check_quant
from affinequant_kernels.weight import Weight, integer_weight, kind_of, row_group, unpack

SCALE_FLOOR = 1e-8


class Rows(NamedTuple):
    """Quantised rows: value = (q - zero) * scale. In groups all but q have a second axis, [m, g]."""

    q: Tensor  # int8 [m, k]
    scale: Tensor  # float32 [m]
    zero: Tensor  # int32 [m]; all 0 where the quantiser is symmetric
    rowsum: Tensor  # int32 [m]: sum of q over k


def _divide(x: Tensor, by: float) -> Tensor:
    # On CUDA torch divides by a Python number through its reciprocal, which rounds twice; by a tensor it divides.
    return x / torch.full_like(x, by)


def in_groups(rows: Rows, m: int, k: int) -> Rows:
    """Rows [m, k] from their groups, each of which was quantised as if it were a row."""
    return Rows(rows.q.view(m, k), *(part.view(m, k // rows.q.shape[1]) for part in rows[1:]))


def row_quant(
    x: Float[Tensor, "m k"], *, bits: int = 4, symmetric: bool = True, clip: float = 1.0, group: int = 0
) -> Rows:
    """Quantise each row with its own scale; or each `group` columns of it, where that is not 0.

    symmetric:   s = max(max|x| * clip / qmax, 1e-8);      q = rne(clamp(x * (1/s), -qmax-1, qmax)); zero = 0
    asymmetric:  lo = min(min x, 0) * clip; hi = max(max x, 0) * clip; s = max((hi - lo) / (2^bits - 1), 1e-8)
                 zero = clamp(rne(-lo * (1/s)) - 2^(bits-1), -qmax-1, qmax)
                 q = clamp(rne(x * (1/s)) + zero, -qmax-1, qmax)
    with qmax = 2^(bits-1) - 1. A row that holds NaN or infinity gets a scale of NaN or infinity, and unspecified codes.
    """
    check_quant(bits, clip)
    if group:
        return in_groups(row_quant(x.reshape(-1, group), bits=bits, symmetric=symmetric, clip=clip), *x.shape)
    x = x.float()
    half = 1 << (bits - 1)
    low, high = float(-half), float(half - 1)
    if symmetric:
        scale = _divide(x.abs().amax(1) * clip, high).clamp(min=SCALE_FLOOR)
        zero = torch.zeros_like(scale)
        q = (x * (1.0 / scale).unsqueeze(1)).clamp(low, high).round()
    else:
        bottom = x.amin(1).clamp(max=0.0) * clip
        top = x.amax(1).clamp(min=0.0) * clip
        scale = _divide(top - bottom, float(2 * half - 1)).clamp(min=SCALE_FLOOR)
        inverse = 1.0 / scale
        zero = ((-bottom * inverse).round() - half).clamp(low, high)
        q = ((x * inverse.unsqueeze(1)).round() + zero.unsqueeze(1)).clamp(low, high)
    finite = torch.isfinite(scale)
    q = torch.where(finite.unsqueeze(1), q, 0.0).to(torch.int8)
    zero = torch.where(finite, zero, 0.0).to(torch.int32)
    return Rows(q, scale, zero, q.sum(1, dtype=torch.int32))


def integer_matmul(a: Tensor, b: Tensor) -> Int32[Tensor, "m n"]:
    """a [m, k] times b [n, k] transposed, exactly. Through fp64, whose sums of integers are exact below 2^53."""
    return (a.double() @ b.double().t()).to(torch.int64).to(torch.int32)


def accumulator(q: Int8[Tensor, "m k"], zero: Int32[Tensor, " m"] | None, weight: Weight) -> Int32[Tensor, "m n"]:
    """sum_k (q - zero) * (code - weight zero) * mul. Kinds "channel" and "integer"."""
    value = integer_weight(unpack(weight.qweight, q.shape[1]), weight.zero, weight.mul)
    acc = integer_matmul(q, value)
    return acc if zero is None else acc - zero.unsqueeze(1) * weight.colsum


def linear(
    q: Int8[Tensor, "m k"],
    scale: Float[Tensor, " m *g"],
    zero: Int32[Tensor, " m *g"] | None,
    weight: Weight,
    bias: Float[Tensor, " n"] | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantised rows times a quantised weight, [m, n].

    Kind "group" adds float(acc_g) * scale_g over the groups in ascending order, in fp32, and then subtracts
    float(zero) * colsum. `out_dtype` int32 gives the accumulator itself (not for kind "group"). Rows in groups need
    a weight that was prepared for them.
    """
    if scale.ndim == 2:
        y = _group_sum(q, scale, zero, weight)
        y = y * weight.scale if weight.scale.ndim == 1 else y
    elif kind_of(weight.scale, weight.mul) == "group":
        y = _group_sum(q, None, None, weight)
        if zero is not None:
            y = y - zero.float().unsqueeze(1) * weight.colsum
        y = y * scale.unsqueeze(1)
    else:
        acc = accumulator(q, zero, weight)
        if out_dtype == torch.int32:
            return acc
        y = acc.float() * weight.scale * scale.unsqueeze(1)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def _group_sum(q: Tensor, scale: Tensor | None, zero: Tensor | None, weight: Weight) -> Float[Tensor, "m n"]:
    """Over the groups of the weight, or of the rows, with their scale [m, g] and zero; with each scale that is a group's."""
    value = integer_weight(unpack(weight.qweight, q.shape[1]), weight.zero, None)
    groups = weight.scale.shape[1] if scale is None else scale.shape[1]
    y = torch.zeros(q.shape[0], value.shape[0], device=q.device)
    for g, (rows, columns) in enumerate(zip(q.chunk(groups, 1), value.chunk(groups, 1), strict=True)):
        acc = integer_matmul(rows, columns)
        acc = acc if zero is None else acc - zero[:, g].unsqueeze(1) * weight.colsum[:, g]
        part = acc.float() if weight.scale.ndim == 1 else acc.float() * weight.scale[:, g]
        y = y + (part if scale is None else part * scale[:, g].unsqueeze(1))
    return y


def linear_dyn(
    x: Float[Tensor, "m k"],
    weight: Weight,
    bias: Float[Tensor, " n"] | None = None,
    *,
    act_bits: int = 4,
    act_symmetric: bool = True,
    clip: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`row_quant`, in groups where the weight was prepared for them, and then `linear`."""
    rows = row_quant(x, bits=act_bits, symmetric=act_symmetric, clip=clip, group=row_group(weight, x.shape[1]))
    return linear(rows.q, rows.scale, None if act_symmetric else rows.zero, weight, bias, out_dtype or x.dtype)


# Transforms and activation functions that are fused with the quantiser on CUDA.


def kron_apply(
    x: Float[Tensor, "m k"], left: Float[Tensor, "n1 n1"], right: Float[Tensor, "n2 n2"]
) -> Float[Tensor, "m k"]:
    """x (left (x) right) in fp32; the matrices, and the product with `right`, are rounded to x's type."""
    matrix = x.view(-1, left.shape[0], right.shape[0]).float()
    half = (matrix @ right.to(x.dtype).float()).to(x.dtype).float()
    return (left.to(x.dtype).float().t() @ half).reshape(x.shape)


def block_apply(x: Float[Tensor, "m k"], matrices: Float[Tensor, "blocks b b"]) -> Float[Tensor, "m k"]:
    """Each piece of b columns times its matrix, in fp32; one matrix serves all pieces. The matrices get x's type."""
    pieces = x.view(x.shape[0], -1, matrices.shape[1]).float()
    return torch.einsum("mpi,pij->mpj", pieces, matrices.to(x.dtype).float().expand(pieces.shape[1], -1, -1)).reshape(
        x.shape
    )


def transform(x: Float[Tensor, "m k"], factors: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """x times each factor in turn, (left, right) of `kron_apply` or (matrices,) of `block_apply`: fp32 after the last of
    them, rounded to x's type between two; x itself where there is none."""
    y = x
    for factor in factors:
        y = (kron_apply if len(factor) == 2 else block_apply)(y.to(x.dtype), *factor)
    return y


def kron_quant(
    x: Float[Tensor, "m k"],
    left: Float[Tensor, "n1 n1"],
    right: Float[Tensor, "n2 n2"],
    *,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
) -> Rows:
    """`row_quant` of `kron_apply`."""
    return row_quant(kron_apply(x, left, right), bits=bits, symmetric=symmetric, clip=clip, group=group)


def block_quant(
    x: Float[Tensor, "m k"],
    matrices: Float[Tensor, "blocks b b"],
    *,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
) -> Rows:
    """`row_quant` of `block_apply`."""
    return row_quant(block_apply(x, matrices), bits=bits, symmetric=symmetric, clip=clip, group=group)


def rmsnorm_apply(
    x: Float[Tensor, "m k"], residual: Float[Tensor, "m k"] | None, gain: Float[Tensor, " k"], eps: float
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """(gain * normalised(h), h) with h = x + residual, each rounded to x's type, as Llama's norm does."""
    hidden = x.clone() if residual is None else x + residual
    h = hidden.float()
    normal = (h * (1.0 / torch.sqrt(h.square().mean(1, keepdim=True) + eps))).to(x.dtype)
    return (normal.float() * gain.float()).to(x.dtype), hidden


def rmsnorm_quant(
    x: Float[Tensor, "m k"],
    residual: Float[Tensor, "m k"] | None,
    gain: Float[Tensor, " k"],
    eps: float,
    *,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
) -> tuple[Rows, Float[Tensor, "m k"]]:
    """`row_quant` of the norm's output, and x + residual."""
    y, hidden = rmsnorm_apply(x, residual, gain, eps)
    return row_quant(y, bits=bits, symmetric=symmetric, clip=clip), hidden


def silu_mul_apply(gate_up: Float[Tensor, "m two_k"]) -> Float[Tensor, "m k"]:
    """silu(gate) * up of rows [gate | up], each step rounded to the input's type."""
    gate, up = gate_up.chunk(2, 1)
    gate = gate.float()
    return ((gate / (1.0 + torch.exp(-gate))).to(up.dtype).float() * up.float()).to(up.dtype)


def silu_mul_quant(
    gate_up: Float[Tensor, "m two_k"], *, bits: int = 4, symmetric: bool = True, clip: float = 1.0
) -> Rows:
    """`row_quant` of `silu_mul_apply`."""
    return row_quant(silu_mul_apply(gate_up), bits=bits, symmetric=symmetric, clip=clip)


# Weights only, and the key-value cache.


def w4a16_linear(
    x: Float[Tensor, "m k"],
    weight: Weight,
    bias: Float[Tensor, " n"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times the dequantised weight, in fp64 before the one rounding to the output's type."""
    value = integer_weight(unpack(weight.qweight, x.shape[1]), weight.zero, weight.mul).double()
    groups = weight.scale.shape[1] if weight.scale.ndim == 2 else 1
    value = (value.unflatten(1, (groups, -1)) * weight.scale.double().view(-1, groups, 1)).flatten(1)
    y = x.double() @ value.t()
    return (y if bias is None else y + bias.double()).to(out_dtype or x.dtype)


KV_LARGEST = 65504.0  # of fp16
KV_LEAST_STEP = 2.0**-14  # smallest normal fp16


def kv_pack(
    k: Float[Tensor, "t h d"],
) -> tuple[UInt8[Tensor, "t h half_d"], Float16[Tensor, "t h"], Float16[Tensor, "t h"]]:
    """Keys or values in 4 bits, one scale and offset per token and head: value = u * scale + zero, u in 0..15.

    zero = fp16(clamp(min k)); scale = fp16(clamp((max k - zero) / 15, 2^-14, 65504)); u = rne(clamp((k - zero) / scale)).
    Byte j holds element j in its low nibble and element d/2 + j in its high nibble.
    """
    value = k.float()
    zero = value.amin(-1).clamp(-KV_LARGEST, KV_LARGEST).half()
    scale = _divide(value.amax(-1) - zero.float(), 15.0).clamp(KV_LEAST_STEP, KV_LARGEST).half()
    steps = (value - zero.float().unsqueeze(-1)) * (1.0 / scale.float()).unsqueeze(-1)
    low, high = steps.clamp(0.0, 15.0).round().to(torch.uint8).chunk(2, -1)
    return low | (high << 4), scale, zero


def kv_unpack(
    packed: UInt8[Tensor, "t h half_d"],
    scale: Float16[Tensor, "t h"],
    zero: Float16[Tensor, "t h"],
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "t h d"]:
    """Inverse of `kv_pack`: u * scale + zero in fp32, two roundings, then to the output's type."""
    u = torch.cat((packed & 15, packed >> 4), -1).float()
    return (u * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).to(out_dtype)
