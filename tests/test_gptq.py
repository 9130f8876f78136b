"""Rounding with second-order information, and ranges found by search."""

import pytest
import torch
from torch import Tensor

from affinequant.numbers import Grid, grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import codes_of, dequantize, weight_range
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.rounding.gptq import (
    GPTQFailure,
    _panels,
    _quadratic,
    follow_target,
    gptq,
    refine,
    search_activation_clip,
    search_weight_range,
)
from affinequant.transforms.site_input import SiteInput

SCHEMES = ["w4a4", "w4a4-sym", "w4a16-g16", "w8a8"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Inputs [tokens, width] whose features share a few directions."""
    return random(tokens, 6, seed=seed) @ random(6, width, seed=seed + 1) + 0.2 * random(tokens, width, seed=seed + 2)


def rounded(weight: Tensor, hessian: Tensor, scheme: str, **options: float) -> tuple[Tensor, Tensor]:
    """(GPTQ's values, round-to-nearest's values) on the same grid."""
    grid = grid_of(Scheme.parse(scheme).weight)
    scale, zero = grid.params(*weight_range(weight, grid), torch.bfloat16)
    codes = gptq(weight, hessian, scale, zero, grid, **{"damping": 0.01} | options)  # pyright: ignore[reportArgumentType]
    assert torch.equal(codes, codes.round()) and grid.fmt.code_min <= codes.min() and codes.max() <= grid.fmt.code_max
    nearest = codes_of(weight, scale, zero, grid)
    return dequantize(codes, scale, zero, grid), dequantize(nearest, scale, zero, grid)


def output_error(x: Tensor, weight: Tensor, value: Tensor) -> float:
    return float((x @ (weight - value).mT).square().sum() / (x @ weight.mT).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", [128, 7])
def test_it_beats_rounding_to_nearest_on_correlated_inputs(scheme: str, block: int) -> None:
    weight, x = random(24, 64), correlated(64)
    value, nearest = rounded(weight, x.mT @ x / len(x), scheme, block=block)
    assert output_error(x, weight, value) < 0.5 * output_error(x, weight, nearest)
    unseen = correlated(64, seed=1)[:100] + 0.1 * random(100, 64, seed=9)
    assert output_error(unseen, weight, value) < output_error(unseen, weight, nearest)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_rounding_to_nearest_where_inputs_are_independent(scheme: str) -> None:
    diagonal = torch.diag(random(64).abs() + 0.1)
    value, nearest = rounded(random(24, 64), diagonal, scheme)
    assert torch.equal(value, nearest)


def test_the_block_of_columns_at_a_time_changes_nothing_but_roundings() -> None:
    weight, x = random(16, 48), correlated(48)
    hessian = x.mT @ x / len(x)
    once, _ = rounded(weight.double(), hessian.double(), "w4a4", block=48)
    parts, _ = rounded(weight.double(), hessian.double(), "w4a4", block=5)
    assert torch.equal(once, parts)


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8"])
def test_the_order_of_the_inputs_does_not_matter(scheme: str) -> None:
    """Columns are taken by importance, wherever they stand."""
    weight, x = random(16, 40).double(), correlated(40).double()
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    plain, _ = rounded(weight, x.mT @ x, scheme)
    moved, _ = rounded(weight[:, shuffle], x[:, shuffle].mT @ x[:, shuffle], scheme)
    assert torch.equal(moved, plain[:, shuffle])


def test_a_group_keeps_its_grid_whatever_the_order() -> None:
    """The most important column lies in the last group; each value is on the grid of its own group."""
    grid = grid_of(Scheme.parse("w4a16-g8").weight)
    weight, x = random(4, 32), correlated(32) * torch.linspace(0.5, 4, 32)
    scale, zero = grid.params(*weight_range(weight * torch.linspace(0.1, 3, 32), grid))
    codes = gptq(weight, x.mT @ x, scale, zero, grid, damping=0.01)
    value = dequantize(codes, scale, zero, grid)
    steps = value.reshape(4, 4, 8) / scale[..., None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


SINGULAR = {
    "rank one": torch.outer(torch.ones(32), torch.ones(32)),
    "fewer tokens than inputs": correlated(32, tokens=5).mT @ correlated(32, tokens=5),
    "a dead input": torch.diag((torch.arange(32) != 4).float()),
    "tiny": 1e-20 * torch.eye(32),
    "huge": 1e20 * (torch.eye(32) + 1),
}


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_hessians_are_damped(kind: str, damping: float) -> None:
    value, _ = rounded(random(8, 32), SINGULAR[kind], "w4a4", damping=damping)
    assert bool(value.isfinite().all())


@pytest.mark.parametrize("hessian", [torch.full((16, 16), torch.nan), -torch.eye(16) * 1e30, torch.zeros(16, 16)])
def test_what_no_damping_mends_is_said(hessian: Tensor) -> None:
    grid = grid_of(Scheme.parse("w4a4").weight)
    weight = random(4, 16)
    scale, zero = grid.params(*weight_range(weight, grid))
    try:
        codes = gptq(weight, hessian, scale, zero, grid, damping=0.01)
    except GPTQFailure as failure:
        assert "not positive definite" in str(failure)
    else:  # nothing to know is nothing to correct
        assert not bool(hessian.any()) and torch.equal(codes, codes_of(weight, scale, zero, grid))


def damped_error(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """e H e^T per row, at a damping of 0.01."""
    wrong = (dequantize(codes, scale, zero, grid) - weight).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return ((wrong @ damped) * wrong).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", [128, 7])
def test_descent_ends_where_no_code_alone_can_be_bettered(scheme: str, block: int) -> None:
    grid, weight, x = grid_of(Scheme.parse(scheme).weight), random(12, 32), correlated(32)
    hessian = x.mT @ x / len(x)
    low, high = (0.8 * end for end in weight_range(weight, grid))
    scale, zero = grid.params(low, high, torch.bfloat16)
    codes = gptq(weight, hessian, scale, zero, grid, damping=0.01)
    errors = [damped_error(weight, codes, hessian, scale, zero, grid)]
    for sweeps in (1, 2, 40):
        found = refine(codes, weight, hessian, scale, zero, grid, damping=0.01, sweeps=sweeps, block=block)
        assert (
            torch.equal(found, found.round()) and grid.fmt.code_min <= found.min() and found.max() <= grid.fmt.code_max
        )
        errors.append(damped_error(weight, found, hessian, scale, zero, grid))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-6)).all())
    assert float(errors[-1].sum()) < 0.99 * float(errors[0].sum())
    for column in range(weight.shape[1]):
        for step in (-1, 1):
            other = found.clone()
            other[:, column] = (other[:, column] + step).clamp(grid.fmt.code_min, grid.fmt.code_max)
            assert bool((damped_error(weight, other, hessian, scale, zero, grid) >= errors[-1] * (1 - 1e-5)).all())


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_descent_leaves_alone_what_nothing_decides(kind: str, damping: float) -> None:
    grid, weight = grid_of(Scheme.parse("w4a4").weight), random(8, 32)
    scale, zero = grid.params(*weight_range(weight, grid))
    codes = codes_of(weight, scale, zero, grid)
    found = refine(codes, weight, SINGULAR[kind], scale, zero, grid, damping=damping, sweeps=3)
    assert bool(found.isfinite().all())
    assert torch.equal(refine(codes, weight, SINGULAR[kind], scale, zero, grid, damping=damping, sweeps=0), codes)


def searched_error(weight: Tensor, hessian: Tensor, grid: Grid, low: Tensor, high: Tensor) -> Tensor:
    """e H_g e^T of each group, by a loop."""
    scale, zero = grid.params(low, high, torch.bfloat16)
    wrong = dequantize(codes_of(weight, scale, zero, grid), scale, zero, grid) - weight
    width = weight.shape[1] // grid.fmt.groups(weight.shape[1])
    parts = []
    for start in range(0, weight.shape[1], width):
        part = wrong[:, start : start + width]
        parts.append((part @ hessian[start : start + width, start : start + width] * part).sum(-1))
    return torch.stack(parts, 1)


@pytest.mark.parametrize("kind", ["normal", "outlier", "zero rows", "one-sided"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_searched_range_is_never_worse_than_the_whole(scheme: str, kind: str) -> None:
    grid, weight, x = grid_of(Scheme.parse(scheme).weight), random(12, 64), correlated(64)
    if kind == "outlier":
        weight[:, 9] *= 12
    if kind == "zero rows":
        weight[::2] = 0
    if kind == "one-sided":
        weight = weight.abs()
    hessian = x.mT @ x / len(x)
    low, high = search_weight_range(weight, hessian, grid, torch.bfloat16)
    whole = searched_error(weight, hessian, grid, *weight_range(weight, grid))
    found = searched_error(weight, hessian, grid, low, high)
    assert bool((found <= whole * (1 + 1e-4)).all())
    assert low.shape == high.shape == (12, grid.fmt.groups(64))
    if kind == "outlier" and grid.fmt.bits == 4:
        assert float(found.sum()) < 0.9 * float(whole.sum())


def test_a_range_is_judged_by_the_inputs_that_occur() -> None:
    """The outlier's input never fires: the range forgets it. It always fires: the range keeps it."""
    grid, weight = grid_of(Scheme.parse("w4a4").weight), random(6, 32)
    weight[:, 3] = 20.0
    silent, loud = torch.ones(32), torch.ones(32)
    silent[3], loud[3] = 0.0, 1e4
    assert float(search_weight_range(weight, torch.diag(silent), grid, torch.float32)[1].max()) < 15
    assert float(search_weight_range(weight, torch.diag(loud), grid, torch.float32)[1].min()) > 19


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [8, 200])
def test_a_searched_activation_clip_is_never_worse_than_none(rows: int, symmetric: bool) -> None:
    grid = grid_of(NumberFormat(bits=4, symmetric=symmetric, granularity="token", dynamic=True))
    x, weight = random(50, 64), random(rows, 64, seed=3)
    x[:, 5] *= 10
    weight[:, 5] *= 0.01  # the outlier hardly counts

    def error(clip: float) -> float:
        wrong = (fake_quantize_activation(x, grid, clip) - x) @ weight.mT
        return float((wrong.square().sum(-1) / (x @ weight.mT).square().sum(-1)).mean())

    clip = search_activation_clip(x, weight, SiteInput(grid=grid))
    assert 0.5 < clip < 1
    assert error(clip) < error(1.0)
    assert search_activation_clip(torch.zeros(4, 64), weight, SiteInput(grid=grid)) == 1.0


def test_following_a_target_is_least_squares() -> None:
    """With no damping to speak of, the weights that make of x what the old ones make of t; with much, the old ones."""
    x, weight = random(300, 24).double(), random(8, 24).double()
    target = x @ (torch.eye(24) + 0.1 * random(24, 24, seed=2)).double() + 0.1 * random(300, 24, seed=3).double()
    hessian, drift = x.mT @ x / 300, (target - x).mT @ x / 300
    found = follow_target(weight, hessian, drift, damping=0.0)
    torch.testing.assert_close(found.mT, torch.linalg.lstsq(x, target @ weight.mT).solution, rtol=1e-5, atol=1e-6)
    assert float((follow_target(weight, hessian, drift, damping=1e6) - weight).abs().max()) < 1e-5


@pytest.mark.parametrize("width", [5, 192, 500])
def test_a_symmetric_form_in_panels(width: int) -> None:
    rows, half = random(3, 4, width).double(), random(3, width, width).double()
    matrix = half @ half.mT
    torch.testing.assert_close(_quadratic(rows, _panels(matrix)), ((rows @ matrix) * rows).sum(-1))
