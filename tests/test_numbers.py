"""Integer grids: codes in range, scales that engines can store, activations as the kernels' reference has them."""

import pytest
import torch
from affinequant_kernels import reference
from torch import Tensor

from affinequant.numbers import Grid, grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import (
    LearnedRange,
    codes_of,
    dequantize,
    fake_quantize,
    grouped,
    to_integers,
    weight_range,
)
from affinequant.recipe.scheme import NumberFormat, Scheme

SCHEMES = ["w4a4", "w4a4-sym", "w4a16-g16", "w4a16-g32-sym", "w8a8", "w8a8-asym"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Rows of every sort: usual, one-sided, constant, all zero, tiny, huge, with an outlier."""
    base = random(8, 64)
    rows = torch.stack(
        [base[0], base[1].abs(), -base[2].abs(), torch.ones(64), torch.zeros(64), 1e-12 * base[5], 1e4 * base[6]]
    )
    return {"random": base, "odd rows": rows, "outlier": base + 50 * (torch.arange(64) == 3)}


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "odd rows", "outlier"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_in_range_and_scales_can_be_stored(scheme: str, kind: str, store: torch.dtype) -> None:
    grid, weight = grid_of(Scheme.parse(scheme).weight), weights()[kind]
    scale, zero = grid.params(*weight_range(weight, grid), store)
    assert scale.shape == zero.shape == (len(weight), grid.fmt.groups(64))
    assert torch.equal(scale.to(store).float(), scale) and bool((scale > 0).all())
    codes = codes_of(weight, scale, zero, grid)
    for whole in (codes, zero):
        assert torch.equal(whole, whole.round())
        assert bool(((whole >= grid.fmt.code_min) & (whole <= grid.fmt.code_max)).all())
    assert torch.equal(to_integers(codes).float(), codes) and to_integers(codes).dtype == torch.int8
    assert not grid.fmt.symmetric or not bool(zero.any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_half_a_step_at_most(scheme: str) -> None:
    grid, weight = grid_of(Scheme.parse(scheme).weight), weights()["random"]
    scale, zero = grid.params(*weight_range(weight, grid))
    value = dequantize(codes_of(weight, scale, zero, grid), scale, zero, grid)
    wrong = grouped(value - weight, grid).abs() / scale[..., None]
    # An asymmetric grid's zero is rounded too, which may push one end out by another half step.
    assert float(wrong.max()) <= (0.5 if grid.fmt.symmetric else 1.0) + 1e-5
    assert float(wrong.mean()) < 0.27


def test_grids_by_hand() -> None:
    asymmetric = grid_of(NumberFormat(bits=4, symmetric=False, granularity="channel"))
    symmetric = grid_of(NumberFormat(bits=4, symmetric=True, granularity="channel"))
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    low, high = weight_range(weight, asymmetric)
    assert (low.item(), high.item()) == (-1.0, 2.0)
    scale, zero = asymmetric.params(low, high)
    assert scale.item() == pytest.approx(0.2) and zero.item() == 5 - 8
    assert codes_of(weight, scale, zero, asymmetric).tolist() == [[-8.0, -3.0, -1.0, 7.0]]  # 2.5 rounds to even
    scale, zero = symmetric.params(*weight_range(weight, symmetric))
    assert scale.item() == pytest.approx(2 / 7) and zero.item() == 0
    assert weight_range(torch.tensor([[1.0, 2.0]]), asymmetric)[0].item() == 0  # zero is always inside


def test_each_group_has_its_own_grid() -> None:
    grid = grid_of(Scheme.parse("w4a16-g8").weight)
    weight = torch.cat([torch.full((1, 8), 0.01), torch.full((1, 8), 5.0)], 1)
    scale, zero = grid.params(*weight_range(weight, grid))
    value = dequantize(codes_of(weight, scale, zero, grid), scale, zero, grid)
    torch.testing.assert_close(value, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_and_committing_round_alike(scheme: str) -> None:
    grid, weight = grid_of(Scheme.parse(scheme).weight), random(64, 64)
    low, high = weight_range(weight, grid)
    scale, zero = grid.params(low, high, torch.bfloat16)
    committed = dequantize(codes_of(weight, scale, zero, grid), scale, zero, grid)
    trained = fake_quantize(weight, low, high, grid, torch.bfloat16)
    steps = ((trained - committed) / scale.repeat_interleave(64 // scale.shape[1], 1)).abs()
    # A product with the reciprocal may fall on the other side of a tie: one step, hardly ever.
    assert float((steps > 1e-3).float().mean()) < 1e-3 and float(steps.max()) < 1.001


def token_codes(x: Tensor, grid: Grid, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) of each token."""
    low, high = grid.range(x)
    scale, zero = grid.params(low * clip, high * clip)
    return grid.nearest(x, scale, zero), scale, zero


ROWS = {
    "random": random(32, 96),
    "outlier": random(32, 96, seed=1) * torch.where(torch.arange(96) == 5, 100.0, 1.0),
    "positive": random(8, 96, seed=2).abs(),
    "negative": -random(8, 96, seed=3).abs(),
    "zero": torch.zeros(2, 96),
    "tiny": 1e-9 * random(4, 96, seed=4),
    "huge": 1e30 * random(4, 96, seed=5),
    "ties": (torch.arange(96) % 15 - 7).float().expand(2, 96),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("clip", [1.0, 0.96, 0.6, 1 / 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_equal_the_kernels_reference_bit_for_bit(
    bits: int, symmetric: bool, clip: float, rows: str
) -> None:
    grid = grid_of(NumberFormat(bits=bits, symmetric=symmetric, granularity="token", dynamic=True))
    x = ROWS[rows]
    expected = reference.row_quant(x, bits=bits, symmetric=symmetric, clip=clip)
    codes, scale, zero = token_codes(x, grid, clip)
    assert torch.equal(codes, expected.q.float())
    assert torch.equal(scale[:, 0], expected.scale)
    assert torch.equal(zero[:, 0], expected.zero.float())
    value = (expected.q.float() - expected.zero.float()[:, None]) * expected.scale[:, None]
    assert torch.equal(fake_quantize_activation(x, grid, clip), value)
    assert torch.equal(fake_quantize_activation(x, grid, torch.tensor(clip)), value)


def test_activations_keep_their_type_and_tokens_their_own_grid() -> None:
    grid = grid_of(NumberFormat(bits=4, symmetric=False, granularity="token", dynamic=True))
    x = random(2, 3, 16)
    alone = torch.stack([fake_quantize_activation(row, grid) for row in x.reshape(6, 16)]).reshape(2, 3, 16)
    assert torch.equal(fake_quantize_activation(x, grid), alone)
    assert fake_quantize_activation(x.bfloat16(), grid).dtype == torch.bfloat16


def test_gradients_pass_straight_through_inside_and_stop_outside() -> None:
    grid = grid_of(NumberFormat(bits=4, symmetric=True, granularity="token", dynamic=True))
    x = torch.tensor([[0.1, -0.4, 0.35, 2.0]], requires_grad=True)
    clip = torch.tensor(0.25, requires_grad=True)
    value = fake_quantize_activation(x, grid, clip)
    value.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    # Only the value that is cut off moves with the clip as a whole: 7 codes of scale 2 * clip / 7.
    rounded_off = float(((value - x).detach() / (0.5 / 7))[0, :3].sum())
    assert clip.grad is not None and float(clip.grad) == pytest.approx(2.0 + 2 / 7 * rounded_off, rel=1e-4)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-sym", "w4a16-g16"])
def test_weights_and_ranges_both_learn(scheme: str) -> None:
    grid = grid_of(Scheme.parse(scheme).weight)
    weight = random(6, 64).requires_grad_()
    ranges = LearnedRange(6, grid.fmt.groups(64))
    target = random(6, 64, seed=9)
    loss = (fake_quantize(weight, *ranges(weight, grid), grid, torch.bfloat16) - target).square().sum()
    loss.backward()
    for gradient in (weight.grad, ranges.low_logit.grad, ranges.high_logit.grad):
        assert gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def test_learned_ranges_start_at_sigmoid_four() -> None:
    grid, weight = grid_of(Scheme.parse("w4a4").weight), random(5, 64)
    low, high = weight_range(weight, grid)
    ranges = LearnedRange(5, 1)
    assert [p.detach().unique().tolist() for p in ranges.parameters()] == [[4.0], [4.0]]
    learned_low, learned_high = ranges(weight, grid)
    torch.testing.assert_close(learned_low, low * 0.9820138, rtol=1e-6, atol=0)
    torch.testing.assert_close(learned_high, high * 0.9820138, rtol=1e-6, atol=0)


def test_learning_a_range_finds_a_better_one() -> None:
    """With one outlier that hardly matters, narrowing pays; the logits must find that by their gradients alone."""
    grid = grid_of(Scheme.parse("w4a4").weight)
    weight = random(4, 256)
    weight[:, 7] = 8.0
    importance = torch.ones(256)
    importance[7] = 1e-4
    ranges = LearnedRange(4, 1)
    optimizer = torch.optim.AdamW(ranges.parameters(), lr=0.05, weight_decay=0.0)

    def error() -> Tensor:
        return ((fake_quantize(weight, *ranges(weight, grid), grid) - weight).square() * importance).sum()

    first = float(error().detach())
    for _ in range(80):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error().detach()) < 0.5 * first
    assert float(ranges.high_logit.detach().max()) < float(ranges.low_logit.detach().min())


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-sym"])
def test_a_gradient_through_the_extremes_is_that_of_the_grid(scheme: str) -> None:
    """Codes held fixed, the largest value stretches the grid: each value moves by its code's share of that, less what
    the straight-through value moves already."""
    fmt = Scheme.parse(scheme).activation
    assert fmt is not None
    grid = grid_of(fmt)
    x, weighing = random(1, 32), random(1, 32, seed=1)
    x[0, 3] = 4.0
    gradients = []
    for through in (False, True):
        value = x.clone().requires_grad_()
        (fake_quantize_activation(value, grid, through=through) * weighing).sum().backward()
        assert value.grad is not None
        gradients.append(value.grad)
    codes, scale, zero = token_codes(x, grid)
    share = ((codes - zero) * weighing - x / scale * weighing).sum() / (fmt.code_max if fmt.symmetric else 15)
    difference = gradients[1] - gradients[0]
    assert float(difference[0, 3]) == pytest.approx(float(share), rel=1e-4)
    low = int(x.argmin())
    moved = [index for index in range(32) if abs(float(difference[0, index])) > 1e-6]
    assert moved == sorted([3] if fmt.symmetric else [3, low])
