"""Break each kernel in one place, in a scratch copy, and see that a test of test_kernels_cases.py fails.

    pytest -m slow -s tests/test_kernels_mutation.py      # prints which test noticed

Without a GPU the cases run in triton's interpreter, so what is broken here are the forms that it runs: of asm.py the
plain ones. The inline assembly is compared with the reference on a GPU only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.test_kernels_interpreter import CANNOT_INTERPRET

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Mutation:
    """The first `old` of a file becomes `new`; of the cases that the expression `tests` selects, one must fail."""

    about: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # Unpacking.
    Mutation("low nibble, shift", "cuda/asm.py", "low = w << 4\n", "low = w << 3\n", "ragged and 17"),
    Mutation("high nibble, mask", "cuda/asm.py", "high = w & -16", "high = w & -32", "ragged and 17"),
    Mutation("zero point, sign", "cuda/asm.py", "(code.to(tl.int32) - zero) * mul", "(code.to(tl.int32) + zero) * mul",
             "every_kind and 4-True-integer-4-True-64"),
    Mutation("multiplier left out", "cuda/asm.py", "(code.to(tl.int32) - zero) * mul", "(code.to(tl.int32) - zero)",
             "every_kind and 4-True-integer-4-False"),
    Mutation("dp4a, wrong byte", "cuda/asm.py", "24 - 8 * index", "16 - 8 * index", "configuration and gemv"),
    # The product.
    Mutation("shift back by 5", "cuda/gemm.py", "acc = acc >> 4\n", "acc = acc >> 5\n", "ragged and 17"),
    Mutation("block of 64 columns", "cuda/gemm.py", "(step // PER_BLOCK) * 128", "(step // PER_BLOCK) * 64", "ragged and 17"),
    Mutation("half a step", "cuda/gemm.py", "(step % PER_BLOCK) * BJ", "(step % PER_BLOCK) * 0", "configuration and half"),
    Mutation("columns past K are read", "cuda/tiles.py", "mask=(k < K)[:, None], other=0", "mask=(k <= K)[:, None], other=0",
             "every_kind and 4-True-integer-4-True-64"),
    Mutation("int8, high half", "cuda/gemm.py", "w_high = tl.load(at + 64)", "w_high = tl.load(at + 63)",
             "every_kind and 4-True-channel-8-False"),
    Mutation("one group for all", "cuda/gemm.py", "column // GROUP_SIZE, GROUPS - 1", "column // GROUP_SIZE, 0",
             "every_kind and 4-True-integer-4-True-64"),
    Mutation("last row of weights", "cuda/gemm.py", "tl.minimum(rn, N - 1), tl.minimum(rm, M - 1)",
             "tl.minimum(rn, N - 2), tl.minimum(rm, M - 1)", "ragged and 17"),
    Mutation("last row of tokens", "cuda/gemm.py", "tl.minimum(rn, N - 1), tl.minimum(rm, M - 1)",
             "tl.minimum(rn, N - 1), tl.minimum(rm, M - 2)", "ragged and 17"),
    Mutation("tile order", "cuda/tiles.py", "within % width, within // width", "within // width, within % width",
             "not_square and program"),
    Mutation("width of the last band", "cuda/tiles.py", "tl.minimum(tiles_n - band * GROUP, GROUP)", "GROUP + 0 * band",
             "not_square and program"),
    Mutation("persistent, last tile", "cuda/gemm.py", "tl.program_id(0), tiles, tl.num_programs(0)",
             "tl.program_id(0), tiles - 1, tl.num_programs(0)", "configuration and persistent"),
    Mutation("split, share", "cuda/gemm.py", "first = tl.program_id(1) * share", "first = tl.program_id(1) * (share - 1)",
             "configuration and split"),
    Mutation("split, place of a share", "cuda/gemm.py", "out_ptr + tl.program_id(1).to(tl.int64) * M * N", "out_ptr",
             "asks_nothing"),
    Mutation("split, last share left out", "cuda/gemm.py", "for part in tl.static_range(SPLIT):",
             "for part in tl.static_range(SPLIT - 1):", "asks_nothing"),
    Mutation("split, first share again", "cuda/gemm.py", "tl.full([], part, tl.int64)", "tl.full([], 0, tl.int64)",
             "configuration and split"),
    Mutation("split, sums not from 0", "cuda/gemm.py",
             "acc = tl.zeros([BN, BM], tl.int32)\n    for part", "acc = tl.full([BN, BM], 1, tl.int32)\n    for part",
             "configuration and split"),
    Mutation("split, rows of the end", "cuda/gemm.py", "inside = (rn < N)[:, None] & (rm < M)[None, :]",
             "inside = (rn < N)[:, None] & (rm < M - 1)[None, :]", "asks_nothing"),
    Mutation("gemv, ragged words", "cuda/gemm.py", "low + 16 < words", "low + 17 < words", "configuration and gemv"),
    # What follows the product.
    Mutation("weight zero, sign", "cuda/gemm.py", "acc -= zw[:, None]", "acc += zw[:, None]",
             "every_kind and 4-True-channel-4-True"),
    Mutation("activation zero left out", "cuda/gemm.py", "other=0)[:, None] * za[None, :]", "other=0)[:, None] * 0",
             "every_kind and 8-False-channel-4-True"),
    Mutation("bias, sign", "cuda/gemm.py", "y += tl.load(bias_ptr", "y -= tl.load(bias_ptr", "ragged and 17"),
    Mutation("last feature not stored", "cuda/tiles.py", "mask=(rm < M)[:, None] & (rn < N)[None, :]",
             "mask=(rm < M)[:, None] & (rn < N - 1)[None, :]", "ragged and 17"),
    # Groups.
    Mutation("group, shift left out", "cuda/gemm_group.py", "part = part >> SHIFT", "part = part >> 0",
             "every_kind and 4-True-group-4-False-32"),
    Mutation("group, activation zero", "cuda/gemm_group.py", "acc -= za[None, :]", "acc += za[None, :]",
             "every_kind and 8-False-group-4-True-128"),
    Mutation("group of 64, scale", "cuda/gemm_group.py", "in_n, in_m, block * 2 + 1, groups", "in_n, in_m, block * 2, groups",
             "every_kind and 4-True-group-4-True-64"),
    Mutation("group of 32, columns", "cuda/gemm_group.py", "a_ptr, k + 96, K", "a_ptr, k + 64, K",
             "every_kind and 4-True-group-4-True-32"),
    Mutation("group of 256, block", "cuda/gemm_group.py", "group * (GROUP_SIZE // 128) + inner",
             "group * (GROUP_SIZE // 128)", "every_kind and 4-True-group-4-False-256"),
    Mutation("rows in groups, zero point", "cuda/gemm_group.py", "part -= tl.load(colsum_ptr", "part += tl.load(colsum_ptr",
             "rows_in_groups and channel-4-True-64"),
    Mutation("rows in groups, past the last", "cuda/gemm_group.py", "(group < groups).to", "(group <= groups).to",
             "rows_in_groups and channel-4-True-64"),
    Mutation("rows in groups, scale", "cuda/gemm_group.py", "sa_ptr + rm * groups + last", "sa_ptr + rm * groups",
             "rows_in_groups and group-4-True-128"),
    Mutation("rows in groups, scale per channel", "cuda/gemm_group.py", "elif not OF_W:", "elif OF_W:",
             "rows_in_groups and channel-4-True-64"),
    Mutation("rows in groups, weight's zero", "cuda/gemm_group.py", "zeros = 1", "zeros = groups",
             "rows_in_groups and channel-4-True-64"),
    Mutation("w4a16, multiplier", "cuda/weight_only.py", "value = value * tl.load(mul_ptr", "value = value + tl.load(mul_ptr",
             "weights_only and integer-4-True-64"),
    Mutation("w4a16, share", "cuda/weight_only.py", "tl.program_id(1) * share", "tl.program_id(1) * (share - 1)",
             "weights_only and channel-4-True"),
    Mutation("w4a16, place of a share", "cuda/weight_only.py", "out_ptr + tl.program_id(1).to(tl.int64) * M * N", "out_ptr",
             "weights_only and channel-4-True"),
    Mutation("w4a16, first share again", "cuda/weight_only.py", "tl.full([], part, tl.int64)", "tl.full([], 0, tl.int64)",
             "weights_only and channel-4-True"),
    Mutation("w4a16, low nibble", "cuda/weight_only.py", "w = w << 4\n", "w = w << 3\n", "weights_only and channel-4-True"),
    # Quantisers.
    Mutation("kron, place of a group", "cuda/transform.py", "row * GROUPS + part", "row * GROUPS + (part + 1) % GROUPS",
             "kron_quant_in_groups and 6-64-64"),
    Mutation("kron, padding as groups", "cuda/transform.py", "part < GROUPS", "part <= GROUPS",
             "kron_quant_in_groups and 6-64-64"),
    Mutation("floor of the scale", "cuda/quant.py", "HALF - 1.0, tl.float32)), 1e-8)", "HALF - 1.0, tl.float32)), 1e-7)",
             "row_quant and 17-200-dtype0-True-4"),
    Mutation("rounding", "cuda/quant.py", "(12582912.0)", "(12582913.0)", "row_quant and 17-200-dtype0-True-4"),
    Mutation("upper clamp", "cuda/quant.py", "high = HALF - 1.0 - zero", "high = HALF * 1.0 - zero",
             "row_quant and 17-200-dtype0"),
    Mutation("range without 0", "cuda/quant.py", "tl.minimum(bottom, 0.0) * clip", "bottom * clip",
             "one_sign"),
    Mutation("NaN hidden", "cuda/quant.py", "scale = tl.where(top >= _INFINITY, largest, scale)", "pass", "not_finite"),
    Mutation("row sum of padding", "cuda/quant.py", "tl.where(mask, q, 0)", "tl.where(mask, q, 1)",
             "row_quant and 17-200-dtype0-True-4"),
    Mutation("long rows, start", "cuda/quant.py", "for start in range(0, K, BK):\n        mask = inside[:, None] & (start + "
             "columns < K)[None, :]\n        y = _tile(x_ptr, rows, start + columns,",
             "for start in range(0, K, BK):\n        mask = inside[:, None] & (start + "
             "columns < K)[None, :]\n        y = _tile(x_ptr, rows, columns,",
             "row_quant and 4-9000-dtype0-True-4"),
    Mutation("silu", "cuda/quant.py", "1.0 + tl.exp(-y)", "2.0 + tl.exp(-y)", "fused_quantisers"),
    Mutation("norm, eps", "cuda/quant.py", "mean + eps", "mean + 1e-3", "fused_quantisers"),
    Mutation("norm, gain", "cuda/quant.py", "y = (y * gain[None, :])", "y = (y + gain[None, :])", "fused_quantisers"),
    Mutation("norm, residual", "cuda/quant.py", "h = (h + tl.load(residual_ptr", "h = (h - tl.load(residual_ptr",
             "fused_quantisers"),
    Mutation("range without 0, above", "cuda/quant.py", "tl.maximum(ceiling, 0.0) * clip", "ceiling * clip", "one_sign"),
    # Transforms.
    Mutation("kron, left not transposed", "cuda/transform.py", "i1[None, :] * N1 + i1[:, None]",
             "i1[:, None] * N1 + i1[None, :]", "kron_quant and 8-16"),
    Mutation("kron, padding", "cuda/transform.py", "tl.where(mask, q, 0)", "tl.where(mask, q, 1)", "kron_quant and 12-20"),
    Mutation("block, one matrix for all", "cuda/transform.py", "block * shared_stride", "0 * shared_stride",
             "block_quant and 5-12"),
    Mutation("block, columns", "cuda/transform.py", "rows[:, None] * K + block * B + j[None, :], mask=inside",
             "rows[:, None] * K + j[None, :], mask=inside", "block_quant and 5-12"),
    Mutation("tiles, left not transposed", "cuda/transform.py", "i[None, :] * N1 + i1[:, None]",
             "i1[:, None] * N1 + i[None, :]", "kron_quant and 130-20"),
    Mutation("tiles, the second", "cuda/transform.py", "tile // DOWN * T2", "tile % DOWN * T2", "kron_quant and 2-130"),
    Mutation("tiles, all terms", "cuda/transform.py", "range(0, N1, S)", "range(0, S, S)", "kron_quant and 130-20"),
    # The key-value cache.
    Mutation("cache, rounding", "cuda/kv.py", "(8388608.0)", "(8388609.0)", "kv"),
    Mutation("cache, high nibble", "cuda/kv.py", "(_steps(high, zero, inverse) << 4)", "(_steps(low, zero, inverse) << 4)",
             "kv and 5-3"),
    Mutation("cache, least step", "cuda/kv.py", "(2.0**-14)", "(2.0**-12)", "kv and 70"),
    Mutation("cache, unpacked high", "cuda/kv.py", "(byte >> 4).to", "(byte >> 3).to", "kv and 5-3"),
]  # fmt: skip


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    """Some minutes, and nothing that a user's change would break unnoticed: only where `slow` is asked for."""
    if not request.config.option.markexpr:
        pytest.skip("breaks the kernels one by one, for minutes: pytest -m slow")


def scratch(folder: Path) -> Path:
    """A copy of the kernels and of their cases, where a run of pytest finds only these."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "test_kernels_cases.py", folder)
    package = folder / "kernels" / "affinequant_kernels"
    (folder / "conftest.py").write_text(
        "import affinequant_kernels\n\n"
        "def pytest_configure():\n"
        f"    assert affinequant_kernels.__path__ == [{str(package)!r}], affinequant_kernels.__path__\n"
    )
    return package


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    environment["PYTHONPATH"] = str(folder / "kernels")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-k", tests, "test_kernels_cases.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.usefixtures("asked_for")
@CANNOT_INTERPRET
def test_the_unbroken_copy_passes(tmp_path: Path) -> None:
    """What the mutations below are judged by: so a failure there is the mutation's."""
    scratch(tmp_path)
    chosen = " or ".join(sorted({f"({mutation.tests})" for mutation in MUTATIONS}))
    done = run(tmp_path, chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.usefixtures("asked_for")
@CANNOT_INTERPRET
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.about}")
def test_a_broken_kernel_is_noticed(tmp_path: Path, mutation: Mutation) -> None:
    path = scratch(tmp_path) / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    done = run(tmp_path, mutation.tests)
    # 1: tests failed. Anything else (nothing collected, a broken import) is no proof, and neither is a failure to run.
    failed = re.search(r"^FAILED \S+::(.+?) - (.*)$", done.stdout, re.MULTILINE)
    assert done.returncode == 1 and failed, done.stdout[-3000:] + done.stderr[-1000:]
    assert "AssertionError" in failed[2] or "assert" in failed[2], failed[0]
    print(f"\n| {mutation.file}: {mutation.about} | {failed[1]} |")


def test_every_kernel_is_broken_somewhere() -> None:
    package = ROOT / "kernels/affinequant_kernels"
    texts = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    assert {mutation.file for mutation in MUTATIONS} == {name for name, text in texts.items() if "@triton.jit" in text}
    for mutation in MUTATIONS:
        assert mutation.old in texts[mutation.file], f"{mutation.about}: the mutation no longer applies"
