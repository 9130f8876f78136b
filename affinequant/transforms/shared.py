"""One matrix for all blocks of neighbouring features, P = I (x) B: the form that engines of 4-bit floats hold."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, block_width
from affinequant.transforms.linalg import orthogonal_factors
from affinequant.transforms.svd import BoundedMatrix


class Shared(nn.Module):
    """P = I (x) B, with B learned and its spectrum bounded."""

    def __init__(self, site: Site, *, width: int, seed: int, alpha: float, start: Tensor | None = None) -> None:
        """Args:
        width: of B.
        start: B [width, width]; None for the identity.
        """
        super().__init__()
        self.block = BoundedMatrix(width, start=start)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        return _times(x, self.block.matrix())

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return _times(w, self.block.inverse_transpose())

    @torch.no_grad()
    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"blocks": [1, width, width]}."""
        return {"blocks": self.block.matrix()[None]}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """B's."""
        return self.block.condition()


shared_16, shared_32, shared_64, shared_128 = (partial(Shared, width=width) for width in (16, 32, 64, 128))


class BlockHadamard(nn.Module):
    """P = diag(signs) (I (x) H): a fixed rotation of each block of 64 features (of a head, or of as many as divide). On the
    residual stream it folds, and mixes no more than a few of the blocks that share a scale."""

    signs: Tensor
    matrix: Tensor

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        heads, n = (site.heads, site.head_width) if site.kind in ("heads", "scores") else (1, site.width)
        width = block_width(site)
        drawn = torch.randint(0, 2, (heads, n), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("signs", drawn.double() * 2 - 1)
        self.register_buffer("matrix", torch.kron(*orthogonal_factors(width)))

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        heads, n = self.signs.shape
        parts = x.reshape(*x.shape[:-1], heads, copies, n) * self.signs.to(x)[:, None]
        return _times(parts, self.matrix).reshape(x.shape)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T = w P."""
        return self.on_activations(w, copies)

    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"blocks": [count, width, width]}."""
        return {"blocks": self.signs.reshape(-1, len(self.matrix), 1) * self.matrix}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """1: orthogonal."""
        return 1.0


def _times(x: Tensor, block: Tensor) -> Tensor:
    return (x.reshape(-1, len(block)) @ block.to(x.dtype)).reshape(x.shape)
