"""One block's objective: the original block, its weights transformed and rounded, against its full-precision output."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.fit import Group
from affinequant.fold import Tensors, fold_all
from affinequant.quantizer import CLIP_START, LearnedRange, fake_quantize, fake_quantize_activation, weight_range
from affinequant.recipe import Recipe
from affinequant.scheme import Scheme
from affinequant.sites import Site
from affinequant.stream import Decoder, like_on_disk, run_block, slices
from affinequant.transforms import Transform, build


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

    def run(self, tensors: Mapping[str, Tensor], x: Tensor, on_input=None) -> Tensor:
        """The block on a batch, in the compute dtype whatever the tensors are in."""
        lent = {name: tensor.to(self.decoder.dtype) for name, tensor in tensors.items()}
        return run_block(self.decoder.block(self.index), self.decoder.family, lent, x, self.kwargs, on_input)

    def run_all(self, tensors: Mapping[str, Tensor], x: Tensor, on_input=None) -> Tensor:
        """The block on every sample, a batch at a time, without gradients; the result lies where `x` lies."""
        with torch.no_grad():
            result = like_on_disk(x, self.scratch)
            for part in slices(len(x), self.recipe.batch_size):
                result[part] = self.run(tensors, x[part].to(self.decoder.device), on_input).to(x)
        return result

    def seed(self, purpose: str) -> int:
        """A seed of its own for each purpose in each block."""
        return zlib.crc32(f"{self.recipe.seed}/{self.index}/{purpose}".encode())


class BlockObjective:
    """Error of the quantised block against its target; trains transforms and clipping, never the weights."""

    def __init__(self, job: BlockJob, tensors: Tensors, transforms: Mapping[str, Transform]) -> None:
        self.job = job
        self.tensors = tensors
        self.transforms = dict(transforms)
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
        transforms = [p for module in self.transforms.values() for p in module.parameters()]
        return (
            Group(name="transforms", parameters=[p for p in transforms if p.requires_grad], lr=recipe.lr),
            Group(name="clipping", parameters=[p for p in clips if p.requires_grad], lr=recipe.clip_lr),
        )

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        """Widen the gradual mask by epoch: the diagonal alone in the first, everything in the last."""
        epochs = self.job.recipe.epochs
        fraction = min(int(t * epochs + 1e-6), epochs - 1) / max(1, epochs - 1) if epochs > 1 else 1.0
        if fraction == self.fraction:
            return ()
        self.fraction = fraction
        released = [m for m in self.transforms.values() if m.progress(fraction)]
        return [parameter for module in released for parameter in module.parameters()]

    def loss(self, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """`block`: error against the target; `auxiliary`: against the full-precision block on the same inputs."""
        x, *targets = (part.to(self.job.decoder.device) for part in batch)
        y = self.job.run(self.quantized(), x, self.on_input).float()
        measure = _relative if self.job.recipe.loss == "relative" else nn.functional.mse_loss
        return {name: measure(y, target.float()) for name, target in zip(("block", "auxiliary"), targets, strict=False)}

    def folded(self) -> Tensors:
        """The block's tensors with every transform folded in."""
        offset = self.job.decoder.family.norm_offset
        return fold_all(self.tensors, self.job.sites, self.transforms, norm_offset=offset)

    def quantized(self) -> Tensors:
        """The block's tensors folded, with rounded weights."""
        tensors = self.folded()
        for name in self.linears:
            weight = tensors[f"{name}.weight"]
            low, high = self.ranges.get(name, weight_range)(weight, self.job.scheme.weight)
            tensors[f"{name}.weight"] = fake_quantize(weight, low, high, self.job.scheme.weight, self.job.store)
        return tensors

    def on_input(self, site: str, x: Tensor) -> Tensor:
        """Round what a site's linears read."""
        if self.job.scheme.activation is None:
            return x
        return fake_quantize_activation(x, self.job.scheme.activation, self.clips[site].sigmoid())


def folded_exactly(objective: BlockObjective, exact: Tensors) -> Tensors:
    """The fp64 tensors of the block with the objective's transforms folded in, for good."""
    job = objective.job
    transforms = {name: module.double() for name, module in objective.transforms.items()}
    with torch.no_grad():
        return fold_all(exact, job.sites, transforms, norm_offset=job.decoder.family.norm_offset)


def starts(job: BlockJob, tensors: Tensors, x: Float[Tensor, "samples tokens hidden"]) -> dict[str, Tensor]:
    """For each site that is an input, the diagonal [width] that balances activations against weights:
    p = w^(1-b) / a^b with a and w the largest magnitudes per feature (SmoothQuant, arXiv 2211.10438, eq. 4)."""
    largest: dict[str, Tensor] = {}

    def see(site: str, value: Tensor) -> Tensor:
        seen = value.detach().abs().flatten(0, -2).amax(0)
        largest[site] = torch.maximum(largest[site], seen) if site in largest else seen
        return value

    job.run_all(tensors, x, see)
    result = {}
    for name, site in job.sites.items():
        if name not in largest:
            continue
        copies = site.sinks[0].copies
        weight = torch.stack([tensors[f"{edge.module}.weight"].abs().amax(0) for edge in site.sinks]).amax(0)
        a, w = (
            v.float().reshape(site.heads, copies, -1).amax(1).reshape(-1).clamp_min(1e-5)
            for v in (largest[name], weight)
        )
        log_p = (1 - job.recipe.balance) * w.log() - job.recipe.balance * a.log()
        result[name] = (log_p - log_p.mean()).exp()
    return result


def build_transforms(job: BlockJob, start: Mapping[str, Tensor]) -> dict[str, Transform]:
    """The recipe's transforms of one block, in the order of the sites; the residual stream's is the model's."""
    return {
        name: build(
            job.recipe.transforms[name], site, seed=job.seed(name), alpha=job.recipe.alpha, start=start.get(name)
        ).to(job.decoder.device)
        for name, site in job.sites.items()
        if name in job.recipe.transforms and site.kind != "residual"
    }


def _relative(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over each token's power, so that the first token's massive activation weighs as one token."""
    power = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
    return ((y - target).square().sum(-1) / power).mean()
