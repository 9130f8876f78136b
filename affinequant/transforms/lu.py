"""Triangular factors: an invertible matrix whose inverse is applied by substitution."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, block_width
from affinequant.transforms.linalg import from_blocks, to_blocks
from affinequant.transforms.svd import LIMIT

ROW_SUM = 0.9
"""Largest sum of magnitudes beside the unit diagonal in any row of L and U."""


class LowerUpper(nn.Module):
    """P = L diag(d) U per block: L unit lower and U unit upper triangular, their rows bounded, d positive and bounded.

    With rows beside the diagonal summing to at most r, |L| <= 1 + r and |L^-1| <= 1 / (1 - r) in the maximum norm, and
    the same holds for U. So the condition number in that norm is at most ((1 + r) / (1 - r))^2 exp(2 LIMIT), and the
    usual one at most the width of a block times that, whatever the parameters are.
    """

    centre: Tensor
    begin: Tensor

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        """Args:
        start: a diagonal [n], or None for the identity. Spreads above the limit are cut.
        """
        super().__init__()
        n = block_width(site)
        count = site.width // n
        assert start is None or start.dim() == 1, "triangular factors start from a diagonal"
        log_d = (torch.zeros(site.width) if start is None else start.log()).double().reshape(count, n)
        centre = (log_d.amax(-1, keepdim=True) + log_d.amin(-1, keepdim=True)) / 2
        self.register_buffer("centre", centre)
        self.register_buffer("begin", ((log_d - centre) / LIMIT).clamp(-0.98, 0.98).atanh())
        self.stretch = nn.Parameter(torch.zeros(count, n))
        self.lower = nn.Parameter(torch.zeros(count, n, n))
        self.upper = nn.Parameter(torch.zeros(count, n, n))

    def matrix(self) -> Float[Tensor, "count n n"]:
        """P, in the parameters' dtype."""
        lower, d, upper = self._factors()
        return (lower * d[..., None, :]) @ upper

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        matrix = self.matrix().to(x.dtype)
        return from_blocks(to_blocks(x, len(matrix), copies) @ matrix, x, copies)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T = w L^-T diag(1 / d) U^-T, by two substitutions."""
        lower, d, upper = (factor.to(w.dtype) for factor in self._factors())
        rows = to_blocks(w, len(d), copies)
        rows = torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
        rows = rows / d[:, None, :]
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False, unitriangular=True)
        return from_blocks(rows, w, copies)

    @torch.no_grad()
    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"blocks": [count, width, width]}."""
        return {"blocks": self.matrix()}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """Ratio of the extreme singular values, the largest over blocks."""
        return float(torch.linalg.cond(self.matrix().detach().double()).max())

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        centre, begin = self.centre.to(self.stretch), self.begin.to(self.stretch)
        d = (centre + LIMIT * torch.tanh(begin + self.stretch / LIMIT)).exp()
        return _unit(self.lower.tril(-1)), d, _unit(self.upper.triu(1))


def _unit(off: Tensor) -> Tensor:
    """Ones on the diagonal, beside it `off` with rows scaled back to `ROW_SUM` where they pass it."""
    limit = ROW_SUM / off.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(off.dtype).tiny)
    eye = torch.eye(off.shape[-1], dtype=off.dtype, device=off.device)
    return eye + off * limit.clamp_max(1.0)
