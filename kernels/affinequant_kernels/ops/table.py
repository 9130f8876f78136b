"""The ops, registered with torch.library under `affq`: schemas, shapes for torch.compile, and dispatch by device.

On the CPU an op runs what is in cpu/, on CUDA the Triton kernels. Both equal reference.py. Arguments are checked here, so no
kernel reads out of bounds; values (finite scales, codes in range) are checked once, in `prepare_weight`. The ops that
fuse something with the quantiser, and the key-value cache, are in fused.py, which is registered along with these.

Shapes: m rows (tokens), k input features, n output features, g groups, `bytes` the width of layout hs128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels import layout
from affinequant_kernels.checks import FLOATS, check_quant, check_tensor, fail
from affinequant_kernels.ops.library import register
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight

WEIGHT_SCHEMA = "Tensor qweight, Tensor w_scale, Tensor? w_zero, Tensor? w_mul, Tensor w_colsum, Tensor? bias"
ROWS_SCHEMA = "Tensor q, Tensor scale, Tensor zero, Tensor rowsum"

_OUT = (*FLOATS, torch.int32)


# Checks. Shapes may be symbolic here: they also run under torch.compile.


def check_weight(k: int, device: torch.device, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    qweight, scale, zero, mul, colsum = weight
    four = qweight.dtype == torch.uint8
    columns = layout.packed_columns(k) if four else k
    check_tensor("qweight", qweight, (None, columns), (torch.uint8, torch.int8), device)
    n = qweight.shape[0]
    grouped = scale.ndim == 2
    check_tensor("w_scale", scale, (n, None) if grouped else (n,), (torch.float32,), device)
    groups = None
    if mul is not None:
        if grouped or not four:
            raise fail("w_mul", "None beside a scale per group or 8-bit codes", list(mul.shape))
        check_tensor("w_mul", mul, (n, None), (torch.uint8,), device)
        groups = mul.shape[1]
    elif grouped:
        groups = scale.shape[1]
    if groups is not None and (groups == 0 or k % groups):
        raise fail("w_mul" if mul is not None else "w_scale", f"a number of groups that divides {k} columns", groups)
    if zero is not None:
        check_tensor("w_zero", zero, (n,) if groups is None else (n, groups), (torch.int8,), device)
    check_tensor("w_colsum", colsum, (n,), (torch.float32 if grouped else torch.int32,), device)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, device)
    if out_dtype not in _OUT or (grouped and out_dtype == torch.int32):
        raise fail("out_dtype", "a float type, or int32 without a scale per group", out_dtype)
    # The accumulator, zero points included, must fit int32.
    if k * 255 * (255 if not four else 128) >= 1 << 31:
        raise fail("k", "an accumulator within int32", f"{k} columns")


def _check_rows(q: Tensor, scale: Tensor, zero: Tensor | None, rowsum: Tensor | None) -> None:
    check_tensor("q", q, (None, None), (torch.int8,))
    m = q.shape[0]
    check_tensor("scale", scale, (m,), (torch.float32,), q.device)
    for name, part in (("zero", zero), ("rowsum", rowsum)):
        if part is not None:
            check_tensor(name, part, (m,), (torch.int32,), q.device)


def check_x(x: Tensor) -> None:
    if x.ndim == 0:
        raise fail("x", "shape [..., k]", [])
    check_tensor("x", x, tuple(x.shape), FLOATS)


# Shapes only, for torch.compile.


def empty_rows(x: Tensor, k: int | None = None) -> tuple[Tensor, ...]:
    m, k = x.shape[0], x.shape[1] if k is None else k
    return (
        x.new_empty((m, k), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m,), dtype=torch.int32),
        x.new_empty((m,), dtype=torch.int32),
    )


def _row_quant_fake(x: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0) -> tuple[Tensor, ...]:
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    return empty_rows(x)


def _linear_fake(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rowsum: Tensor | None,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_rows(q, scale, zero, rowsum)
    check_weight(q.shape[1], q.device, Weight(qweight, w_scale, w_zero, w_mul, w_colsum), bias, out_dtype)
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=out_dtype)


def _linear_dyn_fake(
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    act_bits: int = 4,
    act_symmetric: bool = True,
    clip: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_x(x)
    check_quant(act_bits, clip)
    weight = Weight(qweight, w_scale, w_zero, w_mul, w_colsum)
    check_weight(x.shape[-1], x.device, weight, bias, out_dtype or x.dtype)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]), dtype=out_dtype or x.dtype)


# The work. A kernel may only see what the checks above have let through, so each begins with them, as its twin does.


def quantiser(device: torch.device) -> Callable[..., Rows]:
    """`row_quant` of this device."""
    if device.type == "cuda":
        from affinequant_kernels.cuda import quant

        return quant.row_quant
    from affinequant_kernels.cpu import layer

    return layer.row_quant


def _row_quant(x: Tensor, bits: int = 4, symmetric: bool = True, clip: float = 1.0) -> tuple[Tensor, ...]:
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    return tuple(quantiser(x.device)(x, bits=bits, symmetric=symmetric, clip=clip))


def _linear(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rowsum: Tensor | None,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_rows(q, scale, zero, rowsum)
    weight = Weight(qweight, w_scale, w_zero, w_mul, w_colsum)
    check_weight(q.shape[1], q.device, weight, bias, out_dtype)
    if q.is_cuda:
        from affinequant_kernels.cuda import gemm

        return gemm.linear(q, scale, zero, rowsum, weight, bias, out_dtype)
    from affinequant_kernels.cpu import layer

    return layer.linear(q, scale, zero, weight, bias, out_dtype)


def _linear_dyn(
    x: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_mul: Tensor | None,
    w_colsum: Tensor,
    bias: Tensor | None,
    act_bits: int = 4,
    act_symmetric: bool = True,
    clip: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_x(x)
    check_quant(act_bits, clip)
    weight = Weight(qweight, w_scale, w_zero, w_mul, w_colsum)
    out_dtype = out_dtype or x.dtype
    k = x.shape[-1]
    check_weight(k, x.device, weight, bias, out_dtype)
    flat = x.view(-1, k)
    if x.is_cuda:
        from affinequant_kernels.cuda import gemm

        rows = quantiser(x.device)(flat, bits=act_bits, symmetric=act_symmetric, clip=clip)
        zero = None if act_symmetric else rows.zero
        y = gemm.linear(rows.q, rows.scale, zero, rows.rowsum, weight, bias, out_dtype)
    else:
        from affinequant_kernels.cpu import layer

        settings = {"act_bits": act_bits, "act_symmetric": act_symmetric, "clip": clip, "out_dtype": out_dtype}
        y = layer.linear_dyn(flat, weight, bias, **settings)
    return y.view(*x.shape[:-1], qweight.shape[0])


register(
    f"row_quant(Tensor x, int bits=4, bool symmetric=True, float clip=1.0) -> ({ROWS_SCHEMA})",
    _row_quant,
    _row_quant_fake,
)
register(
    f"w4a4_linear(Tensor q, Tensor scale, Tensor? zero, Tensor? rowsum, {WEIGHT_SCHEMA}, ScalarType out_dtype) -> Tensor",
    _linear,
    _linear_fake,
)
register(
    f"w4a4_linear_dyn(Tensor x, {WEIGHT_SCHEMA}, int act_bits=4, bool act_symmetric=True, float clip=1.0, "
    "ScalarType? out_dtype=None) -> Tensor",
    _linear_dyn,
    _linear_dyn_fake,
)

# The same ops with named parts, for eager code.


def row_quant(x: Float[Tensor, "m k"], *, bits: int = 4, symmetric: bool = True, clip: float = 1.0) -> Rows:
    """Quantise each row with its own scale; see `reference.row_quant`."""
    return Rows(*torch.ops.affq.row_quant(x.contiguous(), bits, symmetric, clip))


def linear(
    x: Float[Tensor, "*batch k"],
    weight: Weight,
    *,
    act_bits: int = 4,
    act_symmetric: bool = True,
    clip: float = 1.0,
    bias: Float[Tensor, " n"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantise x per row to `act_bits` and multiply by a quantised weight: [..., k] -> [..., n].

    W4A4, W4A8 and W8A8 alike: the weight knows its own width. `out_dtype` defaults to x's type; int32 gives the integer
    accumulator. See `reference.linear_dyn` for the arithmetic. Raises ValueError for anything that does not fit.
    """
    return torch.ops.affq.w4a4_linear_dyn(x.contiguous(), *weight, bias, act_bits, act_symmetric, clip, out_dtype)
