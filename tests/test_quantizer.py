"""Grids: codes in range, errors within half a step, stored scales, gradients, and the kernels' very integers."""

import pytest
import torch
from affinequant_kernels import reference

from affinequant.quantizer import (
    LearnedRange,
    codes_of,
    dequantize,
    fake_quantize,
    fake_quantize_activation,
    grid,
    quantize_activation,
    weight_range,
)
from affinequant.scheme import NumberFormat


def weights(symmetric: bool, group: int | None = None, bits: int = 4) -> NumberFormat:
    kind = "group" if group else "channel"
    return NumberFormat(bits=bits, symmetric=symmetric, granularity=kind, group_size=group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(symmetric: bool, group: int | None, bits: int) -> None:
    fmt, w = weights(symmetric, group, bits), torch.randn(6, 32)
    w[2] = 0
    w[3] = w[3].abs()
    scale, zero = grid(*weight_range(w, fmt), fmt, torch.bfloat16)
    codes = codes_of(w, scale, zero, fmt)
    assert scale.shape == (6, 32 // group if group else 1)
    assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(zero, zero.round())
    assert torch.equal(codes, codes.round())
    assert fmt.code_min <= codes.min() and codes.max() <= fmt.code_max
    error = (dequantize(codes, scale, zero, fmt) - w).abs().reshape(6, scale.shape[1], -1).amax(-1)
    assert bool((error <= scale * 0.51 + fmt.code_max * scale / 128).all())  # half a step, and the scale's own rounding
    assert torch.equal(dequantize(codes, scale, zero, fmt)[2], torch.zeros(32))
    assert torch.equal(fake_quantize(w, *weight_range(w, fmt), fmt, torch.bfloat16).round(decimals=5),
                       dequantize(codes, scale, zero, fmt).round(decimals=5))  # fmt: skip


def test_scales_in_float16_are_never_zero() -> None:
    fmt = weights(False)
    scale, zero = grid(*weight_range(torch.zeros(2, 8), fmt), fmt, torch.float16)
    assert bool((scale > 0).all()) and bool(zero.isfinite().all())


@pytest.mark.parametrize("clip", [1.0, 0.84])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_the_kernels_integers(symmetric: bool, bits: int, clip: float) -> None:
    x = torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]
    x[5], x[6], x[7] = 0, x[6].abs(), 1e4 * torch.eye(48)[0]
    fmt = NumberFormat(bits=bits, symmetric=symmetric, granularity="token", dynamic=True)
    codes, scale, zero = quantize_activation(x, fmt, clip)
    rows = reference.row_quant(x, bits=bits, symmetric=symmetric, clip=clip)
    assert torch.equal(codes.to(torch.int8), rows.q)
    assert torch.equal(scale[:, 0], rows.scale)
    assert torch.equal(zero[:, 0].int(), rows.zero)
    assert torch.equal(fake_quantize_activation(x, fmt, clip), (codes - zero) * scale)


def test_gradients_pass_straight_through_inside_and_stop_outside() -> None:
    fmt, x = weights(False), torch.tensor([[-0.4, 0.1, 0.7, 3.0]], requires_grad=True)
    low, high = torch.tensor([[-0.5]]), torch.tensor([[1.0]], requires_grad=True)
    fake_quantize(x, low, high, fmt).sum().backward()
    assert x.grad is not None and high.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert float(high.grad) > 0.9  # the value beyond the grid follows its end


def test_learned_ranges_start_at_98_per_cent() -> None:
    fmt, w = weights(False), torch.randn(4, 16)
    low, high = LearnedRange(4, 1)(w, fmt)
    full_low, full_high = weight_range(w, fmt)
    assert torch.allclose(high / full_high, torch.full((4, 1), 0.982), atol=1e-3)
    assert torch.allclose(low / full_low, torch.full((4, 1), 0.982), atol=1e-3)
