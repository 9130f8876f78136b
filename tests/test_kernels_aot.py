"""Every Triton kernel compiled to machine code for sm_80, sm_89 and sm_90, and that code held to its limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import torch
from affinequant_kernels.bench import aot, ptx
from affinequant_kernels.cuda import transform

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler on Linux only")


def compile_for(arch: int, name: str) -> aot.Report:
    os.environ.pop("TRITON_INTERPRET", None)
    return aot.compile_case(next(case for case in aot.cases() if case.name == name), arch)


JOBS = [(arch, case.name) for case in aot.cases() for arch in case.architectures]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[int, str], aot.Report]:
    with ProcessPoolExecutor(max_workers=2) as pool:
        return dict(zip(JOBS, pool.map(compile_for, *zip(*JOBS, strict=True)), strict=True))


@pytest.mark.parametrize("arch, name", JOBS)
def test_machine_code(reports: dict[tuple[int, str], aot.Report], arch: int, name: str) -> None:
    report = reports[arch, name]
    assert not report.problems, report


# The end of a split product as it once was: the sums are loaded in one layout and zeroed in another, which are two threads'
# business, with no barrier between.
RACED = """
.visible .entry gemm_kernel(.param .u64 .ptr .global .align 1 gemm_kernel_param_0, .param .u64 gemm_kernel_param_1)
	ld.param.b64 	%rd1, [gemm_kernel_param_0];
	ld.param.b64 	%rd2, [gemm_kernel_param_1];
$L__BB0_1:
	mad.wide.s32 	%rd3, %r1, 4, %rd1;
	add.s64 	%rd4, %rd3, 16;
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	@%p1 atom.global.gpu.relaxed.add.u32 %r2, [ %rd3 + 0 ], %r3;
	bar.sync 	0;
	ld.global.cg.v4.b32 { %r287, %r288, %r289, %r290 }, [ %rd3 + 0 ];
	st.global.b32 [ %rd4 + 0 ], { %r4 };
	st.shared.b32 [ %r9 + 0 ], %r4;
"""


def test_memory_that_is_read_and_written_is_named() -> None:
    assert ptx.read_and_written(RACED) == [0]
    kept = [(set(a.arguments), a.reads, a.writes, a.width) for a in ptx.accesses(RACED)]
    assert kept == [({1}, True, False, 16), ({0}, True, True, 4), ({0}, True, False, 16), ({0}, False, True, 4)]
    two = "\n".join(line for line in RACED.splitlines() if "atom" not in line and "st.global" not in line)
    assert ptx.read_and_written(two) == [] and ptx.read_and_written(two.replace("ld.global.cg", "st.global")) == []
    with pytest.raises(ValueError, match="no argument is known to give the addresses %rd4"):
        ptx.accesses(RACED.replace("add.s64 \t%rd4, %rd3", "add.s64 \t%rd4, %rd9"))


def test_what_was_found_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "read_and_written", lambda text: [1])
    assert compile_for(90, "kv_pack").problems == ("out_ptr is read and written",)


def test_every_kernel_is_among_the_cases() -> None:
    import importlib

    covered = {case.kernel for case in aot.cases()}
    for module in ("gemm", "gemm_group", "weight_only", "quant", "transform", "kv"):
        names = vars(importlib.import_module(f"affinequant_kernels.cuda.{module}"))
        assert {name for name in names if name.endswith("_kernel")} <= covered


def test_the_default_scheme_is_among_the_cases_of_every_kernel() -> None:
    """Zero points on both sides, and the transform of LLaMA-2-7B's widest input."""
    for kernel in {case.kernel for case in aot.cases()}:
        values = [case.values for case in aot.cases() if case.kernel == kernel]
        for flag, default in (("HAS_ZA", True), ("HAS_ZW", True), ("SYMMETRIC", False)):
            if any(flag in each for each in values):
                together = [each for each in values if each.get("HAS_ZA", True) and each.get("HAS_ZW", True)]
                assert any(each[flag] == default for each in together), (kernel, flag)
    kron = [case.values for case in aot.cases() if case.kernel == "kron_kernel"]
    assert any((each["N1"], each["N2"], each["SYMMETRIC"]) == (86, 128, False) for each in kron)


def test_a_fused_transform_is_refused_by_the_memory_that_its_code_asks_for(
    reports: dict[tuple[int, str], aot.Report],
) -> None:
    bf16 = torch.bfloat16
    for arch, shared in aot.SHARED.items():
        asked = reports[arch, "kron_quant 86x128"].shared
        assert transform.kron_fits(86, 128, bf16, asked) and not transform.kron_fits(86, 128, bf16, asked - 1)
        assert [transform.kron_fits(n1, n2, bf16, shared) for n1, n2 in ((64, 64), (86, 128), (128, 128))] == [True] * 3
        for n1, n2 in ((128, 224), (148, 128), (1, 256)):
            assert not transform.kron_fits(n1, n2, bf16, shared)
        assert not transform.kron_fits(86, 128, torch.float32, shared)
    assert not transform.kron_fits(86, 128, bf16, 64 << 10)  # Turing's


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n1, n2", [(8, 16), (128, 224), (224, 128)])
def test_every_kronecker_transform_is_fused_with_its_quantiser(
    n1: int, n2: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **_: launched.append((self.name, grid, given[0]))

    launched: list[tuple[str, tuple[int, ...], torch.Tensor]] = []
    for name in ("kron_kernel", "left_kernel", "row_quant"):
        monkeypatch.setattr(transform, name, Kernel(name))
    x, right = torch.randn(3, n1 * n2).to(dtype), torch.randn(n2, n2)
    transform.kron_quant(x, torch.eye(n1), right, bits=4, symmetric=False, clip=1.0)
    ((name, grid, first),) = launched
    if dtype == torch.float16 and n1 == 8:
        assert name == "kron_kernel" and first is x
    else:  # what lies in memory between the steps is of x's type
        assert name == "left_kernel" and grid == (3,) and torch.equal(first, x.view(-1, n2) @ right.to(dtype))


def test_limits_are_enforced(reports: dict[tuple[int, str], aot.Report]) -> None:
    case = next(case for case in aot.cases() if case.name == "gemm 128x128")
    bad = {
        "spills": 1,
        "kept": 0,
        "registers": 999,
        "wgmma": 0,
        "from_registers": 0,
        "mma": 0,
        "dp4a": 0,
        "shuffles": 99,
        "copies": 0,
    }
    assert len(aot._problems(case, 90, bad)) == 4
    assert len(aot._problems(case, 90, bad | {"kept": aot._KEPT + 1})) == 5
    good = reports[90, "gemm 128x128"]
    assert good.wgmma > 0 and good.from_registers == good.wgmma and reports[80, "gemm 128x128"].mma > 0
    assert len(aot._problems(case, 90, bad | {"wgmma": 4, "from_registers": 3})) == 4
    gemv = next(case for case in aot.cases() if case.name == "gemv")
    assert aot._problems(gemv, 90, bad | {"spills": 0, "registers": 9, "shuffles": 0, "dp4a": 8}) == (
        "weights are not fetched ahead",
    )


def test_product_loop_is_the_inner_one() -> None:
    code = ".L_x_1:\n A ;\n.L_x_2:\n IMMA ;\n PRMT ;\n BRA `(.L_x_2) ;\n B ;\n BRA `(.L_x_1) ;\n"
    assert aot.product_loop(code).split() == [".L_x_2:", "IMMA", ";", "PRMT", ";", "BRA", "`(.L_x_2)"]
    assert aot.product_loop("no loop") == "no loop"


def test_a_value_put_aside_for_a_loop_is_no_spill_in_it() -> None:
    code = " STL ;\n.L_x_1:\n A ;\n BRA `(.L_x_1) ;\n LDL ;\n"
    assert not any("STL" in loop or "LDL" in loop for loop in aot._loops(code))
    assert any("LDL" in loop for loop in aot._loops(code.replace("A ;", "LDL ;")))
