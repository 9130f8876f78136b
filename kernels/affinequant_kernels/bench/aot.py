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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from affinequant_kernels.bench import ptx
from affinequant_kernels.bench.cases import Case, cases

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have at most: CUDA C++ programming guide, technical specifications."""
_KEPT = 8  # loads and stores of local memory outside of loops, at most


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

    kernel = getattr(importlib.import_module(f"affinequant_kernels.cuda.{case.module}"), case.kernel)
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
