"""Scaled rotations of RoPE's frequency pairs: what commutes with RoPE, and so folds into q and k exactly."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site


class RopePair(nn.Module):
    """Per KV head and frequency, P = exp(s) Rot(theta) on features (i, i + head_dim / 2).

    RoPE turns the same pair by an angle of its own; plane rotations commute, so scores are unchanged at every distance.
    P^-T = exp(-s) Rot(theta).
    """

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        pairs = (site.heads, site.head_width // 2)
        scale = torch.ones(site.width) if start is None else start.float()
        # One factor per pair: the geometric mean of what the two features ask for.
        self.log_scale = nn.Parameter(scale.log().reshape(site.heads, 2, -1).mean(1))
        self.angle = nn.Parameter(torch.zeros(pairs))

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        return self._turn(x, self.log_scale, copies)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return self._turn(w, -self.log_scale, copies)

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """Largest factor over smallest, within a head."""
        spread = self.log_scale.detach()
        return float((spread.amax(1) - spread.amin(1)).max().exp())

    def _turn(self, x: Tensor, log_scale: Tensor, copies: int) -> Tensor:
        scale = log_scale.exp().to(x.dtype)
        cos, sin = (self.angle.cos().to(x.dtype) * scale, self.angle.sin().to(x.dtype) * scale)
        heads, half = cos.shape
        first, second = x.reshape(*x.shape[:-1], heads, copies, 2, half).unbind(-2)
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -2).reshape(x.shape)
