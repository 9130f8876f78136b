"""One block's objective: the original block, its weights transformed and rounded, against its full-precision output."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from affinequant.learning.optimizers import Group
from affinequant.models.on_demand import OnDemand
from affinequant.numbers.weights import CLIP_START, LearnedRange, fake_quantize, weight_range
from affinequant.rounding.job import BlockJob
from affinequant.transforms import OnlineTransform, Transform
from affinequant.transforms.fold import Tensors, fold_all, in_parts


class BlockObjective:
    """Error of the quantised block against its target; trains transforms and clipping, never the weights."""

    def __init__(
        self,
        job: BlockJob,
        tensors: Mapping[str, Tensor],
        transforms: Mapping[str, Transform],
        online: Mapping[str, OnlineTransform] | None = None,
        untrained: Collection[str] = (),
    ) -> None:
        """Args:
        transforms: those that fold, by site.
        online: those that act on activations at run time, after the folded ones.
        untrained: sites whose transforms stay as they start.
        """
        self.job = job
        self.tensors = tensors
        self.transforms = dict(transforms)
        self.online = dict(online or {})
        for parameter in (p for site in untrained for module in self.modules(site) for p in module.parameters()):
            parameter.requires_grad_(False)
        self.on_attention = job.cached_heads(self.after_rope())
        family = job.family
        read = {member: site for site, members in family.input_groups() for member in members}
        self.linears = {linear.name: job.weight_grid(read[linear.name]) for linear in family.linears}
        self.ranges: dict[str, LearnedRange] = {}
        if "learn" in job.recipe.weight_clip:
            shapes = {linear.name: linear.shape(job.decoder.dims) for linear in family.linears}
            for name, grid in self.linears.items():
                rows, columns = shapes[name]
                self.ranges[name] = LearnedRange(rows, grid.fmt.groups(columns)).to(job.decoder.device)
        self.clips = {site: self._clip(site) for site, _ in family.input_groups()}
        self.fraction = -1.0

    def _clip(self, site: str) -> nn.Parameter:
        learned = "learn" in self.job.clipping(site)
        start = CLIP_START if learned else float("inf")
        return nn.Parameter(torch.tensor(start, device=self.job.decoder.device), learned)

    def groups(self) -> Sequence[Group]:
        """Transforms at one rate, clipping at another."""
        recipe = self.job.recipe
        clips = [p for module in self.ranges.values() for p in module.parameters()] + list(self.clips.values())
        transforms = [p for module in self.modules() for p in module.parameters()]
        return (
            Group(name="transforms", parameters=[p for p in transforms if p.requires_grad], lr=recipe.lr),
            Group(name="clipping", parameters=[p for p in clips if p.requires_grad], lr=recipe.clip_lr),
        )

    def modules(self, *sites: str) -> list[Transform]:
        """Every transform, folded or not; or those of some sites."""
        both = (*self.transforms.items(), *self.online.items())
        return [module for site, module in both if not sites or site in sites]

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

    def folded(self) -> Mapping[str, Tensor]:
        """The block's tensors with every transform folded in."""
        return in_parts(self.tensors, self._folded)

    def quantized(self) -> Tensors:
        """The block's tensors folded, with rounded weights. Experts on demand are made one after the other, and once more
        on the way back, where their gradients need what lies between."""
        if not isinstance(self.tensors, OnDemand):
            return self._quantized(self.tensors, False)
        result, many = self._quantized(self.tensors.there, True), self.tensors
        for number in range(self.job.decoder.dims.experts):
            start = f"{self.job.family.expert(number)}."
            names = [name for name in many.names if name.startswith(start)]
            made = checkpoint(self._expert, names, use_reentrant=False, preserve_rng_state=False)
            result |= zip(names, made, strict=True)  # pyright: ignore[reportArgumentType]
        return result

    def _expert(self, names: Sequence[str]) -> list[Tensor]:
        """The weights of an expert as they are computed with."""
        part = self._quantized({name: self.tensors[name] for name in names}, True)
        return [part[name].to(self.job.decoder.dtype) for name in names]

    def _folded(self, part: Mapping[str, Tensor], partial: bool) -> Tensors:
        offset, sites = self.job.family.norm_offset, self.job.sites
        return fold_all(part, sites, self.transforms, self.online, norm_offset=offset, partial=partial)

    def _quantized(self, part: Mapping[str, Tensor], partial: bool) -> Tensors:
        tensors = self._folded(part, partial)
        for name, grid in self.linears.items():
            if partial and f"{name}.weight" not in tensors:
                continue
            weight = tensors[f"{name}.weight"]
            low, high = self.ranges.get(name, weight_range)(weight, grid)
            tensors[f"{name}.weight"] = fake_quantize(weight, low, high, grid, self.job.store)
        return tensors

    def on_input(self, site: str, x: Tensor) -> Tensor:
        """Transform and round what a site's linears read."""
        online = self.online[site].on_activations if site in self.online else None
        return self.job.site_input(site, online, self.clips[site].sigmoid())(x)


def folded_exactly(objective: BlockObjective, exact: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The fp64 tensors of the block with the objective's transforms folded in, for good."""
    job = objective.job
    folded, online = (
        {name: module.double() for name, module in modules.items()}
        for modules in (objective.transforms, objective.online)
    )

    @torch.no_grad()
    def fold(part: Mapping[str, Tensor], partial: bool) -> Tensors:
        return fold_all(part, job.sites, folded, online, norm_offset=job.family.norm_offset, partial=partial)

    return in_parts(exact, fold)


def _relative(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over each token's power, so that the first token's massive activation weighs as one token."""
    power = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
    return ((y - target).square().sum(-1) / power).mean()
