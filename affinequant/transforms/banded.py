"""AffineQuant's matrix: dense per head, released from the diagonal outwards by the gradual mask (arXiv 2403.12544)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site
from affinequant.transforms.linalg import from_blocks, masked_band, to_blocks

DOMINANCE = 0.9
"""Largest sum of off-diagonal magnitudes, over the diagonal's, in any row of P."""


class Banded(nn.Module):
    """P = A * mask per head, its rows kept strictly diagonally dominant, hence invertible (Levy-Desplanques).

    The published code neither checks dominance nor keeps it. Here a row whose masked off-diagonal sum passes
    `DOMINANCE` of its diagonal is scaled back to that, so the theorem holds at every step, not only at the start.
    """

    mask: Tensor

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        heads, n = site.heads, site.head_width
        scale = torch.ones(site.width) if start is None else start.float()
        self.log_scale = nn.Parameter(scale.log().reshape(heads, n))
        self.off_diagonal = nn.Parameter(torch.zeros(heads, n, n))
        self.alpha = alpha
        self.width = n
        self.register_buffer("mask", masked_band(n, n, alpha).fill_diagonal_(0.0))

    def matrix(self) -> Float[Tensor, "heads n n"]:
        """P, in the parameters' dtype."""
        diagonal = self.log_scale.exp()
        off = self.off_diagonal * self.mask * diagonal[..., None]
        limit = DOMINANCE * diagonal / off.abs().sum(-1).clamp_min(torch.finfo(off.dtype).tiny)
        return torch.diag_embed(diagonal) + off * limit.clamp_max(1.0)[..., None]

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        matrix = self.matrix().to(x.dtype)
        return from_blocks(to_blocks(x, len(matrix), copies) @ matrix, x, copies)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T, by a solve per head."""
        matrix = self.matrix().to(w.dtype)
        return from_blocks(torch.linalg.solve(matrix, to_blocks(w, len(matrix), copies).mT).mT, w, copies)

    def progress(self, t: float) -> bool:
        """Widen the band with training: only the diagonal at t = 0, everything from t = 1 on."""
        n = self.log_scale.shape[-1]
        width = min(n, math.floor((n - 1) * t) + 1)
        if width == self.width:
            return False
        widened = width > self.width
        self.width = width
        self.mask.copy_(masked_band(n, width, self.alpha).fill_diagonal_(0.0))
        return widened

    def condition(self) -> float:
        """Ratio of the extreme singular values, the largest over heads."""
        return float(torch.linalg.cond(self.matrix().detach().double()).max())

    def dominance(self) -> float:
        """Largest off-diagonal row sum over its diagonal; below 1 means that every head is invertible."""
        matrix = self.matrix().detach().double().abs()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return float(((matrix.sum(-1) - diagonal) / diagonal).max())
