"""Orthogonal matrices of any size, their factors, and the gradual mask."""

import pytest
import torch

from affinequant.linalg import dct, hadamard, kronecker_apply, masked_band, orthogonal_factors

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
