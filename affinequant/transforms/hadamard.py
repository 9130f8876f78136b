"""A fixed rotation that spreads outliers over all features: random signs, then a Hadamard matrix of any width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.linalg import kronecker_apply, orthogonal_factors
from affinequant.sites import Site


class Hadamard(nn.Module):
    """P = diag(signs) (A (x) B) per head, orthogonal, so P^-T = P. Nothing is learned."""

    signs: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (site.heads, site.head_width), generator=generator).double() * 2 - 1
        a, b = orthogonal_factors(site.head_width)
        self.register_buffer("signs", signs)
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        heads, n = self.signs.shape
        parts = x.reshape(*x.shape[:-1], heads, copies, n) * self.signs.to(x)[:, None]
        return kronecker_apply(parts, self.a.to(x), self.b.to(x)).reshape(x.shape)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return self.on_activations(w, copies)

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """1: orthogonal."""
        return 1.0
