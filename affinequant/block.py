"""One block's objective: the original block, its weights transformed and rounded, against its full-precision output."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.attention import CachedHeads, OnAttention
from affinequant.fit import Group
from affinequant.fold import Tensors, fold_all
from affinequant.quantizer import CLIP_START, LearnedRange, fake_quantize, fake_quantize_activation, weight_range
from affinequant.recipe import Recipe
from affinequant.scheme import Scheme
from affinequant.sites import Site
from affinequant.stream import Decoder, OnInput, like_on_disk, run_block, slices
from affinequant.transforms import OnlineTransform, Transform


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
        lent = {name: tensor.to(self.decoder.dtype) for name, tensor in tensors.items()}
        block, family = self.decoder.block(self.index), self.decoder.family
        factors = {name: scale.to(self.decoder.dtype) for name, scale in (scales or {}).items()}
        return run_block(block, family, lent, x, self.kwargs, on_input, on_attention, known, factors)

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

    def seed(self, purpose: str) -> int:
        """A seed of its own for each purpose in each block."""
        return zlib.crc32(f"{self.recipe.seed}/{self.index}/{purpose}".encode())


class BlockObjective:
    """Error of the quantised block against its target; trains transforms and clipping, never the weights."""

    def __init__(
        self,
        job: BlockJob,
        tensors: Tensors,
        transforms: Mapping[str, Transform],
        online: Mapping[str, OnlineTransform] | None = None,
    ) -> None:
        """Args:
        transforms: those that fold, by site.
        online: those that act on activations at run time, after the folded ones.
        """
        self.job = job
        self.tensors = tensors
        self.transforms = dict(transforms)
        self.online = dict(online or {})
        self.on_attention = job.cached_heads(self.after_rope())
        family, fmt = job.decoder.family, job.scheme.weight
        self.linears = [linear.name for linear in family.linears]
        self.ranges: dict[str, LearnedRange] = {}
        if "learn" in job.recipe.weight_clip:
            for name in self.linears:
                rows, columns = tensors[f"{name}.weight"].shape
                self.ranges[name] = LearnedRange(rows, fmt.groups(columns)).to(job.decoder.device)
        learn_inputs = "learn" in job.recipe.activation_clip
        start = torch.tensor(CLIP_START if learn_inputs else float("inf"), device=job.decoder.device)
        self.clips = {site: nn.Parameter(start.clone(), learn_inputs) for site, _ in family.input_groups()}
        self.fraction = -1.0

    def groups(self) -> Sequence[Group]:
        """Transforms at one rate, clipping at another."""
        recipe = self.job.recipe
        clips = [p for module in self.ranges.values() for p in module.parameters()] + list(self.clips.values())
        transforms = [p for module in self.modules() for p in module.parameters()]
        return (
            Group(name="transforms", parameters=[p for p in transforms if p.requires_grad], lr=recipe.lr),
            Group(name="clipping", parameters=[p for p in clips if p.requires_grad], lr=recipe.clip_lr),
        )

    def modules(self) -> list[Transform]:
        """Every transform, folded or not."""
        return [*self.transforms.values(), *self.online.values()]

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        """Widen the gradual mask by epoch: the diagonal alone in the first, everything in the last."""
        epochs = self.job.recipe.epochs
        fraction = min(int(t * epochs + 1e-6), epochs - 1) / max(1, epochs - 1) if epochs > 1 else 1.0
        if fraction == self.fraction:
            return ()
        self.fraction = fraction
        released = [module for module in self.modules() if module.progress(fraction)]
        return [parameter for module in released for parameter in module.parameters()]

    def loss(self, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """`block`: error against the target; `auxiliary`: against the full-precision block on the same inputs."""
        x, *targets = (part.to(self.job.decoder.device) for part in batch)
        y = self.job.run(self.quantized(), x, self.on_input, self.on_attention).float()
        measure = _relative if self.job.recipe.loss == "relative" else nn.functional.mse_loss
        return {name: measure(y, target.float()) for name, target in zip(("block", "auxiliary"), targets, strict=False)}

    def after_rope(self) -> Tensors:
        """The rotation of queries and keys after RoPE, in fp32, as the run time applies it; nothing learns it."""
        parts = {name: module for name, module in self.online.items() if self.job.sites[name].kind == "rope"}
        return {
            part: tensor.float().contiguous() for module in parts.values() for part, tensor in module.online().items()
        }

    def folded(self) -> Tensors:
        """The block's tensors with every transform folded in."""
        offset = self.job.decoder.family.norm_offset
        return fold_all(self.tensors, self.job.sites, self.transforms, self.online, norm_offset=offset)

    def quantized(self) -> Tensors:
        """The block's tensors folded, with rounded weights."""
        tensors = self.folded()
        for name in self.linears:
            weight = tensors[f"{name}.weight"]
            low, high = self.ranges.get(name, weight_range)(weight, self.job.scheme.weight)
            tensors[f"{name}.weight"] = fake_quantize(weight, low, high, self.job.scheme.weight, self.job.store)
        return tensors

    def on_input(self, site: str, x: Tensor) -> Tensor:
        """Transform and round what a site's linears read."""
        if site in self.online:
            x = self.online[site].on_activations(x)
        if self.job.scheme.activation is None:
            return x
        slices = self.job.sites[site].slices
        return fake_quantize_activation(x, self.job.scheme.activation, self.clips[site].sigmoid(), slices)


def folded_exactly(objective: BlockObjective, exact: Tensors) -> Tensors:
    """The fp64 tensors of the block with the objective's transforms folded in, for good."""
    job = objective.job
    folded, online = (
        {name: module.double() for name, module in modules.items()}
        for modules in (objective.transforms, objective.online)
    )
    with torch.no_grad():
        return fold_all(exact, job.sites, folded, online, norm_offset=job.decoder.family.norm_offset)


def _relative(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over each token's power, so that the first token's massive activation weighs as one token."""
    power = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
    return ((y - target).square().sum(-1) / power).mean()
