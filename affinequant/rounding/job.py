"""What is fixed while one block is worked on, and the original block run with whatever tensors it is given."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from affinequant.models import Family
from affinequant.models.attention import OnAttention
from affinequant.models.decoder import Decoder, OnInput, like_on_disk, run_block, slices
from affinequant.models.on_demand import each
from affinequant.models.sites import Site
from affinequant.numbers import Grid, grid_of, in_units
from affinequant.recipe.recipe import Clip, Recipe
from affinequant.recipe.scheme import Scheme
from affinequant.transforms.cached_heads import CachedHeads
from affinequant.transforms.site_input import SiteInput

HELD_OUT = 8
"""Of what there is to learn from, one in so many is kept and tells how good it is: the last ones, and at least one."""


class Judge(Protocol):
    """Says what the whole model makes of a block, on the last `held` samples, which are not trained on then."""

    held: int

    def __call__(self, index: int, hidden: Float[Tensor, "held tokens hidden"]) -> float:
        """The less the better, for what block `index` gives on the held-out samples."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJob:
    """What is fixed while one block is worked on: the code, the sizes, and what the recipe asks for."""

    decoder: Decoder
    index: int
    sites: Mapping[str, Site]
    recipe: Recipe
    scheme: Scheme
    kwargs: Mapping[str, Any]
    store: torch.dtype
    scratch: Path | None = None
    """Where activations wait between blocks; None for memory."""
    judge: Judge | None = None
    """Judges what is learned after every epoch; None where the last epoch stands."""
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    """By site, matrices that have been learned already: its transform starts from them."""
    others: Mapping[str, Scheme] = field(default_factory=dict)
    """By site, the numbers of what its linears read and of these, where they are not the scheme's."""
    units: Mapping[str, float] = field(default_factory=dict)
    """By site, the unit of its activations' scales where the format has one and it is known."""

    @property
    def family(self) -> Family:
        """What the block is made of."""
        return self.decoder.family.at(self.decoder.dims, self.index)

    def numbers(self, site: str) -> Scheme:
        """The numbers of the linears that read `site`, and of what they read."""
        return self.others.get(site, self.scheme)

    def weight_grid(self, site: str) -> Grid:
        """What the weights of the linears that read `site` are rounded to."""
        return grid_of(self.numbers(site).weight)

    def activation_grid(self, site: str) -> Grid | None:
        """What they read is rounded to; None where it stays as it is."""
        activation = self.numbers(site).activation
        return None if activation is None else grid_of(activation)

    def clipping(self, site: str) -> Clip:
        """How the range of what they read is narrowed."""
        return self.recipe.clipping(self.numbers(site))

    def run(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        on_input: OnInput | None = None,
        on_attention: OnAttention | None = None,
        known: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The block on a batch (`run_block`), in the compute dtype whatever the tensors are in. Without `on_input` and
        `on_attention` in full precision: they hold all that acts on activations at run time."""
        lent = each(tensors, lambda _, tensor: tensor.to(self.decoder.dtype), self.family.expert())
        block = self.decoder.block(self.index)
        factors = {name: scale.to(self.decoder.dtype) for name, scale in (scales or {}).items()}
        return run_block(block, self.family, lent, x, self.kwargs, on_input, on_attention, known, factors)

    def run_all(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        on_input: OnInput | None = None,
        on_attention: OnAttention | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The block on every sample, a batch at a time, without gradients; the result lies where `x` lies."""
        with torch.no_grad():
            result = like_on_disk(x, self.scratch)
            for part in slices(len(x), self.recipe.batch_size):
                batch = x[part].to(self.decoder.device)
                result[part] = self.run(tensors, batch, on_input, on_attention, scales=scales).to(x)
        return result

    def cached_heads(self, rotation: Mapping[str, Tensor]) -> OnAttention | None:
        """What acts between RoPE and attention in the quantised stream; None where nothing does."""
        return CachedHeads(self.scheme.kv, rotation) if rotation or self.scheme.kv else None

    def site_input(
        self, site: str, online: Callable[[Tensor], Tensor] | None = None, clip: Tensor | float | None = 1.0
    ) -> SiteInput:
        """What happens to what the linears of `site` read, where `online` acts there; without a `clip` nothing is
        rounded."""
        grid = None if clip is None else self.activation_grid(site)
        if grid is not None and site in self.units:
            grid = in_units(grid, self.units[site])
        return SiteInput(online=online, grid=grid, clip=1.0 if clip is None else clip, slices=self.sites[site].slices)

    def batches(self, samples: int, epoch: int) -> tuple[Int[Tensor, " batch"], ...]:
        """Which samples are learned from together, in an order that the seed, the block and the epoch decide."""
        generator = torch.Generator().manual_seed(self.seed("order") + 7919 * epoch)
        return torch.randperm(samples, generator=generator).split(self.recipe.batch_size)

    def seed(self, purpose: str) -> int:
        """A seed of its own for each purpose in each block."""
        return zlib.crc32(f"{self.recipe.seed}/{self.index}/{purpose}".encode())
