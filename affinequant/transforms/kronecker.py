"""A Kronecker product of two small matrices: mixes all features at the cost of two thin ones (arXiv 2410.09426)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, kronecker_factors
from affinequant.transforms.linalg import kronecker_apply
from affinequant.transforms.svd import BoundedMatrix


class Kronecker(nn.Module):
    """P = P1 (x) P2 on what the sinks of a site read, both factors with bounded spectra.

    Where there are heads, P1 mixes the query heads and P2 acts within each of them; elsewhere the sizes are the factor
    pair of the width with the smallest sum (1 and itself for a prime).
    """

    def __init__(self, site: Site, *, seed: int, alpha: float, start: tuple[Tensor, Tensor] | None = None) -> None:
        """Args:
        start: (P1 [n1, n1], P2 [n2, n2]), or None for the identity.
        """
        super().__init__()
        n1, n2 = kronecker_factors(site)
        assert start is None or isinstance(start, tuple), "a Kronecker product starts from its two factors"
        first, second = start or (None, None)
        self.left = BoundedMatrix(n1, start=first)
        self.right = BoundedMatrix(n2, start=second)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P, for x as wide as what the sinks read; `copies` is part of that width already."""
        return kronecker_apply(x, self.left.matrix().to(x.dtype), self.right.matrix().to(x.dtype))

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        first, second = self.left.inverse_transpose(), self.right.inverse_transpose()
        return kronecker_apply(w, first.to(w.dtype), second.to(w.dtype))

    @torch.no_grad()
    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"left": P1, "right": P2}."""
        return {"left": self.left.matrix(), "right": self.right.matrix()}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """The product of the factors'."""
        return self.left.condition() * self.right.condition()
