"""Every Triton kernel compiled to machine code for sm_80, sm_89 and sm_90, and that code held to its limits."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from affinequant_kernels import aot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler on Linux only")


def compile_for(arch: int, name: str) -> aot.Report:
    os.environ.pop("TRITON_INTERPRET", None)
    return aot.compile_case(next(case for case in aot.cases() if case.name == name), arch)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[int, str], aot.Report]:
    jobs = [(arch, case.name) for arch in aot.ARCHITECTURES for case in aot.cases()]
    with ProcessPoolExecutor(max_workers=2) as pool:
        return dict(zip(jobs, pool.map(compile_for, *zip(*jobs, strict=True)), strict=True))


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", [case.name for case in aot.cases()])
def test_machine_code(reports: dict[tuple[int, str], aot.Report], arch: int, name: str) -> None:
    report = reports[arch, name]
    assert not report.problems, report


def test_every_kernel_is_among_the_cases() -> None:
    import importlib

    covered = {case.kernel for case in aot.cases()}
    for module in ("gemm", "gemm_group", "quant", "transform", "kv"):
        names = vars(importlib.import_module(f"affinequant_kernels.{module}"))
        assert {name for name in names if name.endswith("_kernel")} <= covered


def test_limits_are_enforced(reports: dict[tuple[int, str], aot.Report]) -> None:
    case = next(case for case in aot.cases() if case.name == "gemm 128x128")
    bad = {"spills": 1, "registers": 999, "wgmma": 0, "from_registers": 0, "mma": 0, "dp4a": 0, "shuffles": 99}
    assert len(aot._problems(case, 90, bad)) == 4
    good = reports[90, "gemm 128x128"]
    assert good.wgmma > 0 and good.from_registers == good.wgmma and reports[80, "gemm 128x128"].mma > 0
    assert len(aot._problems(case, 90, bad | {"wgmma": 4, "from_registers": 3})) == 4


def test_product_loop_is_the_inner_one() -> None:
    code = ".L_x_1:\n A ;\n.L_x_2:\n IMMA ;\n PRMT ;\n BRA `(.L_x_2) ;\n B ;\n BRA `(.L_x_1) ;\n"
    assert aot.product_loop(code).split() == [".L_x_2:", "IMMA", ";", "PRMT", ";", "BRA", "`(.L_x_2)"]
    assert aot.product_loop("no loop") == "no loop"
