"""The ways to multiply integers on a CPU, one result each. Which is quick, and which exact, `engines.py` finds out.

Shapes: m rows (tokens), k input features, n output features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int8
from torch import Tensor

from affinequant_kernels.cpu import native

Held = tuple[Tensor, ...]

# Integers that fp32 holds exactly lie below this.
EXACT = 1 << 24


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to multiply: q int8 [m, k] by codes int8 [n, k]."""

    prepare: Callable[[Int8[Tensor, "n k"]], Held]  # what `product` reads instead of the codes
    # float32 or int32 [m, n] of exact integers. With a scale [n]: float(integer) * scale in float32, rounded once each;
    # and with a total [m, n] that is added, in its place.
    product: Callable[[Tensor, Held, Tensor | None, Tensor | None], Tensor]
    rounds: bool = False  # it hands out float32, so integers above EXACT are rounded even without a scale
    views: bool = False  # `prepare` costs nothing, and what it makes is the codes' own memory


def _packed(codes: Tensor) -> Held:
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    n = codes.shape[0]
    return packed, torch.ones(n, dtype=torch.float32), torch.zeros(n, dtype=torch.int32)


def _onednn(unsigned: bool, q: Tensor, held: Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
    """oneDNN's integer product. VNNI multiplies unsigned by signed bytes: there q + 128 with a zero point of 128."""
    packed, one, none = held
    scale, shift = one if scale is None else scale, 128 if unsigned else 0
    if unsigned:
        q = (q ^ -128).view(torch.uint8)
    end = (torch.float32, "none", [], "")
    if total is None:
        return torch.ops.onednn.qlinear_pointwise(q, 1.0, shift, packed, scale, none, None, 1.0, 0, *end)
    zero = torch.full((1,), shift, dtype=torch.int32)
    add = (torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.binary_tensor(
        q, one[:1], zero, packed, scale, none, total, None, 1.0, 0, *add
    )


def _transposed(codes: Tensor) -> Held:
    return (codes.t(),)


def _columns(codes: Tensor) -> Held:
    return (codes.t().contiguous(),)


def _int_mm(swapped: bool, q: Tensor, held: Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
    multiply = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    integers = multiply(held[0].t(), q.t()).t().contiguous() if swapped else multiply(q, held[0])
    return _finished(integers, scale, total)


def _float32(q: Tensor, held: Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
    """In fp32, over as many columns at once as its sums of integers are exact for."""
    first, *others = held
    x, width = q.float(), first.shape[1]
    integers = x[:, :width] @ first.t()
    if others:
        integers = integers.to(torch.int32)
        for index, part in enumerate(others, 1):
            integers += (x[:, index * width : (index + 1) * width] @ part.t()).to(torch.int32)
    return _finished(integers, scale, total)


def _floats(codes: Tensor) -> Held:
    """A copy in fp32, four bytes a weight: to make it at every call takes longer than the product of one row."""
    largest = max(1, int(codes.abs().max())) if int(codes.min()) > -128 else 128
    return tuple(part.float().contiguous() for part in codes.split(EXACT // (128 * largest), 1))


def _finished(integers: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
    if scale is None:
        return integers
    scaled = integers.float().mul_(scale)
    return scaled if total is None else total.add_(scaled)


def _native(q: Tensor, held: Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
    return _finished(native.product(q, *held), scale, total)


# The first one always works, is the yardstick of the others, and so cannot be left out.
CANDIDATES: dict[str, Candidate] = {
    "float32": Candidate(_floats, _float32),
    "native": Candidate(native.hold, _native),
    "onednn_u8": Candidate(_packed, functools.partial(_onednn, True), rounds=True),
    "onednn": Candidate(_packed, functools.partial(_onednn, False), rounds=True),
    "int_mm": Candidate(_transposed, functools.partial(_int_mm, False), views=True),
    "int_mm_swapped": Candidate(_transposed, functools.partial(_int_mm, True), views=True),
    "int_mm_columns": Candidate(_columns, functools.partial(_int_mm, False)),
}
ALWAYS = "float32"


def sample(m: int, n: int, k: int, largest: int) -> tuple[Tensor, Tensor]:
    """Random integers of the whole range, with rows of the extremes."""
    make = functools.partial(torch.randint, dtype=torch.int8, device="cpu", generator=torch.Generator().manual_seed(0))
    high = min(largest, 127)
    q, codes = make(-128, 128, (m, k)), make(-largest, high + 1, (n, k))
    for row, value in zip(range(m - 1), (-128, 127), strict=False):
        q[row] = value
    codes[0], codes[1], codes[2] = -largest, high, high
    codes[2, ::2] = -largest
    return q, codes


def inexact(candidate: Candidate, m: int, largest: int) -> str | None:
    """None where sums up to the largest and above EXACT come out right in all forms, or what is wrong."""
    q, codes = sample(m, 24, 8192, largest)
    if m == 1:
        q[0, :4096] = 127
    exact = q.double() @ codes.double().t()
    scale = torch.linspace(0.5, 1.5, 24, dtype=torch.float32, device="cpu")
    scaled = exact.float() * scale
    try:
        held = candidate.prepare(codes)
        plain = candidate.product(q, held, None, None)
        once = candidate.product(q, held, scale, None)
        twice = candidate.product(q, held, scale, scaled.clone())
    except (AttributeError, RuntimeError, NotImplementedError) as problem:
        return reason(problem)
    wanted = exact.float() if candidate.rounds else exact
    right = torch.equal(plain.to(wanted.dtype), wanted)
    return None if right and torch.equal(once, scaled) and torch.equal(twice, scaled + scaled) else "not exact"


def reason(problem: Exception) -> str:
    """A build without it, or a version with another signature."""
    return f"does not work here: {str(problem).strip().splitlines()[0][:120]}"
