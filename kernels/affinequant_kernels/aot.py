"""Compile every kernel to machine code without a GPU, and look at that code.

    python -m affinequant_kernels.aot            a table; exit status 1 where a limit is broken

For each kernel and architecture: it compiles; no register is spilled to memory; registers stay below a limit; on sm_90
products of int8 use the warp-group instruction, elsewhere mma; unpacking does not shuffle bytes (PRMT), which is what
the compiler falls back to when it takes int8 apart; and no memory is both read and written, which threads could do in the
wrong order (ptx.py). Needs triton, whose wheel brings ptxas and the disassembler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from . import ptx

ARCHITECTURES = (80, 89, 90)
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have at most: CUDA C++ programming guide, technical specifications."""
_KEPT = 8  # loads and stores of local memory outside of loops, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One specialisation of one kernel."""

    name: str
    module: str
    kernel: str
    types: Mapping[str, str]  # of the arguments that are not constexpr, in order
    values: Mapping[str, object]  # of the constexprs
    warps: int
    stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES  # where tune.py uses it
    registers: int = 255  # most allowed per thread
    product: bool = False  # an int8 matrix product
    shuffles: int | None = None  # most PRMT in the machine code


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the machine code of a case looks like."""

    name: str
    arch: int
    registers: int
    spills: int  # loads and stores of local memory, in loops
    kept: int  # the same outside of loops: a value put aside once, for as long as a loop or a division takes
    shared: int  # bytes
    shuffles: int
    wgmma: int  # integer warp-group products
    from_registers: int  # of these, with the weight in registers
    mma: int  # integer warp products
    dp4a: int
    copies: int  # to shared memory, while the processor goes on
    raced: tuple[str, ...]  # arguments whose memory is both read and written
    problems: tuple[str, ...]


_P, _I, _F = "*i8", "i32", "fp32"
_QUANT = {"q_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32", "sum_ptr": "*i32", "y_ptr": "*fp32"}
_GEMM = {
    "a_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", "sa_ptr": "*fp32", "za_ptr": "*i32", "rowsum_ptr": "*i32",
    "sw_ptr": "*fp32", "zw_ptr": "*i8", "mul_ptr": "*u8", "colsum_ptr": "*i32", "bias_ptr": "*bf16",
    "M": _I, "N": _I, "K": _I, "stride_w": _I, "groups": _I, "group_size": _I,
}  # fmt: skip
_GROUP = {
    "a_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", "sa_ptr": "*fp32", "za_ptr": "*i32", "sw_ptr": "*fp32",
    "zw_ptr": "*i8", "colsum_ptr": "*fp32", "bias_ptr": "*bf16", "M": _I, "N": _I, "K": _I, "stride_w": _I,
    "groups": _I,
}  # fmt: skip
_FINISH = {
    "parts_ptr": "*i32", "out_ptr": "*bf16", "sa_ptr": "*fp32", "za_ptr": "*i32", "rowsum_ptr": "*i32",
    "sw_ptr": "*fp32", "zw_ptr": "*i8", "colsum_ptr": "*i32", "bias_ptr": "*bf16", "M": _I, "N": _I,
}  # fmt: skip
_GEMV = {
    "a_ptr": "*i32", "w_ptr": "*i32", "out_ptr": "*bf16", "sa_ptr": "*fp32", "za_ptr": "*i32", "rowsum_ptr": "*i32",
    "sw_ptr": "*fp32", "zw_ptr": "*i8", "colsum_ptr": "*i32", "bias_ptr": "*bf16", "M": _I, "N": _I, "words": _I,
    "blocks": _I,
}  # fmt: skip
_A16 = {
    "x_ptr": "*bf16", "w_ptr": "*i8", "out_ptr": "*bf16", "sw_ptr": "*fp32", "zw_ptr": "*i8", "mul_ptr": "*u8",
    "bias_ptr": "*bf16", "M": _I, "N": _I, "K": _I, "stride_w": _I, "groups": _I, "group_size": _I,
}  # fmt: skip
_A16_FINISH = {
    "parts_ptr": "*fp32", "out_ptr": "*bf16", "sw_ptr": "*fp32", "bias_ptr": "*bf16", "M": _I, "N": _I,
}  # fmt: skip
# The scheme that a run takes by default: zero points on both sides. A case that says otherwise is of the symmetric one.
_FLAGS = {"HAS_ZA": True, "HAS_ZW": True, "HAS_BIAS": True}
_SYMMETRIC = {"HAS_ZA": False, "HAS_ZW": False}


def _gemm(name: str, registers: int, shuffles: int, warps: int = 8, stages: int = 3, **values: object) -> Case:
    base: dict[str, object] = {
        **_FLAGS, "BITS": 4, "AFFINE": False, "RAW": False, "EVEN": True, "BN": 128, "BM": 128, "BJ": 64, "SPLIT": 1,
        "PERSISTENT": False, "ASM": True,
    }  # fmt: skip
    return Case(name=name, module="gemm", kernel="gemm_kernel", types=_GEMM, values=base | values, warps=warps,
                stages=stages, registers=registers, product=True, shuffles=shuffles)  # fmt: skip


def _rows(name: str, registers: int, **values: object) -> Case:
    base: dict[str, object] = {"BITS": 4, "SYMMETRIC": False, "SILU_MUL": False, "STORE_Y": False, "SINGLE": True}
    types = {"x_ptr": "*bf16", **_QUANT, "M": _I, "K": _I, "stride": _I, "clip": _F}
    return Case(name=name, module="quant", kernel="rows_kernel", types=types, warps=8, registers=registers,
                values=base | {"R": 1, "BK": 4096} | values)  # fmt: skip


def cases() -> list[Case]:
    """Every kernel, in the shapes that the dispatch uses most."""
    from .transform import block_terms, tile_sizes

    group: dict[str, object] = {**_FLAGS, "BITS": 4, "EVEN": True, "BN": 128, "BM": 64, "ASM": True}
    fused: dict[str, object] = {"BITS": 4, "SYMMETRIC": False, "STORE_Y": False}
    kron = {"x_ptr": "*bf16", "left_ptr": "*bf16", "right_ptr": "*bf16", **_QUANT, "M": _I, "clip": _F}
    left = {"half_ptr": "*bf16", "left_ptr": "*bf16", **_QUANT, "M": _I, "clip": _F}
    block = {"x_ptr": "*bf16", "matrix_ptr": "*bf16", **_QUANT, "M": _I, "K": _I, "blocks": _I, "matrix_stride": _I,
             "clip": _F}  # fmt: skip
    norm = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "gain_ptr": "*bf16", "hidden_ptr": "*bf16", **_QUANT, "M": _I,
            "K": _I, "eps": _F, "clip": _F}  # fmt: skip
    kv_in = {"k_ptr": "*bf16", "out_ptr": "*u8", "scale_ptr": "*fp16", "zero_ptr": "*fp16", "ROWS": _I}
    kv_out = {"in_ptr": "*u8", "scale_ptr": "*fp16", "zero_ptr": "*fp16", "out_ptr": "*bf16", "ROWS": _I}
    # Zero points on both sides take 203 to 230 registers at the end of a tile of 128 x 128, so a program has the processor
    # to itself; on sm_90 two of the symmetric kind share it. Bound to 128 registers, the tile's end has 233 loads and
    # stores of local memory.
    return [
        _gemm("gemm 128x128", 255, 8),
        _gemm("gemm 128x128 symmetric", 168, 8, **_SYMMETRIC),
        _gemm("gemm 128x128 ragged K", 255, 8, EVEN=False),
        _gemm("gemm 128x128 integer groups", 168, 8, AFFINE=True),
        _gemm("gemm 128x128 persistent", 255, 8, PERSISTENT=True),
        _gemm("gemm 128x256", 255, 8, BM=256),
        replace(_gemm("gemm 256x128", 255, 8, BN=256), architectures=(90,)),
        _gemm("gemm 64x16 split", 80, 8, warps=4, stages=4, BN=64, BM=16, SPLIT=4),
        _gemm("gemm 64x32 split", 96, 8, warps=4, stages=4, BN=64, BM=32, SPLIT=4),
        _gemm("gemm 64x64", 128, 8, warps=4, stages=4, BN=64, BM=64),
        _gemm("gemm 64x64 split", 128, 8, warps=4, stages=4, BN=64, BM=64, SPLIT=4),
        # 168 with triton 3.6.0, three programs to a processor; 176 on sm_89 with 3.7.1, two. Only the search launches it.
        _gemm("gemm 128x64 split", 176, 8, warps=4, stages=4, BM=64, SPLIT=4),
        _gemm("gemm 128x128 split", 168, 8, SPLIT=4),
        Case(name="finish", module="gemm", kernel="finish_kernel", types=_FINISH, warps=4, registers=64,
             values={**_FLAGS, "RAW": False, "SPLIT": 8, "BN": 128, "BM": 4}),
        _gemm("gemm 128x128 int8 weights", 200, 8, BITS=8),
        Case(name="gemv", module="gemm", kernel="gemv_kernel", types=_GEMV, warps=4, registers=128, shuffles=8,
             values={**_FLAGS, "RAW": False, "BN": 16, "BW": 128, "ASM": True}),
        Case(name="group 128", module="gemm_group", kernel="group_kernel", types=_GROUP, warps=8, registers=144,
             shuffles=8,
             product=True, values=group | {"GROUP_SIZE": 128}),
        Case(name="group 64", module="gemm_group", kernel="group_kernel", types=_GROUP, warps=8, registers=144,
             shuffles=8,
             product=True, values=group | {"GROUP_SIZE": 64, "HAS_ZW": False}),
        Case(name="w4a16", module="gemm_group", kernel="a16_kernel", types=_A16, warps=4, registers=255,
             values={"BITS": 4, "GROUPED": True, "AFFINE": False, "HAS_ZW": True, "HAS_BIAS": True, "EVEN": True,
                     "BN": 64, "BM": 16, "J": 64, "SPLIT": 1, "FP32": False}),
        Case(name="w4a16 split", module="gemm_group", kernel="a16_kernel", types=_A16 | {"out_ptr": "*fp32"}, warps=4,
             registers=255,
             values={"BITS": 4, "GROUPED": True, "AFFINE": False, "HAS_ZW": True, "HAS_BIAS": False, "EVEN": True,
                     "BN": 64, "BM": 16, "J": 64, "SPLIT": 4, "FP32": False}),
        Case(name="w4a16 finish", module="gemm_group", kernel="a16_finish_kernel", types=_A16_FINISH, warps=4,
             registers=64,
             values={"GROUPED": False, "HAS_BIAS": True, "SPLIT": 8, "BN": 128, "BM": 4}),
        _rows("row_quant", 96),
        _rows("row_quant symmetric", 96, SYMMETRIC=True),
        _rows("row_quant long rows", 128, SINGLE=False, BK=8192),
        _rows("silu_mul_quant", 128, SILU_MUL=True, SINGLE=False, BK=8192),
        Case(name="rmsnorm_quant", module="quant", kernel="rmsnorm_kernel", types=norm, warps=8, registers=128,
             values=fused | {"HAS_RESIDUAL": True, "BK": 4096}),
        Case(name="kron_quant 64x64", module="transform", kernel="kron_kernel", types=kron, warps=4, stages=1,
             values=fused | {"N1": 64, "N2": 64, "P1": 64, "P2": 64, "FP32": False}),
        Case(name="kron_quant 86x128", module="transform", kernel="kron_kernel", types=kron, warps=8, stages=1,
             values=fused | {"N1": 86, "N2": 128, "P1": 128, "P2": 128, "FP32": False}),
        *(
            Case(name=f"kron_quant {n1}x{n2} {kind}, tiles", module="transform", kernel="left_kernel", warps=4, stages=2,
                 types=left | dict.fromkeys(("half_ptr", "left_ptr"), f"*{kind}"),
                 values=fused | tile_sizes(kind == "fp32") | {"N1": n1, "N2": n2, "FP32": kind == "fp32"})
            for n1, n2, kind in ((128, 224, "bf16"), (224, 128, "bf16"), (86, 128, "fp32"), (128, 224, "fp32"))
        ),
        *(
            Case(name=f"block_quant {size} {kind}, {rows} rows", module="transform", kernel="block_kernel", warps=4,
                 types=block | dict.fromkeys(("x_ptr", "matrix_ptr"), f"*{kind}"),
                 values=fused | {"B": size, "P": size, "R": rows, "S": block_terms(size, kind == "fp32"),
                                 "FP32": kind == "fp32"})
            for size, kind, rows in ((128, "bf16", 16), (256, "bf16", 32), (128, "fp32", 32))
        ),
        Case(name="kv_pack", module="kv", kernel="pack_kernel", types=kv_in, warps=4, registers=128,
             values={"H": 64, "P": 64, "R": 64}),
        Case(name="kv_unpack", module="kv", kernel="unpack_kernel", types=kv_out, warps=4, registers=128,
             values={"H": 64, "P": 64, "R": 64}),
    ]  # fmt: skip


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_case(case: Case, arch: int) -> Report:
    """Compile one case and read its machine code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: kernels of this process are interpreted, not compiled")
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f".{case.module}", __package__), case.kernel)
    order = list(kernel.arg_names)
    if [name for name in order if name not in case.values] != list(case.types):
        raise ValueError(f"{case.name}: expected arguments {list(case.types)}, got {order}")
    signature = {name: case.types.get(name, "constexpr") for name in order}
    # Aligned pointers and sizes, as they are when launched: without this, loads are taken apart.
    aligned = [["tt.divisibility", 16]]
    attributes = {(order.index(n),): aligned for n, t in case.types.items() if t.startswith("*") or t == "i32"}
    for free in ("M", "ROWS"):
        if free in case.types:
            attributes.pop((order.index(free),))
    constants = {(order.index(name),): value for name, value in case.values.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    raced = tuple(list(case.types)[argument] for argument in ptx.read_and_written(compiled.asm["ptx"]))
    return _inspect(case, arch, compiled.asm["cubin"], compiled.metadata.shared, raced)


def _inspect(case: Case, arch: int, cubin: bytes, shared: int, raced: tuple[str, ...]) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
        code = subprocess.run([_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+)", usage.stdout)
    if match is None:
        raise RuntimeError(f"cuobjdump gave no register count: {usage.stdout}")
    found = {op: len(re.findall(rf"\b{op}\b", code)) for op in ("STL", "LDL", "IGMMA", "IMMA", "IDP", "LDGSTS")}
    inside = "\n".join(_loops(code))
    spills = sum(found[op] for op in ("STL", "LDL"))
    looped = min(spills, len(re.findall(r"\b(?:STL|LDL)\b", inside)))  # a loop in another is there twice
    found["PRMT"] = len(re.findall(r"\bPRMT\b", product_loop(code)))
    numbers = {
        "registers": int(match.group(1)), "spills": looped, "kept": spills - looped, "shuffles": found["PRMT"],
        "from_registers": len(re.findall(r"\bIGMMA\S* R\d+, R\d+, gdesc", code)), "wgmma": found["IGMMA"], "mma": found["IMMA"], "dp4a": found["IDP"], "copies": found["LDGSTS"],  # noqa: E501
    }  # fmt: skip
    full = (f"{shared} bytes of shared memory, there are {SHARED[arch]}",) if shared > SHARED[arch] else ()
    problems = (*_problems(case, arch, numbers), *full, *(f"{name} is read and written" for name in raced))
    return Report(name=case.name, arch=arch, shared=shared, raced=raced, problems=problems, **numbers)


def _loops(code: str) -> list[str]:
    """All between a label and a later jump back to it."""
    labels = {match.group(1): match.start() for match in re.finditer(r"^(\.L_x_\d+):", code, re.MULTILINE)}
    return [
        code[labels[match.group(1)] : match.end()]
        for match in re.finditer(r"\bBRA[^;`]*`\((\.L_x_\d+)\)", code)
        if match.group(1) in labels and labels[match.group(1)] < match.start()
    ]


def product_loop(code: str) -> str:
    """The shortest loop that holds a product. All of it where none does."""
    return min((loop for loop in _loops(code) if re.search(r"\b(IGMMA|IMMA|IDP)\b", loop)), key=len, default=code)


def _problems(case: Case, arch: int, found: dict[str, int]) -> tuple[str, ...]:
    problems = []
    if found["spills"]:
        problems.append(f"{found['spills']} spills")
    if found["kept"] > _KEPT:
        problems.append(f"{found['kept']} loads and stores of local memory, limit {_KEPT}")
    if found["registers"] > case.registers:
        problems.append(f"{found['registers']} registers, limit {case.registers}")
    if case.product and not (found["wgmma"] if arch >= 90 else found["mma"]):
        problems.append("no int8 matrix instruction")
    if case.product and case.values["BITS"] == 4 and found["from_registers"] < found["wgmma"]:
        problems.append("unpacked weights go through shared memory")
    if case.kernel == "gemv_kernel" and not found["dp4a"]:
        problems.append("no dp4a")
    if case.kernel == "gemv_kernel" and not found["copies"]:
        problems.append("weights are not fetched ahead")
    if case.shuffles is not None and found["shuffles"] > case.shuffles:
        problems.append(f"{found['shuffles']} byte shuffles, limit {case.shuffles}")
    return tuple(problems)


def _one(job: tuple[int, int]) -> Report:
    return compile_case(cases()[job[0]], job[1])


def main() -> int:
    """Compile everything (or the cases whose names contain an argument); return 1 where a limit is broken."""
    wanted = [(i, c) for i, c in enumerate(cases()) if not sys.argv[1:] or any(w in c.name for w in sys.argv[1:])]
    jobs = [(index, arch) for index, case in wanted for arch in case.architectures]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        reports = list(pool.map(_one, jobs))
    print(
        f"{'kernel':34s} {'arch':>5s} {'regs':>5s} {'spill':>6s} {'kept':>5s} {'shared':>7s} "
        f"{'PRMT':>5s} {'wgmma':>6s} {'mma':>5s}"
    )
    for r in reports:
        counts = f"{r.registers:5d} {r.spills:6d} {r.kept:5d} {r.shared:7d} {r.shuffles:5d} {r.wgmma:6d} {r.mma:5d}"
        print(f"{r.name:34s} sm_{r.arch} {counts}  {'; '.join(r.problems)}")
    return 1 if any(r.problems for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
