"""Row quantisation on a CPU in cache-sized blocks of vectorised, threaded torch ops. Equal to reference.py bit for bit.

Nothing is gained here by fusing it with what computes the rows: that runs as in the reference.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.reference import SCALE_FLOOR, Rows

# torch shares an op among threads above this many elements (torch.round above 2048). Waking a thread that sleeps costs
# some 50 microseconds, more than such an op, so up to SERIAL_ELEMENTS rows are worked on in blocks of THREADED_ELEMENTS,
THREADED_ELEMENTS = 1 << 15
SERIAL_ELEMENTS = 1 << 17
# and above it in few blocks, which cores' second-level caches just hold.
BLOCK_ELEMENTS = 1 << 19
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves no fraction, and rounds to nearest even


def row_quant(
    x: Float[Tensor, "m k"], *, bits: int, symmetric: bool, clip: float, group: int = 0, with_rowsum: bool = True
) -> Rows:
    """As `reference.row_quant`."""
    if group:
        settings = {"bits": bits, "symmetric": symmetric, "clip": clip, "with_rowsum": with_rowsum}
        return reference.in_groups(row_quant(x.reshape(-1, group), **settings), *x.shape)
    m, k = x.shape
    rows = Rows(torch.empty(m, k, dtype=torch.int8), torch.empty(m), torch.zeros(m, dtype=torch.int32), torch.empty(0))
    together = m if x.numel() > SERIAL_ELEMENTS else max(1, THREADED_ELEMENTS // max(k, 1))
    for start in range(0, m, together):
        part = slice(start, start + together)
        _quantise(x[part], bits, symmetric, clip, rows.q[part], rows.scale[part], rows.zero[part])
    rowsum = torch.sum(rows.q, 1, dtype=torch.int32) if with_rowsum else torch.empty(m, dtype=torch.int32)
    return rows._replace(rowsum=rowsum)


def _quantise(x: Tensor, bits: int, symmetric: bool, clip: float, q: Tensor, scale: Tensor, zero: Tensor) -> None:
    """Fill q, scale and, where not symmetric, zero."""
    m, k = x.shape
    half = float(1 << (bits - 1))
    if symmetric:
        torch.mul(_largest_magnitude(x), clip, out=scale)
        scale.div_(half - 1.0).clamp_(min=SCALE_FLOOR)
        inverse, shift = scale.reciprocal().unsqueeze(1), None
    else:
        bottom = x.amin(1).float().clamp_(max=0.0).mul_(clip)
        torch.sub(x.amax(1).float().clamp_(min=0.0).mul_(clip), bottom, out=scale)
        scale.div_(2.0 * half - 1.0).clamp_(min=SCALE_FLOOR)
        inverse = scale.reciprocal().unsqueeze(1)
        shift = _round_(bottom.neg_().mul_(inverse.squeeze(1))).sub_(half).clamp_(-half, half - 1.0).unsqueeze(1)
        zero.copy_(shift.squeeze(1))
    rows = max(1, min(m, BLOCK_ELEMENTS // k))
    scratch = torch.empty(rows, k)
    for start in range(0, m, rows):
        block = slice(start, min(start + rows, m))
        value = scratch[: block.stop - start]
        torch.mul(x[block] if x.dtype == torch.float32 else value.copy_(x[block]), inverse[block], out=value)
        if shift is not None:
            _round_(value).add_(shift[block]).clamp_(-half, half - 1.0)
        elif clip < 1.0:
            _round_(value.clamp_(-half, half - 1.0))
        else:  # max|x| itself becomes half - 1, give or take a rounding
            _round_(value)
        q[block].copy_(value)


def _largest_magnitude(x: Tensor) -> Float[Tensor, " m"]:
    """max |x| of each row; NaN where there is one."""
    if x.dtype == torch.float32:
        return torch.maximum(x.amax(1), x.amin(1).neg_())
    # The bits of a 16-bit float without its sign, as an integer, are in the order of magnitudes; NaN is above infinity.
    return (x.view(torch.int16) & 0x7FFF).amax(1).view(x.dtype).float()


def _round_(x: Tensor) -> Tensor:
    """Round to nearest even, in place. Exact below 2^22; what is larger stays large, and is clamped."""
    return x.round_() if x.numel() > THREADED_ELEMENTS else x.add_(MAGIC).sub_(MAGIC)


def kron_quant(x: Tensor, left: Tensor, right: Tensor, *, bits: int, symmetric: bool, clip: float, group: int) -> Rows:
    """As `reference.kron_quant`."""
    return row_quant(reference.kron_apply(x, left, right), bits=bits, symmetric=symmetric, clip=clip, group=group)


def block_quant(x: Tensor, matrices: Tensor, *, bits: int, symmetric: bool, clip: float, group: int) -> Rows:
    """As `reference.block_quant`."""
    return row_quant(reference.block_apply(x, matrices), bits=bits, symmetric=symmetric, clip=clip, group=group)


def rmsnorm_quant(
    x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, *, bits: int, symmetric: bool, clip: float
) -> tuple[Rows, Tensor]:
    """As `reference.rmsnorm_quant`."""
    y, hidden = reference.rmsnorm_apply(x, residual, gain, eps)
    return row_quant(y, bits=bits, symmetric=symmetric, clip=clip), hidden


def silu_mul_quant(gate_up: Tensor, *, bits: int, symmetric: bool, clip: float) -> Rows:
    """As `reference.silu_mul_quant`."""
    return row_quant(reference.silu_mul_apply(gate_up), bits=bits, symmetric=symmetric, clip=clip)
