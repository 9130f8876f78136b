"""The ops with named parts, for eager code and torch.compile alike; and the warming of a layer.

The matrices that act on a layer's input come as a flat list, in the order in which they act: two square matrices [n1, n1],
[n2, n2] that follow each other are a Kronecker product, one of three dimensions [blocks, b, b] is block-diagonal (one block
serves all pieces). All but the last are rounded to x's type; the last stays in fp32 and goes straight into the quantiser.

Shapes: m rows (tokens), k input features, n output features, t tokens, h heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from affinequant_kernels.cuda import configs
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight, kind_of, row_group


def row_quant(
    x: Float[Tensor, "m k"], *, bits: int = 4, symmetric: bool = True, clip: float = 1.0, group: int = 0
) -> Rows:
    """Quantise each row, or each `group` columns of it, with its own scale; see `reference.row_quant`."""
    return Rows(*torch.ops.affq.row_quant(x.contiguous(), bits, symmetric, clip, group))


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
    """Quantise x to `act_bits` and multiply by a quantised weight: [..., k] -> [..., n].

    Per row, or in the groups that the weight was prepared for (`prepare_weight(act_group=...)`). W4A4, W4A8 and W8A8
    alike: the weight knows its own width. `out_dtype` defaults to x's type; int32 gives the integer accumulator. See
    `reference.linear_dyn` for the arithmetic. Raises ValueError for anything that does not fit.
    """
    return torch.ops.affq.w4a4_linear_dyn(x.contiguous(), *weight, bias, act_bits, act_symmetric, clip, out_dtype)


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
    """Transform x, quantise it to `act_bits` as `linear` does, and multiply: [..., k] -> [..., n].

    Args:
        matrices: what acts on x, as the module says; empty for none.
        act_bits: 4 or 8, or 16 for activations that stay as they are.

    Raises:
        ValueError: anything that does not fit.
    """
    return torch.ops.affq.online_linear(
        x.contiguous(), list(matrices), *weight, bias, act_bits, act_symmetric, clip, out_dtype
    )


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
    kind = "group" if row_group(weight, k) else kind_of(weight.scale, weight.mul)
    rows = configs.rows_to_meet(weight.qweight.shape[0], k, kind, bits, device)
    settings = {"act_bits": act_bits, "act_symmetric": act_symmetric, "bias": bias, "out_dtype": out_dtype}
    for m in rows:
        online_linear(torch.zeros(m, k, dtype=dtype, device=device), matrices, weight, **settings)
    _WARM.add(alike)
    return rows


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
