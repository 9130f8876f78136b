"""GPTQ and the searches: better than plain rounding where they can be, equal where they cannot, never worse."""

import pytest
import torch
from torch import Tensor

from affinequant.gptq import GPTQFailure, gptq, search_activation_clip, search_weight_range
from affinequant.quantizer import codes_of, dequantize, fake_quantize, fake_quantize_activation, grid, weight_range
from affinequant.scheme import NumberFormat

CHANNEL = NumberFormat(bits=4, symmetric=False, granularity="channel")
GROUP = NumberFormat(bits=4, symmetric=False, granularity="group", group_size=16)
TOKEN = NumberFormat(bits=4, symmetric=False, granularity="token", dynamic=True)


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [24, 64] and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    x += 0.1 * torch.randn(512, 64, generator=generator)
    return torch.randn(24, 64, generator=generator), x.mT @ x / 512


def output_error(wrong: Tensor, hessian: Tensor) -> float:
    return float(torch.einsum("ri,ij,rj->", wrong, hessian, wrong))


@pytest.mark.parametrize("fmt", [CHANNEL, GROUP], ids=["channel", "group"])
def test_it_beats_rounding_to_nearest(fmt: NumberFormat) -> None:
    weight, hessian = problem()
    scale, zero = grid(*weight_range(weight, fmt), fmt)
    codes = gptq(weight, hessian, scale, zero, fmt, damping=0.01, block=16)
    assert torch.equal(codes, codes.round()) and codes.min() >= -8 and codes.max() <= 7
    ours = output_error(dequantize(codes, scale, zero, fmt) - weight, hessian)
    nearest = output_error(dequantize(codes_of(weight, scale, zero, fmt), scale, zero, fmt) - weight, hessian)
    assert ours < 0.6 * nearest


def test_blocks_do_not_change_it_and_independent_inputs_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    scale, zero = grid(*weight_range(weight, CHANNEL), CHANNEL)
    small, large = (
        gptq(weight, hessian.double().float(), scale, zero, CHANNEL, damping=0.01, block=b) for b in (8, 64)
    )
    assert float((small != large).float().mean()) < 0.02  # sums in another order may turn a tie
    diagonal = torch.diag(torch.linspace(1, 5, 64))
    assert torch.equal(
        gptq(weight, diagonal, scale, zero, CHANNEL, damping=0.01), codes_of(weight, scale, zero, CHANNEL)
    )


def test_a_singular_hessian_is_damped_and_a_broken_one_refused() -> None:
    weight, _ = problem()
    scale, zero = grid(*weight_range(weight, CHANNEL), CHANNEL)
    rank_one = torch.ones(64, 64)
    assert bool(gptq(weight, rank_one, scale, zero, CHANNEL, damping=0.0).isfinite().all())
    with pytest.raises(GPTQFailure):
        gptq(weight, torch.full((64, 64), torch.nan), scale, zero, CHANNEL, damping=0.01)


@pytest.mark.parametrize("fmt", [CHANNEL, GROUP], ids=["channel", "group"])
def test_a_searched_range_is_never_worse_by_its_own_measure(fmt: NumberFormat) -> None:
    weight, hessian = problem(1)
    weight[0, 0] = 9.0
    if fmt is GROUP:  # a group is judged by its own block of the Hessian
        hessian = torch.block_diag(*(hessian[i : i + 16, i : i + 16] for i in range(0, 64, 16)))
    full = fake_quantize(weight, *weight_range(weight, fmt), fmt) - weight
    found = fake_quantize(weight, *search_weight_range(weight, hessian, fmt, torch.float32), fmt) - weight
    rows_full = torch.einsum("ri,ij,rj->r", full, hessian, full)
    rows_found = torch.einsum("ri,ij,rj->r", found, hessian, found)
    assert bool((rows_found <= rows_full * (1 + 1e-5)).all())
    assert float(rows_found.sum()) < 0.9 * float(rows_full.sum())


def test_a_searched_activation_clip_lowers_the_output_error() -> None:
    x, weight = torch.randn(256, 64), torch.randn(32, 64)
    ratio = search_activation_clip(x, weight, TOKEN)
    assert 0.6 <= ratio < 1.0

    def error(clip: float) -> float:
        wrong = (fake_quantize_activation(x, TOKEN, clip) - x) @ weight.mT
        return float((wrong.square().sum(-1) / (x @ weight.mT).square().sum(-1)).mean())

    assert error(ratio) < error(1.0)
