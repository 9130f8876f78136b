"""Closed-form starts: both sides get the same energy in every coordinate, at the least product of energies."""

import pytest
import torch
from torch import Tensor

from affinequant.transforms.linalg import kronecker_apply, orthogonal_factors
from affinequant.transforms.wush import (
    balance,
    block_moments,
    level,
    partial_moments,
    wush,
    wush_blocks,
    wush_kronecker,
    wush_kronecker_rows,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(*shape: int, seed: int = 0) -> Tensor:
    """Symmetric positive definite, with eigenvalues that differ a good deal."""
    factor = random(*shape, shape[-1], seed=seed) * torch.logspace(-0.5, 0.5, shape[-1], dtype=torch.float64)[:, None]
    return factor.mT @ factor / shape[-1]


def both_sides(p: Tensor, moment: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """P^T M P and P^-1 G P^-T."""
    inverse = torch.linalg.inv(p)
    return p.mT @ moment @ p, inverse @ gram @ inverse.mT


@pytest.mark.parametrize("n", [1, 2, 7, 9, 16, 24, 48, 61])
def test_both_sides_get_the_same_energy_in_every_coordinate(n: int) -> None:
    moment, gram = spd(n), spd(n, seed=1)
    x, w = both_sides(wush(moment, gram, damping=0.0), moment, gram)
    torch.testing.assert_close(x, w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.diagonal(), x.diagonal().mean().expand(n), rtol=1e-9, atol=1e-9)


def test_the_product_of_energies_is_the_least_there_is() -> None:
    moment, gram = spd(12), spd(12, seed=1)
    b, c = (torch.linalg.cholesky(m, upper=True) for m in (moment, gram))
    bound = torch.linalg.svdvals(b @ c.mT).sum().square()
    x, w = both_sides(wush(moment, gram, damping=0.0), moment, gram)
    torch.testing.assert_close(x.trace() * w.trace(), bound, rtol=1e-9, atol=0)
    for seed in range(20):
        other = both_sides(random(12, 12, seed=seed), moment, gram)
        assert other[0].trace() * other[1].trace() > bound


@pytest.mark.parametrize("n", [1, 3, 8, 9, 24, 43, 76])
def test_levelling(n: int) -> None:
    energies = torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    energies[1], energies[2, 1:] = 1.0, 0.0
    h = level(energies)
    torch.testing.assert_close(h.mT @ h, torch.eye(n).double().expand(4, n, n), rtol=0, atol=1e-12)
    diagonal = (h.mT @ (energies[..., None] * h)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, energies.mean(-1, keepdim=True).expand(4, n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("n", [6, 64])
def test_whatever_the_rank_the_condition_number_is_bounded(n: int, rank: int) -> None:
    rows, weights = 1e4 * random(rank, n), random(rank, n, seed=1)
    for moment, gram in [(rows.T @ rows, weights.T @ weights), (rows.T @ rows, spd(n)), (spd(n), weights.T @ weights)]:
        p = wush(moment, gram)
        assert bool(p.isfinite().all())
        assert float(torch.linalg.cond(p)) <= (1 + n / 0.01) ** 0.5 * (1 + 1e-6)
        diagonal = balance(moment.diagonal(), gram.diagonal())
        assert float(diagonal.max() / diagonal.min()) <= (1 + n / 0.01) ** 0.5
    for factor in wush_kronecker_rows(rows, weights, 2, n // 2):
        assert float(torch.linalg.cond(factor)) <= (1 + len(factor) / 0.01) ** 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(("n1", "n2"), [(4, 8), (3, 5), (1, 7)])
def test_kronecker_is_exact_where_the_moments_are_kronecker_products(n1: int, n2: int) -> None:
    moment, gram = torch.kron(spd(n1), spd(n2, seed=1)), torch.kron(spd(n1, seed=2), spd(n2, seed=3))
    p1, p2 = wush_kronecker(moment, gram, n1, n2, damping=0.0)
    p, best = torch.kron(p1, p2), wush(moment, gram, damping=0.0)
    # The same map up to a rotation and a factor: P P^T is the geometric mean of M^-1 and G.
    found, wanted = p @ p.mT, best @ best.mT
    torch.testing.assert_close(found / found.trace(), wanted / wanted.trace(), rtol=1e-6, atol=1e-8)
    x, w = both_sides(p, moment, gram)
    for side in (x, w):
        torch.testing.assert_close(side.diagonal(), side.diagonal().mean().expand(n1 * n2), rtol=1e-6, atol=0)


def test_kronecker_from_rows_is_kronecker_from_their_moments() -> None:
    x, w = random(5, 40, 15), random(30, 15, seed=1)
    flat = x.reshape(-1, 15)
    pairs = zip(wush_kronecker(flat.T @ flat, w.T @ w, 3, 5), wush_kronecker_rows(x, w, 3, 5), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=1e-6, atol=1e-8)


def test_rounds_lower_the_product_of_energies() -> None:
    moment, gram = spd(24), spd(24, seed=1)

    def product(rounds: int) -> float:
        x, w = both_sides(torch.kron(*wush_kronecker(moment, gram, 4, 6, damping=0, rounds=rounds)), moment, gram)
        return float(x.trace() * w.trace())

    found = [product(rounds) for rounds in (1, 2, 3, 8)]
    assert found == sorted(found, reverse=True)
    assert found[1] < 1.01 * found[-1] < moment.trace() * gram.trace()


def test_partial_moments_are_partial_traces_and_add_up() -> None:
    x = random(2, 7, 15)
    moment = sum(torch.outer(row, row) for row in x.reshape(-1, 15))
    assert isinstance(moment, Tensor)
    whole = moment.reshape(3, 5, 3, 5)
    first, second = partial_moments(x, 3, 5)
    torch.testing.assert_close(first, torch.einsum("iaja->ij", whole))
    torch.testing.assert_close(second, torch.einsum("iaib->ab", whole))
    halves = [partial_moments(half, 3, 5) for half in x]
    torch.testing.assert_close(halves[0][1] + halves[1][1], second)


def test_blocks_are_the_blocks_own() -> None:
    moment, gram = spd(12), spd(12, seed=1)
    blocks = wush_blocks(moment, gram, 4)
    assert blocks.shape == (3, 4, 4)
    torch.testing.assert_close(blocks[1], wush(moment[4:8, 4:8], gram[4:8, 4:8]))


def test_moments_of_blocks_add_up_over_rows_and_copies() -> None:
    x, w = random(5, 9, 24), random(30, 24, seed=1)
    flat = x.reshape(-1, 24)
    torch.testing.assert_close(
        wush(block_moments(x, 4), block_moments(w, 4)), wush_blocks(flat.T @ flat, w.T @ w, 6), rtol=1e-6, atol=1e-8
    )
    heads = flat.reshape(-1, 2, 3, 4)  # two KV heads, each shared by three query heads
    expected = torch.stack([sum(heads[:, k, c].T @ heads[:, k, c] for c in range(3)) for k in range(2)])
    torch.testing.assert_close(block_moments(x, 2, copies=3), expected)


def test_balance_is_the_best_diagonal() -> None:
    m, g = random(10).square(), random(10, seed=1).square()
    p = balance(m, g, damping=0.0)
    torch.testing.assert_close((m * p**2 / (g / p**2)).log().std(), torch.tensor(0.0).double(), rtol=0, atol=1e-9)
    assert float(p.log().mean().abs()) < 1e-12
    least = (m * p**2).sum() * (g / p**2).sum()
    for seed in range(10):
        other = (p.log() + 0.1 * random(10, seed=seed)).exp()
        assert (m * other**2).sum() * (g / other**2).sum() > least


def four_bits(v: Tensor) -> Tensor:
    """Rounded to 16 levels between the extremes of each row."""
    low, high = v.amin(-1, keepdim=True).clamp_max(0), v.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low) / 15
    zero = (-low / step).round()
    return (((v / step).round() + zero).clamp(0, 15) - zero) * step


def error(x: Tensor, w: Tensor, wanted: Tensor) -> float:
    """Relative squared error of the product once both sides have been rounded."""
    return float((four_bits(x) @ four_bits(w).mT - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("n1", "n2"), [(16, 16), (12, 20)])
def test_the_error_of_rounding_is_far_below_a_rotation_s(n1: int, n2: int) -> None:
    """Heavy tails, features that go together, and three massive channels; weights that follow other directions."""
    n = n1 * n2
    tails = random(1024, n) / random(1024, n, seed=1).abs().clamp_min(0.3)
    gains = torch.exp(0.5 * random(n, seed=2))
    gains[torch.tensor([3, n // 2, n - 7])] *= 20
    a, b = random(n1, n1, seed=3), random(n2, n2, seed=4)
    x = kronecker_apply(tails, a, b) * gains
    w = random(128, n, seed=5) @ random(n, n, seed=6) * torch.linspace(0.3, 3, n, dtype=torch.float64)
    y, moment, gram = x @ w.mT, x.mT @ x, w.mT @ w
    signs = random(n, seed=7).sign()
    rotated = error(*(kronecker_apply(v * signs, *orthogonal_factors(n)) for v in (x, w)), y)
    p = wush(moment, gram)
    dense = error(x @ p, w @ torch.linalg.inv(p).mT, y)
    d = balance(moment.diagonal(), gram.diagonal())
    p1, p2 = wush_kronecker_rows(x * d, w / d, n1, n2)
    q1, q2 = (torch.linalg.inv(q).mT for q in (p1, p2))
    kronecker = error(kronecker_apply(x * d, p1, p2), kronecker_apply(w / d, q1, q2), y)
    assert rotated < 0.7 * error(x, w, y)
    assert kronecker < 0.2 * rotated and dense < 0.2 * rotated
