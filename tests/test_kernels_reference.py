"""layout.py, weight.py and reference.py: properties that do not depend on the code under test."""

from __future__ import annotations

import pytest
import torch
from affinequant_kernels import layout, prepare_weight, reference, slice_columns, slice_rows
from affinequant_kernels.weight import Weight, integer_weight, row_group, unpack


def codes(n: int, k: int, bits: int = 4, seed: int = 0) -> torch.Tensor:
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    return torch.randint(low, high, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


# Layouts


@pytest.mark.parametrize("k", [1, 63, 64, 65, 127, 128, 129, 300, 11008])
def test_hs128_round_trip(k: int) -> None:
    c = codes(3, k)
    packed = layout.pack_hs128(c)
    assert packed.shape == (3, layout.packed_columns(k)) and packed.dtype == torch.uint8
    assert torch.equal(layout.unpack_hs128(packed, k), c)
    assert torch.equal(layout.pack_rows_hs128(c), packed)


def test_hs128_bit_order_is_the_documented_one() -> None:
    c = torch.zeros(1, 256, dtype=torch.int8)
    c[0, 128 + 5], c[0, 128 + 64 + 5] = -3, 7
    packed = layout.pack_hs128(c)
    assert packed[0, 64 + 5].item() == (7 << 4) | (-3 & 15)
    assert int(packed.count_nonzero()) == 1


def test_hs128_pads_with_code_zero() -> None:
    packed = layout.pack_hs128(torch.full((2, 65), -1, dtype=torch.int8))
    assert torch.equal(layout.unpack_hs128(packed, 128)[:, 65:], torch.zeros(2, 63, dtype=torch.int8))


@pytest.mark.parametrize("k", [1, 8, 13, 128])
def test_compressed_tensors_round_trip(k: int) -> None:
    c = codes(5, k)
    words = layout.codes_to_compressed_tensors(c)
    assert torch.equal(layout.codes_from_compressed_tensors(words, k), c)
    zero = codes(13, 3)
    assert torch.equal(layout.zeros_from_compressed_tensors(layout.zeros_to_compressed_tensors(zero), 13), zero)


@pytest.mark.parametrize("k", [8, 13, 128])
def test_compressed_tensors_layout_is_that_library_s(k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    c = codes(16, k)
    assert torch.equal(layout.codes_to_compressed_tensors(c), helpers.pack_to_int32(c, 4, packed_dim=1))
    zero = codes(13, 3)
    assert torch.equal(layout.zeros_to_compressed_tensors(zero), helpers.pack_to_int32(zero, 4, packed_dim=0))


def test_gptq_layout() -> None:
    c = codes(6, 32)
    words = layout.codes_to_gptq(c)
    assert words.shape == (4, 6)
    assert (int(words[1, 2]) >> (4 * 3)) & 15 == int(c[2, 8 + 3]) + 8
    assert torch.equal(layout.codes_from_gptq(words, torch.arange(32) // 16, 32), c)
    with pytest.raises(ValueError, match="g_idx: expected groups in ascending order"):
        layout.codes_from_gptq(words, torch.arange(31, -1, -1), 32)
    stored = codes(2, 16).add(8)  # [groups, n], unsigned
    qzeros = layout.codes_to_compressed_tensors(stored - 8)
    assert torch.equal(layout.zeros_from_gptq(qzeros, 16, minus_one=False), (stored - 8).t())
    small = stored.clamp(max=14)
    qzeros = layout.codes_to_compressed_tensors(small - 8)
    assert torch.equal(layout.zeros_from_gptq(qzeros, 16, minus_one=True), (small - 7).t())


# Weights


def dequantise(weight: Weight, k: int) -> torch.Tensor:
    value = integer_weight(unpack(weight.qweight, k), weight.zero, weight.mul).double()
    scale = weight.scale.double().view(value.shape[0], -1)
    return (value.view(value.shape[0], scale.shape[1], -1) * scale.unsqueeze(-1)).view_as(value)


def sample(kind: str, n: int, k: int, groups: int, bits: int = 4, with_zero: bool = True) -> Weight:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(n, groups if kind == "group" else 1, generator=generator) + 0.5
    zero = codes(n, 1 if kind == "channel" else groups, 4) if with_zero else None
    mul = torch.randint(1, 9, (n, groups), dtype=torch.uint8, generator=generator) if kind == "integer" else None
    return prepare_weight(codes(n, k, bits).clamp(-100, 100), scale, zero, bits=bits, mul=mul)


KINDS = [("channel", 4), ("integer", 4), ("group", 4), ("channel", 8), ("group", 8)]


@pytest.mark.parametrize("kind, bits", KINDS)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_is_the_product_of_the_dequantised_values(kind: str, bits: int, act_bits: int, symmetric: bool) -> None:
    k = 192
    weight = sample(kind, 10, k, 6, bits)
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(2)) + 0.5
    rows = reference.row_quant(x, bits=act_bits, symmetric=symmetric)
    values = (rows.q.double() - rows.zero.double().unsqueeze(1)) * rows.scale.double().unsqueeze(1)
    bias = torch.randn(10)
    wanted = values @ dequantise(weight, k).t() + bias
    got = reference.linear_dyn(x, weight, bias, act_bits=act_bits, act_symmetric=symmetric)
    # Only fp32 rounding of the epilogue separates them.
    assert (got.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind, bits", [("channel", 4), ("group", 4), ("channel", 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_in_groups_each_have_a_scale_and_a_zero_point(kind: str, bits: int, symmetric: bool) -> None:
    k, size = 192, 32
    whole = sample(kind, 10, k, k // size, bits)
    weight = prepare_weight(unpack(whole.qweight, k), whole.scale, whole.zero, bits=bits, act_group=size)
    assert weight.colsum.shape == (10, k // size) and row_group(weight, k) == size and row_group(whole, k) == 0
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(2)) + 0.5
    x[:, :size] *= 100
    rows = reference.row_quant(x, bits=4, symmetric=symmetric, clip=0.9, group=size)
    apart = [reference.row_quant(part, bits=4, symmetric=symmetric, clip=0.9) for part in x.split(size, 1)]
    for have, parts in zip(rows, zip(*apart, strict=True), strict=True):
        assert torch.equal(have, torch.cat([part.view(7, -1) for part in parts], 1))
    values = (rows.q.double().view(7, -1, size) - rows.zero.double().unsqueeze(2)) * rows.scale.double().unsqueeze(2)
    wanted = values.flatten(1) @ dequantise(weight, k).t() + 1.0
    got = reference.linear_dyn(x, weight, torch.ones(10), act_symmetric=symmetric, clip=0.9)
    assert (got.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()
    cut = slice_columns(weight, k, 64, 160)
    assert torch.equal(cut.colsum, weight.colsum[:, 2:5]) and row_group(cut, 96) == size


@pytest.mark.parametrize(
    "groups, mul, act_group, message",
    [
        (1, False, 50, "act_group: expected a size that divides 192 columns, got 50"),
        (3, False, 32, "act_group: expected the 64 columns of the weight's own groups, got 32"),
        (6, True, 32, "mul: expected none beside rows in groups"),
    ],
)
def test_groups_of_rows_that_no_product_has(groups: int, mul: bool, act_group: int, message: str) -> None:
    multipliers = torch.ones(4, groups, dtype=torch.uint8) if mul else None
    scale = torch.ones(4, 1 if mul else groups)
    with pytest.raises(ValueError, match=message):
        prepare_weight(codes(4, 192), scale, mul=multipliers, act_group=act_group)
    with pytest.raises(ValueError, match="multiples of the group size 64"):
        slice_columns(prepare_weight(codes(4, 192), torch.ones(4), act_group=64), 192, 0, 96)


@pytest.mark.parametrize("kind", ["channel", "integer"])
def test_accumulator_is_exact(kind: str) -> None:
    weight = sample(kind, 10, 192, 6)
    rows = reference.row_quant(torch.randn(5, 192), bits=8, symmetric=False)
    value = integer_weight(unpack(weight.qweight, 192), weight.zero, weight.mul)
    wanted = (rows.q.long() - rows.zero.unsqueeze(1)) @ value.long().t()
    got = reference.linear(rows.q, rows.scale, rows.zero, weight, out_dtype=torch.int32)
    assert torch.equal(got.long(), wanted)


@pytest.mark.parametrize("kind, bits", KINDS)
def test_shards_add_up(kind: str, bits: int) -> None:
    k, groups = 256, 4
    weight = sample(kind, 12, k, groups, bits)
    rows = reference.row_quant(torch.randn(3, k), bits=4, symmetric=False)
    whole = reference.linear(rows.q, rows.scale, rows.zero, weight)
    for part, rows_of_part in ((slice_rows(weight, 0, 5), slice(0, 5)), (slice_rows(weight, 5, 12), slice(5, 12))):
        assert torch.equal(reference.linear(rows.q, rows.scale, rows.zero, part), whole[:, rows_of_part])
    halves = [slice_columns(weight, k, 0, 192), slice_columns(weight, k, 192, k)]
    cut = [slice(0, 192), slice(192, k)]
    if kind != "group":
        total = sum(
            reference.linear(rows.q[:, c].contiguous(), rows.scale, rows.zero, h, out_dtype=torch.int32).long()
            for h, c in zip(halves, cut, strict=True)
        )
        assert torch.equal(total, reference.linear(rows.q, rows.scale, rows.zero, weight, out_dtype=torch.int32).long())
    total = sum(
        reference.linear(rows.q[:, c].contiguous(), rows.scale, rows.zero, h) for h, c in zip(halves, cut, strict=True)
    )
    assert (total - whole).abs().max() < 1e-5 * whole.abs().max()


def test_slice_columns_refuses_to_cut_a_group() -> None:
    with pytest.raises(ValueError, match="start, stop: expected multiples of the group size 64"):
        slice_columns(sample("group", 4, 256, 4), 256, 0, 32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"codes": torch.full((2, 8), 8, dtype=torch.int8)}, "codes: expected values in"),
        ({"codes": torch.zeros(2, 8)}, "codes: expected torch.int8"),
        ({"scale": torch.tensor([1.0, float("nan")])}, "scale: expected finite values, got 1"),
        ({"scale": torch.ones(3)}, r"scale: expected shape \[2\]"),
        ({"scale": torch.ones(2, 3)}, "scale: expected a number of groups that divides 8 columns, got 3"),
        ({"scale": torch.ones(2, dtype=torch.float64)}, "scale: expected torch.float32 or"),
        ({"zero": torch.zeros(2, dtype=torch.int32)}, "zero: expected torch.int8"),
        ({"zero": torch.full((2,), 9, dtype=torch.int8)}, r"zero: expected values in \[-8, 7\]"),
        ({"bits": 3}, "bits: expected 4 or 8, got 3"),
        (
            {"mul": torch.full((2, 2), 40, dtype=torch.uint8), "codes": torch.full((2, 8), -8, dtype=torch.int8)},
            "int8|128",
        ),
        ({"mul": torch.ones(2, 2, dtype=torch.uint8), "scale": torch.ones(2, 2)}, "mul: expected none"),
    ],
)
def test_prepare_weight_refuses(arguments: dict[str, object], message: str) -> None:
    good = {"codes": torch.zeros(2, 8, dtype=torch.int8), "scale": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        prepare_weight(**{**good, **arguments})  # type: ignore[arg-type]


# Quantisers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_row_quant_error_is_half_a_step(bits: int, symmetric: bool) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 4, 50).unsqueeze(1) + 0.1
    rows = reference.row_quant(x, bits=bits, symmetric=symmetric)
    back = (rows.q - rows.zero.unsqueeze(1)) * rows.scale.unsqueeze(1)
    assert ((back - x).abs() <= rows.scale.unsqueeze(1) * 0.50001).all()
    assert torch.equal(rows.rowsum.long(), rows.q.long().sum(1))
    # No grid of this many bits that reaches as far has smaller steps.
    span = (
        2 * x.abs().amax(1) / (2**bits - 2)
        if symmetric
        else (x.amax(1).clamp(0) - x.amin(1).clamp(max=0)) / (2**bits - 1)
    )
    assert torch.allclose(rows.scale, span, rtol=1e-5)


def test_row_quant_by_hand() -> None:
    x = torch.tensor([[7.0, -3.5, 2.5, 0.4], [0.0, 0.0, 0.0, 0.0], [-14.0, 7.0, 1.0, -1.0]])
    rows = reference.row_quant(x)
    assert rows.q.tolist() == [
        [7, -4, 2, 0],
        [0, 0, 0, 0],
        [-7, 4, 0, 0],
    ]  # ties go to even: 2.5 -> 2, 3.5 -> 4, 0.5 -> 0
    assert rows.scale[[0, 2]].tolist() == [1.0, 2.0] and rows.scale[1].item() == pytest.approx(1e-8)
    asymmetric = reference.row_quant(torch.tensor([[0.0, 15.0, 7.4, 1.0], [-5.0, -15.0, -1.0, -2.0]]), symmetric=False)
    assert asymmetric.scale.tolist() == [1.0, 1.0] and asymmetric.zero.tolist() == [-8, 7]
    assert asymmetric.q.tolist() == [[-8, 7, -1, -7], [2, -8, 6, 5]]


def test_clip_saturates() -> None:
    rows = reference.row_quant(torch.tensor([[10.0, -10.0, 1.0]]), clip=0.5)
    assert rows.q.tolist() == [[7, -8, 1]]
    for symmetric in (True, False):
        assert reference.row_quant(torch.tensor([[1e30, -1.0]]), symmetric=symmetric, clip=0.1).q[0, 0] == 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_that_is_not_finite_stays_visible(bad: float, symmetric: bool) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = bad
    y = reference.linear_dyn(x, sample("channel", 4, 64, 1), act_symmetric=symmetric)
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize(
    "bits, clip, message", [(5, 1.0, "bits"), (4, 0.0, "clip"), (4, float("nan"), "clip"), (4, 1.5, "clip")]
)
def test_row_quant_refuses(bits: int, clip: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        reference.row_quant(torch.ones(1, 8), bits=bits, clip=clip)
