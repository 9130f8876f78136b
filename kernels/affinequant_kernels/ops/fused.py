"""The ops that compute a row and quantise it at once, weights-only products, and the 4-bit key-value cache.

On the CPU, where nothing is gained by fusing, they run the reference's transform and the fast quantiser.
Shapes: m rows (tokens), k features, t tokens, h heads, d head dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.checks import FLOATS, check_quant, check_tensor, fail
from affinequant_kernels.ops import table as ops
from affinequant_kernels.ops.library import register
from affinequant_kernels.weight import Weight

_SETTINGS = "int bits=4, bool symmetric=True, float clip=1.0"


def _check_square(argument: str, matrix: Tensor, x: Tensor, dims: int) -> None:
    shape = tuple(matrix.shape)
    check_tensor(argument, matrix, (None,) * dims, FLOATS, x.device)
    if shape[-1] != shape[-2] or shape[-1] == 0:
        raise fail(argument, "square matrices", list(shape))


def check_kron(x: Tensor, left: Tensor, right: Tensor, bits: int, clip: float) -> None:
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    _check_square("left", left, x, 2)
    _check_square("right", right, x, 2)
    if left.shape[0] * right.shape[0] != x.shape[1]:
        raise fail("left, right", f"sizes whose product is {x.shape[1]}", (left.shape[0], right.shape[0]))


def _kron_shapes(
    x: Tensor, left: Tensor, right: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0
) -> tuple[Tensor, ...]:
    check_kron(x, left, right, bits, clip)
    return ops.empty_rows(x)


def _kron_quant(
    x: Tensor, left: Tensor, right: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0
) -> tuple[Tensor, ...]:
    check_kron(x, left, right, bits, clip)
    if x.is_cuda:
        from affinequant_kernels.cuda import transform

        return tuple(transform.kron_quant(x, left, right, bits=bits, symmetric=symmetric, clip=clip))
    y = reference.kron_apply(x, left, right)
    return tuple(ops.quantiser(x.device)(y, bits=bits, symmetric=symmetric, clip=clip))


def check_block(x: Tensor, matrices: Tensor, bits: int, clip: float) -> None:
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    _check_square("matrices", matrices, x, 3)
    blocks, size = matrices.shape[0], matrices.shape[1]
    if x.shape[1] % size or (blocks != 1 and blocks * size != x.shape[1]):
        raise fail("matrices", f"one matrix, or as many as fill {x.shape[1]} columns", list(matrices.shape))


def _block_shapes(
    x: Tensor, matrices: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0
) -> tuple[Tensor, ...]:
    check_block(x, matrices, bits, clip)
    return ops.empty_rows(x)


def _block_quant(
    x: Tensor, matrices: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0
) -> tuple[Tensor, ...]:
    check_block(x, matrices, bits, clip)
    if x.is_cuda:
        from affinequant_kernels.cuda import transform

        return tuple(transform.block_quant(x, matrices, bits=bits, symmetric=symmetric, clip=clip))
    y = reference.block_apply(x, matrices)
    return tuple(ops.quantiser(x.device)(y, bits=bits, symmetric=symmetric, clip=clip))


def _check_norm(x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, bits: int, clip: float) -> None:
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    check_tensor("gain", gain, (x.shape[1],), FLOATS, x.device)
    if not eps > 0:
        raise fail("eps", "a positive number", eps)


def _norm_shapes(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor,
    eps: float,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
) -> tuple[Tensor, ...]:
    _check_norm(x, residual, gain, eps, bits, clip)
    return (*ops.empty_rows(x), torch.empty_like(x))


def _rmsnorm_quant(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor,
    eps: float,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
) -> tuple[Tensor, ...]:
    _check_norm(x, residual, gain, eps, bits, clip)
    if x.is_cuda:
        from affinequant_kernels.cuda import quant

        rows, hidden = quant.rmsnorm_quant(x, residual, gain, eps, bits=bits, symmetric=symmetric, clip=clip)
    else:
        y, hidden = reference.rmsnorm_apply(x, residual, gain, eps)
        rows = ops.quantiser(x.device)(y, bits=bits, symmetric=symmetric, clip=clip)
    return (*rows, hidden)


def _check_gate(gate_up: Tensor, bits: int, clip: float) -> None:
    check_tensor("gate_up", gate_up, (None, None), FLOATS)
    check_quant(bits, clip)
    if gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise fail("gate_up", "an even number of columns", gate_up.shape[1])


def _silu_shapes(gate_up: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0) -> tuple[Tensor, ...]:
    _check_gate(gate_up, bits, clip)
    return ops.empty_rows(gate_up, gate_up.shape[1] // 2)


def _silu_mul_quant(gate_up: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0) -> tuple[Tensor, ...]:
    _check_gate(gate_up, bits, clip)
    if gate_up.is_cuda:
        from affinequant_kernels.cuda import quant

        return tuple(quant.silu_mul_quant(gate_up, bits=bits, symmetric=symmetric, clip=clip))
    y = reference.silu_mul_apply(gate_up)
    return tuple(ops.quantiser(gate_up.device)(y, bits=bits, symmetric=symmetric, clip=clip))


def _check_a16(x: Tensor, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    ops.check_x(x)
    if out_dtype not in FLOATS:
        raise fail("out_dtype", "a float type", out_dtype)
    ops.check_weight(x.shape[-1], x.device, weight, bias, out_dtype)


def _a16_shapes(
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_a16(x, Weight(qweight, w_scale, w_zero, w_mul, w_colsum), bias, out_dtype or x.dtype)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]), dtype=out_dtype or x.dtype)


def _a16_linear(
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    weight = Weight(qweight, w_scale, w_zero, w_mul, w_colsum)
    _check_a16(x, weight, bias, out_dtype or x.dtype)
    flat = x.view(-1, x.shape[-1])
    if x.is_cuda:
        from affinequant_kernels.cuda import gemm_group

        y = gemm_group.w4a16_linear(flat, weight, bias, out_dtype or x.dtype)
    else:
        from affinequant_kernels.cpu import layer

        y = layer.w4a16_linear(flat, weight, bias, out_dtype or x.dtype)
    return y.view(*x.shape[:-1], qweight.shape[0])


def _check_kv(k: Tensor) -> None:
    check_tensor("k", k, (None, None, None), FLOATS)
    if k.shape[2] % 2 or k.shape[2] == 0:
        raise fail("k", "an even head dimension", k.shape[2])


def _pack_shapes(k: Tensor) -> tuple[Tensor, ...]:
    _check_kv(k)
    t, h, d = k.shape
    scale = k.new_empty((t, h), dtype=torch.float16)
    return k.new_empty((t, h, d // 2), dtype=torch.uint8), scale, torch.empty_like(scale)


def _kv_pack(k: Tensor) -> tuple[Tensor, ...]:
    _check_kv(k)
    if k.is_cuda:
        from affinequant_kernels.cuda import kv

        return kv.kv_pack(k)
    return reference.kv_pack(k)


def _check_packed(packed: Tensor, scale: Tensor, zero: Tensor, out_dtype: torch.dtype) -> None:
    check_tensor("packed", packed, (None, None, None), (torch.uint8,))
    for name, part in (("scale", scale), ("zero", zero)):
        check_tensor(name, part, tuple(packed.shape[:2]), (torch.float16,), packed.device)
    if out_dtype not in FLOATS:
        raise fail("out_dtype", "a float type", out_dtype)


def _unpack_shapes(packed: Tensor, scale: Tensor, zero: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_packed(packed, scale, zero, out_dtype)
    t, h, half = packed.shape
    return packed.new_empty((t, h, 2 * half), dtype=out_dtype)


def _kv_unpack(packed: Tensor, scale: Tensor, zero: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_packed(packed, scale, zero, out_dtype)
    if packed.is_cuda:
        from affinequant_kernels.cuda import kv

        return kv.kv_unpack(packed, scale, zero, out_dtype)
    return reference.kv_unpack(packed, scale, zero, out_dtype)


_ROWS = ops.ROWS_SCHEMA
register(f"kron_quant(Tensor x, Tensor left, Tensor right, {_SETTINGS}) -> ({_ROWS})", _kron_quant, _kron_shapes)
register(f"block_quant(Tensor x, Tensor matrices, {_SETTINGS}) -> ({_ROWS})", _block_quant, _block_shapes)
register(
    f"rmsnorm_quant(Tensor x, Tensor? residual, Tensor gain, float eps, {_SETTINGS}) -> ({_ROWS}, Tensor hidden)",
    _rmsnorm_quant,
    _norm_shapes,
)
register(f"silu_mul_quant(Tensor gate_up, {_SETTINGS}) -> ({_ROWS})", _silu_mul_quant, _silu_shapes)
register(f"w4a16_linear(Tensor x, {ops.WEIGHT_SCHEMA}, ScalarType? out_dtype=None) -> Tensor", _a16_linear, _a16_shapes)
register("kv_pack(Tensor k) -> (Tensor packed, Tensor scale, Tensor zero)", _kv_pack, _pack_shapes)
register(
    "kv_unpack(Tensor packed, Tensor scale, Tensor zero, ScalarType out_dtype) -> Tensor", _kv_unpack, _unpack_shapes
)


def kv_pack(
    k: Float[Tensor, "t h d"],
) -> tuple[UInt8[Tensor, "t h half"], Float16[Tensor, "t h"], Float16[Tensor, "t h"]]:
    """Keys or values in 4 bits, two codes in a byte, with a scale and an offset per token and head: (packed, scale, zero)
    as `reference.kv_pack` defines them.

    Raises:
        ValueError: a shape, dtype or layout that the op does not take.
    """
    return torch.ops.affq.kv_pack(k)


def kv_unpack(
    packed: UInt8[Tensor, "t h half"],
    scale: Float16[Tensor, "t h"],
    zero: Float16[Tensor, "t h"],
    out_dtype: torch.dtype,
) -> Float[Tensor, "t h d"]:
    """What `kv_pack` was given, rounded to its grid.

    Raises:
        ValueError: a shape, dtype or layout that the op does not take.
    """
    return torch.ops.affq.kv_unpack(packed, scale, zero, out_dtype)
