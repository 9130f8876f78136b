"""cpu/ equals reference.py bit for bit, on every engine; its cache follows the weights."""

from __future__ import annotations

import pytest
import torch
from affinequant_kernels import prepare_weight, reference
from affinequant_kernels.cpu import engines, layer, native, quant
from affinequant_kernels.weight import Weight

ENGINES = ["compiled", *engines.CANDIDATES]
SHAPES = [(1, 96), (3, 4128), (17, 1024), (600, 96)]
KINDS = [("channel", 4), ("integer", 4), ("group", 4), ("channel", 8), ("group", 8)]
IN_GROUPS = [("channel, rows in groups", 4), ("group, rows in groups", 4), ("channel, rows in groups", 8)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.clear_cache()
    if request.param == "compiled":  # whole layers, where it serves them
        if native.available():
            pytest.skip(f"no compiled code: {native.available()}")
        monkeypatch.setattr(layer, "_at_once", lambda *_: True)
        return request.param
    if request.param != "native":
        monkeypatch.setattr(native, "available", lambda: "another engine is tested")
    wrong = {
        largest: next(filter(None, (engines.inexact_in(request.param, rows, width) for rows in engines.ROWS)), None)
        for width, largest in engines.RANGES.items()
    }
    if wrong[15]:
        pytest.skip(f"{request.param} on this machine: {wrong[15]}")
    exact = [largest for largest, problem in wrong.items() if not problem]

    def choose(m: int, largest: int, integers: bool) -> str:
        possible = largest <= max(exact) and not (integers and engines.CANDIDATES[request.param].rounds)
        return request.param if possible else engines.ALWAYS

    monkeypatch.setattr(engines, "choose", choose)
    monkeypatch.setattr(layer, "_at_once", lambda *_: False)  # the product of `native` alone
    return request.param


def sample(kind: str, bits: int, with_zero: bool, n: int, k: int) -> Weight:
    generator = torch.Generator().manual_seed(k + bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups, (kind, *in_groups) = k // 32, kind.split(", ")
    codes = torch.randint(low, high, (n, k), dtype=torch.int8, generator=generator)
    codes[0], codes[1] = low, high - 1
    scale = torch.rand(n, groups if kind == "group" else 1, generator=generator) * 0.01 + 1e-3
    zero = torch.randint(low, high, (n, 1 if kind == "channel" else groups), dtype=torch.int8, generator=generator)
    if kind == "group" and bits == 8:
        zero = zero.zero_()  # more would not fit int8
    mul = torch.randint(1, 9, (n, groups), dtype=torch.uint8, generator=generator) if kind == "integer" else None
    act_group = 32 if in_groups else 0
    return prepare_weight(codes, scale, zero if with_zero else None, bits=bits, mul=mul, act_group=act_group)


def rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 3 + 0.3
    if m > 2:
        x[0], x[1], x[2, 3] = 0.0, -5.0, 1e4  # a zero row, a constant row, a huge outlier
    return x.to(dtype)


@pytest.mark.parametrize("kind, bits", KINDS)
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_dyn_equals_reference(
    engine: str, kind: str, bits: int, with_zero: bool, act_bits: int, symmetric: bool
) -> None:
    for m, k in SHAPES:
        weight = sample(kind, bits, with_zero, 40, k)
        bias = torch.randn(40, generator=torch.Generator().manual_seed(9))
        types = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]
        if kind != "group":
            types.append((torch.bfloat16, torch.int32))
        for dtype, out_dtype in types:
            x = rows(m, k, dtype)
            settings = {"act_bits": act_bits, "act_symmetric": symmetric, "clip": 0.9, "out_dtype": out_dtype}
            for b in (None, bias):
                got = layer.linear_dyn(x, weight, b, **settings)
                wanted = reference.linear_dyn(x, weight, b, **settings)
                assert got.dtype == out_dtype and torch.equal(got, wanted), (m, k, dtype, out_dtype)


@pytest.mark.parametrize("kind, bits", IN_GROUPS)
@pytest.mark.parametrize("act_bits, symmetric", [(4, False), (8, True)])
def test_rows_in_groups_equal_reference(engine: str, kind: str, bits: int, act_bits: int, symmetric: bool) -> None:
    for m, k in ((1, 96), (17, 1024), (600, 96)):
        bias = torch.randn(40, generator=torch.Generator().manual_seed(9)) if m > 1 else None
        for with_zero, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            x, weight = rows(m, k, dtype), sample(kind, bits, with_zero, 40, k)
            if m > 2:
                x[1, 40] = torch.nan
            settings = {"act_bits": act_bits, "act_symmetric": symmetric, "clip": 0.9, "out_dtype": dtype}
            got = layer.linear_dyn(x, weight, bias, **settings)
            wanted = reference.linear_dyn(x, weight, bias, **settings)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
            assert bool(got[1:2].isnan().all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k", [(0, 64), (1, 1), (5, 127), (70, 4096), (3, 300_000)])
def test_row_quant_equals_reference(bits: int, symmetric: bool, dtype: torch.dtype, m: int, k: int) -> None:
    x = rows(m, max(k, 4), dtype)[:, :k].contiguous()
    for clip, group in ((1.0, 0), (0.73, 0), (0.01, 0), (0.9, 32 if k % 32 == 0 else 1)):
        got = quant.row_quant(x, bits=bits, symmetric=symmetric, clip=clip, group=group)
        wanted = reference.row_quant(x, bits=bits, symmetric=symmetric, clip=clip, group=group)
        for name, have, want in zip(got._fields, got, wanted, strict=True):
            assert torch.equal(have, want), (name, clip)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_that_is_not_finite_stays_visible(engine: str, bad: float, symmetric: bool) -> None:
    x = torch.ones(3, 96)
    x[1, 5] = bad
    y = layer.linear_dyn(
        x,
        sample("channel", 4, True, 8, 96),
        None,
        act_bits=4,
        act_symmetric=symmetric,
        clip=1.0,
        out_dtype=torch.float32,
    )
    assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).any()


def product(weight: Weight) -> torch.Tensor:
    q = torch.ones(2, 96, dtype=torch.int8)
    return layer.linear(q, torch.ones(2), None, weight, None, torch.float32)


def test_the_cache_sees_updates_in_place(engine: str) -> None:
    weight = sample("channel", 4, True, 40, 96)
    product(weight)
    other = sample("channel", 4, True, 40, 96)
    for target, source in zip(
        weight, (other.qweight.flip(0), other.scale, other.zero, None, other.colsum), strict=True
    ):
        if target is not None and source is not None:
            target.copy_(source)
    q = torch.ones(2, 96, dtype=torch.int8)
    assert torch.equal(product(weight), reference.linear(q, torch.ones(2), None, weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cache_lets_go_of_dead_weights(engine: str, bits: int) -> None:
    for _ in range(5):
        product(sample("channel", bits, False, 40, 96))
    assert len(layer._MADE) <= 1  # a view of the weight itself is not kept at all
    layer.clear_cache()
    assert not layer._MADE


def test_weights_made_in_inference_mode(engine: str) -> None:
    with torch.inference_mode():
        weight = sample("channel", 4, False, 40, 96)
        q = torch.ones(2, 96, dtype=torch.int8)
        assert torch.equal(product(weight), reference.linear(q, torch.ones(2), None, weight))


def test_views_of_one_storage_are_different_weights(engine: str) -> None:
    both = sample("channel", 4, False, 80, 96)
    for part in (Weight(*(None if t is None else t[s] for t in both)) for s in (slice(0, 40), slice(40, 80))):
        q = torch.ones(2, 96, dtype=torch.int8)
        assert torch.equal(product(part), reference.linear(q, torch.ones(2), None, part))


def test_sums_that_fp32_does_not_hold_are_kept_whole() -> None:
    zero = torch.ones(1, dtype=torch.int32)
    four, eight = (sample("channel", bits, False, 8, 1024) for bits in (4, 8))
    for k, act_bits, weight, whole in (
        (1 << 16, 4, four, False),
        (1 << 17, 4, four, True),
        (256, 8, eight, False),
        (512, 8, eight, True),
        (256, 8, sample("channel", 8, True, 8, 1024), True),
        # A group is summed by itself, and only its fp32 goes on.
        (1 << 17, 4, sample("group", 4, True, 8, 1 << 17), False),
    ):
        using, kept = layer._engine_for(3, k, zero, weight, torch.float32, act_bits)
        assert kept == whole and not (whole and engines.CANDIDATES[using].rounds)
    assert not layer._engine_for(3, 1 << 17, None, four, torch.float32, 4)[1]
    assert layer._engine_for(3, 1 << 17, None, four, torch.int32, 4)[1]
