"""The CPU path: int8 matmuls on weights that are unpacked once.

Equal to reference.py bit for bit. What makes it fast and still exact:
* `engines.py` knows several ways to multiply integers, and chooses by time among those that are exact on this machine.
* The integers come as int32, or as float32 where they lie below 2^24: that holds them exactly. Zero points are integers,
  taken off before the scale.

Shapes: m rows (tokens), k input features, n output features, g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from affinequant_kernels import reference
from affinequant_kernels.checks import WEIGHT_ONLY
from affinequant_kernels.cpu import engines, native
from affinequant_kernels.cpu.candidates import EXACT, Candidate, Held
from affinequant_kernels.cpu.quant import SERIAL_ELEMENTS, THREADED_ELEMENTS, row_quant
from affinequant_kernels.weight import Weight, integer_weight, kind_of, row_group, unpack

T = TypeVar("T")

# Rows of the output worked on at once: bounds the fp32 intermediate, which costs page faults when it is large.
CHUNK_ROWS = 512
# Up to so many rows reading a weight takes longer than multiplying with AVX512, and native.c reads it in 4 bits.
FEW_ROWS = 32


# One weight, ready to multiply.


@dataclass(frozen=True, slots=True)
class _Plan:
    engine: Candidate
    held: tuple[Held, ...] | None  # what it reads, one per group; None: the weight's own int8 codes
    whole: bool  # integers may lie above EXACT, and are needed as int32


# What was made from a weight, kept as long as the weight's storage lives and is not written to.
_MADE: dict[tuple[object, ...], tuple[object, tuple[StorageWeakRef, ...]]] = {}


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # Inference tensors do not count their updates: a weight that is changed in place must be an ordinary tensor.
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, version


def _made(parts: tuple[Tensor | None, ...], settings: tuple[object, ...], make: Callable[[], T]) -> T:
    tensors = [t for t in parts if t is not None]
    key = (*settings, *(t is None for t in parts), *(_identity(t) for t in tensors))
    found = _MADE.get(key)
    if found is None:
        clear_cache(dead_only=True)
        found = _MADE[key] = (make(), tuple(StorageWeakRef(t.untyped_storage()) for t in tensors))
    return cast(T, found[0])


def clear_cache(*, dead_only: bool = False) -> None:
    """Drop the unpacked copies of weights: all, or those of weights that no longer exist (done at every new weight)."""
    for key in [key for key, (_, alive) in _MADE.items() if not dead_only or any(r.expired() for r in alive)]:
        del _MADE[key]


def _plan(weight: Weight, k: int, using: str, whole: bool) -> _Plan:
    groups = max(t.shape[1] if t.ndim == 2 else 1 for t in (weight.scale, weight.colsum))
    parts, engine = (weight.qweight, weight.zero, weight.mul), engines.CANDIDATES[using]
    if engine.views and groups == 1 and weight.qweight.dtype == torch.int8:
        return _Plan(engine, None, whole)  # kept, they would keep the weight alive for ever
    return _Plan(engine, _made(parts, (engine.prepare, k, groups), lambda: _build(weight, k, groups, engine)), whole)


def _build(weight: Weight, k: int, groups: int, engine: Candidate) -> tuple[Held, ...]:
    codes = unpack(weight.qweight, k)
    zero = None if _by_rowsum(weight) else weight.zero
    if zero is not None or weight.mul is not None:
        codes = integer_weight(codes, zero, weight.mul).to(torch.int8)
    if groups == 1:
        return (engine.prepare(codes),)
    return tuple(engine.prepare(part.contiguous()) for part in codes.chunk(groups, 1))


def _by_rowsum(weight: Weight) -> bool:
    """8-bit codes less a zero point do not fit int8: that zero point is taken off by row sums instead."""
    return weight.qweight.dtype == torch.int8 and weight.zero is not None and weight.zero.ndim == 1


def _largest(weight: Weight) -> int:
    """Bound of |(code - zero) * mul|."""
    if weight.qweight.dtype == torch.int8 or weight.mul is not None:
        return 128
    return 8 if weight.zero is None else 15


# The multiplication.


def linear(
    q: Int8[Tensor, "m k"],
    scale: Float[Tensor, " m *g"],
    zero: Int32[Tensor, " m *g"] | None,
    weight: Weight,
    bias: Float[Tensor, " n"] | None,
    out_dtype: torch.dtype,
    act_bits: int = 8,
) -> Tensor:
    """As `reference.linear`. `act_bits` bounds q and zero: 8 is always right, 4 keeps long rows on the fast path."""
    m, k = q.shape
    n = weight.qweight.shape[0]
    using, whole = _engine_for(m, k, zero, weight, out_dtype, act_bits)
    plan = _plan(weight, k, using, whole)
    if 0 < m <= CHUNK_ROWS:
        return _chunk(plan, q, scale, zero, weight, bias, out_dtype)
    out = torch.empty(m, n, dtype=out_dtype)
    for start in range(0, m, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        out[rows] = _chunk(plan, q[rows], scale[rows], None if zero is None else zero[rows], weight, bias, out_dtype)
    return out


def _engine_for(
    m: int, k: int, zero: Tensor | None, weight: Weight, out_dtype: torch.dtype, act_bits: int
) -> tuple[str, bool]:
    """The fastest engine for this product, and whether its integers may be too large for fp32 and must be whole."""
    largest, grouped = _largest(weight), kind_of(weight.scale, weight.mul) == "group" and not row_group(weight, k)
    # The product and the zero point's correction, each at most this, must both and in their difference be exact. Where
    # nothing is taken off, a product that is rounded once to fp32 is what the reference has too.
    bound = 2 * (1 << (act_bits - 1)) * largest * (row_group(weight, k) or k)
    rounded = grouped or (zero is None and out_dtype != torch.int32)
    whole = _by_rowsum(weight) or not (rounded or bound < EXACT)
    return engines.choose(min(m, CHUNK_ROWS), largest, whole), whole


def _chunk(
    plan: _Plan,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if scale.ndim == 2:
        return _rows_in_groups(plan, q, scale, zero, weight, bias).to(out_dtype)
    if kind_of(weight.scale, weight.mul) == "group":
        y = _groups(plan, q, weight)
        if zero is not None:
            y.sub_(zero.float().unsqueeze(1) * weight.colsum)
        return _scaled(y, scale, bias, out_dtype)
    (held,) = _held(plan, weight)
    if not plan.whole and out_dtype in native.TYPES and native.available() is None:
        acc = plan.engine.product(q, held, None, None)
        return native.epilogue(acc.float(), weight, scale, zero, bias, out_dtype)
    if zero is None and not plan.whole and out_dtype != torch.int32:
        y = plan.engine.product(q, held, weight.scale, None)
    else:
        acc = _accumulate(plan, held, q, zero, weight, weight.colsum)
        if out_dtype == torch.int32:
            return acc.to(torch.int32)
        y = acc.float().mul_(weight.scale)
    return _scaled(y, scale, bias, out_dtype)


def _held(plan: _Plan, weight: Weight) -> tuple[Held, ...]:
    return (plan.engine.prepare(weight.qweight),) if plan.held is None else plan.held


def _scaled(y: Float[Tensor, "m n"], scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """y * scale + bias in y's place, and then the one rounding to the output's type."""
    m, n = y.shape
    out = y if out_dtype == torch.float32 else torch.empty(m, n, dtype=out_dtype)
    rows = m if y.numel() > SERIAL_ELEMENTS else max(1, THREADED_ELEMENTS // n)
    for start in range(0, m, rows):
        block = slice(start, start + rows)
        part = y[block].mul_(scale[block].unsqueeze(1))
        if bias is not None:
            part.add_(bias)
        if out is not y:
            out[block].copy_(part)
    return out


def _accumulate(
    plan: _Plan, held: Held, q: Tensor, zero: Tensor | None, weight: Weight, colsum: Int32[Tensor, " n"]
) -> Tensor:
    """The corrected accumulator: int32, or the same integers in fp32 where `_engine_for` found them to fit."""
    acc = plan.engine.product(q, held, None, None)
    if plan.whole:
        acc = acc.to(torch.int32)
    if _by_rowsum(weight):
        assert weight.zero is not None
        acc -= q.sum(1, dtype=torch.int32).unsqueeze(1) * weight.zero
    return acc if zero is None else acc.addr_(zero.to(acc.dtype), colsum.to(acc.dtype), alpha=-1)


def _groups(plan: _Plan, q: Tensor, weight: Weight) -> Float[Tensor, "m n"]:
    parts, scales = _held(plan, weight), weight.scale.t().contiguous()
    y = torch.zeros(q.shape[0], weight.scale.shape[0])
    for part, held, scale in zip(q.chunk(len(parts), 1), parts, scales, strict=True):
        y = plan.engine.product(part.contiguous(), held, scale, y)
    return y


def _rows_in_groups(
    plan: _Plan, q: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, bias: Tensor | None
) -> Float[Tensor, "m n"]:
    y, colsum, per_row = (
        torch.zeros(q.shape[0], len(weight.scale)),
        weight.colsum.t().contiguous(),
        weight.scale.ndim == 1,
    )
    weights = None if per_row else weight.scale.t().contiguous()
    for g, (rows, held) in enumerate(zip(q.chunk(len(colsum), 1), _held(plan, weight), strict=True)):
        shift = None if zero is None else zero[:, g]
        part = _accumulate(plan, held, rows.contiguous(), shift, weight, colsum[g]).float()
        part = part if weights is None else part.mul_(weights[g])
        y.add_(part.mul_(scale[:, g].unsqueeze(1)))
    y = y.mul_(weight.scale) if per_row else y
    return y if bias is None else y.add_(bias)


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
        return _weight_only(reference.transform(x, factors).to(x.dtype), weight, bias, out_dtype)
    settings = {"bits": act_bits, "symmetric": act_symmetric, "clip": clip}
    if native.available() is None:
        whole = out_dtype in native.TYPES and native.serves(weight, x.shape[1]) and _at_once(x.shape[0], weight)
        layer = _native(weight, x, factors, whole)
        if whole:
            return native.linear(layer, x, bias, out_dtype=out_dtype, **settings)
        rows = native.rows(layer, x, **settings)
    else:
        rows = row_quant(
            reference.transform(x, factors), group=row_group(weight, x.shape[1]), with_rowsum=False, **settings
        )
    return linear(rows.q, rows.scale, None if act_symmetric else rows.zero, weight, bias, out_dtype, act_bits)


def _at_once(m: int, weight: Weight) -> bool:
    """Whether m rows go through the compiled code in one call: it alone needs no product for each group; or, with AVX512, it
    alone reads 4 bits and rows are few; or it multiplies as fast as any."""
    groups = weight.scale.ndim == 2 or weight.colsum.ndim == 2
    if groups or (m <= FEW_ROWS and weight.qweight.dtype == torch.uint8 and native.in_lanes()):
        return engines.overridden() in (None, "native")
    return engines.at_once(min(m, CHUNK_ROWS), _largest(weight))


def _native(weight: Weight, x: Tensor, factors: Sequence[tuple[Tensor, ...]], whole: bool) -> native.Layer:
    k, parts = x.shape[1], (*weight, *(matrix for factor in factors for matrix in factor))
    return _made(parts, ("native", k, x.dtype, whole), lambda: native.prepare(weight, k, factors, x.dtype, whole=whole))


def _weight_only(
    x: Float[Tensor, "m k"], weight: Weight, bias: Float[Tensor, " n"] | None, out_dtype: torch.dtype
) -> Tensor:
    """As `reference.w4a16_linear`, with the dequantised weight rounded to x's type once and kept."""
    k = x.shape[1]

    def dequantise() -> Tensor:
        value = integer_weight(unpack(weight.qweight, k), weight.zero, weight.mul).float()
        groups = weight.scale.shape[1] if weight.scale.ndim == 2 else 1
        return (value.unflatten(1, (groups, -1)) * weight.scale.view(-1, groups, 1)).flatten(1).to(x.dtype)

    dense = _made((weight.qweight, weight.scale, weight.zero, weight.mul), (x.dtype, k), dequantise)
    y = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return y.to(out_dtype)
