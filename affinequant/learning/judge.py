"""Judge a block by what the network makes of it: its output goes on through the other blocks in full precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.costs import JUDGED_TOKENS
from affinequant.data.tokens import Tokens
from affinequant.learning.divergence import stream_divergence
from affinequant.learning.network import block_job, block_reader, read_outer
from affinequant.models.decoder import Decoder
from affinequant.plan import Plan
from affinequant.rounding.job import HELD_OUT
from affinequant.transforms import Transform


class ModelJudge:
    """Divergence of next-token distributions on the last `held` calibration samples, which are then not trained on.

    It costs one forward pass of those samples through what lies behind the block each time, so that a run's cost in
    judging grows with the square of the number of blocks; next to training, it is small.
    """

    def __init__(
        self,
        made: Plan,
        decoder: Decoder,
        tokens: Tokens,
        rotation: Transform | None,
        kwargs: Sequence[Mapping[str, Any]],
    ) -> None:
        """Args:
        rotation: of the residual stream, in fp64 on the decoder's device; hidden states to be judged are rotated.
        kwargs: what each block is called with.
        """
        samples, length = tokens.ids.shape
        self.held = max(1, min(samples // HELD_OUT, JUDGED_TOKENS // length))
        self.decoder, self.read = decoder, block_reader(made, decoder)
        self.jobs = [block_job(made, decoder, index, kwargs) for index in range(made.dims.layers)]
        outer = read_outer(made, decoder)
        self.head = decoder.head(outer)
        self.back = None
        if rotation is not None:
            eye = torch.eye(made.dims.hidden, dtype=torch.float64, device=decoder.device)
            self.back = rotation.on_activations(eye).mT.to(decoder.dtype)
        embedded, _ = decoder.embed(tokens.ids[-self.held :], outer)
        self.full = self._onwards(embedded, 0)

    def __call__(self, index: int, hidden: Float[Tensor, "held tokens hidden"]) -> float:
        """Nats per token by which `hidden`, behind block `index`, makes the network diverge from full precision."""
        if self.back is not None:
            hidden = (hidden.to(self.back) @ self.back).to(hidden)
        return stream_divergence(self.decoder, self._onwards(hidden, index + 1), self.full, self.head)

    def _onwards(self, hidden: Tensor, first: int) -> Tensor:
        for job in self.jobs[first:]:
            hidden = job.run_all(self.read(job.index), hidden)
        return hidden
