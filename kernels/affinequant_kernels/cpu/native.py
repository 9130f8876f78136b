"""native.c: compiled once by the machine's own C compiler, kept in the cache, checked against the reference, and called.

It serves whole layers, and is one of the ways to multiply that `engines.py` times. `layer.py` decides when. Where there is no
such CPU or no compiler, or AFFQ_NATIVE=0, everything goes the way of `layer.py`. `affinequant env` tells which it is.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.cache import check_private, private_folder
from affinequant_kernels.cpu import compiling, lanes
from affinequant_kernels.layout import BLOCK
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight, integer_weight, kind_of, prepare_weight, row_group, unpack

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications (tokens x features in x features out) below which a second thread costs more than it saves.
SERIAL = 1 << 20
# How codes lie, as native.c numbers it.
NIBBLES, SMALL, WIDE, NIBBLE_LANES, BYTE_LANES = range(5)


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("left", "right")] + [
        (name, ctypes.c_int64) for name in ("rows", "columns")
    ]


_GROUPS = ("group", "weight_groups", "row_groups")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "k", "factors", "kind", *_GROUPS)] + [
        (name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "colsum", "factor")
    ]


@dataclass(frozen=True, slots=True)
class Layer:
    """What the compiled code reads of a layer. Of the weight's own tensors it holds addresses: they must outlive it."""

    address: int
    n: int
    k: int
    row_groups: int  # into how many groups `rows` quantises each; 0: whole rows
    held: tuple[object, ...]


def prepare(
    weight: Weight, k: int, factors: Sequence[tuple[Tensor, ...]], dtype: torch.dtype, *, whole: bool = True
) -> Layer:
    """A layer for inputs [m, k] of a type, to whose precision the matrices of its factors are rounded. `whole`: for `linear`,
    of a weight that `serves` knows; otherwise `rows` alone may be asked."""
    held: list[object] = []

    def address(tensor: Tensor) -> int:
        value = tensor.to(dtype).float().contiguous()
        held.append(value.clone() if value is tensor else value)
        return held[-1].data_ptr()  # pyright: ignore[reportAttributeAccessIssue]

    made = (_Factor * max(1, len(factors)))()
    for place, (first, *second) in zip(made, factors, strict=False):
        if second:
            place.left, place.rows = address(first), first.shape[0]
        else:
            place.rows = first.shape[0]
        right = second[0] if second else first
        place.right, place.columns = address(right), right.shape[-1]
    pointer = ctypes.addressof(made) if factors else None
    row_size, of_weight = row_group(weight, k), weight.scale.ndim == 2
    kind, read = _as_read(weight, k) if whole else (WIDE, ())
    held += [t for t in read if not any(t is own for own in weight)]  # the weight's own would never die
    parts = [None if t is None else t.data_ptr() for t in read] or [None] * 4
    of_rows, n = k // row_size if row_size else 0, weight.qweight.shape[0]
    size = row_size or (k // weight.scale.shape[1] if of_weight else 0)
    layer = _Layer(n, k, len(factors), kind, size if whole else 0, of_weight, of_rows, *parts, pointer)
    return Layer(ctypes.addressof(layer), n, k, of_rows, (layer, made, *held))


def _as_read(weight: Weight, k: int) -> tuple[int, tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """How codes lie; codes, scale, zero points and column sums: with multipliers their products, in groups [groups, n].
    With AVX512 codes are copied, in the order in which it reads them; with AVX2 what can be is the weight's own memory."""
    four, zero = weight.qweight.dtype == torch.uint8 and weight.mul is None, weight.zero
    codes = weight.qweight
    if weight.mul is not None:
        codes, zero = integer_weight(unpack(codes, k), zero, weight.mul).to(torch.int8), None
    if in_lanes():
        codes = lanes.nibbles(unpack(codes, k)) if four else lanes.whole_bytes(codes)
    scale, zero, colsum = (
        t.t().contiguous() if t is not None and t.ndim == 2 else t for t in (weight.scale, zero, weight.colsum)
    )
    kind = (NIBBLE_LANES if four else BYTE_LANES) if in_lanes() else NIBBLES if four else WIDE
    return kind, (codes, scale, zero, colsum)  # pyright: ignore[reportReturnType]


def serves(weight: Weight, k: int) -> bool:
    """Whether the compiled code knows this kind of weight: 4 or 8 bits with a scale and at most a zero point per row,
    multipliers, and 4 bits with groups, the weight's or the rows', of a size that fits its registers."""
    kind, of_rows = kind_of(weight.scale, weight.mul), row_group(weight, k)
    if kind != "group" and not of_rows:
        return True
    size = of_rows or k // weight.scale.shape[1]
    return weight.qweight.dtype == torch.uint8 and (size in (32, 64) or size % BLOCK == 0)


def linear(
    layer: Layer, x: Tensor, bias: Tensor | None, *, bits: int, symmetric: bool, clip: float, out_dtype: torch.dtype
) -> Tensor:
    """A prepared layer on x [m, k], as `reference.linear_dyn` of the transformed x: [m, n]."""
    m = x.shape[0]
    out = torch.empty(m, layer.n, dtype=out_dtype)
    added = None if bias is None else bias.float()
    threads = torch.get_num_threads() if m * layer.k * layer.n > SERIAL else 1
    failed = _loaded().affq_linear(
        layer.address,
        *(x.data_ptr(), TYPES[x.dtype], m, bits, symmetric, clip, threads),
        *(None if added is None else added.data_ptr(), out.data_ptr(), TYPES[out_dtype]),
    )
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {layer.k} features")
    return out


def rows(layer: Layer, x: Tensor, *, bits: int, symmetric: bool, clip: float) -> Rows:
    """x [m, k] through a prepared layer's factors and quantiser, as `reference.row_quant` of the transformed x."""
    m = x.shape[0]
    q = torch.empty(m, layer.k, dtype=torch.int8)
    size = (m, layer.row_groups) if layer.row_groups else (m,)
    scale, zero, total = torch.empty(size), *(torch.empty(size, dtype=torch.int32) for _ in range(2))
    threads = torch.get_num_threads() if x.numel() > SERIAL // 64 else 1
    failed = _loaded().affq_rows(
        layer.address,
        *(x.data_ptr(), TYPES[x.dtype], m, bits, symmetric, clip, threads),
        *(t.data_ptr() for t in (q, scale, zero, total)),
    )
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {layer.k} features")
    return Rows(q, scale, zero, total)


def epilogue(
    acc: Tensor, weight: Weight, scale: Tensor, zero: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """What `reference.linear` makes of its accumulator [m, n], here in fp32: its integers and zero * colsum are exact."""
    m, n = acc.shape
    out = torch.empty(m, n, dtype=out_dtype)
    added = None if bias is None else bias.float()
    threads = torch.get_num_threads() if acc.numel() > SERIAL // 64 else 1
    parts = (scale, zero, added)
    _loaded().affq_epilogue(
        *(acc.data_ptr(), m, n, weight.scale.data_ptr(), weight.colsum.data_ptr()),
        *(None if part is None else part.data_ptr() for part in parts),
        *(threads, out.data_ptr(), TYPES[out_dtype]),
    )
    return out


def hold(codes: Tensor) -> tuple[Tensor, ...]:
    """A copy of codes int8 [n, k] for `product`; with AVX2 those below 16 in magnitude as uint8, filled up to whole blocks.
    Raises NotImplementedError where there is no compiled code."""
    _must_be_available()
    if in_lanes():
        return (lanes.whole_bytes(codes),)
    if int(codes.max()) >= 16 or int(codes.min()) <= -16:
        return (codes.clone(memory_format=torch.contiguous_format),)
    return (torch.nn.functional.pad(codes + 16, (0, -codes.shape[1] % BLOCK)).view(torch.uint8),)


def product(q: Tensor, codes: Tensor) -> Tensor:
    """q int8 [m, k] by what `hold` made: int32 [m, n]. Raises NotImplementedError where there is no compiled code."""
    _must_be_available()
    (m, k), n = q.shape, codes.shape[0]
    out = torch.empty(m, n, dtype=torch.int32)
    kind = BYTE_LANES if in_lanes() else SMALL if codes.dtype == torch.uint8 else WIDE
    threads = torch.get_num_threads() if m * k * n > SERIAL else 1
    if _loaded().affq_product(codes.data_ptr(), kind, n, k, q.data_ptr(), m, threads, out.data_ptr()):
        raise MemoryError(f"no memory for {m} tokens of {k} features")
    return out


def _must_be_available() -> None:
    why = available()
    if why is not None:
        raise NotImplementedError(why)


@functools.cache
def available() -> str | None:
    """None where the compiled code can be used, or why it cannot. The first call may compile it: some two seconds."""
    if os.environ.get("AFFQ_NATIVE") == "0":
        return "switched off by AFFQ_NATIVE=0"
    lacking = compiling.lacking()
    name = next((name for name, missing in lacking.items() if not missing), None)
    if name is None:
        return f"this CPU has no {list(lacking.values())[-1][0]}"
    compiler = compiling.find_compiler()
    if compiler is None:
        return "no C compiler (cc, gcc or clang) was found"
    try:
        folder = private_folder()
    except OSError as problem:
        return f"there is no safe place for compiled code: {problem}"
    try:
        _load(compiling.library(compiler, folder, name))
        return None if _right() else "its results on this machine are not the reference's"
    except PermissionError as problem:
        return f"compiled code that is not safe to load: {problem}"
    except (OSError, subprocess.CalledProcessError) as problem:
        said = getattr(problem, "stderr", None) or str(problem)
        return f"{compiler} could not compile {compiling.SOURCE.name}: {said.strip().splitlines()[-1]}"


_LIBRARY: list[ctypes.CDLL] = []


def _loaded() -> ctypes.CDLL:
    return _LIBRARY[0]


def in_lanes() -> bool:
    """Whether the compiled code, which must be available, is that of AVX512, and reads codes in an order of its own."""
    return bool(_loaded().affq_in_lanes())


def _load(path: Path) -> None:
    check_private(path)
    library = ctypes.CDLL(str(path))
    pointer, size, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    shared = [pointer, pointer, whole, size, whole, whole, real, whole]
    library.affq_linear.argtypes = [*shared, pointer, pointer, whole]
    library.affq_rows.argtypes = [*shared, *[pointer] * 4]
    library.affq_epilogue.argtypes = [pointer, size, size, *[pointer] * 5, whole, pointer, whole]
    library.affq_epilogue.restype = None
    library.affq_product.argtypes = [pointer, whole, size, size, pointer, size, whole, pointer]
    _LIBRARY[:] = [library]


def _right() -> bool:
    """Whether extreme codes, ragged sizes and each type come out as the reference's."""
    generator = torch.Generator().manual_seed(0)
    for bits, k, groups in ((4, 200, 1), (8, 200, 1), (4, 192, 3)):
        half = 1 << (bits - 1)
        codes, zero = (
            torch.randint(-half, half, shape, dtype=torch.int8, generator=generator) for shape in ((9, k), (9, groups))
        )
        codes[0], codes[1] = -half, half - 1
        scale, act_group = torch.rand(9, groups, generator=generator) + 0.01, 0 if groups == 1 else k // groups
        weight = prepare_weight(codes, scale, zero, bits=bits, act_group=act_group)
        for dtype in TYPES:
            x = (torch.randn(13, k, generator=generator) + 0.3).to(dtype)
            for symmetric in (True, False):
                settings = {"symmetric": symmetric, "clip": 0.9}
                got = linear(prepare(weight, k, (), dtype), x, None, bits=8, out_dtype=dtype, **settings)
                wanted = reference.linear_dyn(x, weight, act_bits=8, act_symmetric=symmetric, clip=0.9)
                if not torch.equal(got, wanted):
                    return False
    return True
