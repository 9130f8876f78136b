"""A whole layer on a GPU: transform, quantiser and product, each a kernel of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.checks import WEIGHT_ONLY
from affinequant_kernels.cuda import gemm, quant, transform, weight_only
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight, row_group


def linear_dyn(
    x: Float[Tensor, "m k"],
    weight: Weight,
    bias: Float[Tensor, " n"] | None,
    *,
    act_bits: int,
    act_symmetric: bool,
    clip: float,
    out_dtype: torch.dtype,
    factors: Sequence[tuple[Tensor, ...]] = (),
) -> Tensor:
    """As `reference.linear_dyn` of `reference.transform(x, factors)`; as `reference.w4a16_linear` with WEIGHT_ONLY."""
    if act_bits == WEIGHT_ONLY:
        return weight_only.w4a16_linear(reference.transform(x, factors).to(x.dtype), weight, bias, out_dtype)
    group = row_group(weight, x.shape[1])
    rows = _rows(x, factors, bits=act_bits, symmetric=act_symmetric, clip=clip, group=group)
    zero = None if act_symmetric else rows.zero
    return gemm.linear(rows.q, rows.scale, zero, rows.rowsum, weight, bias, out_dtype)


def _rows(
    x: Tensor, factors: Sequence[tuple[Tensor, ...]], *, bits: int, symmetric: bool, clip: float, group: int
) -> Rows:
    """The last factor is fused with the quantiser."""
    if not factors:
        return quant.row_quant(x, bits=bits, symmetric=symmetric, clip=clip, group=group)
    fused = transform.kron_quant if len(factors[-1]) == 2 else transform.block_quant
    first = reference.transform(x, factors[:-1]).to(x.dtype)
    return fused(first, *factors[-1], bits=bits, symmetric=symmetric, clip=clip, group=group)
