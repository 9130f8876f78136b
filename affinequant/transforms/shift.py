"""A shift of the features: what makes an affine transform of a linear one (arXiv 2403.12544, eq. 4)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site
from affinequant.transforms import Transform


class Shift(nn.Module):
    """x - d. Weights stay as they are, and biases take W d up: y = (x - d) W^T + (b + W d)."""

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        shift = torch.zeros(site.width) if start is None else start.float()
        self.shift = nn.Parameter(shift.reshape(site.heads, site.head_width))

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x - d."""
        return x - self.shift[:, None, :].expand(-1, copies, -1).reshape(-1).to(x.dtype)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w itself: P is the identity."""
        return w

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """That of the identity."""
        return 1.0


def shifts(transform: Transform) -> bool:
    """Whether it is affine, and not linear."""
    return isinstance(transform, nn.Module) and any(isinstance(part, Shift) for part in transform.modules())


def added(transform: Transform, like: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, " n"]:
    """What it adds to every row as wide as those of `like`: c of x P + c."""
    return transform.on_activations(like.new_zeros(like.shape[-1]), copies)
