"""What the stages of one run share, made when the first of them asks for it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affinequant.data.tokens import Tokens
from affinequant.learning.judge import ModelJudge
from affinequant.learning.network import block_job
from affinequant.models.decoder import Decoder
from affinequant.plan import Plan
from affinequant.progress import Progress
from affinequant.rounding.job import BlockJob
from affinequant.run.run import Run
from affinequant.stages import OUTER, ROTATED
from affinequant.transforms import Transform, build
from affinequant.transforms.orthogonal import Fixed, Orthogonal

Starts = Mapping[int, Mapping[str, Tensor]]
"""Index of a block -> site -> the matrices that its transform starts from."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage is called with."""

    made: Plan
    run: Run
    tokens: Tokens
    decoder: Decoder
    listen: Progress

    @functools.cached_property
    def kwargs(self) -> Sequence[Mapping[str, Any]]:
        """What each block is called with."""
        return self.decoder.embed(self.tokens.ids[:1], self.run.tensors(OUTER))[1]

    @functools.cached_property
    def rotations(self) -> tuple[Transform | None, Starts]:
        """The rotation of the residual stream in fp64 (None where the recipe asks for none), and what the blocks' own
        rotations start from. What is learned comes from its stage."""
        recipe = self.made.recipe
        name = recipe.transforms.get("residual")
        if name is None:
            return None, {}
        residual = build(name, self.made.sites["residual"], seed=recipe.seed, alpha=recipe.alpha)
        if not isinstance(residual, Orthogonal):
            return residual.double(), {}
        stored, starts = self.run.tensors(ROTATED), dict[int, dict[str, Tensor]]()
        with torch.no_grad():
            residual.params.requires_grad_(False).copy_(stored.pop("residual"))
        for key, blocks in stored.items():
            index, site = key.split(".")
            starts.setdefault(int(index), {})[site] = blocks
        return Fixed(residual.double()), starts

    @functools.cached_property
    def judge(self) -> ModelJudge | None:
        """What judges the blocks' learning, where the recipe asks for it."""
        if self.made.recipe.judge != "kl" or not self.made.recipe.epochs:
            return None
        return ModelJudge(self.made, self.decoder, self.tokens, self.rotations[0], self.kwargs)

    def job(self, index: int) -> BlockJob:
        """What is fixed while a block is worked on, without what is needed to learn it."""
        scratch = self.run.folder if self.made.offload == "disk" else None
        return block_job(self.made, self.decoder, index, self.kwargs, scratch)

    def jobs(self) -> list[BlockJob]:
        """Those of all blocks."""
        return [self.job(index) for index in range(self.made.dims.layers)]
