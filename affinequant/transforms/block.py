"""Matrices on blocks of neighbouring features, one per head where there are heads; or one matrix on all of them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, block_width
from affinequant.transforms.linalg import from_blocks, to_blocks
from affinequant.transforms.svd import BoundedMatrix


class Block(nn.Module):
    """P is block-diagonal, its blocks learned with bounded spectra.

    Between v and o the blocks are the KV heads', so P folds; elsewhere they stay online, at the width that
    `sites.block_width` chooses.
    """

    def __init__(
        self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None, width: int | None = None
    ) -> None:
        """Args:
        start: a diagonal [n] or the blocks [count, width, width]; None for the identity.
        width: of one block; None for the site's.
        """
        super().__init__()
        width = width or block_width(site)
        if start is not None and start.dim() == 1:
            start = torch.diag_embed(start.double().reshape(-1, width))
        self.blocks = BoundedMatrix(site.width // width, width, start=start)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        return self._times(x, self.blocks.matrix(), copies)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return self._times(w, self.blocks.inverse_transpose(), copies)

    @torch.no_grad()
    def online(self) -> dict[str, Tensor]:
        """What the run time applies: {"blocks": [count, width, width]}."""
        return {"blocks": self.blocks.matrix()}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """The worst block's."""
        return self.blocks.condition()

    @staticmethod
    def _times(x: Tensor, blocks: Tensor, copies: int) -> Tensor:
        return from_blocks(to_blocks(x, len(blocks), copies) @ blocks.to(x.dtype), x, copies)


def dense(site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> Block:
    """One block of the whole width: the most that any linear map can do, at the cost of a layer of its own. Each step
    solves two systems of this width, so it is a yardstick for small models rather than something to ship."""
    return Block(site, seed=seed, alpha=alpha, start=start, width=site.width)
