"""Every Triton kernel against reference.py, bit for bit: on a GPU, or in triton's interpreter.

An interpreted kernel cannot share a process with a compiled one, so without a GPU this file is run by
test_kernels_interpreter.py in a process of its own; here it then skips.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs CUDA, or the interpreter (test_kernels_interpreter.py runs it)", allow_module_level=True)

from affinequant_kernels import prepare_weight, reference
from affinequant_kernels.cuda import gemm, kv, quant, transform, weight_only
from affinequant_kernels.cuda.configs import Config
from affinequant_kernels.weight import Weight, row_group

# The interpreter's own habits: it turns 1-element arrays into numbers, and numpy tells of NaN and overflow.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bf16 off instead of rounding it, so there only these outputs can be compared.
OUTPUTS = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
N = 72  # not a multiple of any tile


def weight_of(kind: str, bits: int, with_zero: bool, group: int, k: int, act_group: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(k + group)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (N, k), dtype=torch.int8, generator=generator)
    codes[0], codes[1], codes[N - 1] = low, high - 1, low  # extremes, in the last row as well
    groups = k // group
    scale = torch.rand(N, groups if kind == "group" else 1, generator=generator) * 0.01 + 1e-3
    zero = torch.randint(low, high, (N, 1 if kind == "channel" else groups), dtype=torch.int8, generator=generator)
    if kind == "group" and bits == 8:
        zero.zero_()  # more would not fit int8
    # 8 * 15 + 8 fits int8 with any zero point; without one the multiplier may reach 16.
    top = 9 if with_zero else 17
    mul = torch.randint(1, top, (N, groups), dtype=torch.uint8, generator=generator) if kind == "integer" else None
    zero = zero if with_zero else None
    return prepare_weight(codes, scale, zero, bits=bits, mul=mul, act_group=act_group).to(DEVICE)


def input_of(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)) * 3 + 0.3
    if m > 2:
        x[0], x[1], x[2, 3] = 0.0, -5.0, 1e4  # a zero row, a constant row, a huge outlier
    if m > 3:
        x[3, -1] = 50.0  # the largest comes last
    return x.to(dtype).to(DEVICE)


def check_linear(m: int, k: int, weight: Weight, config: Config | None, act_bits: int, symmetric: bool) -> None:
    group = row_group(weight, k)
    rows = reference.row_quant(input_of(m, k), bits=act_bits, symmetric=symmetric, group=group)
    zero = None if symmetric else rows.zero
    bias = torch.linspace(-1, 1, N, device=DEVICE) if m % 2 else None
    kinds = [*OUTPUTS, torch.int32] if weight.scale.ndim == 1 and not group else OUTPUTS
    for out_dtype in kinds:
        got = gemm.linear(rows.q, rows.scale, zero, rows.rowsum, weight, bias, out_dtype, config)
        wanted = reference.linear(rows.q, rows.scale, zero, weight, bias, out_dtype)
        assert got.dtype == out_dtype and torch.equal(got, wanted), out_dtype


# Products


@pytest.mark.parametrize("m", [*range(1, 18), 63, 64, 65])
def test_linear_at_every_ragged_number_of_rows(m: int) -> None:
    check_linear(m, 256, weight_of("channel", 4, False, 64, 256), None, 4, True)


WEIGHTS = [
    ("channel", 4, True, 64, 192),
    ("channel", 4, False, 4, 100),
    ("channel", 8, True, 50, 200),
    ("channel", 8, False, 64, 256),
    ("integer", 4, True, 64, 192),
    ("integer", 4, False, 32, 160),
    ("integer", 4, True, 128, 256),
    ("group", 4, True, 128, 256),
    ("group", 4, False, 256, 512),
    ("group", 4, True, 64, 192),
    ("group", 4, False, 32, 160),
    ("group", 4, True, 32, 256),
    ("group", 8, False, 64, 192),
]


@pytest.mark.parametrize("kind, bits, with_zero, group, k", WEIGHTS)
@pytest.mark.parametrize("act_bits, symmetric", [(4, True), (8, False)])
def test_linear_of_every_kind(
    kind: str, bits: int, with_zero: bool, group: int, k: int, act_bits: int, symmetric: bool
) -> None:
    for m in (1, 19):
        check_linear(m, k, weight_of(kind, bits, with_zero, group, k), None, act_bits, symmetric)


ROWS_IN_GROUPS = [
    ("channel", 4, True, 64, 192),
    ("channel", 4, False, 32, 160),
    ("channel", 4, True, 256, 512),
    ("channel", 8, False, 64, 192),
    ("group", 4, True, 32, 160),
    ("group", 4, False, 64, 192),
    ("group", 4, True, 128, 256),
]


@pytest.mark.parametrize("kind, bits, with_zero, group, k", ROWS_IN_GROUPS)
@pytest.mark.parametrize("act_bits, symmetric", [(4, False), (8, True)])
def test_linear_of_rows_in_groups(
    kind: str, bits: int, with_zero: bool, group: int, k: int, act_bits: int, symmetric: bool
) -> None:
    for m in (1, 19):
        check_linear(m, k, weight_of(kind, bits, with_zero, group, k, group), None, act_bits, symmetric)


CONFIGS = {
    "split": Config(bn=64, bm=16, split=2, warps=4),
    "split with an uneven share": Config(bn=64, bm=16, split=4, bj=32, warps=4),
    "split in eight": Config(bn=64, bm=32, split=8, warps=4),
    "persistent": Config(bn=64, bm=64, programs=2, warps=4),
    "half steps": Config(bn=64, bm=64, bj=32, warps=4),
    "wide": Config(bn=128, bm=128),
    "wider": Config(bn=256, bm=128),
    "gemv": Config(path="gemv", bn=16, bm=1, bj=64, warps=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("k", [200, 640])
def test_linear_of_every_configuration(config: Config, k: int) -> None:
    m = 2 if config.path == "gemv" else 67
    check_linear(m, k, weight_of("channel", 4, True, 4, k), config, 8, False)


@pytest.mark.parametrize("programs", [None, 7], ids=["a program each", "persistent"])
def test_every_tile_of_a_grid_that_is_not_square(programs: int | None) -> None:
    """10 tiles of features, in bands of 8 and 2, by 3 of tokens."""
    generator = torch.Generator().manual_seed(3)
    weight = prepare_weight(torch.randint(-8, 8, (300, 128), dtype=torch.int8, generator=generator), torch.ones(300))
    weight = weight.to(DEVICE)
    q = torch.randint(-8, 8, (40, 128), dtype=torch.int8, generator=generator).to(DEVICE)
    config = Config(bn=32, bm=16, programs=programs, warps=4)
    got = gemm.linear(q, torch.ones(40, device=DEVICE), None, None, weight, None, torch.int32, config)
    assert torch.equal(got, reference.accumulator(q, None, weight))


@pytest.mark.parametrize("config", ["split", "split with an uneven share", "split in eight"])
def test_a_split_product_asks_nothing_of_the_memory_it_gets(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that it is zero nor that nobody else uses it at another time: under a CUDA graph neither would be so."""
    given: list[torch.Tensor] = []

    def dirty(*size: int, **settings: Any) -> torch.Tensor:
        given.append(torch.full(size, -77, **settings))
        return given[-1]

    weight = weight_of("channel", 4, False, 64, 640)
    rows = reference.row_quant(input_of(5, 640))
    monkeypatch.setattr(gemm, "torch", SimpleNamespace(**(vars(torch) | {"empty": dirty})))
    for _ in range(2):
        got = gemm.linear(rows.q, rows.scale, None, None, weight, None, torch.int32, CONFIGS[config])
        assert torch.equal(got, reference.accumulator(rows.q, None, weight))
    kept = [given.pop(0) for _ in range(2)]
    assert (
        kept[1].shape == (min(CONFIGS[config].split, 5 if CONFIGS[config].bj == 64 else 10), 5, N) and len(given) == 2
    )


def test_every_code_times_every_code() -> None:
    """All 256 x 256 products of int8, and all pairs of nibbles, with the largest possible sum."""
    values = torch.arange(-128, 128, dtype=torch.int8)
    q = values.repeat_interleave(1).view(1, 256).expand(4, 256).contiguous().to(DEVICE)
    for bits, codes in ((8, values), (4, values.remainder(16).sub(8))):
        weight = prepare_weight(
            torch.stack((codes, codes.flip(0), codes.roll(1))).contiguous(), torch.ones(3), bits=bits
        )
        weight = weight.to(DEVICE)
        ones = torch.ones(4, device=DEVICE)
        got = gemm.linear(q, ones, None, None, weight, None, torch.int32)
        assert torch.equal(got, reference.linear(q, ones, None, weight, None, torch.int32))
    low = torch.full((1, 4096), -128, dtype=torch.int8, device=DEVICE)
    weight = prepare_weight(torch.full((2, 4096), -8, dtype=torch.int8), torch.ones(2)).to(DEVICE)
    got = gemm.linear(low, torch.ones(1, device=DEVICE), None, None, weight, None, torch.int32)
    assert got.unique().tolist() == [128 * 8 * 4096]


def test_group_sizes_that_no_kernel_has_are_refused() -> None:
    rows = reference.row_quant(input_of(2, 96))
    with pytest.raises(ValueError, match=r"group size: expected .*, got 24"):
        inside = reference.row_quant(input_of(2, 96), group=24)
        gemm.linear(*inside, weight_of("channel", 4, True, 24, 96, 24), None, torch.float32)
    with pytest.raises(ValueError, match="w_zero: expected none beside 8-bit codes and rows in groups"):
        inside = reference.row_quant(input_of(2, 96), group=32)
        gemm.linear(*inside, weight_of("channel", 8, True, 32, 96, 32), None, torch.float32)
    for kind in ("group", "integer"):
        with pytest.raises(ValueError, match=r"group size: expected .*, got 24"):
            gemm.linear(rows.q, rows.scale, None, None, weight_of(kind, 4, True, 24, 96), None, torch.float32)


@pytest.mark.parametrize("kind, bits, with_zero, group, k", WEIGHTS)
def test_weights_only_product(kind: str, bits: int, with_zero: bool, group: int, k: int) -> None:
    weight = weight_of(kind, bits, with_zero, group, k)
    for m in (1, 17):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE)
        bias = torch.linspace(-1, 1, N, device=DEVICE)
        wanted = reference.w4a16_linear(x.double(), weight, bias)
        got = weight_only.w4a16_linear(x, weight, bias, torch.float32)
        # fp32 sums of k terms.
        assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        for split in (2, 5):  # the second leaves programs without columns
            got = weight_only.w4a16_linear(x, weight, bias if m > 1 else None, torch.float32, split=split)
            assert (got - wanted + (bias if m == 1 else 0)).abs().max() <= 2e-6 * wanted.abs().max()


# Quantisers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 64), (17, 200), (4, 9000)])
def test_row_quant(bits: int, symmetric: bool, dtype: torch.dtype, m: int, k: int) -> None:
    x = input_of(m, k, dtype)
    for clip, group in ((1.0, 0), (0.73, 0), (0.01, 0), (0.9, k // 8)):
        got = quant.row_quant(x, bits=bits, symmetric=symmetric, clip=clip, group=group)
        wanted = reference.row_quant(x, bits=bits, symmetric=symmetric, clip=clip, group=group)
        for name, have, want in zip(got._fields, got, wanted, strict=True):
            assert torch.equal(have, want), (name, clip)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_go_to_even(symmetric: bool) -> None:
    x = torch.arange(-14, 16).div(2.0).view(1, -1).contiguous().to(DEVICE)
    got = quant.row_quant(x, bits=4, symmetric=symmetric, clip=1.0)
    wanted = reference.row_quant(x, bits=4, symmetric=symmetric)
    assert torch.equal(got.q, wanted.q) and torch.equal(got.zero, wanted.zero)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_that_is_not_finite_keeps_its_scale(bad: float, symmetric: bool) -> None:
    x = input_of(4, 200)
    x[3, 7] = bad
    rows = quant.row_quant(x, bits=4, symmetric=symmetric, clip=1.0)
    assert torch.isfinite(rows.scale).tolist() == [True, True, True, False]
    wanted = reference.row_quant(x[:3], symmetric=symmetric)
    assert torch.equal(rows.q[:3], wanted.q)


# What is quantised may differ from the reference by the order of summation: by this much, relative to the row's largest.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check_fused(
    rows: reference.Rows, y: torch.Tensor, wanted: torch.Tensor, symmetric: bool, dtype: torch.dtype, group: int = 0
) -> None:
    assert (y - wanted.float()).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
    again = reference.row_quant(y, symmetric=symmetric, clip=0.9, group=group)
    for name, have, want in zip(rows._fields, rows, again, strict=True):
        assert torch.equal(have, want), name


FUSED_TYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FUSED_TYPES)
def test_fused_quantisers(symmetric: bool, dtype: torch.dtype) -> None:
    settings = {"bits": 4, "symmetric": symmetric, "clip": 0.9}
    for m, k in ((1, 64), (5, 300)):
        x, residual = torch.randn(m, k).to(dtype).to(DEVICE), torch.randn(m, k).to(dtype).to(DEVICE)
        gain = torch.rand(k).to(dtype).to(DEVICE)
        y = torch.empty(m, k, device=DEVICE)
        rows, hidden = quant.rmsnorm_quant(x, residual, gain, 1e-6, y=y, **settings)
        wanted, wanted_hidden = reference.rmsnorm_apply(x, residual, gain, 1e-6)
        assert torch.equal(hidden, wanted_hidden)
        check_fused(rows, y, wanted, symmetric, dtype)
        rows, hidden = quant.rmsnorm_quant(x, None, gain, 1e-6, y=y, **settings)
        assert torch.equal(hidden, x)
        check_fused(rows, y, reference.rmsnorm_apply(x, None, gain, 1e-6)[0], symmetric, dtype)
        both = torch.cat((x, residual), 1)
        rows = quant.silu_mul_quant(both, y=y, **settings)
        check_fused(rows, y, reference.silu_mul_apply(both), symmetric, dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_of_one_sign_is_taken_from_zero(sign: int) -> None:
    """Where nothing pads the tile with zeros."""
    x, gain = torch.rand(2, 64).add(1.0).mul(sign).to(DEVICE), torch.ones(64, device=DEVICE)
    y = torch.empty(2, 64, device=DEVICE)
    rows, _ = quant.rmsnorm_quant(x, None, gain, 1e-6, bits=4, symmetric=False, clip=0.9, y=y)
    check_fused(rows, y, reference.rmsnorm_apply(x, None, gain, 1e-6)[0], False, torch.float32)
    assert rows.zero.tolist() == ([-8, -8] if sign > 0 else [7, 7])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FUSED_TYPES)
@pytest.mark.parametrize("n1, n2", [(8, 16), (12, 20), (1, 32), (2, 130), (130, 20)])
def test_kron_quant(symmetric: bool, dtype: torch.dtype, n1: int, n2: int) -> None:
    generator = torch.Generator().manual_seed(n1)
    x = torch.randn(3, n1 * n2, generator=generator).to(dtype).to(DEVICE)
    left, right = (torch.randn(n, n, generator=generator).to(DEVICE) for n in (n1, n2))
    y = torch.empty(3, n1 * n2, device=DEVICE)
    rows = transform.kron_quant(x, left, right, bits=4, symmetric=symmetric, clip=0.9, y=y)
    check_fused(rows, y, reference.kron_apply(x, left, right), symmetric, dtype)
    full = x.double() @ torch.kron(left.to(dtype).double(), right.to(dtype).double())
    assert (y - full).abs().max() <= TOLERANCE[dtype] * full.abs().max()


@pytest.mark.parametrize("dtype", FUSED_TYPES)
@pytest.mark.parametrize("n1, n2, group", [(6, 64, 64), (6, 64, 32), (4, 32, 64), (4, 48, 64), (130, 16, 32)])
def test_kron_quant_in_groups(dtype: torch.dtype, n1: int, n2: int, group: int) -> None:
    generator = torch.Generator().manual_seed(n1)
    x = torch.randn(3, n1 * n2, generator=generator).to(dtype).to(DEVICE)
    left, right = (torch.randn(n, n, generator=generator).to(DEVICE) for n in (n1, n2))
    fused = dtype != torch.float32 and transform.groups_fit(n1, n2, group) and n1 <= 128
    assert fused == (dtype != torch.float32 and n2 != 48 and n1 != 130)
    for symmetric in (True, False):
        y = torch.empty(3, n1 * n2, device=DEVICE)
        rows = transform.kron_quant(x, left, right, bits=4, symmetric=symmetric, clip=0.9, group=group, y=y)
        check_fused(rows, y, reference.kron_apply(x, left, right), symmetric, dtype, group)
    blocks = torch.randn(1, n2, n2, generator=generator).to(DEVICE)
    rows = transform.block_quant(x, blocks, bits=4, symmetric=False, clip=0.9, group=group, y=y)
    check_fused(rows, y, reference.block_apply(x, blocks), False, dtype, group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FUSED_TYPES)
@pytest.mark.parametrize("blocks, size, k", [(5, 12, 60), (1, 32, 96), (2, 150, 300), (1, 258, 258)])
def test_block_quant(symmetric: bool, dtype: torch.dtype, blocks: int, size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(18, k, generator=generator).to(dtype).to(DEVICE)
    matrices = torch.randn(blocks, size, size, generator=generator).to(DEVICE)
    y = torch.empty(18, k, device=DEVICE)
    rows = transform.block_quant(x, matrices, bits=4, symmetric=symmetric, clip=0.9, y=y)
    check_fused(rows, y, reference.block_apply(x, matrices), symmetric, dtype)
    full = x.double() @ torch.block_diag(*matrices.to(dtype).double().expand(k // size, -1, -1))
    assert (y - full).abs().max() <= TOLERANCE[dtype] * full.abs().max()


# The key-value cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("t, h, d", [(1, 1, 2), (5, 3, 48), (70, 2, 128)])
def test_kv_round_trip(dtype: torch.dtype, t: int, h: int, d: int) -> None:
    k = torch.randn(t, h, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    k[0, 0] = 3.0
    if t > 1:
        k[1] = k[1] * 1e-4
        k[2] = k[2] * 1e4
    k = k.to(DEVICE)
    got = kv.kv_pack(k)
    for name, have, want in zip(("packed", "scale", "zero"), got, reference.kv_pack(k), strict=True):
        assert torch.equal(have, want), name
    for out_dtype in OUTPUTS:
        assert torch.equal(kv.kv_unpack(*got, out_dtype), reference.kv_unpack(*got, out_dtype))
    # Half a step, and what rounding scale and offset to fp16 adds.
    error = (kv.kv_unpack(*got, torch.float32) - k.float()).abs()
    assert (error <= got[1].float().unsqueeze(-1) * 0.5 + k.float().abs().amax(-1, keepdim=True) * 2e-3 + 1e-6).all()
