"""Learned rotations: a Hadamard-like start, then orthogonal blocks in one of three charts."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, block_width
from affinequant.transforms.hadamard import Hadamard
from affinequant.transforms.linalg import cayley, from_blocks, gram_schmidt, orthogonal_factors, polar, to_blocks

Chart = Literal["cayley", "gram-schmidt", "polar"]


class Orthogonal(nn.Module):
    """P = F diag(Q1, Q2, ...): learned orthogonal blocks, after a fixed rotation F on the residual stream.

    By Cayley, Q = Q0 (I - A)(I + A)^-1; by Gram-Schmidt, Q is made of the columns of Q0 + A (arXiv 1812.07035), which is
    its QR decomposition (arXiv 2511.04063) but for signs; by the polar factor, Q is the orthogonal matrix nearest to
    Q0 + A (arXiv 2006.14616). Q0 is a Hadamard matrix with random signs. On the residual stream F is the very rotation of
    the transform `hadamard`, and there is one block of full width that starts as the identity: a step of the whole
    network costs far more than the one system of that width.
    """

    start: Tensor

    def __init__(
        self,
        site: Site,
        *,
        seed: int,
        alpha: float,
        start: Tensor | None = None,
        chart: Chart = "cayley",
    ) -> None:
        """Args:
        start: orthogonal blocks Q0 [count, width, width]. A diagonal [n] is no rotation, and left to other transforms.
        """
        super().__init__()
        n = site.width if site.kind == "residual" else block_width(site)
        count = site.width // n
        self.chart = chart
        self.fixed = Hadamard(site, seed=seed, alpha=alpha) if site.kind == "residual" else None
        if start is not None and start.dim() == 3:
            assert start.shape == (count, n, n), (start.shape, count, n)
            blocks = start.detach().double().cpu()
        elif self.fixed:
            blocks = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1)
        else:
            signs = torch.randint(0, 2, (count, n, 1), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
            blocks = signs * torch.kron(*orthogonal_factors(n))
        self.register_buffer("start", blocks)
        self.params = nn.Parameter(torch.zeros(count, n, n))

    @property
    def turn(self) -> float:
        """How far a feature of n turns, in radians over sqrt(n), when every parameter moves by 1 (small moves: twice by
        A and its transpose, twice by the Cayley map)."""
        return 4.0 if self.chart == "cayley" else 1.0

    def blocks(self) -> Float[Tensor, "count n n"]:
        """Q, in the parameters' dtype."""
        start = self.start.to(self.params)
        if self.chart == "cayley":
            return start @ cayley(self.params)
        return (polar if self.chart == "polar" else gram_schmidt)(start + self.params)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        blocks = self.blocks().to(x.dtype)
        x = self.fixed.on_activations(x, copies) if self.fixed else x
        return from_blocks(to_blocks(x, len(blocks), copies) @ blocks, x, copies)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T = w P."""
        return self.on_activations(w, copies)

    @torch.no_grad()
    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"blocks": [count, width, width]}."""
        assert not self.fixed, "on the residual stream it folds"
        return {"blocks": self.blocks()}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """1: orthogonal."""
        return 1.0


class Fixed(nn.Module):
    """A rotation that has been learned, as the one matrix that it is: nothing is solved where it acts."""

    matrix: Tensor

    def __init__(self, learned: Orthogonal) -> None:
        """Args:
        learned: acts on one width, without heads.
        """
        super().__init__()
        with torch.no_grad():
            n = learned.params.shape[0] * learned.params.shape[-1]
            self.register_buffer("matrix", learned.on_activations(torch.eye(n).to(learned.params)))

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        assert copies == 1
        return x @ self.matrix.to(x.dtype)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T = w P."""
        return self.on_activations(w, copies)

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """1: orthogonal."""
        return 1.0


def by_gram_schmidt(site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> Orthogonal:
    """`Orthogonal` in the other chart, from which no rotation is out of reach (Cayley misses half turns)."""
    return Orthogonal(site, seed=seed, alpha=alpha, start=start, chart="gram-schmidt")


def by_polar(site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> Orthogonal:
    """`Orthogonal` in the chart that prefers no column."""
    return Orthogonal(site, seed=seed, alpha=alpha, start=start, chart="polar")
