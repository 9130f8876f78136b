"""What the linears of a site read, and that the integer linear of the run time reads the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import dequantize
from affinequant.recipe.scheme import Scheme
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.transforms.online import acting, apply_online, in_order
from affinequant.transforms.site_input import SiteInput


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: sums of their products are exact in whatever order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


KRONECKER = {"left": whole(4, 4, seed=1), "right": whole(8, 8, seed=2)}
ONLINE = {"nothing": {}, "kronecker": KRONECKER, "blocks": {"blocks": whole(1, 32, 32, seed=3)}}


def test_it_transforms_and_then_rounds() -> None:
    x, grid = random(5, 32), grid_of(Scheme.parse("w4a4").activation)  # pyright: ignore[reportArgumentType]
    both = SiteInput(online=acting(KRONECKER), grid=grid, clip=0.9, slices=2)
    turned = apply_online(x, KRONECKER)
    assert torch.equal(both.transformed(x), turned)
    assert torch.equal(both.rounded(x), fake_quantize_activation(x, grid, 0.9, 2))
    assert torch.equal(both(x), fake_quantize_activation(turned, grid, 0.9, 2))
    assert not torch.equal(both(x), replace(both, slices=1)(x)) and not torch.equal(both(x), replace(both, clip=1.0)(x))
    assert torch.equal(replace(both, grid=None)(x), turned) and SiteInput()(x) is x and acting({}) is None


def test_each_group_of_a_token_has_a_grid_of_its_own() -> None:
    """Within slices too, and learned through its extremes: as if a group were a token."""
    plain, grouped = (Scheme.parse(name).activation for name in ("w4a4", "w4a4-g8-ag8"))
    assert plain and grouped
    x, width = random(2, 5, 32).requires_grad_(), 8
    by_hand = SiteInput(grid=grid_of(plain), clip=0.9).rounded(x.unflatten(-1, (-1, width)), through=True).flatten(-2)
    (wanted,) = torch.autograd.grad(by_hand.square().sum(), x)
    for slices in (1, 2):
        site = SiteInput(grid=grid_of(grouped), clip=0.9, slices=slices)
        assert torch.equal(site(x), by_hand)
        (grad,) = torch.autograd.grad(site.rounded(x, through=True).square().sum(), x)
        assert torch.equal(grad, wanted)
    assert not torch.equal(by_hand, SiteInput(grid=grid_of(plain), clip=0.9)(x))
    with pytest.raises(ValueError, match="no 8 slices in groups of 8"):
        SiteInput(grid=grid_of(grouped), slices=8)(x)


def test_it_learns_with_all_that_acts() -> None:
    grid = grid_of(Scheme.parse("w4a4").activation)  # pyright: ignore[reportArgumentType]
    x, turn, clip = random(5, 32).requires_grad_(), random(32, 32, seed=4).requires_grad_(), torch.tensor(0.8)
    there = SiteInput(online=lambda x: x @ turn, grid=grid, clip=clip.requires_grad_())
    there(x).square().sum().backward()
    assert all(part.grad is not None and bool(part.grad.any()) for part in (x, turn, clip))
    through = [torch.autograd.grad(there.rounded(x, through=way).square().sum(), x)[0] for way in (False, True)]
    assert not torch.equal(*through)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("online", ONLINE)
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8-sym", "w8a8", "w4a4-ag16", "w4a8-g16-ag16-sym"])
def test_the_run_time_reads_the_same(scheme: str, online: str, slices: int) -> None:
    """The integer linear's product is that of the rounded input with the weights that its integers stand for."""
    parsed, matrices, width = Scheme.parse(scheme), ONLINE[online], 32 * slices
    assert parsed.activation is not None
    limits = (parsed.weight.code_min, parsed.weight.code_max + 1)
    codes = torch.randint(*limits, (16, width), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    scale = random(16, parsed.weight.groups(width), seed=6).abs() + 0.1
    zero = None if parsed.weight.symmetric else torch.ones_like(scale).char()
    settings = {"bits": parsed.weight.bits, "activation": parsed.activation, "clip": 0.9, "slices": slices}
    linear = IntegerLinear(codes, scale, zero, None, matrices=in_order(matrices) if matrices else [], **settings)

    def act(x: Tensor) -> Tensor:  # a Kronecker product, or one block, serves every slice
        return apply_online(x.unflatten(-1, (slices, -1)), matrices).flatten(-2)

    reads = SiteInput(online=act if matrices else None, grid=grid_of(parsed.activation), clip=0.9, slices=slices)
    x, zeros = whole(7, width, seed=7), torch.zeros_like(scale) if zero is None else zero.float()
    expected = reads(x).double() @ dequantize(codes, scale, zeros, grid_of(parsed.weight)).double().mT
    assert float((linear(x) - expected).norm() / expected.norm()) < 1e-5
