"""The CPU path: int8 matmuls on weights that are unpacked once, and row quantisation in cache-sized blocks.

Equal to reference.py bit for bit. What makes it fast and still exact:
* `onednn::qlinear_pointwise` on a weight that `qlinear_prepack` laid out for this machine's int8 units returns
  float(int32 accumulator) * weight_scale, rounded once each. Zero points are integers, taken off before the scale;
  below 2^24 fp32 holds them exactly, above it `torch._int_mm` gives the int32.
* Whether this build and machine really compute that is checked once per process with extreme values. Where they do not
  (no VNNI: its sums of int8 products saturate), integers are multiplied in fp32, which is exact below 2^24, above in fp64.

Shapes: m rows (tokens), k input features, n output features, g groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import native, reference
from .reference import SCALE_FLOOR, Rows
from .weight import Weight, integer_weight, kind_of, unpack

Engine = Literal["onednn", "int_mm", "float32", "float64"]
T = TypeVar("T")

# torch shares an op among threads above this many elements (torch.round above 2048). Waking a thread that sleeps costs
# some 50 microseconds, more than such an op, so up to SERIAL_ELEMENTS rows are worked on in blocks of THREADED_ELEMENTS,
THREADED_ELEMENTS = 1 << 15
SERIAL_ELEMENTS = 1 << 17
# and above it in few blocks, which cores' second-level caches just hold.
BLOCK_ELEMENTS = 1 << 19
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves no fraction, and rounds to nearest even
# Rows of the output worked on at once: bounds the fp32 intermediate, which costs page faults when it is large.
CHUNK_ROWS = 512
# Up to so many rows reading a weight takes longer than multiplying, and native.c reads it in 4 bits; less of a large one,
# where the time of oneDNN's call no longer counts.
FEW_ROWS, FEW_ROWS_OF_LARGE, LARGE = 16, 8, 1 << 22
# Integers that fp32 holds exactly lie below this.
EXACT = 1 << 24


def row_quant(x: Float[Tensor, "m k"], *, bits: int, symmetric: bool, clip: float, with_rowsum: bool = True) -> Rows:
    """As `reference.row_quant`. Works on blocks of rows, each by vectorised, threaded torch ops."""
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


# One weight, ready to multiply.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    engine: Engine
    codes: Int8[Tensor, "n k"] | None  # what `_int_mm` and fp64 multiply; None: the weight's own int8 codes
    packed: tuple[Tensor, ...]  # what oneDNN multiplies: its own layout, one per group
    no_zero: Tensor  # int32 [n] of 0
    one: Tensor  # float32 [n] of 1


# What was made from a weight, kept as long as the weight's storage lives and is not written to.
_MADE: dict[tuple[object, ...], tuple[object, tuple[StorageWeakRef, ...]]] = {}


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # Inference tensors do not count their updates: a weight that is changed in place must be an ordinary tensor.
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), version


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


def _plan(weight: Weight, k: int, using: Engine) -> _Plan:
    groups = weight.scale.shape[1] if weight.scale.ndim == 2 else 1
    parts = (weight.qweight, weight.zero, weight.mul)
    return _made(parts, (using, k, groups), lambda: _build(weight, k, groups, using))


def _build(weight: Weight, k: int, groups: int, using: Engine) -> _Plan:
    codes = unpack(weight.qweight, k)
    zero = None if _by_rowsum(weight) else weight.zero
    if zero is not None or weight.mul is not None:
        codes = integer_weight(codes, zero, weight.mul).to(torch.int8)
    packed: tuple[Tensor, ...] = ()
    if using == "onednn":
        parts = codes.chunk(groups, 1) if groups > 1 else (codes,)
        packed = tuple(torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in parts)
    n = codes.shape[0]
    return _Plan(
        engine=using,
        # Never the weight's own tensor: the plan would keep it alive for ever.
        codes=None if using == "onednn" or codes is weight.qweight else codes,
        packed=packed,
        no_zero=torch.zeros(n, dtype=torch.int32),
        one=torch.ones(n),
    )


def _by_rowsum(weight: Weight) -> bool:
    """8-bit codes less a zero point do not fit int8: that zero point is taken off by row sums instead."""
    return weight.qweight.dtype == torch.int8 and weight.zero is not None and weight.zero.ndim == 1


def _largest(weight: Weight) -> int:
    """Bound of |(code - zero) * mul|."""
    if weight.qweight.dtype == torch.int8 or weight.mul is not None:
        return 128
    return 8 if weight.zero is None else 15


# The multiplication.


def _onednn(q: Tensor, packed: Tensor, scale: Tensor, no_zero: Tensor) -> Float[Tensor, "m n"]:
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 0, packed, scale, no_zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _onednn_add(q: Tensor, packed: Tensor, scale: Tensor, no_zero: Tensor, total: Tensor) -> Float[Tensor, "m n"]:
    """total + float(acc) * scale, in place."""
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.binary_tensor(
        q, one, none, packed, scale, no_zero, total, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )


def _product(q: Tensor, codes: Tensor, using: Engine) -> Tensor:
    """Exact integers: int32, or with `float32` in fp32."""
    if using == "float64":
        return (q.double() @ codes.double().t()).to(torch.int32)
    if using == "float32":
        return q.float() @ codes.float().t()
    return torch._int_mm(q, codes.t())  # pyright: ignore[reportPrivateImportUsage]


@functools.cache
def engine() -> Engine:
    """oneDNN where its results on extreme values are exact on this machine, else fp32 (where that is)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (17, 2048), dtype=torch.int8, generator=generator)
    codes = torch.randint(-128, 128, (48, 2048), dtype=torch.int8, generator=generator)
    q[:2], codes[:2] = -128, torch.tensor([[-128], [127]], dtype=torch.int8)
    scale = torch.rand(48, generator=generator)
    scaled = _product(q, codes, "float64").float() * scale
    no_zero = torch.zeros(48, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        once = _onednn(q, packed, scale, no_zero)
        twice = _onednn_add(q, packed, scale, no_zero, scaled.clone())
        if torch.equal(once, scaled) and torch.equal(twice, scaled + scaled):
            return "onednn"
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # a build without oneDNN, or with another version's signature
    return "float32"


def linear(
    q: Int8[Tensor, "m k"],
    scale: Float[Tensor, " m"],
    zero: Int32[Tensor, " m"] | None,
    weight: Weight,
    bias: Float[Tensor, " n"] | None,
    out_dtype: torch.dtype,
    act_bits: int = 8,
) -> Tensor:
    """As `reference.linear`. `act_bits` bounds q and zero: 8 is always right, 4 keeps long rows on the fast path."""
    m, k = q.shape
    n = weight.qweight.shape[0]
    plan = _plan(weight, k, _engine_for(k, zero, weight, out_dtype, act_bits))
    if 0 < m <= CHUNK_ROWS:
        return _chunk(plan, q, scale, zero, weight, bias, out_dtype)
    out = torch.empty(m, n, dtype=out_dtype)
    for start in range(0, m, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        out[rows] = _chunk(plan, q[rows], scale[rows], None if zero is None else zero[rows], weight, bias, out_dtype)
    return out


def _engine_for(k: int, zero: Tensor | None, weight: Weight, out_dtype: torch.dtype, act_bits: int) -> Engine:
    """The best engine, or where its integers may be too large for fp32, or do not fit int8, another."""
    best, grouped = engine(), kind_of(weight.scale, weight.mul) == "group"
    wider: Engine = "int_mm" if best == "onednn" else "float64"
    if best == "onednn" and grouped:
        return best
    if _by_rowsum(weight):
        return wider
    # oneDNN sums in int32 and hands out fp32, rounded once: that harms where the integers themselves are needed.
    if best == "onednn" and zero is None and out_dtype != torch.int32:
        return best
    # The product and the zero point's correction, each at most this, must both and in their difference be exact.
    summed = k // weight.scale.shape[1] if grouped else k
    bound = 2 * (1 << (act_bits - 1)) * _largest(weight) * summed
    return best if bound < EXACT else wider


def _chunk(
    plan: _Plan,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if kind_of(weight.scale, weight.mul) == "group":
        y = _groups(plan, q, weight)
        if zero is not None:
            y.sub_(zero.float().unsqueeze(1) * weight.colsum)
    elif plan.engine == "onednn" and out_dtype in native.TYPES and native.available() is None:
        acc = _onednn(q, plan.packed[0], plan.one, plan.no_zero)
        return native.epilogue(acc, weight, scale, zero, bias, out_dtype)
    elif zero is None and plan.engine == "onednn" and out_dtype != torch.int32:
        y = _onednn(q, plan.packed[0], weight.scale, plan.no_zero)
    else:
        acc = _accumulate(plan, q, zero, weight)
        if out_dtype == torch.int32:
            return acc.to(torch.int32)
        y = acc.float().mul_(weight.scale)
    return _scaled(y, scale, bias, out_dtype)


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


def _accumulate(plan: _Plan, q: Tensor, zero: Tensor | None, weight: Weight) -> Tensor:
    """The corrected accumulator: int32, or the same integers in fp32 where `_engine_for` found them to fit."""
    if plan.engine == "onednn":
        acc = _onednn(q, plan.packed[0], plan.one, plan.no_zero)
        return acc if zero is None else acc.addr_(zero.float(), weight.colsum.float(), alpha=-1.0)
    acc = _product(q, weight.qweight if plan.codes is None else plan.codes, plan.engine)
    if _by_rowsum(weight):
        assert weight.zero is not None
        acc -= q.sum(1, dtype=torch.int32).unsqueeze(1) * weight.zero
    return acc if zero is None else acc.addr_(zero.to(acc.dtype), weight.colsum.to(acc.dtype), alpha=-1)


def _groups(plan: _Plan, q: Tensor, weight: Weight) -> Float[Tensor, "m n"]:
    groups = weight.scale.shape[1]
    size = q.shape[1] // groups
    scales = weight.scale.t().contiguous()
    y = torch.zeros(q.shape[0], weight.scale.shape[0])
    for g in range(groups):
        part = q[:, g * size : (g + 1) * size].contiguous()
        if plan.engine == "onednn":
            y = _onednn_add(part, plan.packed[g], scales[g], plan.no_zero, y)
        else:
            codes = (weight.qweight if plan.codes is None else plan.codes)[:, g * size : (g + 1) * size].contiguous()
            y.add_(_product(part, codes, plan.engine).float().mul_(scales[g]))
    return y


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
    """As `reference.linear_dyn` of `reference.transform(x, factors)`."""
    settings = {"bits": act_bits, "symmetric": act_symmetric, "clip": clip}
    if native.available() is None:
        layer = _native(weight, x, factors)
        few = FEW_ROWS if layer.n * layer.k < LARGE else FEW_ROWS_OF_LARGE
        if x.shape[0] <= few and out_dtype in native.TYPES and native.serves(weight):
            return native.linear(layer, x, bias, out_dtype=out_dtype, **settings)
        rows = native.rows(layer, x, **settings)
    else:
        rows = row_quant(reference.transform(x, factors), with_rowsum=False, **settings)
    return linear(rows.q, rows.scale, None if act_symmetric else rows.zero, weight, bias, out_dtype, act_bits)


def _native(weight: Weight, x: Tensor, factors: Sequence[tuple[Tensor, ...]]) -> native.Layer:
    k, parts = x.shape[1], (*weight, *(matrix for factor in factors for matrix in factor))
    return _made(parts, ("native", k, x.dtype), lambda: native.prepare(weight, k, factors, x.dtype))


def w4a16_linear(
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
