"""Orthogonal matrices of any size, their factors, maps onto rotations, blocks, and the gradual mask."""

from functools import partial

import pytest
import torch

from affinequant.transforms.linalg import (
    cayley,
    dct,
    from_blocks,
    gram_schmidt,
    hadamard,
    kronecker_apply,
    masked_band,
    orthogonal_factors,
    polar,
    to_blocks,
)

WIDTHS = (1, 2, 3, 6, 8, 10, 16, 18, 40, 60, 64, 72, 96, 105, 576, 1536)


def assert_orthonormal(matrix: torch.Tensor) -> None:
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 256])
def test_hadamard_is_orthonormal_and_flat(n: int) -> None:
    matrix = hadamard(n)
    assert_orthonormal(matrix)
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, 3, 12])
def test_hadamard_of_another_size_is_a_mistake(n: int) -> None:
    with pytest.raises(AssertionError):
        hadamard(n)


@pytest.mark.parametrize("n", [1, 2, 3, 9, 15, 43])
def test_dct_is_orthonormal(n: int) -> None:
    assert_orthonormal(dct(n))


@pytest.mark.parametrize("n", WIDTHS)
def test_factors_of_every_width(n: int) -> None:
    a, b = orthogonal_factors(n)
    assert len(a) * len(b) == n
    assert_orthonormal(a)
    assert_orthonormal(b)
    # No entry of the product passes that of a cosine matrix: an outlier is spread, whatever the width.
    assert float(a.abs().max() * b.abs().max()) <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("n", WIDTHS)
def test_applying_factors_is_applying_their_product(n: int) -> None:
    a, b = orthogonal_factors(n)
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kronecker_apply(x, a, b), x @ torch.kron(a, b))


def test_kronecker_of_matrices_that_are_not_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (3, 5))
    x = torch.randn(4, 15, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(kronecker_apply(x, a, b), x @ torch.kron(a, b))


def test_the_band_of_the_gradual_mask() -> None:
    expected = [[1, 0.1, 0, 0], [0.1, 1, 0.1, 0], [0, 0.1, 1, 0.1], [0, 0, 0.1, 1]]
    torch.testing.assert_close(masked_band(4, 2, 0.1), torch.tensor(expected))
    torch.testing.assert_close(masked_band(4, 1, 0.1), torch.eye(4))
    assert bool((masked_band(4, 4, 0.1) > 0).all())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_cayley_gives_rotations_and_zero_the_identity(n: int) -> None:
    for size in (0.1, 1.0, 100.0):
        turned = cayley(size * random(3, n, n))
        torch.testing.assert_close(turned @ turned.mT, torch.eye(n).double().expand(3, n, n), rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.linalg.det(turned), torch.ones(3).double())
    assert torch.equal(cayley(torch.zeros(3, n, n)), torch.eye(n).expand(3, n, n))


def test_cayley_in_the_plane_turns_by_twice_the_arc_tangent() -> None:
    params = torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    angle = torch.tensor(2 * 0.463647609, dtype=torch.float64)  # tan of half of it is 0.5
    expected = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2)
    torch.testing.assert_close(cayley(params), expected)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_gram_schmidt_is_the_recursion(n: int, missing: int) -> None:
    matrix = random(4, n, n - missing)
    columns: list[torch.Tensor] = []
    for column in matrix.unbind(-1):
        rest = column - sum(((column * q).sum(-1, keepdim=True) * q for q in columns), torch.zeros_like(column))
        columns.append(rest / rest.norm(dim=-1, keepdim=True))
    made = gram_schmidt(matrix)
    if columns:
        torch.testing.assert_close(made[..., : n - missing], torch.stack(columns, -1))
    torch.testing.assert_close(made @ made.mT, torch.eye(n).double().expand(4, n, n), rtol=0, atol=1e-12)
    sign = torch.linalg.det(made)
    torch.testing.assert_close(sign, torch.linalg.det(matrix).sign() if missing == 0 else torch.ones(4).double())


def test_gram_schmidt_of_two_columns_ends_with_their_cross_product() -> None:
    made = gram_schmidt(random(5, 3, 2))
    torch.testing.assert_close(made[..., 2], torch.linalg.cross(made[..., 0], made[..., 1]))


@pytest.mark.parametrize(
    "map_",
    [cayley, gram_schmidt, polar, partial(polar, proper=True)],
    ids=["cayley", "gram-schmidt", "polar", "proper-polar"],
)
def test_gradients_of_the_maps_onto_rotations(map_) -> None:
    assert torch.autograd.gradcheck(map_, (random(2, 4, 4).requires_grad_(),))
    if map_ is gram_schmidt:
        assert torch.autograd.gradcheck(map_, (random(2, 4, 3).requires_grad_(),))


@pytest.mark.parametrize("proper", [False, True])
def test_no_orthogonal_matrix_is_nearer_than_the_polar_factor(proper: bool) -> None:
    matrix = random(40, 3, 3)
    nearest = polar(matrix, proper=proper)
    torch.testing.assert_close(nearest @ nearest.mT, torch.eye(3).double().expand(40, 3, 3), rtol=0, atol=1e-12)
    sign = torch.linalg.det(matrix).sign()
    torch.testing.assert_close(torch.linalg.det(nearest), sign.abs() if proper else sign)
    away = (matrix - nearest).norm(dim=(-2, -1))
    for seed in range(20):
        other = cayley(random(40, 3, 3, seed=seed) * 0.3**seed) @ nearest
        assert bool(((matrix - other).norm(dim=(-2, -1)) >= away - 1e-12).all())


def test_the_polar_factor_has_a_slope_where_singular_values_are_equal() -> None:
    """The start of learning: an orthogonal matrix, where derivatives of U and V by themselves do not exist."""
    rotation = cayley(random(2, 4, 4)).requires_grad_()
    assert torch.autograd.gradcheck(polar, (rotation,))
    polar(torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("columns", [[[0, 0, 0], [0, 1, 0]], [[1, 0, 0], [2, 0, 0]], [[0, 0, 0], [0, 0, 0]]], ids=str)
def test_gram_schmidt_of_dependent_columns_is_a_rotation_with_finite_gradients(columns: list[list[int]]) -> None:
    matrix = torch.tensor(columns).double().mT.contiguous().requires_grad_()
    made = gram_schmidt(matrix)
    torch.testing.assert_close(made @ made.mT, torch.eye(3).double())
    torch.testing.assert_close(torch.linalg.det(made), torch.ones(()).double())
    (made * random(3, 3)).sum().backward()
    assert matrix.grad is not None and bool(matrix.grad.isfinite().all())


def test_qr_is_gram_schmidt_but_for_signs_of_columns() -> None:
    """Which quantisation to symmetric ranges does not see: QR-Orth (arXiv 2511.04063) is this chart."""
    matrix = random(5, 8, 8)
    torch.testing.assert_close(torch.linalg.qr(matrix).Q.abs(), gram_schmidt(matrix).abs())


def test_gram_schmidt_undoes_nothing_on_a_rotation() -> None:
    """The map's right inverse: the columns of a rotation themselves (arXiv 1812.07035)."""
    rotation = cayley(random(3, 5, 5))
    torch.testing.assert_close(gram_schmidt(rotation), rotation)
    torch.testing.assert_close(gram_schmidt(rotation[..., :4]), rotation)


@pytest.mark.parametrize("copies", [1, 3])
def test_blocks_are_runs_of_copies_and_come_back(copies: int) -> None:
    x = random(2, 7, 4 * copies * 5)
    blocks = to_blocks(x, 4, copies)
    assert blocks.shape == (4, 14 * copies, 5)
    torch.testing.assert_close(blocks[1, 0], x[0, 0, 5 * copies : 5 * copies + 5])
    assert torch.equal(from_blocks(blocks, x, copies), x)
