"""A positive diagonal, held as logarithms: always invertible."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site


class Diagonal(nn.Module):
    """P = diag(exp(log_scale))."""

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        scale = torch.ones(site.width) if start is None else start.float()
        self.log_scale = nn.Parameter(scale.log().reshape(site.heads, site.head_width))

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        return x * self._repeated(copies).exp().to(x.dtype)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return w * (-self._repeated(copies)).exp().to(w.dtype)

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """Largest factor over smallest, within a head."""
        spread = self.log_scale.detach()
        return float((spread.amax(1) - spread.amin(1)).max().exp())

    def _repeated(self, copies: int) -> Tensor:
        return self.log_scale.repeat_interleave(copies, 0).reshape(-1)
