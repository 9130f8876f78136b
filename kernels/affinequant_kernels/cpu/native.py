"""native.c: compiled once by the machine's own C compiler, kept in the cache, checked against the reference, and called.

It serves the layers of a CPU with AVX512-VNNI for 4-bit codes with a scale per row; `cpu.py` decides when. Where there is
no such CPU or no compiler, or AFFQ_NATIVE=0, everything goes the way of `cpu.py`. `affinequant env` tells which it is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.cache import check_private, private_folder
from affinequant_kernels.reference import Rows
from affinequant_kernels.weight import Weight, prepare_weight

SOURCE = Path(__file__).with_name("native.c")
UNITS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma", "f16c")
FLAGS = (
    *[
        "-std=gnu11",
        "-O3",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
    ],
    *(f"-m{unit}" for unit in UNITS),
)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications (tokens x features in x features out) below which a second thread costs more than it saves.
SERIAL = 1 << 20


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("left", "right")] + [
        (name, ctypes.c_int64) for name in ("rows", "columns")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "k", "factors")] + [
        (name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "colsum", "factor")
    ]


@dataclass(frozen=True, slots=True)
class Layer:
    """What the compiled code reads of a layer. Of the weight's own tensors it holds addresses: they must outlive it."""

    address: int
    n: int
    k: int
    held: tuple[object, ...]


def prepare(weight: Weight, k: int, factors: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> Layer:
    """A layer for inputs [m, k] of a type, to whose precision the matrices of its factors are rounded."""
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
    parts = [None if t is None else t.data_ptr() for t in (weight.qweight, weight.scale, weight.zero, weight.colsum)]
    layer = _Layer(weight.qweight.shape[0], k, len(factors), *parts, pointer)
    return Layer(ctypes.addressof(layer), weight.qweight.shape[0], k, (layer, made, *held))


def serves(weight: Weight) -> bool:
    """Whether the compiled code knows this kind of weight: 4 bits, a scale and at most a zero point per row."""
    return (
        weight.qweight.dtype == torch.uint8
        and weight.scale.ndim == 1
        and weight.mul is None
        and (weight.zero is None or weight.zero.ndim == 1)
    )


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
    scale, zero, total = torch.empty(m), torch.empty(m, dtype=torch.int32), torch.empty(m, dtype=torch.int32)
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


@functools.cache
def available() -> str | None:
    """None where the compiled code can be used, or why it cannot. The first call may compile it: some two seconds."""
    if os.environ.get("AFFQ_NATIVE") == "0":
        return "switched off by AFFQ_NATIVE=0"
    # The units of the CPU as Linux names them; elsewhere there are none, and other code does the work.
    facts = Path("/proc/cpuinfo")
    units = facts.read_text().replace("avx512_", "avx512").split() if facts.exists() else []
    lacking = [unit for unit in UNITS if unit not in units]
    if lacking:
        return f"this CPU has no {lacking[0]}"
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler (cc, gcc or clang) was found"
    try:
        folder = private_folder()
    except OSError as problem:
        return f"there is no safe place for compiled code: {problem}"
    try:
        _load(_compiled(compiler, folder))
        return None if _right() else "its results on this machine are not the reference's"
    except PermissionError as problem:
        return f"compiled code that is not safe to load: {problem}"
    except (OSError, subprocess.CalledProcessError) as problem:
        said = getattr(problem, "stderr", None) or str(problem)
        return f"{compiler} could not compile {SOURCE.name}: {said.strip().splitlines()[-1]}"


_LIBRARY: list[ctypes.CDLL] = []


def _loaded() -> ctypes.CDLL:
    return _LIBRARY[0]


def _load(path: Path) -> None:
    check_private(path)
    library = ctypes.CDLL(str(path))
    pointer, size, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    shared = [pointer, pointer, whole, size, whole, whole, real, whole]
    library.affq_linear.argtypes = [*shared, pointer, pointer, whole]
    library.affq_rows.argtypes = [*shared, *[pointer] * 4]
    library.affq_epilogue.argtypes = [pointer, size, size, *[pointer] * 5, whole, pointer, whole]
    library.affq_epilogue.restype = None
    _LIBRARY[:] = [library]


def _compiled(compiler: str, folder: Path) -> Path:
    """The shared library in the folder; named by all that it was made from, so that a change makes another."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = "\0".join((SOURCE.read_text(), *FLAGS, version))
    path = folder / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if not os.path.lexists(path):
        with tempfile.TemporaryDirectory(dir=folder) as building:
            fresh = Path(building) / path.name
            # Threads come from the OpenMP that torch has loaded: two of them would wait for each other's cores.
            subprocess.run(
                [compiler, *FLAGS, "-o", str(fresh), str(SOURCE)], capture_output=True, text=True, check=True
            )
            fresh.chmod(0o600)
            fresh.replace(path)
    return path


def _right() -> bool:
    """Whether extreme codes, ragged sizes and each type come out as the reference's."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (9, 200), dtype=torch.int8, generator=generator)
    codes[0], codes[1] = -8, 7
    zero = torch.randint(-8, 8, (9,), dtype=torch.int8, generator=generator)
    weight = prepare_weight(codes, torch.rand(9, generator=generator) + 0.01, zero)
    for dtype in TYPES:
        x = (torch.randn(7, 200, generator=generator) + 0.3).to(dtype)
        for symmetric in (True, False):
            settings = {"symmetric": symmetric, "clip": 0.9}
            got = linear(prepare(weight, 200, (), dtype), x, None, bits=8, out_dtype=dtype, **settings)
            wanted = reference.linear_dyn(x, weight, act_bits=8, act_symmetric=symmetric, clip=0.9)
            if not torch.equal(got, wanted):
                return False
    return True
