"""What `aot.py` compiles: every kernel, in the shapes that the dispatch uses most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

ARCHITECTURES = (80, 89, 90)


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
    architectures: tuple[int, ...] = ARCHITECTURES  # where cuda/configs.py or the search use it
    registers: int = 255  # most allowed per thread
    product: bool = False  # an int8 matrix product
    shuffles: int | None = None  # most PRMT in the machine code


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
    from affinequant_kernels.cuda.transform import block_terms, tile_sizes

    group: dict[str, object] = {
        **_FLAGS, "BITS": 4, "EVEN": True, "BN": 128, "BM": 64, "ASM": True, "OF_W": True, "OF_A": False
    }  # fmt: skip
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
        *(
            Case(name=f"group {size} of rows{' and weights' * both}", module="gemm_group", kernel="group_kernel", warps=8,
                 types=_GROUP | {"colsum_ptr": "*i32"}, registers=255, shuffles=8, product=True,
                 values=group | {"GROUP_SIZE": size, "OF_W": both, "OF_A": True})
            for size, both in ((64, False), (64, True), (128, True))
        ),
        Case(name="w4a16", module="weight_only", kernel="a16_kernel", types=_A16, warps=4, registers=255,
             values={"BITS": 4, "GROUPED": True, "AFFINE": False, "HAS_ZW": True, "HAS_BIAS": True, "EVEN": True,
                     "BN": 64, "BM": 16, "J": 64, "SPLIT": 1, "FP32": False}),
        Case(name="w4a16 split", module="weight_only", kernel="a16_kernel", types=_A16 | {"out_ptr": "*fp32"}, warps=4,
             registers=255,
             values={"BITS": 4, "GROUPED": True, "AFFINE": False, "HAS_ZW": True, "HAS_BIAS": False, "EVEN": True,
                     "BN": 64, "BM": 16, "J": 64, "SPLIT": 4, "FP32": False}),
        Case(name="w4a16 finish", module="weight_only", kernel="a16_finish_kernel", types=_A16_FINISH, warps=4,
             registers=64,
             values={"GROUPED": False, "HAS_BIAS": True, "SPLIT": 8, "BN": 128, "BM": 4}),
        _rows("row_quant", 96),
        _rows("row_quant symmetric", 96, SYMMETRIC=True),
        _rows("row_quant long rows", 128, SINGLE=False, BK=8192),
        _rows("silu_mul_quant", 128, SILU_MUL=True, SINGLE=False, BK=8192),
        Case(name="rmsnorm_quant", module="quant", kernel="rmsnorm_kernel", types=norm, warps=8, registers=128,
             values=fused | {"HAS_RESIDUAL": True, "BK": 4096}),
        Case(name="kron_quant 64x64", module="transform", kernel="kron_kernel", types=kron, warps=4, stages=1,
             values=fused | {"N1": 64, "N2": 64, "P1": 64, "P2": 64, "FP32": False, "GROUP": 0}),
        Case(name="kron_quant 86x128", module="transform", kernel="kron_kernel", types=kron, warps=8, stages=1,
             values=fused | {"N1": 86, "N2": 128, "P1": 128, "P2": 128, "FP32": False, "GROUP": 0}),
        Case(name="kron_quant 86x128 groups of 64", module="transform", kernel="kron_kernel", types=kron, warps=8, stages=1,
             values=fused | {"N1": 86, "N2": 128, "P1": 128, "P2": 128, "FP32": False, "GROUP": 64}),
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
