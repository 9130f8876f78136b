"""A whole linear layer with what acts on its input at run time, as one op that a compiler need not look into.

The matrices come as a flat list, in the order in which they act: two square matrices [n1, n1], [n2, n2] that follow each
other are a Kronecker product, one of three dimensions [blocks, b, b] is block-diagonal (one block serves all pieces). All
but the last are rounded to x's type; the last stays in fp32 and goes straight into the quantiser, fused with it on CUDA.

Shapes: m rows (tokens), k input features, n output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.checks import FLOATS, check_quant, fail
from affinequant_kernels.cuda import configs
from affinequant_kernels.ops import fused as fused_ops
from affinequant_kernels.ops import table as ops
from affinequant_kernels.ops.library import register
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight, kind_of

WEIGHT_ONLY = 16
"""As `act_bits`: activations stay in their type."""


def parts(matrices: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The matrices of one factor at a time: (left, right), or (blocks,).

    Raises:
        ValueError: a matrix without its partner.
    """
    waiting: Tensor | None = None
    for matrix in matrices:
        if matrix.ndim == 2:
            if waiting is None:
                waiting = matrix
                continue
            yield waiting, matrix
            waiting = None
        elif matrix.ndim == 3 and waiting is None:
            yield (matrix,)
        else:
            raise fail("matrices", "two of two dimensions, or one of three", list(matrix.shape))
    if waiting is not None:
        raise fail("matrices", "a second factor beside the first", "one")


def _check(
    x: Tensor, matrices: Sequence[Tensor], weight: Weight, bias: Tensor | None, act_bits: int, clip: float
) -> None:
    ops.check_x(x)
    if act_bits != WEIGHT_ONLY:
        check_quant(act_bits, clip)
    ops.check_weight(x.shape[-1], x.device, weight, bias, x.dtype)
    flat = x.view(-1, x.shape[-1])
    for first, *second in parts(matrices):
        if second:
            fused_ops.check_kron(flat, first, second[0], bits=4, clip=1.0)
        else:
            fused_ops.check_block(flat, first, bits=4, clip=1.0)


def _shapes(
    x: Tensor,
    matrices: Sequence[Tensor],
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
    _check(x, matrices, Weight(qweight, w_scale, w_zero, w_mul, w_colsum), bias, act_bits, clip)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]), dtype=out_dtype or x.dtype)


def _run(
    x: Tensor,
    matrices: Sequence[Tensor],
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
    weight = Weight(qweight, w_scale, w_zero, w_mul, w_colsum)
    _check(x, matrices, weight, bias, act_bits, clip)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in FLOATS:
        raise fail("out_dtype", "a float type", out_dtype)
    flat = x.view(-1, x.shape[-1])
    factors = list(parts(matrices))
    if act_bits == WEIGHT_ONLY:
        y = torch.ops.affq.w4a16_linear(reference.transform(flat, factors).to(x.dtype), *weight, bias, out_dtype)
    elif x.is_cuda:
        y = _on_cuda(flat, factors, weight, bias, act_bits, act_symmetric, clip, out_dtype)
    else:
        from affinequant_kernels.cpu import layer

        settings = {"act_bits": act_bits, "act_symmetric": act_symmetric, "clip": clip, "out_dtype": out_dtype}
        y = layer.linear_dyn(flat, weight, bias, factors=factors, **settings)
    return y.view(*x.shape[:-1], qweight.shape[0])


def _on_cuda(
    x: Tensor,
    factors: Sequence[tuple[Tensor, ...]],
    weight: Weight,
    bias: Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    clip: float,
    out_dtype: torch.dtype,
) -> Tensor:
    from affinequant_kernels.cuda import gemm

    if not factors:
        return torch.ops.affq.w4a4_linear_dyn(x, *weight, bias, act_bits, act_symmetric, clip, out_dtype)
    op = torch.ops.affq.kron_quant if len(factors[-1]) == 2 else torch.ops.affq.block_quant
    first = reference.transform(x, factors[:-1]).to(x.dtype)
    rows = Rows(*op(first, *factors[-1], act_bits, act_symmetric, clip))
    zero = None if act_symmetric else rows.zero
    return gemm.linear(rows.q, rows.scale, zero, rows.rowsum, weight, bias, out_dtype)


_WARM: set[tuple[object, ...]] = set()


def warm(
    k: int,
    dtype: torch.dtype,
    matrices: Sequence[Tensor],
    weight: Weight,
    *,
    act_bits: int,
    act_symmetric: bool,
    bias: Float[Tensor, " n"] | None,
    out_dtype: torch.dtype,
) -> list[int]:
    """Compile, on a GPU, every kernel that `online_linear` can meet for inputs [..., k] of a type, so that no request
    waits for it. Layers alike are warmed once in a process, and triton keeps on disk what it compiled.

    Returns:
        With how many tokens the layer was run: nothing on other devices, or where a layer like it was before.
    """
    device = weight.qweight.device
    tensors = [None if t is None else (t.shape, t.dtype) for t in (*weight, bias, *matrices)]
    alike = (device, dtype, act_bits, act_symmetric, out_dtype, *tensors)
    if device.type != "cuda" or alike in _WARM:
        return []
    bits = 4 if weight.qweight.dtype == torch.uint8 else 8
    rows = configs.rows_to_meet(weight.qweight.shape[0], k, kind_of(weight.scale, weight.mul), bits, device)
    settings = {"act_bits": act_bits, "act_symmetric": act_symmetric, "bias": bias, "out_dtype": out_dtype}
    for m in rows:
        online_linear(torch.zeros(m, k, dtype=dtype, device=device), matrices, weight, **settings)
    _WARM.add(alike)
    return rows


register(
    f"online_linear(Tensor x, Tensor[] matrices, {ops.WEIGHT_SCHEMA}, int act_bits=4, bool act_symmetric=True, "
    "float clip=1.0, ScalarType? out_dtype=None) -> Tensor",
    _run,
    _shapes,
)


def online_linear(
    x: Float[Tensor, "*batch k"],
    matrices: Sequence[Tensor],
    weight: Weight,
    *,
    act_bits: int = 4,
    act_symmetric: bool = True,
    clip: float = 1.0,
    bias: Float[Tensor, " n"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Transform x, quantise it per row to `act_bits` and multiply: [..., k] -> [..., n].

    Args:
        matrices: what acts on x, as the module says; empty for none.
        act_bits: 4 or 8, or 16 for activations that stay as they are.

    Raises:
        ValueError: anything that does not fit.
    """
    return torch.ops.affq.online_linear(
        x.contiguous(), list(matrices), *weight, bias, act_bits, act_symmetric, clip, out_dtype
    )
