"""Every registered transform: an invertible map in both of its forms, with gradients; and the gradual mask's promises."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.models.sites import SHARED, Edge, Kind, Site, place
from affinequant.transforms import LEARNED_ROTATIONS, SHIFT, TRANSFORMS, build, structures_of
from affinequant.transforms.banded import Banded
from affinequant.transforms.svd import LIMIT

SIZES = [(1, 10), (2, 18), (3, 8)]
OF_HEADS = [name for name in TRANSFORMS if name not in (SHIFT, *SHARED)]
EVERY = [*OF_HEADS, "hadamard+banded"]
MIXING = ["kronecker"]
"""Those that mix heads: between v and o they act on the query heads that o reads."""
ROWS = ["dense"]
"""Those that have no use for heads: tested on the whole row."""


def site(heads: int, head_width: int, copies: int = 1, kind: Kind = "heads") -> Site:
    source, sink = Edge(module="m", side="rows"), Edge(module="n", side="columns", copies=copies)
    return Site(name="s", kind=kind, width=heads * head_width, heads=heads, sources=(source,), sinks=(sink,))


def made(
    name: str, heads: int, width: int, *, copies: int = 1, noise: float = 0.5, alpha: float = 1.0, start: Any = None
) -> Any:
    """A transform in fp64 with random parameters."""
    where = site(1, heads * width * copies, kind="norm") if name in ROWS else site(heads, width, copies)
    return randomised(build(name, where, seed=3, alpha=alpha, start=start), noise)


def randomised(built: Any, noise: float = 0.5) -> Any:
    """In fp64, with random parameters."""
    transform = built.double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return transform


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix_of(transform: Any, width: int) -> Tensor:
    """P, [width, width]."""
    with torch.no_grad():
        return transform.on_activations(torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("heads", "width"), SIZES)
@pytest.mark.parametrize("name", EVERY)
def test_the_two_forms_cancel(name: str, heads: int, width: int, copies: int) -> None:
    transform, n = made(name, heads, width, copies=copies), heads * copies * width
    copies = 1 if name in ROWS else copies
    x, w = random(2, 5, n), random(7, n, seed=1)
    product = transform.on_activations(x, copies) @ transform.on_weights(w, copies).mT
    torch.testing.assert_close(product, x @ w.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "width"), SIZES)
@pytest.mark.parametrize("name", EVERY)
def test_the_weight_form_is_the_inverse_transpose(name: str, heads: int, width: int) -> None:
    transform, n = made(name, heads, width), heads * width
    p = matrix_of(transform, n)
    w = random(4, n)
    torch.testing.assert_close(transform.on_weights(w), w @ torch.linalg.inv(p).mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in MIXING + ROWS])
def test_heads_do_not_mix_and_copies_repeat_them(name: str) -> None:
    transform = made(name, 3, 8)
    blocks = matrix_of(transform, 24).reshape(3, 8, 3, 8)
    for i in range(3):
        for j in range(3):
            if i != j:
                assert float(blocks[i, :, j].abs().max()) == 0
    x = random(5, 3, 1, 8).expand(5, 3, 2, 8).reshape(5, -1)
    twice = transform.on_activations(x, 2).reshape(5, 3, 2, 8)
    torch.testing.assert_close(twice[:, :, 0], twice[:, :, 1])
    torch.testing.assert_close(
        twice[:, :, 0].reshape(5, -1), transform.on_activations(x.reshape(5, 3, 2, 8)[:, :, 0].reshape(5, -1))
    )


@pytest.mark.parametrize("name", [name for name in OF_HEADS if name not in MIXING + ROWS])
def test_the_condition_number_is_the_worst_head_s(name: str) -> None:
    transform = made(name, 3, 8)
    blocks = matrix_of(transform, 24).reshape(3, 8, 3, 8).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    worst = float(torch.linalg.cond(blocks).max())
    assert transform.condition() == pytest.approx(worst, rel=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_every_parameter_through_both_forms(name: str) -> None:
    transform, x, w = made(name, 2, 4), random(3, 8), random(3, 8, seed=1)
    parameters = list(transform.parameters())
    if not parameters:
        return
    weighing = random(3, 8, seed=2)
    for form, value in ((transform.on_activations, x), (transform.on_weights, w)):
        gradients = torch.autograd.grad((form(value) * weighing).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert torch.isfinite(gradient).all() and bool(gradient.ne(0).any())
            flat, step = parameter.data.view(-1), 1e-6
            index = int(gradient.abs().argmax())  # finite differences where they are largest
            flat[index] += step
            above = (form(value) * weighing).sum()
            flat[index] -= 2 * step
            below = (form(value) * weighing).sum()
            flat[index] += step
            slope = float((above - below).detach() / (2 * step))
            assert slope == pytest.approx(float(gradient.reshape(-1)[index]), rel=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_one_matrix_serves_all_blocks(name: str) -> None:
    width = int(name.removeprefix("shared-"))
    start = random(width, width) + 3 * torch.eye(width, dtype=torch.float64)
    transform = randomised(build(name, site(1, 2 * width, kind="linear"), seed=3, alpha=1.0, start=start), 0.1)
    p = matrix_of(transform, 2 * width)
    assert torch.equal(p[:width, :width], p[width:, width:]) and not bool(p[:width, width:].any())
    torch.testing.assert_close(transform.online()["blocks"][0], p[:width, :width])
    w = random(4, 2 * width)
    torch.testing.assert_close(transform.on_weights(w), w @ torch.linalg.inv(p).mT, rtol=1e-9, atol=1e-9)
    assert transform.condition() == pytest.approx(float(torch.linalg.cond(p)), rel=1e-6)
    assert float((p[:width, :width] - start).abs().max()) > 0.01
    assert not any(place(one, name).how == "folded" for one in (site(1, 256, kind="norm"), site(2, 128)))


@pytest.mark.parametrize("name", ["diagonal", "banded", "block", "lu", "dense"])
def test_a_start_is_the_diagonal(name: str) -> None:
    start = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.5
    matrix = matrix_of(made(name, 3, 8, noise=0.0, start=start), 24)
    torch.testing.assert_close(matrix, torch.diag(start.double()), rtol=1e-6, atol=1e-7)


def test_a_rope_pair_starts_between_what_its_two_features_ask_for() -> None:
    start = torch.tensor([1.0, 2.0, 4.0, 8.0])
    matrix = matrix_of(made("rope-pair", 1, 4, noise=0.0, start=start), 4)
    torch.testing.assert_close(matrix.diagonal(), torch.tensor([2.0, 4.0, 2.0, 4.0]).double(), rtol=1e-6, atol=0)


def test_a_rope_pair_commutes_with_every_rotation_of_its_planes() -> None:
    p = matrix_of(made("rope-pair", 1, 8), 8)
    angle = random(4, seed=5)
    turn = torch.zeros(8, 8, dtype=torch.float64)
    index = torch.arange(4)
    turn[index, index] = turn[index + 4, index + 4] = angle.cos()
    turn[index, index + 4], turn[index + 4, index] = angle.sin(), -angle.sin()
    torch.testing.assert_close(p @ turn, turn @ p)
    assert float((p - torch.eye(8, dtype=torch.float64)).abs().max()) > 0.1


@pytest.mark.parametrize("width", [2, 6, 10, 18, 40, 60, 64, 72, 96, 576])
def test_a_hadamard_rotation_of_any_width_is_orthogonal_and_follows_its_seed(width: int) -> None:
    first, again, other = (matrix_of(build("hadamard", site(1, width), seed=s, alpha=0), width) for s in (1, 1, 2))
    torch.testing.assert_close(first @ first.mT, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(first, again)
    assert width == 2 or not torch.equal(first, other)


@pytest.mark.parametrize("name", LEARNED_ROTATIONS)
@pytest.mark.parametrize("kind", ["heads", "linear", "residual"])
def test_a_learned_rotation_is_orthogonal_wherever_it_is_and_starts_as_a_fixed_one(name: str, kind: Kind) -> None:
    where = site(3 if kind == "heads" else 1, 24 if kind == "heads" else 96, kind=kind)
    built: Any = build(name, where, seed=3, alpha=0.0)
    start = matrix_of(built.double(), where.width)
    assert float(start.abs().max()) <= (4 / 24) ** 0.5  # no entry is large: outliers are spread from the first step on
    if kind == "residual":
        torch.testing.assert_close(start, matrix_of(build("hadamard", where, seed=3, alpha=0), where.width))
    moved = matrix_of(randomised(built), where.width)
    eye = torch.eye(where.width, dtype=torch.float64)
    for matrix in (start, moved):
        torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-12)
    assert float((moved - start).abs().max()) > 0.1


@pytest.mark.parametrize("name", LEARNED_ROTATIONS)
def test_a_learned_rotation_starts_from_given_blocks(name: str) -> None:
    start = torch.linalg.qr(random(3, 8, 8)).Q
    made_of = made(name, 3, 8, noise=0.0, start=start)
    torch.testing.assert_close(made_of.online()["blocks"], start)


def test_blocks_start_from_given_matrices() -> None:
    start = random(3, 8, 8)
    torch.testing.assert_close(made("block", 3, 8, noise=0.0, start=start).online()["blocks"], start)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e8])
def test_triangular_factors_are_bounded_whatever_the_parameters(size: float) -> None:
    lu = made("lu", 2, 6, noise=size)
    bound = 6 * ((1 + 0.9) / (1 - 0.9)) ** 2 * math.exp(2 * LIMIT)
    assert lu.condition() <= bound
    x, w = random(3, 12), random(4, 12, seed=2)
    torch.testing.assert_close(lu.on_activations(x) @ lu.on_weights(w).mT, x @ w.mT, rtol=1e-6, atol=1e-6)
    lu.float().on_weights(torch.randn(4, 12)).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lu.parameters())


def test_band_widths_are_the_papers() -> None:
    """B_e = floor((n - 1) / (E - 1) * e) + 1 for e = 0 ... E - 1 (arXiv 2403.12544)."""
    for n in (2, 7, 16, 64):
        for epochs in (2, 5, 20, 40):
            banded: Any = build("banded", site(1, n), seed=0, alpha=0.3)
            for e in range(epochs):
                banded.progress(e / (epochs - 1))
                seen = int((banded.mask[0] > 0).sum()) + 1  # the diagonal is held apart
                assert seen == (n - 1) * e // (epochs - 1) + 1, (n, epochs, e)


def test_the_mask_opens_from_the_diagonal_outwards() -> None:
    banded: Any = build("banded", site(2, 8), seed=0, alpha=0.1)
    with torch.no_grad():
        banded.off_diagonal.fill_(0.2)  # 7 neighbours of 0.1 * 0.2 stay far from the limit
    assert banded.progress(0.0) is False  # narrowing releases nothing
    torch.testing.assert_close(banded.matrix(), torch.eye(8).expand(2, 8, 8))
    assert banded.progress(0.5) is True
    half = banded.matrix()[0]
    assert half[0].tolist() == pytest.approx([1, 0.02, 0.02, 0.02, 0, 0, 0, 0])
    assert banded.progress(0.5) is False
    assert banded.progress(1.0) is True
    dense = banded.matrix()[1]
    torch.testing.assert_close(dense, 0.02 + 0.98 * torch.eye(8))


def test_only_the_band_gets_gradients() -> None:
    banded: Any = build("banded", site(1, 6), seed=0, alpha=0.1)
    banded.progress(0.4)  # width 3
    banded.on_activations(torch.randn(4, 6)).square().sum().backward()
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    inside = (distance > 0) & (distance < 3)
    assert torch.equal(banded.off_diagonal.grad[0] != 0, inside)


@pytest.mark.parametrize("huge", [1.0, 1e3, 1e8, -1e8])
def test_dominance_holds_whatever_the_parameters(huge: float) -> None:
    """Levy-Desplanques by construction: the published code neither checks nor keeps it."""
    banded = made("banded", 2, 16, noise=0.0)
    assert isinstance(banded, Banded)
    with torch.no_grad():
        banded.off_diagonal.copy_(huge * random(2, 16, 16).abs())
        banded.log_scale.copy_(2 * random(2, 16, seed=1))
    assert 0 < banded.dominance() <= 0.9 + 1e-12
    x, w = random(3, 32), random(4, 32, seed=2)
    torch.testing.assert_close(banded.on_activations(x) @ banded.on_weights(w).mT, x @ w.mT)
    assert banded.condition() < 1e6


def test_dominance_also_holds_in_float32_and_its_gradient_is_finite() -> None:
    banded: Any = build("banded", site(1, 16), seed=0, alpha=1.0)
    with torch.no_grad():
        banded.off_diagonal.fill_(1e20)
    banded.on_weights(torch.randn(4, 16)).square().sum().backward()
    assert banded.dominance() < 1
    assert all(bool(p.grad.isfinite().all()) for p in banded.parameters())


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(AffineQuantError, match="did you mean 'hadamard'"):
        structures_of("hadamrd", where="test")
    with pytest.raises(AffineQuantError, match="unknown transform 'x'"):
        structures_of("diagonal+x", where="test")
